"""Products with codes, by whatever is fastest here: integers, codes unpacked on the way, or a dense product.

`integers`, of 8 bits, rounds every row of the input by its own largest value, so that no example feels the others of its batch,
to as many steps as this processor adds up without overflow; the product of the codes is exact then. It moves outputs by about
1 % of their norm where there are 127 steps to either side, 2 % where there are 63. Of rows with outliers, which that would
round by more than `ROUGH` of their own norm, what is left over is rounded and multiplied as well: language models live on them.

`bytes`, of 8 bits, and `nibbles`, of 4, take the input, and scales, in bfloat16, add up in float32, and give bfloat16: they
move outputs by at most 1 %, mostly 0.3 %; on CUDA devices too, where a model was switched to inference. A dense product takes
everything as it is, but for bfloat16 on accelerators, where codes are unpacked in bfloat16.
"""

from __future__ import annotations

import math
import platform
import threading
import weakref
from collections.abc import Collection
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

FEW, FEW_ON_CUDA = 4, 8
"""Rows up to which reading the weights is what takes the time."""
GROUPS, ROWS = (32, 64, 128, 256), 16
"""How many columns may share a scale of `nibbles`, and what the number of outputs is a multiple of."""
MANY = 2**26
"""Products of numbers from which integers pay: below, calling oneDNN and rounding take longer than what they save."""
SMALL = 2**18
"""Weights up to which a layer keeps them unpacked as well: the dense product is the fastest then. 1 MB in float32."""
ROUGH = 0.06
"""Of its norm: what rounding may take a row off by."""
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


@cache
def unpacks() -> bool:
    """Whether this processor unpacks codes on the way as fast as it reads them: tried, as `steps` is."""
    fast = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    if not fast or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return False
    codes = torch.arange(-8, 8).repeat(16, 4).roll(1, 0).reshape(16, 2, 32)
    scale, x = torch.full((16, 2), 0.5), torch.eye(64)
    try:
        found = by_nibbles(x, *nibbles(codes, scale, None), None)
        other = by_bytes(x, codes.flatten(1).to(torch.int8), scale[:, 0], None)
    except (RuntimeError, NotImplementedError):
        return False
    expected = codes.flatten(1).T / 2
    return torch.equal(found, expected) and torch.equal(other, expected)


@cache
def unpacks_on_cuda() -> bool:
    """Whether this GPU does so with codes of 4 bits: tried as well."""
    codes = torch.arange(-8, 8, device="cuda").repeat(16, 4).roll(1, 0).reshape(16, 2, 32)
    try:
        prepacked = nibbles(codes, torch.full((16, 2), 0.5, device="cuda"), None)
        found = by_nibbles(torch.eye(64, device="cuda"), *prepacked, None)
    except (RuntimeError, NotImplementedError, AttributeError):  # a GPU without bfloat16, or not of NVIDIA's
        return False
    return torch.equal(found, codes.flatten(1).T / 2)


@cache
def slow_bfloat16() -> bool:
    """Whether dense products are slower in bfloat16 than in float32, for want of instructions."""
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def kernel_for(x: Tensor, rows: int, weights: int, possible: Collection[str]) -> str:
    """The fastest for so many weights of integers, bytes and nibbles, if possible for such codes, or dense."""
    if torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "dense"
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and rows <= FEW_ON_CUDA and "nibbles" in possible:
        return "nibbles" if unpacks_on_cuda() else "dense"
    if x.device.type != "cpu":
        return "dense"
    whole = x.dtype != torch.bfloat16
    unpacking = next((kind for kind in ("bytes", "nibbles") if kind in possible and unpacks()), "dense")
    if rows <= FEW and not (whole and weights <= SMALL):
        return unpacking
    if "integers" in possible and rows * weights >= MANY and steps() and not (weights <= SMALL and steps() < 127):
        return "integers"
    return "dense" if whole or not slow_bfloat16() else unpacking


