"""Gates on units: factors on what heads and neurons say, by hooks; a unit whose gate is 0 is silenced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfcompress.surgery.units.spans import Span, Units, channel_axis


class Gates(Protocol):
    """Factors for what holds the units: `x` (..., count, size) is an activation, its batch first, or experts' weights."""

    def __call__(self, x: Tensor) -> Tensor: ...


def gate(model: nn.Module, units: Units, gates: Gates) -> Removable:
    """Multiply what each unit hands to `outputs` by `gates(x)`, which broadcasts against (..., count, size), until removed.

    A hook and not a module, so that a checkpoint's keys stay the model's own. It is called once for every time that a module
    in `outputs` runs.
    """
    return Removable(_gate_one(model, units, span, gates) for span in units.outputs)


def folded_when_saved(model: nn.Module, units: Units, gates: Gates) -> Removable:
    """Until removed, a `state_dict` tells the weights of `outputs` multiplied by their gates: a checkpoint has no hooks, and
    loads as what the model computes when it is written."""

    def fold(span: Span, module: nn.Module, tensors: dict[str, Tensor], prefix: str, _: Any) -> None:
        key = f"{prefix}{span.leaf}"
        tensors[key] = _scaled(tensors[key].detach(), span.axis, (units.count, span.width), gates)

    handles = []
    for span in units.outputs:
        hook = partial(fold, span)
        hook.is_gate = True  # type: ignore[attr-defined]
        handles.append(model.get_submodule(span.module).register_state_dict_post_hook(hook))
    return Removable(handles)


class Removable:
    """Several hooks that come off together, and all of them if not all can be put on."""

    def __init__(self, handles: Iterable[Any]) -> None:
        self._handles: list[Any] = []
        self._held: list[tuple[dict[int, Any], int]] = []
        try:
            for handle in handles:
                self._handles.append(handle)
                if isinstance(handle, RemovableHandle):
                    places = (handle.hooks_dict_ref, *handle.extra_dict_ref)
                    self._held += [(hooks, handle.id) for place in places if (hooks := place()) is not None]
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        # A handle knows its hooks weakly: where the garbage collector ends a training that was interrupted, no more at all.
        for hooks, number in self._held:
            hooks.pop(number, None)


def _gate_one(model: nn.Module, units: Units, span: Span, gates: Gates) -> Any:
    module = model.get_submodule(span.module)
    if units.lanes > 1:
        return _gate_weight(module, span.leaf, units, span, gates)
    channel = channel_axis(module)

    def scale(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_scaled(inputs[0], channel, (units.count, span.width), gates), *inputs[1:])

    scale.is_gate = True  # type: ignore[attr-defined]
    return module.register_forward_pre_hook(scale)


def _gate_weight(module: nn.Module, leaf: str, units: Units, span: Span, gates: Gates) -> Removable:
    """Experts read their units inside one forward: there, the weight itself is seen multiplied, (lanes, ..., count, size)."""

    def scale(module: nn.Module, _: Any) -> None:
        # An instance attribute hides the parameter of the same name, which stays where it is.
        vars(module)[leaf] = _scaled(module._parameters[leaf], span.axis, (units.count, span.width), gates)

    def restore(module: nn.Module, *_: Any) -> None:
        vars(module).pop(leaf, None)

    scale.is_gate = True  # type: ignore[attr-defined]
    return Removable([module.register_forward_pre_hook(scale), module.register_forward_hook(restore, always_call=True)])


def _scaled(x: Any, axis: int, sizes: tuple[int, int], gates: Gates) -> Tensor:
    blocks = x.movedim(axis, -1).unflatten(-1, sizes)
    return (blocks * gates(blocks)).flatten(-2).to(x.dtype).movedim(-1, axis)


@contextmanager
def silenced(model: nn.Module, pairs: list[tuple[Units, Tensor]]) -> Iterator[None]:
    """Only the units to keep are heard."""
    handles = [gate(model, one, _gates(one, keep)) for one, keep in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gates(units: Units, keep: Tensor) -> Any:
    values = torch.zeros(units.shape)
    values = values.scatter(-1, keep, 1.0)
    return lambda x: shaped(values, units, x)


def shaped(values: Tensor, units: Units, x: Tensor) -> Tensor:
    """Values of the shape of the units, made to broadcast against what holds them: (..., count, size)."""
    values = values.to(device=x.device, dtype=x.dtype)
    return values[..., None] if units.lanes == 1 else values.reshape(units.lanes, *[1] * (x.dim() - 3), units.count, 1)
