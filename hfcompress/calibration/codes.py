"""Post-training quantisation of one weight: codes on a grid and block scales, chosen by what they do to the layer's output.

Block scales are searched, with the codes nearest to them; then `error_feedback` may choose the codes anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hfcompress.calibration.error_feedback import descended, fed_back
from hfcompress.calibration.grid import Codes, Grid, Nearest, divided, expanded
from hfcompress.calibration.second_moments import DAMPING

log = logging.getLogger(__name__)
Stage = Literal["plain", "scales", "diagonal", "feedback", "rounding"]
FACTORS = tuple((24 - step) / 20 for step in range(15))
"""What a block's plain scale is multiplied by in the search. 1 is among them: no block becomes worse than plain."""
SPARSE = 0.2
"""The share of zeros from which a weight is taken for one that was pruned."""
ELEMENTS, ELEMENTS_ON_ACCELERATORS = 2**19, 2**23
"""Weights that are searched at once: more do not fit the caches of a CPU, and need memory in multiples of the weight's; fewer
leave an accelerator waiting for kernels to be launched."""


@torch.no_grad()
def choose_codes(
    weight: Tensor, grid: Grid, stage: Stage, square: Tensor | None = None, damping: float = DAMPING, name: str = "a layer"
) -> Codes:
    """Codes and scales of a weight (out, in), from `square` (in, in), mean x x^T of what the layer reads.

    plain: scales from the largest magnitude of a block (the range, where it has an offset), codes to the nearest.
    scales: block scales of least squared error, of either sign where that tells; no data.
    diagonal: the same, each column weighted by the mean square of what it multiplies.
    feedback: then codes column by column, each making up for the rounding of those before it: GPTQ (Frantar et al. 2022, arXiv
    2210.17323).
    rounding: then codes once more, each the best one beside all others, until none changes: coordinate descent, as in QuantEase
    (Behdin et al. 2023, arXiv 2309.01885).

    With E what the weight is off by, all minimise mean |E x|^2 = trace E square E^T, and what is returned is never worse in it
    than plain: where a stage made it worse, what was there before is kept, row by row. What is zero in a sparse weight stays
    zero where the grid has a zero; else a line says so. `damping`: the ridge of the inverse and of the weights of columns, as a
    share of the mean of the diagonal. `name`: for lines of the log.
    """
    if weight.shape[1] % grid.blocksize:
        raise ValueError(f"{name}: {weight.shape[1]} columns are no multiple of the block size {grid.blocksize}")
    weight, grid = weight.float(), grid.to(weight.device)
    whole, square = square, None if square is None or stage in ("plain", "scales") else square.float()
    power = _row_errors(weight, square).sum().clamp_min(1e-30)
    nearest = Nearest(grid.values)
    plain = _plain(weight, grid, nearest)
    worst = _row_errors(weight - plain.dequantised(grid), square).sum() / power
    plain = replace(plain, error=float(worst), plain_error=float(worst))
    if stage == "plain":
        return plain
    best, error = _searched(weight, grid, nearest, square, damping)
    if square is not None and whole is not None and stage in ("feedback", "rounding"):
        for refine in (fed_back, descended) if stage == "rounding" else (fed_back,):
            codes = refine(weight, grid, nearest, best, whole, damping, name)
            if codes is None:
                break
            codes = _with_zeros(codes, weight, grid)
            other = _row_errors(weight - expanded(grid, codes, best.scales, best.offset), square)
            better = other < error
            error = torch.where(better, other, error)
            best = replace(best, codes=torch.where(better[:, None], codes, best.codes))
    if not _has_zero(grid) and float((weight == 0).float().mean()) > SPARSE:
        log.warning("%s: its zeros are lost, as these codes have no zero; choose symmetric codes of 2 bits or more.", name)
    found = error.sum() / power
    return replace(best, error=float(found), plain_error=float(worst)) if found <= worst else plain


def _has_zero(grid: Grid) -> bool:
    return not grid.affine and bool((grid.values == 0).any())


