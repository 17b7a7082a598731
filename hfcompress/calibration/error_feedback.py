"""GPTQ's error feedback, and coordinate descent: codes chosen one column after another, beside what all others are off by."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from hfcompress.calibration.column_sweep import SPAN, Columns
from hfcompress.calibration.grid import Codes, Grid, Nearest

log = logging.getLogger(__name__)
SWEEPS = 8
"""Of coordinate descent, at most; it ends where no code changes."""
TRIES = 4
"""How often the ridge is made ten times larger, until there is an inverse."""


def fed_back(
    weight: Tensor, grid: Grid, nearest: Nearest, found: Codes, square: Tensor, damping: float, name: str
) -> Tensor | None:
    """Codes (out, in), uint8, for the scales that were found: each column is rounded, and the columns after it take over what
    that did to the output, as well as they can. None where `square` has no inverse, however it is damped; a line says so.

    Columns come by falling mean square, whatever block they are in, which the scales, being fixed, allow (act-order with static
    groups). Frantar et al. 2022, GPTQ (arXiv 2210.17323), algorithm 1.
    """
    order = square.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(square[order][:, order], damping)
    if factor is None:
        log.warning(
            "%s: the second moments of what it reads have no inverse, with whatever ridge; its codes are the nearest ones, "
            "without feedback.",
            name,
        )
        return None
    columns, left = Columns(grid, nearest, found), weight.T[order].contiguous()  # (in, out), as in `column_sweep`
    codes = torch.empty_like(left, dtype=torch.uint8)
    for start, end in _spans(len(left)):
        swept = columns.swept(left[start:end], factor[start:end, start:end], order[start:end])
        codes[order[start:end]] = swept.codes
        left[end:].addmm_(factor[start:end, end:].T, swept.told, alpha=-1)
    return codes.T.contiguous()


def descended(weight: Tensor, grid: Grid, nearest: Nearest, found: Codes, square: Tensor, damping: float, name: str) -> Tensor:
    """Codes (out, in), uint8, no worse than those that were found: each in turn the best one beside all others as they are.

    With E = W - Q, the error E square E^T of a row is least over its entry q_j at q_j + (E square)_j / square_jj, and, on a
    grid, at the value nearest to that. Behdin et al. 2023, QuantEase (arXiv 2309.01885), without its outliers.
    """
    damped = _damped(square, damping).float()
    columns, codes = Columns(grid, nearest, found), found.codes.T.contiguous()  # (in, out), as in `column_sweep`
    values = found.dequantised(grid).T.contiguous()
    pull = damped @ (weight.T - values)
    places = torch.arange(len(values), device=values.device)
    for _ in range(SWEEPS):
        changed = False
        for start, end in _spans(len(values)):
            inner = damped[start:end, start:end]
            swept = columns.swept(pull[start:end].clone(), inner, places[start:end], values[start:end])
            codes[start:end], values[start:end] = swept.codes, swept.values
            pull.addmm_(damped[:, start:end], swept.told, alpha=-1)
            changed |= bool(swept.told.any())
        if not changed:
            break
    return codes.T.contiguous()


def _spans(count: int) -> Iterator[tuple[int, int]]:
    yield from ((start, min(start + SPAN, count)) for start in range(0, count, SPAN))


def _damped(square: Tensor, damping: float) -> Tensor:
    """With a ridge. A column that was never asked for stands alone: it is rounded, and tells none."""
    diagonal = square.diagonal()
    mean = diagonal.mean()
    ridge = torch.where(diagonal > 0, damping * mean, torch.where(mean > 0, mean, 1.0))
    return square + torch.diag(ridge)


def inverse_factor(square: Tensor, damping: float) -> Tensor | None:
    """The upper Cholesky factor of the inverse of the damped moments, float32; None where there is none. It is found in
    float64, as what columns say is nearly the same, often."""
    for _ in range(TRIES + 1):
        lower, failed = torch.linalg.cholesky_ex(_damped(square.double(), damping))
        if not int(failed) and bool(lower.isfinite().all()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(upper.isfinite().all()):
                return upper.float()
        damping = 10 * max(damping, 1e-4)
    return None
