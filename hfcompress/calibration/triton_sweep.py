"""`column_sweep` as a Triton kernel: rows of the weight don't feel each other, so each program takes some of them through all
columns of a span, which stay in its registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Of the weight, a program."""


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    span,
    inner,
    blocks,
    scales,
    offset,
    middles,
    grid_values,
    base,
    codes,
    values,
    told,
    out,
    width: tl.constexpr,
    columns: tl.constexpr,
    middle_count: tl.constexpr,
    rows: tl.constexpr,
    has_offset: tl.constexpr,
    has_base: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    inside = row < out
    column = tl.arange(0, columns)
    state = tl.load(span + column[:, None] * out + row[None, :], mask=(column < width)[:, None] & inside[None, :], other=0.0)
    middle = tl.load(middles + tl.arange(0, middle_count))
    for place in range(width):
        aim = tl.sum(tl.where((column == place)[:, None], state, 0.0), 0)
        own = tl.load(inner + place * width + place)
        if has_base:
            start = tl.load(base + place * out + row, mask=inside, other=0.0)
            aim = start + aim / own
        block = tl.load(blocks + place) * out
        scale = tl.load(scales + block + row, mask=inside, other=1.0)
        shifted = aim
        if has_offset:
            at = tl.load(offset + block + row, mask=inside, other=0.0)
            shifted = aim - at
        units = shifted / tl.where(scale == 0.0, 1.0, scale)
        code = tl.sum((units[:, None] > middle[None, :]).to(tl.int32), 1)
        value = tl.load(grid_values + code) * scale
        if has_offset:
            value += at
        if has_base:
            tells = value - start
        else:
            tells = (aim - value) / own
        where = place * out + row
        tl.store(codes + where, code.to(tl.uint8), mask=inside)
        tl.store(values + where, value, mask=inside)
        tl.store(told + where, tells, mask=inside)
        factor = tl.load(inner + place * width + column, mask=(column > place) & (column < width), other=0.0)
        state -= factor[:, None] * tells[None, :]


def swept(
    span: Tensor,
    inner: Tensor,
    blocks: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    grid_values: Tensor,
    base: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, uint8, values, and what is told, (n, out) each, as `column_sweep.Columns.swept` explains; float32, contiguous."""
    (width, out), nothing = span.shape, span
    codes = torch.empty_like(span, dtype=torch.uint8)
    values, told = torch.empty_like(span), torch.empty_like(span)
    middles = (grid_values[1:] + grid_values[:-1]) / 2
    padded = torch.full((triton.next_power_of_2(len(middles)),), torch.inf, device=span.device)
    padded[: len(middles)] = middles
    kernel: Any = _sweep[(triton.cdiv(out, ROWS),)]
    with torch.cuda.device_of(span):
        kernel(
            span,
            inner,
            blocks,
            scales,
            nothing if offset is None else offset,
            padded,
            grid_values,
            nothing if base is None else base,
            codes,
            values,
            told,
            out,
            width=width,
            columns=triton.next_power_of_2(width),
            middle_count=len(padded),
            rows=ROWS,
            has_offset=offset is not None,
            has_base=base is not None,
        )
    return codes, values, told
