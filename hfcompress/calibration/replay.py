"""A layer run again: the model's own forward, in which the layers before it return what was kept of them.

No layer is called by hand, so whatever a model makes of its inputs first, and passes to its layers beside the hidden states,
masks, positions, an encoder's answer, is what it always is. Whether this holds for a model is tried on one example first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import singles
from hfcompress.checkpoint.errors import first_line
from hfcompress.surgery.depth.stacks import layer_stacks


class WontReplay(Exception):
    """Why the layers of a model can't be run one by one."""


class _Left(BaseException):
    """Raised when the layer that was asked for has run, to leave the forward; a library's `except Exception` lets it pass."""

    def __init__(self, output: Any) -> None:
        self.output = output


@dataclass
class Route:
    """How a forward goes through the layers of a model."""

    layers: list[str]
    """Names, in the order in which they run."""
    stacks: list[str]
    """Of each layer."""
    inputs: list[list[Tensor]] = field(default_factory=list)
    """Of each layer, on one example: all tensors it was given."""
    outputs: list[Any] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    """Modules that are asked for, in the order in which they first ran."""
    reads: dict[str, int] = field(default_factory=dict)
    """Which tensor each of them read first: the same number, the same tensor."""
    before: list[str] = field(default_factory=list)
    """Those that run before the first layer, and are in none."""
    after: list[str] = field(default_factory=list)
    """Those that run after the last one, and are in none, as a pooler does."""

    def place(self, module: str) -> int:
        return self.places.get(module, len(self.places))

    def layer_of(self, module: str) -> int:
        """The place of the layer that a module is in; -1 for one in no layer that runs."""
        return next((place for place, name in enumerate(self.layers) if f"{module}.".startswith(f"{name}.")), -1)

    def once(self, module: str) -> int:
        """1 where a module runs once in its layer, whatever the tokens are; 0 where that is not sure, as for single experts."""
        inner = module.removeprefix(self.layers[self.layer_of(module)])
        return int(not any(part.isdigit() for part in inner.split(".")))

    def still_read(self, place: int) -> bool:
        """Whether what a layer said is read by more than the next one of its stack: it is the last of them."""
        return place + 1 == len(self.layers) or self.stacks[place] != self.stacks[place + 1]


def routed(model: Any, modules: Iterable[str], batch: dict[str, Tensor], around: bool = False) -> Route:
    """The route through a model, seen and tried on the first example of a batch; `WontReplay` where there is none. `around`:
    modules may run before or after all layers as well."""
    try:
        example = next(singles(model, batch))
        route = _seen(model, list(modules), example)
        if (outside := [*route.before, *route.after]) and (not around or len(outside) == len(route.places)):
            raise WontReplay(f"{outside[0]} is in no layer")
        states: dict[int, Any] = {}
        replay = Replay(model, route, offload=False)
        for place, expected in enumerate(route.inputs):
            if not _equal(replay.inputs(example, states, place), expected):
                raise WontReplay(f"{route.layers[place]} reads more than what the layer before it says")
            states = replay.going_on(states, place, route.outputs[place])
    except WontReplay:
        raise
    except Exception as error:  # a model may raise whatever it likes where its layers are not called as usual
        raise WontReplay(first_line(error)) from error
    route.inputs.clear()
    return route


