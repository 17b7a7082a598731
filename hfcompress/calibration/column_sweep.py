"""One column after another, each rounded and those after it told: the inner loop of GPTQ and of coordinate descent.

All of it is transposed, (in, out): what is read and written for a column lies together. On CUDA devices a kernel goes through a
whole span of columns at once, where torch's own operators would be launched a million times for a model of seven billion.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from hfcompress.calibration.grid import Codes, Grid, Nearest, divided

SPAN = 64
"""Columns that are rounded before the others hear of it: one product instead of so many."""


class Swept(NamedTuple):
    """(n, out) each."""

    codes: Tensor
    """uint8"""
    values: Tensor
    """What the codes stand for."""
    told: Tensor
    """What the columns after these are to take over, times `inner`."""


class Columns:
    """The grid that columns are rounded to, with the scales (and offsets) of their blocks."""

    def __init__(self, grid: Grid, nearest: Nearest, found: Codes) -> None:
        self.grid, self.nearest = grid, nearest
        self.scales = found.scales.T.contiguous()
        self.offset = None if found.offset is None else found.offset.T.contiguous()
        self._has_kernel = self.scales.is_cuda and _triton_is_there()

    def swept(self, span: Tensor, inner: Tensor, places: Tensor, base: Tensor | None = None) -> Swept:
        """Go through a span (n, out), which is overwritten; `inner`: (n, n), of which the upper triangle is read; `places`:
        (n,), of the span's columns among all.

        Column j is rounded as it is and tells (column - value) / inner_jj. With a `base` (n, out), what is rounded is base +
        column / inner_jj, which tells value - base. Every column k after it loses inner_jk of what j tells.
        """
        blocks = places // self.grid.blocksize
        if self._has_kernel:
            from hfcompress.calibration.triton_sweep import swept

            return Swept(*swept(span, inner.contiguous(), blocks, self.scales, self.offset, self.grid.values, base))
        return self._one_by_one(span, inner, blocks.tolist(), base)

    def _one_by_one(self, span: Tensor, inner: Tensor, blocks: list[int], base: Tensor | None) -> Swept:
        found = Swept(torch.empty_like(span, dtype=torch.uint8), torch.empty_like(span), torch.empty_like(span))
        for place, (block, own) in enumerate(zip(blocks, inner.diagonal().tolist(), strict=True)):
            aim = span[place] if base is None else base[place] + span[place] / own
            codes, value = self._rounded(aim, block)
            found.codes[place], found.values[place] = codes, value
            found.told[place] = (aim - value) / own if base is None else value - base[place]
            span[place + 1 :].addr_(inner[place, place + 1 :], found.told[place], alpha=-1)
        return found

    def _rounded(self, x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Codes (out,), int32, and what they stand for, of a column x (out,)."""
        scales, offset = self.scales[block], None if self.offset is None else self.offset[block]
        codes = self.nearest(divided(x, scales, offset))
        values = self.grid.values.index_select(0, codes) * scales
        return codes, values if offset is None else values + offset


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None
