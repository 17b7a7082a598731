"""A few numbers that tell one tensor from another; the proof reads this file without the package, so it imports torch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROWS, _PARTS = 1 << 20, 7
"""Numbers that are multiplied at once, and how many such parts have a weight of their own, 1 to 7."""


def fingerprints(model: Any) -> dict[str, list[float]]:
    """Of every tensor that would be saved: its norm, its products with two fixed series of weights, its size. Those of a NaN
    are not equal to anything."""
    return {name: _of(tensor) for name, tensor in model.state_dict().items()}


def _of(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    angles = torch.arange(1, min(_ROWS, flat.numel()) + 1, dtype=torch.float64, device=flat.device)
    weights = torch.stack([angles.sin(), angles.cos()])
    norm, products = 0.0, [0.0, 0.0]
    for part, rows in enumerate(flat.split(_ROWS)):  # a table of a large vocabulary is not held twice in float64
        values = rows.double()
        norm += float(values.square().sum())
        more = (weights[:, : len(values)] @ values).tolist()
        products = [one + other * (1 + part % _PARTS) for one, other in zip(products, more, strict=True)]
    return [norm**0.5, *products, float(flat.numel())]


def differing(found: dict[str, list[float]], expected: dict[str, list[float]], allowed: float) -> str | None:
    """The first tensor that is another one, by more than this share of its norm."""
    for name in [*expected, *found]:
        if name not in found or name not in expected or found[name][-1] != expected[name][-1]:
            return name
        (norm, *products, size), (other, *theirs, _) = found[name], expected[name]
        room = allowed * other * min(_PARTS, 1 + size // _ROWS)
        apart = [abs(one - two) for one, two in zip(products, theirs, strict=True)]
        if not (abs(norm - other) <= allowed * other and all(one <= room for one in apart)):
            return name
    return None