def _seen(model: Any, modules: list[str], example: dict[str, Tensor]) -> Route:
    stacks = layer_stacks(model)
    if any(stack.repeats for stack in stacks):
        raise WontReplay("its layers share their weights")
    members = {f"{stack.name}.{place}": stack.name for stack in stacks for place in range(stack.count)}
    route, handles = Route([], []), []

    def enter(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        route.layers.append(name)
        route.stacks.append(members[name])
        route.inputs.append(_tensors((args, kwargs)))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        route.outputs.append(output)

    kept: list[Any] = []  # so that no other tensor gets the place of one that was read
    entered: dict[str, int] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        entered.setdefault(name, len(route.layers))
        if name not in route.places and args:
            kept.append(args[0])
            route.reads[name] = next(place for place, one in enumerate(kept) if one is args[0])
        route.places.setdefault(name, len(route.places))

    for name in members:
        handles.append(model.get_submodule(name).register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        handles.append(model.get_submodule(name).register_forward_hook(leave))
    for name in dict.fromkeys(modules):
        handles.append(model.get_submodule(name).register_forward_pre_hook(partial(note, name)))
    try:
        model(**example, **lean(model))
    finally:
        for handle in handles:
            handle.remove()
    if twice := next((name for name in route.layers if route.layers.count(name) > 1), None):
        raise WontReplay(f"{twice} runs more than once")
    if len(route.outputs) < len(route.layers):
        raise WontReplay("a layer stands inside another")
    for name in route.places:
        if route.layer_of(name) < 0:
            if 0 < entered[name] < len(route.layers):
                raise WontReplay(f"{name} is in no layer")
            (route.after if entered[name] else route.before).append(name)
    return route


class Replay:
    """A model whose layers return what was kept, up to the one that is asked for."""

    def __init__(self, model: Any, route: Route, offload: bool) -> None:
        self.model, self.route, self.offload = model, route, offload
        self._layers = [model.get_submodule(name) for name in route.layers]
        self._at, self._states, self._only_inputs = -1, dict[int, Any](), False
        self._lean = lean(model)

    def run(self, batch: dict[str, Tensor], states: dict[int, Any], place: int, only_inputs: bool = False) -> Any:
        """What the layer at a place returns for a batch, of which `states` were kept; or the tensors it is given."""
        self._at, self._states, self._only_inputs = place, states, only_inputs
        try:
            with self._returning():
                self.model(**batch, **self._lean)
        except _Left as left:
            return left.output
        raise RuntimeError(f"{self.route.layers[place]} did not run")

    @contextmanager
    def _returning(self) -> Iterator[None]:
        """An attribute hides the forward of the class; one that a library put there is put back."""
        before = [vars(layer).get("forward") for layer in self._layers]
        for place, layer in enumerate(self._layers):
            vars(layer)["forward"] = partial(self._forward, place, layer.forward)
        try:
            yield
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                if own is None:
                    del vars(layer)["forward"]
                else:
                    vars(layer)["forward"] = own

    def inputs(self, batch: dict[str, Tensor], states: dict[int, Any], place: int) -> list[Tensor]:
        return self.run(batch, states, place, only_inputs=True)

    def advance(self, batch: dict[str, Tensor], states: dict[int, Any], place: int) -> None:
        """Run the layer, and keep in `states` what the next one needs."""
        following = self.going_on(states, place, self.run(batch, states, place))
        states.clear()
        states.update(following)

    def going_on(self, states: dict[int, Any], place: int, output: Any) -> dict[int, Any]:
        """What the layer after this one needs: what this one says, and the last of every stack before it."""
        kept = {earlier: value for earlier, value in states.items() if self.route.still_read(earlier)}
        return {**kept, place: _moved(output, torch.device("cpu") if self.offload else None)}

    def _forward(self, place: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if place < self._at:
            hidden = _first((args, kwargs))
            if place in self._states:
                return _moved(self._states[place], hidden.device)
            return _instead(self.route.outputs[place], hidden)
        if self._only_inputs:
            raise _Left(_tensors((args, kwargs)))
        raise _Left(forward(*args, **kwargs))


def lean(model: Any) -> dict[str, Any]:
    """Arguments of a forward from which nobody wants to generate."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _tensors(values: Any) -> list[Tensor]:
    """Every tensor within, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    several = isinstance(values, list | tuple | type({}.values()))
    return [one for value in values for one in _tensors(value)] if several else []


def _first(values: Any) -> Tensor:
    return _tensors(values)[0]


def _moved(value: Any, device: torch.device | None) -> Any:
    """The same with its tensors on a device; None: where they are."""
    if isinstance(value, Tensor):
        return value.detach().to(device) if device is not None else value.detach()
    if isinstance(value, dict):
        return type(value)(**{key: _moved(one, device) for key, one in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_moved(one, device) for one in value)
    return value


def _instead(output: Any, hidden: Tensor) -> Any:
    """In place of what a layer says, where nobody reads it: of the same form."""
    if isinstance(output, Tensor):
        return hidden
    if type(output) in (tuple, list):
        return type(output)((hidden, *(None if isinstance(one, Tensor) else one for one in output[1:])))
    raise WontReplay(f"a layer returns a {type(output).__name__}")


def _equal(mine: list[Tensor], expected: list[Tensor]) -> bool:
    return len(mine) == len(expected) and all(
        one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        for one, other in zip(mine, expected, strict=True)
    )
