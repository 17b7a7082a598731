"""What single experts read, though they compute inside one forward, on one stacked weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")


@torch.no_grad()
def lanes_read(module: Any, leaf: str, axis: int, lanes: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """(rows, columns) that each lane of a stacked weight, `leaf`, multiplies in a forward of these arguments. `axis`: its
    columns.

    Empty for a lane that no token is sent to, and for all of them where the forward does not multiply lane by lane. Hooks don't
    run. transformers' own implementation runs: the faster ones sort the tokens of all experts into one product.
    """
    watch = _Watch(getattr(module, leaf), lanes)
    with _eager(getattr(module, "config", None)), watch:
        module.forward(*args, **kwargs)
    columns = watch.weight.shape[axis]
    return [torch.cat(rows) if rows else watch.weight.new_zeros(0, columns) for rows in watch.rows]


def alive(module: nn.Module, leaf: str, axis: int, lanes: int) -> Tensor:
    """(lanes, columns), 0 where gates silence a column and 1 elsewhere."""
    for hook in list(module._forward_pre_hooks.values()):
        if getattr(hook, "is_gate", False):
            hook(module, ())
    weight = vars(module).pop(leaf, None)
    if weight is None:
        return torch.ones(lanes, getattr(module, leaf).shape[axis])
    return weight.movedim(axis, 1).flatten(2).any(-1).float()


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    name = "_experts_implementation"
    if not hasattr(config, name):
        yield
        return
    before = getattr(config, name)
    setattr(config, name, "eager")
    try:
        yield
    finally:
        setattr(config, name, before)


class _Watch(TorchFunctionMode):
    """Notes what a stacked weight, or any view of one of its lanes, is multiplied by."""

    def __init__(self, weight: Tensor, lanes: int) -> None:
        super().__init__()
        self.weight = weight
        self.rows: list[list[Tensor]] = [[] for _ in range(lanes)]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS and len(args) > 1:
            x, weight = args[:2]
            place = weight.data_ptr() - self.weight.data_ptr()
            if 0 <= place < self.weight.numel() * self.weight.element_size():
                self._note(x, weight, place // (self.weight.stride(0) * self.weight.element_size()))
        return func(*args, **(kwargs or {}))

    def _note(self, x: Tensor, weight: Tensor, lane: int) -> None:
        if weight.dim() == 2:
            self.rows[lane].append(x.detach().flatten(0, -2))
        elif weight.dim() == x.dim() == 3 and len(weight) == len(x) == len(self.rows):
            for own, some in zip(self.rows, x.detach(), strict=True):
                own.append(some)
