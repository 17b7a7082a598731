"""GPTQ's error feedback, and coordinate descent: codes chosen one column after another, beside what all others are off by."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from hfcompress.calibration.grid import Codes, Grid, Nearest, divided

log = logging.getLogger(__name__)
COLUMNS = 64
"""Columns that are rounded before the others hear of it: one product instead of so many."""
SWEEPS = 8
"""Of coordinate descent, at most; it ends where no code changes."""
TRIES = 4
"""How often the ridge is made ten times larger, until there is an inverse."""


class _Columns:
    """Scales and offset, asked for by column."""

    def __init__(self, grid: Grid, nearest: Nearest, found: Codes) -> None:
        self.grid, self.nearest = grid, nearest
        self._scales = found.scales.T.contiguous()
        self._offset = None if found.offset is None else found.offset.T.contiguous()

    def rounded(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes (out,), int32, and what they stand for, of a column x (out,)."""
        block = column // self.grid.blocksize
        scales, offset = self._scales[block], None if self._offset is None else self._offset[block]
        codes = self.nearest(divided(x, scales, offset))
        values = self.grid.values.index_select(0, codes) * scales
        return codes, values if offset is None else values + offset


def fed_back(
    weight: Tensor, grid: Grid, nearest: Nearest, found: Codes, square: Tensor, damping: float, name: str
) -> Tensor | None:
    """Codes (out, in), uint8, for the scales that were found: each column is rounded, and the columns after it take over what
    that did to the output, as well as they can. None where `square` has no inverse, however it is damped; a line says so.

    Columns come by falling mean square, whatever block they are in, which the scales, being fixed, allow (act-order with static
    groups). Frantar et al. 2022, GPTQ (arXiv 2210.17323), algorithm 1.
    """
    order = square.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(square[order][:, order], damping)
    if factor is None:
        log.warning(
            "%s: the second moments of what it reads have no inverse, with whatever ridge; its codes are the nearest ones, "
            "without feedback.",
            name,
        )
        return None
    # Transposed, (in, out): what is read and written for a column lies together.
    columns, left, names = _Columns(grid, nearest, found), weight.T[order], order.tolist()
    codes = torch.empty_like(left, dtype=torch.uint8)
    for start, end in _spans(len(names)):
        part, inner = left[start:end], factor[start:end, start:end]
        errors = torch.empty_like(part)
        for place in range(end - start):
            chosen, values = columns.rounded(part[place], names[start + place])
            codes[names[start + place]] = chosen
            errors[place] = (part[place] - values) / inner[place, place]
            part[place + 1 :].addr_(inner[place, place + 1 :], errors[place], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()


def descended(weight: Tensor, grid: Grid, nearest: Nearest, found: Codes, square: Tensor, damping: float, name: str) -> Tensor:
    """Codes (out, in), uint8, no worse than those that were found: each in turn the best one beside all others as they are.

    With E = W - Q, the error E square E^T of a row is least over its entry q_j at q_j + (E square)_j / square_jj, and, on a
    grid, at the value nearest to that. Behdin et al. 2023, QuantEase (arXiv 2309.01885), without its outliers.
    """
    damped = _damped(square, damping).float()
    columns, codes = _Columns(grid, nearest, found), found.codes.T.contiguous()  # (in, out), as above
    values = found.dequantised(grid).T.contiguous()
    pull = damped @ (weight.T - values)
    diagonal = damped.diagonal().tolist()
    for _ in range(SWEEPS):
        changed = False
        for start, end in _spans(weight.shape[1]):
            part, inner = pull[start:end].clone(), damped[start:end, start:end]
            moved = torch.empty_like(part)
            for place, column in enumerate(range(start, end)):
                chosen, said = columns.rounded(values[column] + part[place] / diagonal[column], column)
                moved[place] = said - values[column]
                part[place + 1 :].addr_(inner[place, place + 1 :], moved[place], alpha=-1)
                codes[column], values[column] = chosen, said
            pull.addmm_(damped[:, start:end], moved, alpha=-1)
            changed |= bool(moved.any())
        if not changed:
            break
    return codes.T.contiguous()


def _spans(count: int) -> Iterator[tuple[int, int]]:
    yield from ((start, min(start + COLUMNS, count)) for start in range(0, count, COLUMNS))


def _damped(square: Tensor, damping: float) -> Tensor:
    """With a ridge. A column that was never asked for stands alone: it is rounded, and tells none."""
    diagonal = square.diagonal()
    mean = diagonal.mean()
    ridge = torch.where(diagonal > 0, damping * mean, torch.where(mean > 0, mean, 1.0))
    return square + torch.diag(ridge)


def _inverse_factor(square: Tensor, damping: float) -> Tensor | None:
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
