"""A few numbers that tell one tensor from another; the proof reads this file without the package, so it imports torch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROWS = 1 << 20


def fingerprints(model: Any) -> dict[str, list[float]]:
    """Of every tensor that would be saved: its norm, and its product with fixed weights; those of a NaN are not equal to
    anything. Unequal sizes give unequal numbers."""
    return {name: _of(tensor) for name, tensor in model.state_dict().items()}


def _of(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    weights = torch.arange(1, min(_ROWS, flat.numel()) + 1, dtype=torch.float64, device=flat.device).sin()
    norm, product = 0.0, 0.0
    for part, rows in enumerate(flat.split(_ROWS)):  # a table of a large vocabulary is not held twice in float64
        values = rows.double()
        norm += float(values.square().sum())
        product += float(values @ weights[: len(values)]) * (1 + part % 7)
    return [norm**0.5, product, float(flat.numel())]


def differing(found: dict[str, list[float]], expected: dict[str, list[float]], allowed: float) -> str | None:
    """The first tensor that is another one, by more than this share of its norm."""
    for name in [*expected, *found]:
        if name not in found or name not in expected or found[name][2] != expected[name][2]:
            return name
        (norm, product, _), (other, theirs, _) = found[name], expected[name]
        if not (abs(norm - other) <= allowed * other and abs(product - theirs) <= 7 * allowed * other):
            return name
    return None
