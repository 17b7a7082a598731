"""Several methods around one training: what may ride together, what they keep, how they leave the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick, leave_loadable
from hfcompress.surgery.modules import copied


def with_original(model: nn.Module, methods: Iterable[Method], task: Any) -> Any:
    """The task, with a copy of the model as it stands if a method asks for the original and the task has none."""
    if task.original is None and any(method.wants_original for method in methods):
        if hasattr(task, "keep_original"):
            task.keep_original(model)
        else:
            task.original = copied(model)
    return task


def check_together(methods: Iterable[Method]) -> None:
    """Adapters stand where the layers were that others would cut, factor or code; and a model has one loss."""
    for method in (methods := list(methods)):
        if not method.rides:
            raise CompressionError(
                f"{method.key()}: it can't ride along with training, whose texts are tokens already when it begins; list it as "
                f"a step of its own, or call run(model, tokenizer) before you tokenise."
            )
    keys = [method.key() for method in methods]
    masked = next((method for method in methods if "values" in method.edits), None)
    if masked is not None and any(method.repairs for method in methods):
        raise CompressionError(
            f"{masked.key()}: it would count what repair has set to zero, and is cut later, as its own; list {masked.key()} in "
            f"a step after, or leave repair out."
        )
    for method in methods:
        if keys.count(method.key()) > 1 and method.replaces_loss:
            raise CompressionError(
                f"{method.key()}: it is listed twice, and a model has one loss; give one all teachers and terms."
            )
        if keys.count(method.key()) > 1 and method.needs_units:
            raise CompressionError(
                f"{method.key()}: it is listed twice, and both would choose among the same "
                f"{method.key().removeprefix('prune_')}; give one the whole ratio, or do one in a step before."
            )
    for number, method in enumerate(methods):
        # what is listed first finishes last
        pruned = next((one.key() for one in methods[:number] if one.edits & {"units", "layers", "tokens", "values"}), None)
        if "codes" in method.edits and pruned is not None:
            raise CompressionError(
                f"{method.key()}: it would code the layers before {pruned} cuts them; list {method.key()} first, or after."
            )
    adapter = next((method for method in methods if "adapter" in method.edits), None)
    other = next((method.key() for method in methods if method.needs_dense), None)
    if adapter is not None and other is not None:
        raise CompressionError(
            f"{adapter.key()}: can't ride along with {other}; do {other} in a step before, and {adapter.key()} then."
        )


@contextmanager
def riding(model: nn.Module, methods: list[Method] | tuple[Method, ...], task: Any = None) -> Iterator[Tick]:
    """Apply several methods around one training loop of your own.

    ```python
    with riding(model, [Distill(teacher), PruneHeads(ratio=0.3)], batches) as tick:
        for step, batch in enumerate(loader, start=1):
            model(**batch).loss.backward()
            optimizer.step(); optimizer.zero_grad()
            tick(step / len(loader))
    ```
    `task`: a Task, or any iterable of batches (dicts of tensors) for methods that score on data.
    What was entered first is finished last; then `model.save_pretrained` writes what loads. On an error inside, nothing is cut
    or merged: hooks come off, the error goes on.
    """
    check_together(methods)
    task = with_original(model, methods, task if hasattr(task, "batches") else Batches(task))
    with ExitStack() as stack:
        ticks = [tick for method in methods if (tick := stack.enter_context(method.applied(model, task))) is not None]

        def tick_all(progress: float) -> dict[str, Tensor]:
            return {name: value for tick in ticks for name, value in (tick(progress) or {}).items()}

        yield tick_all
    leave_loadable(model, methods)
