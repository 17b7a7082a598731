"""The protocol: a step edits the model in place; a method is a step with a pause in the middle, where training can happen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hfcompress.errors import CompressionError
from hfcompress.loading import forget_reading
from hfcompress.structure import describe
from hfcompress.surgery import copied

NO_DATA = "scores: gradient needs calibration data; give a task or batches with labels, or choose scores: magnitude."
Tick = Callable[[float], Mapping[str, Tensor] | None]
"""Called after every optimizer step with the progress of training, 0..1. Returns what is worth logging, a name to a scalar."""


class Fields(BaseModel):
    """A frozen, typed object whose fields are its YAML; the first fields may also be given by position."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=()
    )

    def __init__(self, *positional: Any, **fields: Any) -> None:
        super().__init__(**dict(zip(type(self).model_fields, positional, strict=False)), **fields)


class Step(Fields):
    """Anything a recipe can list: `run` edits the model in place."""

    @classmethod
    def key(cls) -> str:
        """The YAML key: the class's name in snake case, `PruneHeads` -> `prune_heads`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def run(self, model: nn.Module, task: Any) -> None:
        raise NotImplementedError

    def __str__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self.model_dump(mode="json", exclude_defaults=True).items())
        return f"{self.key()} ({fields})" if fields else self.key()

    @property
    def label(self) -> str:
        """A few words for a table: the key and its first field, "prune_heads 0.5"."""
        first = next(iter(self.model_dump(mode="json").values()), None)
        return f"{self.key()} {first}" if isinstance(first, int | float | str) else self.key()


class Method(Step):
    """A step told as one story with a pause in the middle.

    Class variables say what the drivers must know:
    `adds_parameters` (they must exist before the optimizer is built), `reads_data` (needs batches from the task),
    `fades` (the model is not itself before training ends, so no earlier checkpoint may replace the last one),
    `replaces_loss`, `needs_training` (useless as a step of its own) and `rides` (whether training may happen in the pause).
    """

    adds_parameters: ClassVar[bool] = False
    fades: ClassVar[bool] = False
    replaces_loss: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    rides: ClassVar[bool] = True

    @property
    def wants_original(self) -> bool:
        """Whether it asks for `task.original`, a copy of the model as no method has touched it."""
        return False

    @property
    def wants_labels(self) -> bool:
        """Whether it needs a loss before training begins, to choose by."""
        return False

    @property
    def wants_attentions(self) -> bool:
        """Whether the model must return its attention maps, which only the eager implementation does."""
        return False

    def applied(self, model: nn.Module, task: Any) -> AbstractContextManager[Tick | None]:
        """Before the yield: choose, insert, freeze. The pause: training, calling the yielded tick. After: cut, merge, pack."""
        raise NotImplementedError

    def run(self, model: nn.Module, task: Any) -> None:
        """`task`: a Task, any iterable of batches (dicts of tensors), or None for methods that need no data."""
        with self.applied(model, task if task is None or hasattr(task, "batches") else Batches(task)) as tick:
            if tick is not None:
                tick(1.0)


class Batches:
    """What methods need of a Task, from a data loader: labelled batches, and whose tokens they are."""

    def __init__(
        self, loader: Any = None, original: nn.Module | None = None, processor: Any = None, is_resumed: bool = False
    ) -> None:
        if isinstance(loader, Mapping):
            raise CompressionError("a single batch was given where several are wanted; give a list of batches, as in [batch].")
        self._loader, self.original, self.processor, self.is_resumed = loader, original, processor, is_resumed
        self._read: list[Any] = []

    @property
    def has_data(self) -> bool:
        return self._loader is not None

    def batches(self, model: nn.Module, samples: int | None, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """About `samples` examples by chance, or every one in its order for None, on the model's device."""
        if self._loader is None:
            raise CompressionError(NO_DATA)
        device, seen = next(model.parameters()).device, 0
        for batch in self._plain(batch_size, None if samples is None else seed):
            yield {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            seen += len(next(iter(batch.values())))
            if samples is not None and seen >= samples:
                return

    def _plain(self, batch_size: int, seed: int | None) -> Iterable[Any]:
        # A fresh loader over the same data: leaving the Trainer's own in the middle would upset accelerate's bookkeeping.
        if isinstance(self._loader, Iterator):
            return self._again()
        if not hasattr(getattr(self._loader, "dataset", None), "__getitem__"):  # streamed data
            return self._loader
        return DataLoader(
            self._loader.dataset,
            batch_size=batch_size,
            shuffle=seed is not None,
            collate_fn=self._loader.collate_fn,
            generator=torch.Generator().manual_seed(seed or 0),
        )

    def _again(self) -> Iterator[Any]:
        """What can be read once, from its beginning: what was read is kept."""
        yield from list(self._read)
        for batch in self._loader:
            self._read.append(batch)
            yield batch


def calibration(model: nn.Module, task: Any, samples: int, who: str, instead: str) -> Callable[[], Iterator[dict[str, Tensor]]]:
    """A function that gives the same batches at every call. `who` needs them, and what to choose instead if there are none."""

    def batches() -> Iterator[dict[str, Tensor]]:
        if task is None or (isinstance(task, Batches) and not task.has_data):
            raise CompressionError(
                f"{who} needs calibration data; give a task or batches, as in run(model, batches) before a Trainer is built, "
                f"or choose scores: {instead}."
            )
        yield from task.batches(model, samples)

    return batches


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
    if "prune_weights" in keys and any(getattr(method, "repair", False) for method in methods):
        raise CompressionError(
            "prune_weights: it would count what repair has set to zero, and is cut later, as its own; list prune_weights in a "
            "step after, or leave repair out."
        )
    if keys.count("distill") > 1:
        raise CompressionError("distill: it is listed twice, and a model has one loss; give one all teachers and terms.")
    for cuts in ("prune_heads", "prune_neurons"):
        if keys.count(cuts) > 1:
            raise CompressionError(
                f"{cuts}: it is listed twice, and both would choose among the same {cuts.removeprefix('prune_')}; give one the "
                f"whole ratio, or do one in a step before."
            )
    if pruned := next((key for key in keys if key.startswith("prune_") and "quantize" in keys[keys.index(key) :]), None):
        raise CompressionError(f"quantize: it would code the layers before {pruned} cuts them; list quantize first, or after.")
    others = [key for key in keys if key in ("prune_heads", "prune_neurons", "prune_weights", "low_rank", "quantize")]
    if "adapters" in keys and others:
        raise CompressionError(
            f"adapters: can't ride along with {others[0]}; do {others[0]} in a step before, and adapters then."
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


def leave_loadable(model: nn.Module, methods: Iterable[Method]) -> None:
    """After training: have the config tell what methods made of the model, so that `save_pretrained` writes what loads."""
    if not getattr(model, "_hf_peft_config_loaded", False) and not all(method.replaces_loss for method in methods):
        describe(model)
        forget_reading(model)