def _with_zeros(codes: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """The codes of a sparse weight (out, in), what was zero zero again: feedback moves weights before they are rounded."""
    gone = weight == 0
    if not _has_zero(grid) or float(gone.float().mean()) <= SPARSE:
        return codes
    return codes.masked_fill(gone, int((grid.values == 0).nonzero()[0]))


def column_weights(square: Tensor, damping: float) -> Tensor | None:
    """(in,): mean squares of what columns multiply, damped, as columns that were never asked would else be rounded anyhow; None
    where none was."""
    diagonal = square.diagonal().clamp_min(0)
    mean = diagonal.mean()
    return diagonal + max(damping, 1e-6) * mean if mean > 0 else None


def _plain(weight: Tensor, grid: Grid, nearest: Nearest) -> Codes:
    """As formats do without data: codes that are the nearest for the scales as they were before these were rounded."""
    rows = weight.unflatten(1, (-1, grid.blocksize))
    scales, offset = _start(rows, grid)
    codes = _nearest_codes(weight, grid, nearest, scales, offset)
    return _stored(grid, codes, scales, offset)


def _stored(grid: Grid, codes: Tensor, scales: Tensor, offset: Tensor | None) -> Codes:
    return Codes(codes, grid.read(scales), None if offset is None else grid.read(offset), scales, offset)


def _start(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scales and offset (out, blocks) that cover all of (out, blocks, columns)."""
    low, high = grid.values[0], grid.values[-1]
    if not grid.affine:
        return rows.abs().amax(-1) / torch.minimum(-low, high), None
    least, most = rows.aminmax(dim=-1)
    scales = (most - least) / (high - low)
    return scales, least - scales * low


def _searched(weight: Tensor, grid: Grid, nearest: Nearest, square: Tensor | None, damping: float) -> tuple[Codes, Tensor]:
    """The best scales and the codes nearest to them, with the error of each row (out,).

    A format that rounds scales together (bitsandbytes' nested ones, about their mean) may lose more by mixed signs than these
    gain: both are tried, as they will be read back.
    """
    importance = None if square is None else column_weights(square, damping)
    parts: list[list[tuple[Tensor, Tensor | None]]] = []
    for some in _chunks(weight):
        rows = some.unflatten(1, (-1, grid.blocksize))
        weights = torch.ones_like(some[0]) if importance is None else importance
        parts.append(_search(rows, weights.unflatten(0, (-1, grid.blocksize)), grid, nearest))
    best: tuple[Codes, Tensor] | None = None
    for variant in zip(*parts, strict=True):
        scales = torch.cat([scales for scales, _ in variant])
        offset = torch.cat([offset for _, offset in variant if offset is not None]) if grid.affine else None
        read, read_offset = grid.read(scales), None if offset is None else grid.read(offset)
        codes = _nearest_codes(weight, grid, nearest, read, read_offset)
        errors = _row_errors(weight - expanded(grid, codes, read, read_offset), square)
        if best is None or errors.sum() < best[1].sum():
            best = Codes(codes, read, read_offset, scales, offset), errors
    assert best is not None
    return best


def _search(rows: Tensor, weights: Tensor, grid: Grid, nearest: Nearest) -> list[tuple[Tensor, Tensor | None]]:
    """Scales and offsets (out, blocks) of rows (out, blocks, columns), of either sign; and, where the format rounds scales that
    may have two, those that are positive alone. `weights`: (blocks, columns).

    For each of the factors, codes to the nearest, and the scale (and offset) of least squares for these codes: what it would
    leave is known in closed form.
    """
    start, at = _start(rows, grid)
    mean = (weights * rows).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True) if grid.affine else torch.zeros(())
    about = rows - mean  # sums about the mean: else they would cancel
    weighted, total = weights * about, weights.sum(-1)
    middle = at + start * (grid.values[0] + grid.values[-1]) / 2 if at is not None else None
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for sign in (1, -1) if grid.mirrors else (1,):
        gain, scales, offset = torch.full_like(start, -1.0), start, torch.zeros_like(start)
        for factor in FACTORS:
            tried = start * (sign * factor)
            beside = middle - tried * (grid.values[0] + grid.values[-1]) / 2 if middle is not None else None
            codes = nearest(divided(rows, tried[..., None], None if beside is None else beside[..., None]))
            values = grid.values.index_select(0, codes.flatten()).reshape(rows.shape)
            both = torch.linalg.vecdot(weighted, values)
            own = weights * values
            first = own.sum(-1) if grid.affine else None
            squares = torch.linalg.vecdot(own, values)
            if first is not None:
                squares = squares - first.square() / total
            fitted = torch.where(squares > 0, both / squares.clamp_min(1e-30), tried)
            less = fitted * both  # of the squared error
            better = less > gain
            gain, scales = torch.where(better, less, gain), torch.where(better, fitted, scales)
            if first is not None:
                offset = torch.where(better, mean.squeeze(-1) - fitted * first / total, offset)
        found.append((gain, scales, offset))
    variants = [found[0]]
    if len(found) > 1:
        (gain, scales, offset), (other, mirrored, _) = found
        either = (gain, torch.where(other > gain, mirrored, scales), offset)
        variants = [either] if grid.stored is None else [either, found[0]]
    return [(scales, offset if grid.affine else None) for _, scales, offset in variants]


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    elements = ELEMENTS if weight.device.type == "cpu" else ELEMENTS_ON_ACCELERATORS
    yield from weight.split(max(1, elements // weight.shape[1]))


def _nearest_codes(weight: Tensor, grid: Grid, nearest: Nearest, scales: Tensor, offset: Tensor | None) -> Tensor:
    """(out, in), uint8"""
    codes, start = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), 0
    for some in _chunks(weight):
        place = slice(start, start + len(some))
        rows = some.unflatten(1, (-1, grid.blocksize))
        beside = None if offset is None else offset[place, :, None]
        codes[place] = nearest(divided(rows, scales[place, :, None], beside)).flatten(1).to(torch.uint8)
        start += len(some)
    return codes


def _row_errors(off: Tensor, square: Tensor | None) -> Tensor:
    """(out,): mean squares of off x, of each row of off (out, in); of off itself, without data."""
    return (off.square() if square is None else (off @ square) * off).sum(1)
