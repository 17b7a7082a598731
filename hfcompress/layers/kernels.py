"""Products with codes of 8 bits, by whatever is fastest here: integers, codes unpacked on the way, or a dense product.

`integers` rounds every row of the input by its own largest value, so that no example feels the others of its batch, to as many
steps as this processor adds up without overflow; the product of the codes is exact then. It moves outputs by about 1 % of their
norm where there are 127 steps to either side, 2 % where there are 63; the others take the input as it is.
"""

from __future__ import annotations

import platform
import threading
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

FEW = 4
"""Rows up to which reading the weights is what takes the time."""
MANY = 2**26
"""Products of numbers from which integers pay: below, calling oneDNN and rounding take longer than what they save."""
SMALL = 2**18
"""Weights up to which a layer keeps them unpacked as well, for the dense product: 1 MB in float32."""
_memory = threading.local()


@cache
def steps() -> int:
    """How many steps an input may have to either side of zero: 127, 63, or 0 where oneDNN's integers are of no use.

    Tried, not read off the processor's flags: without VNNI, oneDNN adds pairs of products up in 16 bits, and gives results that
    are off by a tenth without a word if both factors use all of their 8 bits.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686") or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return 0
    return next((count for count in (127, 63) if all(_is_exact(count, rows) for rows in (1, 33, 256))), 0)


def _is_exact(count: int, rows: int) -> bool:
    """Whether codes that are all at their ends are multiplied rightly."""
    source = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (rows + 64, 128), generator=source, dtype=torch.int32) * 2 - 1
    x, w = signs[:rows] * count, (signs[rows:] * 127).to(torch.int8)
    codes = (x + count + 1).to(torch.uint8)
    try:
        found = _multiplied(codes, count + 1, prepack(w), torch.ones(64))
    except (RuntimeError, NotImplementedError):  # a build of torch without oneDNN
        return False
    return torch.equal(found.double(), x.double() @ w.double().T)


def kernel_for(x: Tensor, rows: int, weights: int) -> str:
    """One of integers, weights (codes are unpacked on the way; bfloat16, few rows) and dense, for so many weights."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not steps():
        return "dense"
    if x.dtype == torch.bfloat16 and rows <= FEW:
        return "weights"
    return "integers" if rows * weights >= MANY else "dense"


def by_integers(x: Tensor, prepacked: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) to (..., out), of codes that `prepack` laid out and the scale (out,) of each."""
    codes, each = rounded_rows(x)
    said = _multiplied(codes, steps() + 1, prepacked, scale)
    said = said.mul_(each) if bias is None else torch.addcmul(bias.float(), said, each, out=said)
    return said.to(x.dtype).reshape(*x.shape[:-1], -1)


def _multiplied(codes: Tensor, zero: int, prepacked: Tensor, scale: Tensor) -> Tensor:
    """(rows, out) float32, of uint8 codes (rows, in) in which `zero` stands for 0."""
    none = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise.default(
        codes, 1.0, zero, prepacked, scale, none, None, 1.0, 0, torch.float32, "none", [], ""
    )


def by_weights(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """As `by_integers`, of plain codes (out, in) and a bfloat16 input of few rows, taken as it is."""
    said = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), codes, scale.to(x.dtype))
    return (said if bias is None else said + bias.to(x.dtype)).reshape(*x.shape[:-1], -1)


def prepack(codes: Tensor) -> Tensor:
    """(out, in) int8, in the order that oneDNN reads: it can't be saved."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, in) uint8 codes about `steps() + 1`, and (rows, 1) what a step is worth. Projections that read the same tensor
    share them."""
    last = getattr(_memory, "last", None)
    fresh = not x.is_inference()  # else nothing tells whether somebody has written into it
    if fresh and last is not None and last[0]() is x and last[1] == x._version:
        return last[2]
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    most = flat.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
    codes = (flat * (steps() / most)).add_(steps() + 1.5).to(torch.uint8)
    found = codes, most.div_(steps())
    _memory.last = (weakref.ref(x), x._version, found) if fresh else None
    return found


def forget_rows() -> None:
    """Let go of the rows that were rounded last."""
    _memory.last = None


class Product(torch.autograd.Function):
    """A layer's product whose gradient goes to its input, as if nothing had been rounded (straight through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return layer.product(x, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.dequantised().to(gradient.dtype), None
