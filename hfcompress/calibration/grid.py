"""What a format of codes can store: a grid of values, scales for blocks of columns, and how a number is put on it.

A weight (out, in) is read back as values[code] * scale + offset, with a scale (and an offset, in affine formats) for every
block of columns of a row. Nothing else is known of formats here: bitsandbytes' NF4 and FP4, 8-bit rows and affine 4-bit groups
are all a `Grid`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """What a format can store."""

    values: Tensor
    """(K,), K <= 256, ascending, distinct: what a code stands for, before scale and offset."""
    blocksize: int
    """Columns that share a scale; it divides the columns of a row."""
    affine: bool = False
    """Whether a block has an offset beside its scale."""
    signs: bool = True
    """Whether scales may be negative, which mirrors the values of a block."""
    stored: Callable[[Tensor], Tensor] | None = None
    """Scales (or offsets) (out, blocks) as they will be read back, where the format rounds them; float32 to float32."""

    def to(self, device: torch.device) -> Grid:
        return replace(self, values=self.values.to(device, torch.float32))

    @property
    def mirrors(self) -> bool:
        """Whether a negative scale makes other values than a positive one."""
        return self.signs and not self.affine and not torch.equal(self.values, -self.values.flip(0))

    def read(self, scales: Tensor) -> Tensor:
        return scales if self.stored is None else self.stored(scales)


@dataclass(frozen=True)
class Codes:
    """A weight (out, in) as codes."""

    codes: Tensor
    """(out, in), uint8: indices into the grid's values."""
    scales: Tensor
    """(out, blocks), float32, as they will be read back."""
    offset: Tensor | None
    """(out, blocks), float32, as they will be read back; None where the grid has none."""
    raw_scales: Tensor
    """(out, blocks): the scales before the format rounded them, which is what to hand to it."""
    raw_offset: Tensor | None = None
    error: float = 0.0
    """Mean square of what the layer's output is off by, as a share of the output's own; of weights, where no data was given."""
    plain_error: float = 0.0
    """The same for codes and scales as plain rounding to the nearest chooses them."""

    def dequantised(self, grid: Grid) -> Tensor:
        """(out, in), float32"""
        return expanded(grid, self.codes, self.scales, self.offset)


class Nearest:
    """Finds the nearest of the grid's values, exactly, by a table: a binary search costs ten times as much on a CPU.

    Cells are narrower than the least distance of two midpoints, so that each holds one of these at most.
    """

    def __init__(self, values: Tensor) -> None:
        middles = (values[1:] + values[:-1]) / 2
        least = float((middles[1:] - middles[:-1]).min()) if len(middles) > 1 else 1.0
        self._low = float(middles[0])
        self._cells = int(2 * (float(middles[-1]) - self._low) / least) + 2
        self._per_unit = 2 / least
        cells = self._cell(middles)
        table = torch.arange(self._cells, device=values.device)
        self._below = (cells[None] < table[:, None]).sum(1, dtype=torch.int32)
        self._middle = torch.full((self._cells,), torch.inf, device=values.device).index_copy_(0, cells.long(), middles)

    def __call__(self, x: Tensor) -> Tensor:
        """Indices into the values, int32, of the shape of x; the lower one of two that are as near."""
        cells = self._cell(x).flatten()
        above = x.flatten() > self._middle.index_select(0, cells)
        return self._below.index_select(0, cells).add_(above).reshape(x.shape)

    def _cell(self, x: Tensor) -> Tensor:
        # Rounding keeps order, so what lies below a midpoint is never in a cell above that midpoint's.
        return ((x - self._low) * self._per_unit).clamp_(0, self._cells - 1).int()


def divided(x: Tensor, scales: Tensor, offset: Tensor | None) -> Tensor:
    """x in units of its scales, which have its shape or are spread over it; a scale of zero leaves it as it is."""
    x = x if offset is None else x - offset
    return x / torch.where(scales == 0, 1.0, scales)


def expanded(grid: Grid, codes: Tensor, scales: Tensor, offset: Tensor | None) -> Tensor:
    """(out, in), float32: what the codes stand for."""
    values = grid.values.to(codes.device).index_select(0, codes.flatten().int()).reshape(*scales.shape, -1)
    values = values * scales[..., None]
    return (values if offset is None else values + offset[..., None]).flatten(1)
