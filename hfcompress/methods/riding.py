"""Several methods around one training: what may ride together, who trains what they add, how they leave the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick, leave_loadable
from hfcompress.surgery.modules import body_of, copied, restored_on_error

Parameters = dict[str, nn.Parameter]


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
    choosers = [method.key() for method in methods if method.chooses_trained]
    if len(choosers) > 1:
        raise CompressionError(
            f"{choosers[1]}: it says what is trained, and so does {choosers[0]}; leave one of the two out, or give each "
            f"a train of its own."
        )
    adapter = next((method for method in methods if "adapter" in method.edits), None)
    other = next((method.key() for method in methods if method.needs_dense), None)
    if adapter is not None and other is not None:
        raise CompressionError(
            f"{adapter.key()}: can't ride along with {other}; do {other} in a step before, and {adapter.key()} then."
        )
    changed = next((method.key() for method in methods if method.edits & {"layers", "units"}), None)
    if adapter is not None and adapter.keeps_adapter and changed is not None:
        raise CompressionError(
            f"{adapter.key()}: merge: false leaves an adapter for the model as it came, and {changed} makes another of it; do "
            f"{changed} in a step before, and save its result, or set merge: true."
        )
    _check_holders(methods)
    units, factors = (next((one.key() for one in methods if edit in one.edits), None) for edit in ("units", "factors"))
    whole = any("factors" in method.edits and getattr(method, "target_modules", None) is None for method in methods)
    if factors is not None and whole and units is not None and any(method.fades for method in methods):
        raise CompressionError(
            f"{factors}: it would factor the layers that {units} cuts when training ends; do {units} in a step before, or "
            f"{factors} in a step after, or give {factors} target_modules that lose no units."
        )


def _check_holders(methods: list[Method]) -> None:
    """What makes other layers of some while training lasts can't have them cut meanwhile."""
    holder = next((method.key() for method in methods if method.holds_layers), None)
    shaper = next(
        (one.key() for one in methods if one.edits - {"loss"} and one.key() != holder and not one.chooses_trained), None
    )
    if holder is not None and shaper is not None:
        raise CompressionError(
            f"{holder}: it holds the layers that {shaper} would change in the same training; do {shaper} in a step before."
        )


@contextmanager
def riding(
    model: nn.Module, methods: list[Method] | tuple[Method, ...], task: Any = None, optimizer: Any = None
) -> Iterator[Tick]:
    """Apply several methods around one training loop of your own.

    ```python
    with riding(model, [Distill(teacher), PruneHeads(ratio=0.3)], batches) as tick:
        for step, batch in enumerate(loader, start=1):
            model(**batch).loss.backward()
            optimizer.step(); optimizer.zero_grad()
            tick(step / len(loader))
    ```
    `task`: a Task, or any iterable of batches (dicts of tensors) for methods that score on data. `optimizer`: one that was
    built before, and is to train what methods put in (factors, adapters) in the place of what they took out; without it, a step
    of such an optimizer raises. What was entered first is finished last; then `model.save_pretrained` writes what loads. On an
    error inside, the model is as it was: nothing is cut, factored, frozen or merged, hooks come off, the error goes on.
    """
    check_together(methods)
    model = body_of(model)
    task = with_original(model, methods, task if hasattr(task, "batches") else Batches(task))
    with restored_on_error(model):
        before = trained(model)
        with ExitStack() as stack:
            ticks = [tick for method in methods if (tick := stack.enter_context(method.applied(model, task))) is not None]
            if optimizer is not None:
                take_places(optimizer, before, model)
            ticks.append(stack.enter_context(_steps_watched(model, before, added_by(methods))))

            def tick_all(progress: float) -> dict[str, Tensor]:
                return {name: value for tick in ticks for name, value in (tick(progress) or {}).items()}

            yield tick_all
        leave_loadable(model, methods)


def added_by(methods: Iterable[Method]) -> str:
    """The methods that add parameters, as errors name them; empty if none does."""
    return " and ".join(method.key() for method in methods if method.adds_parameters)


def trained(model: nn.Module) -> Parameters:
    """What of a model an optimizer would be given."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_places(optimizer: Any, before: Parameters, model: nn.Module) -> None:
    """Have an optimizer that was built before methods put new parameters in train them: each joins the group of the parameter
    whose place it takes, by its name. What is no longer in the model leaves the optimizer. In place, as schedulers hold on to
    the optimizer and count its groups."""
    groups = {id(one): number for number, group in enumerate(optimizer.param_groups) for one in group["params"]}
    places = {name: groups[id(one)] for name, one in before.items() if id(one) in groups}
    new = _added(before, model)
    if new and not places:
        raise CompressionError(
            "optimizer: it holds no parameter of this model, and there are new ones to train; build it of "
            "model.parameters(), or after the methods were applied."
        )
    gone = {id(one) for one in before.values()} - {id(one) for one in model.parameters()}
    for group in optimizer.param_groups:
        for one in group["params"]:
            if id(one) in gone:
                optimizer.state.pop(one, None)
        group["params"][:] = [one for one in group["params"] if id(one) not in gone]
    for name, one in new.items():
        nearest = max(places, key=lambda place: _nearness(name, place))
        optimizer.param_groups[places[nearest]]["params"].append(one)


def _added(before: Parameters, model: nn.Module) -> Parameters:
    old = {id(one) for one in before.values()}
    return {name: one for name, one in trained(model).items() if id(one) not in old}


def _nearness(name: str, other: str) -> tuple[int, bool]:
    """Of two parameters by their names: how much of the way to them is the same, and whether both are weights, or biases."""
    mine, theirs = name.split("."), other.split(".")
    same = takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False))
    return len(list(same)), mine[-1] == theirs[-1]


@contextmanager
def _steps_watched(model: nn.Module, before: Parameters, who: str) -> Iterator[Tick]:
    """Refuse an optimizer that was built before new parameters were put in: it would never move them."""
    new = {id(one) for one in _added(before, model).values()}
    stale = {id(one) for one in before.values()} - {id(one) for one in trained(model).values()}
    stepped: set[int] = set()

    def refuse() -> None:
        raise CompressionError(
            f"{who}: the optimizer was built before `riding` put new parameters into the model, and would not train them; "
            f"build it inside the with block, or give it: riding(model, methods, batches, optimizer=optimizer)."
        )

    def look(optimizer: Any, *_: Any) -> None:
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        stepped.update(held)
        if held & stale and not new <= held:
            refuse()

    def tick(_: float) -> None:
        if stepped and not new <= stepped:
            refuse()

    if not new:
        yield tick
        return
    handle = register_optimizer_step_pre_hook(look)
    try:
        yield tick
    finally:
        handle.remove()
