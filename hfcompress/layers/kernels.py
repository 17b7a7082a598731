"""Products with codes, by whatever is fastest here: integers, codes unpacked on the way, or a dense product.

`integers`, of 8 bits, rounds every row of the input between its own least and largest value, so that no example feels the
others of its batch, to as many levels as this processor adds up without overflow; the product of the codes is exact then. It
moves outputs by less than 1 % of their norm where there are 255 steps from end to end, 2 % where there are 127. Of rows with
outliers, which span more than `WIDE` times their own norm, what is left over is rounded and multiplied as well: language models
live on them.

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
from torch.nn import functional

FEW, FEW_ON_CUDA = 4, 8
"""Rows up to which reading the weights is what takes the time."""
GROUPS, ROWS = (32, 64, 128, 256), 16
"""How many columns may share a scale of `nibbles`, and what the number of outputs is a multiple of."""
MANY, MANY_PAIRS = 2**24, 2**26
"""Products of numbers from which integers pay: below, calling oneDNN and rounding take longer than what they save. The second
where they are added up in pairs, for want of VNNI or AMX."""
BESIDE = 8
"""Bytes that FBGEMM keeps beside the codes of a row: the step and the least value, in float32."""
FULL = 255
"""Steps from end to end where integer products use all 8 bits of both factors."""
SMALL = 2**18
"""Weights up to which a layer keeps them unpacked as well: the dense product is the fastest then. 1 MB in float32."""
WIDE = 26
"""From its least to its largest value, in root mean squares: what a row may span to be rounded once, by 3 % or 6 % then."""
_memory = threading.local()


@cache
def levels() -> int:
    """How many steps an input may have from end to end: FULL, 127, or 0 where oneDNN's integers are of no use.

    Tried, not read off the processor's flags: without VNNI, oneDNN adds pairs of products up in 16 bits, and gives results that
    are off by a tenth without a word if both factors use all of their 8 bits.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686") or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return 0
    return next((count for count in (FULL, 127) if all(_is_exact(count, rows) for rows in (1, 33, 256))), 0)


def _is_exact(count: int, rows: int) -> bool:
    """Whether codes that are all at their ends are multiplied rightly."""
    source = torch.Generator().manual_seed(0)
    ends = torch.randint(0, 2, (rows + 64, 128), generator=source, dtype=torch.int32)
    x, w = ends[:rows] * count, ((ends[rows:] * 2 - 1) * 127).to(torch.int8)
    try:
        found = _multiplied(functional.pad(x, (0, BESIDE)).to(torch.uint8), prepack(w, torch.ones(64)))
    except (RuntimeError, NotImplementedError):  # a build of torch without oneDNN
        return False
    return torch.equal(found.double(), x.double() @ w.double().T)


@cache
def unpacks() -> bool:
    """Whether this processor unpacks codes on the way as fast as it reads them: tried, as `levels` is."""
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
    if "integers" in possible and levels():
        pays = rows * weights >= MANY if levels() == FULL else rows * weights >= MANY_PAIRS and weights > SMALL
        if pays:
            return "integers"
    return "dense" if whole or not slow_bfloat16() else unpacking


def by_integers(x: Tensor, prepacked: Prepacked, bias: Tensor | None) -> Tensor:
    """(..., in) to (..., out), of codes that `prepack` laid out."""
    rounded = rounded_rows(x)
    said = _worth(rounded, prepacked, bias)
    if rounded.rest is not None:
        said[rounded.rough] += _worth(rounded.rest, prepacked, None)
    return said.to(x.dtype).reshape(*x.shape[:-1], -1)


def _worth(rows: Rounded, prepacked: Prepacked, bias: Tensor | None) -> Tensor:
    """(rows, out) float32: what codes say, times their steps, and their least values times the sums of the weights."""
    said = _multiplied(rows.fused, prepacked).mul_(rows.each).addcmul_(rows.low, prepacked.sums)
    return said if bias is None else said.add_(bias.float())


def _multiplied(codes: Tensor, prepacked: Prepacked) -> Tensor:
    """(rows, out) float32, of uint8 codes (rows, in + BESIDE)."""
    none = torch.zeros(len(prepacked.scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise.default(
        codes, 1.0, 0, prepacked.codes, prepacked.scale, none, None, 1.0, 0, torch.float32, "none", [], ""
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


class Prepacked(NamedTuple):
    """Codes in the order that oneDNN reads, which can't be saved, the scale of each row, and the sum of each row's weights.

    The weights of what stands beside an input's codes are zeros: the input need not be copied without it.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


def prepack(codes: Tensor, scale: Tensor) -> Prepacked:
    """Of plain int8 codes (out, in) and scales (out,)."""
    padded = functional.pad(codes, (0, BESIDE))
    return Prepacked(torch.ops.onednn.qlinear_prepack(padded, None), scale, codes.sum(1) * scale)


class Rounded(NamedTuple):
    """Rows as codes: `codes * each + low`, and what that leaves of those rows for which it is too rough."""

    fused: Tensor
    """(rows, in + BESIDE) uint8: codes, and what FBGEMM keeps beside them"""
    each: Tensor
    """(rows, 1) float32: what a step is worth"""
    low: Tensor
    """(rows, 1) float32: what a code of 0 stands for"""
    rough: Tensor | None = None
    rest: Rounded | None = None

    @property
    def codes(self) -> Tensor:
        """(rows, in) uint8"""
        return self.fused[:, :-BESIDE]


def rounded_rows(x: Tensor) -> Rounded:
    """Of (..., in). Projections that read the same tensor share them."""
    last = getattr(_memory, "last", None)
    fresh = not x.is_inference()  # else nothing tells whether somebody has written into it
    if fresh and last is not None and last[0]() is x and last[1] == x._version:
        return last[2]  # type: ignore[no-any-return]
    flat = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
    found = _rounded(flat)
    may = torch.linalg.vector_norm(flat, dim=-1, keepdim=True) * (WIDE / levels() / math.sqrt(flat.shape[-1]))
    if not bool((found.each <= may).all()):
        found = _mended(found, flat, may)
    _memory.last = (weakref.ref(x), x._version, found) if fresh else None
    return found


def _rounded(flat: Tensor) -> Rounded:
    """To the nearest of `levels()` even steps from the least to the largest of each row, in one pass of FBGEMM's."""
    width = flat.shape[-1]
    fused = torch.ops.quantized.embedding_bag_byte_prepack(flat)  # the codes of a row, its step, and its least value
    each, low = fused[:, width:].contiguous().view(torch.float32).split(1, 1)
    if levels() < FULL:  # two neighbouring codes become one, which stands for the middle between them
        return Rounded(fused >> 1, each * 2, low + each / 2)
    return Rounded(fused, each, low)


def _mended(found: Rounded, flat: Tensor, may: Tensor) -> Rounded:
    """Rows whose steps are wider than they may be have their rest rounded as well; rows that hold no numbers say none."""
    found = found._replace(each=found.each + may * 0)
    rough = (found.each > may).nonzero()[:, 0]
    if not len(rough):
        return found
    known = found.codes[rough] * found.each[rough] + found.low[rough]
    return found._replace(rough=rough, rest=_rounded(flat[rough] - known))


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
