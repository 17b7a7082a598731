"""Fake quantisation: a dense layer that computes with what its weight would be worth as codes, and is trained as it does so.

Gradients pass the rounding straight through (Bengio et al. 2013, arXiv 1308.3432); steps are learned (Esser et al. 2020, LSQ,
arXiv 1902.08153), by their logarithm, so that an optimizer like Adam moves small and large ones alike (Jain et al. 2020, TQT,
arXiv 1903.08066). The module stays what it is, under its own name, with one parameter more.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.layers.base import is_conv1d
from hfcompress.layers.packing import kept_scale, scale_dtype

SHARES = torch.linspace(0.2, 1.0, 33)
"""Of the largest weight of a group: what the greatest code may stand for at first."""


class FakeQuantized:
    """What a layer becomes while it is trained: `weight` is read rounded to codes about zero. `first_step` is what a code was
    worth at first, and `step_log`, which is trained, by how much it has grown since, as a logarithm: weight decay brings it
    back to that. Both are (rows, groups), float32."""

    bits: int
    group_size: int | None
    is_rounded: bool
    first_step: Tensor
    step_log: nn.Parameter
    step_owner: tuple[Any, ...]
    """The layer whose steps it shares, as both hold one table; in a tuple, so that it is no part of this one."""
    _parameters: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._parameters["weight"]
        return self.worth().to(weight.dtype) if self.is_rounded else weight

    @property
    def _matrix(self) -> Tensor:
        """(rows, groups, group_size), float32: the dense weight."""
        weight: Tensor = self._parameters["weight"]
        matrix = weight.T if _is_conv1d(self) else weight
        return matrix.float().unflatten(1, (-1, self.group_size or matrix.shape[1]))

    def step(self) -> Tensor:
        """(rows, groups), as it will be kept."""
        owner = self.step_owner[0] if self.step_owner else self
        step = owner.first_step * owner.step_log.exp()
        kept = kept_scale(step, scale_dtype(self.group_size)).float()
        return step + (kept - step).detach()

    def worth(self) -> Tensor:
        """The rounded weight, in the layout of the dense one, float32, through which gradients reach it and the step."""
        matrix = self._matrix
        step = _slowed(self.step()[..., None], matrix.shape[-1], self.bits)
        said: Tensor = _Rounding.apply(matrix, step, self.bits)
        return said.flatten(1).T if _is_conv1d(self) else said.flatten(1)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """((rows, groups, group_size) int16, (rows, groups)): the codes it computes with, and what one is worth."""
        step = self.step()
        scaled = (self._matrix / step[..., None]).clamp(-_most(self.bits), _most(self.bits))
        return _rounded(scaled, self.bits).to(torch.int16), step


class _Rounding(torch.autograd.Function):
    """Codes times steps, of weights (rows, groups, group_size) and steps (rows, groups, 1). Gradients reach a weight as they
    are, where it lies between the codes, and a step by what rounding added to each weight, or by the code it was clipped to."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, step: Tensor, bits: int) -> Tensor:
        most = _most(bits)
        scaled = matrix / step
        outside = scaled.abs() > most
        codes = _rounded(scaled.clamp(-most, most), bits)
        ctx.save_for_backward(outside, codes - scaled.masked_fill_(outside, 0.0))
        return codes.mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        outside, off = ctx.saved_tensors
        return grad.masked_fill(outside, 0.0), (grad * off).sum(-1, keepdim=True), None


def _most(bits: int) -> int:
    return max(1, 2 ** (bits - 1) - 1)


def _rounded(scaled: Tensor, bits: int) -> Tensor:
    return torch.where(scaled >= 0, 1.0, -1.0) if bits == 1 else scaled.round()


def _slowed(step: Tensor, count: int, bits: int) -> Tensor:
    """The same, its gradient scaled as LSQ scales it (section 2.2), by how many weights it is a sum over."""
    slow = step / math.sqrt(count * _most(bits))
    return slow + (step - slow).detach()


def _is_conv1d(layer: Any) -> bool:
    """Whether the weight lies as transformers' Conv1D has it, (in, out)."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in type(layer).__mro__)


@cache
def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"FakeQuantized{kind.__name__}", (FakeQuantized, kind), {"__module__": __name__})


@torch.no_grad()
def fake_quantise(layer: Any, bits: int, group_size: int | None, shared: Any = None) -> None:
    """Make a Linear, Conv1D or Embedding compute with what codes of so many bits would be worth, in place. `shared`: a layer
    that was made so and holds the same weight; the step is one then."""
    kind = type(layer)
    matrix = layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()
    groups = matrix.float().unflatten(1, (-1, group_size or matrix.shape[1]))
    layer.__class__ = _class_for(kind)  # type: ignore[arg-type]
    layer.bits, layer.group_size, layer.is_rounded = bits, group_size, True
    layer.step_owner = () if shared is None else (shared,)
    if shared is None:
        first = _first_step(groups, bits)
        layer.register_buffer("first_step", first)
        layer.register_parameter("step_log", nn.Parameter(torch.zeros_like(first)))


def dense_again(layer: Any) -> Any:
    """Undo it, in place; the weight is as training left it."""
    layer.__class__ = type(layer).__mro__[2]
    layer._parameters.pop("step_log", None)
    layer._buffers.pop("first_step", None)
    for name in ("bits", "group_size", "is_rounded", "step_owner"):
        del vars(layer)[name]
    return layer


def _first_step(groups: Tensor, bits: int) -> Tensor:
    """(rows, groups): of some steps, the one of least squared error."""
    tiny = 2.0**-24  # what float16 can keep, for rows that are all zero
    if bits == 1:
        return groups.abs().mean(-1).clamp_min(tiny)
    least = groups.abs().amax(-1).clamp_min(tiny) / _most(bits)
    best, found = torch.full_like(least, torch.inf), least
    for share in SHARES.tolist():
        step = (share * least)[..., None]
        error = ((groups / step).clamp(-_most(bits), _most(bits)).round() * step - groups).square().sum(-1)
        found, best = torch.where(error < best, share * least, found), torch.minimum(error, best)
    return found