def by_integers(x: Tensor, prepacked: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) to (..., out), of codes that `prepack` laid out and the scale (out,) of each."""
    codes, each, left = rounded_rows(x)
    said = _multiplied(codes, steps() + 1, prepacked, scale)
    said = said.mul_(each) if bias is None else torch.addcmul(bias.float(), said, each, out=said)
    if left is not None:
        said[left.rows] += _multiplied(left.codes, steps() + 1, prepacked, scale).mul_(left.each)
    return said.to(x.dtype).reshape(*x.shape[:-1], -1)


def _multiplied(codes: Tensor, zero: int, prepacked: Tensor, scale: Tensor) -> Tensor:
    """(rows, out) float32, of uint8 codes (rows, in) in which `zero` stands for 0."""
    none = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise.default(
        codes, 1.0, zero, prepacked, scale, none, None, 1.0, 0, torch.float32, "none", [], ""
    )


def by_bytes(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) to (..., out), of plain codes (out, in) and scales (out,)."""
    said = torch._weight_int8pack_mm(_rows(x), codes, scale.bfloat16())
    return _with_bias(said, x, bias)


def by_nibbles(x: Tensor, prepacked: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) to (..., out), of what `nibbles` made."""
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch.ops.aten._weight_int4pack_mm
    return _with_bias(multiply(_rows(x), prepacked, x.shape[-1] // len(scales), scales), x, bias)


def nibbles(codes: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (out, groups, group_size), of -8 to 7, or of 0 to 15 where there is an offset (out, groups), in the order that the
    kernel reads, which can't be saved; and (groups, out, 2) bfloat16: scales, and what a code of 8 in 16 is worth."""
    shift = 0 if offset is not None else 8
    middle = torch.zeros_like(scale) if offset is None else offset.float() + 8 * scale.float()
    shifted = (codes.int() + shift).flatten(1)
    if codes.device.type == "cpu":
        prepacked = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 1)
    else:
        tiles = next(count for count in (8, 4, 2) if shifted.shape[1] % (16 * count) == 0)  # of 16 columns, read together
        pairs = (shifted[:, ::2] << 4 | shifted[:, 1::2]).to(torch.uint8)
        prepacked = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    return prepacked, torch.stack([scale.T.bfloat16(), middle.T.bfloat16()], -1).contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).bfloat16().contiguous()


def _with_bias(said: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    said = said.to(x.dtype).reshape(*x.shape[:-1], -1)
    return said if bias is None else said + bias.to(x.dtype)


def prepack(codes: Tensor) -> Tensor:
    """(out, in) int8, in the order that oneDNN reads: it can't be saved."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


class Left(NamedTuple):
    """What rounding leaves of some rows: their numbers, and codes and steps as `rounded_rows` gives them."""

    rows: Tensor
    codes: Tensor
    each: Tensor


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor, Left | None]:
    """(rows, in) uint8 codes about `steps() + 1`, (rows, 1) what a step is worth, and what is left of rows for which that is
    too rough, if there are any. Projections that read the same tensor share them."""
    last = getattr(_memory, "last", None)
    fresh = not x.is_inference()  # else nothing tells whether somebody has written into it
    if fresh and last is not None and last[0]() is x and last[1] == x._version:
        return last[2]
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    most = torch.linalg.vector_norm(flat, math.inf, dim=-1, keepdim=True).clamp_min_(1e-30)
    codes = (flat * (steps() / most)).add_(steps() + 1.5).to(torch.uint8)
    each = most.div_(steps())
    found = codes, each, _left(flat, codes, each)
    _memory.last = (weakref.ref(x), x._version, found) if fresh else None
    return found


def _left(flat: Tensor, codes: Tensor, each: Tensor) -> Left | None:
    norm = torch.linalg.vector_norm(flat, dim=-1) / math.sqrt(flat.shape[-1])
    rows = (each[:, 0] / math.sqrt(12) > ROUGH * norm).nonzero()[:, 0]  # even errors, a step wide
    if not len(rows):
        return None
    wide, zero = each[rows], steps() + 1
    fine = wide / (2 * steps())
    rest = flat[rows].sub_(codes[rows].float().sub_(zero).mul_(wide)).div_(fine)
    return Left(rows, rest.add_(zero + 0.5).clamp_(1, 2 * steps() + 1).to(torch.uint8), fine)


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
