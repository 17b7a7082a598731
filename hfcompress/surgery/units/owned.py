"""Weight norms of units: sums over everything that a head or neuron owns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hfcompress.surgery.units.spans import Span, Units


def spans_of(units: Units) -> tuple[Span, ...]:
    return (*units.inputs, *units.outputs)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def owned(model: nn.Module, units: Units, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of `of` over everything that a unit owns."""
    parts = [per_unit(units, span, of(tensor_of(model, span.tensor).detach().float())) for span in spans_of(units)]
    return torch.stack(parts).sum(0)


def norms(model: nn.Module, all_units: list[Units]) -> list[Tensor]:
    """L2 norm of everything a unit owns: its rows in the input projections and its columns in the output."""
    return [owned(model, units, torch.square).sqrt() for units in all_units]


def per_unit(units: Units, span: Span, tensor: Tensor) -> Tensor:
    """Sum over the entries that each unit owns along the span, of the shape of the units."""
    if units.lanes > 1:
        per_entry = tensor.movedim(span.axis, 1).flatten(2).sum(2) if tensor.dim() > 2 else tensor
    else:
        per_entry = tensor.movedim(span.axis, 0).flatten(1).sum(1) if tensor.dim() > 1 else tensor
    blocks = span.index(torch.arange(units.count)[:, None], units.count)
    return per_entry.cpu()[..., blocks].sum(-1)  # few numbers by now
