"""Codes of few bits: a matrix rounded to them, and how they lie in bytes."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer with a byte for each of so many codes."""


def rounded(
    matrix: Tensor, bits: int, group_size: int | None = None, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round to the nearest of 2^bits even steps: (codes, scale, offset).

    `matrix`: (rows, columns), with a scale for each row, or for every `group_size` columns of it, which divides them.
    Codes are (rows, groups, group_size) int16; scale, offset (rows, groups) as `scale_dtype` says. Symmetric: codes from
    -(2^(bits-1) - 1), a weight is code * scale, so that two bits are ternary. Else: codes from 0, code * scale + offset, offset
    being the least weight. One bit has the two values of least squares: the mean, where it is not symmetric, give or take the
    mean absolute distance to it (Rastegari et al. 2016, XNOR-Net, arXiv 1603.05279, equation 6); its symmetric codes are -1, 1.
    """
    groups = matrix.float().unflatten(1, (-1, group_size or matrix.shape[1]))
    dtype, most = scale_dtype(group_size), 2 ** (bits - 1) - 1
    if bits == 1:
        middle = torch.zeros_like(groups[..., :1]) if symmetric else groups.mean(-1, keepdim=True)
        away = (groups - middle).abs().mean(-1)
        codes = torch.where(groups >= middle, 1, -1 if symmetric else 0)
        scale = kept_scale(away if symmetric else 2 * away, dtype)
        offset = None if symmetric else (middle[..., 0] - away).to(dtype)
    elif symmetric:
        scale, offset = kept_scale(groups.abs().amax(-1) / most, dtype), None
        codes = (groups / scale.float()[..., None]).round().clamp_(-most, most)
    else:
        low, high = groups.aminmax(dim=-1)
        offset = low.to(dtype)
        scale = kept_scale((high - offset.float()).clamp_min(0) / (2**bits - 1), dtype)
        codes = ((groups - offset.float()[..., None]) / scale.float()[..., None]).round().clamp_(0, 2**bits - 1)
    return codes.to(torch.int16), scale, offset


def scale_dtype(group_size: int | None) -> torch.dtype:
    """What scales are kept in: one a row in float32, one a group in float16, as GGUF keeps them."""
    return torch.float32 if group_size is None else torch.float16


def kept_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is kept; never zero, as it divides."""
    return scale.to(dtype).clamp_(2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny, torch.finfo(dtype).max)


def least_code(bits: int, signed: bool) -> int:
    """The least of the 2^bits codes that lie in bytes; those of one bit are -1 and 1."""
    return -(2 ** (bits - 1)) if signed else 0


def packed(codes: Tensor, bits: int, signed: bool) -> Tensor:
    """(..., n) integers to what is stored: int8 for 8 bits, else uint8 (..., n * bits / 8), the first code in the low bits and
    signed ones shifted to begin at 0."""
    if bits == 8:
        return codes.to(torch.int8 if signed else torch.uint8)
    codes = (codes + 1) // 2 if signed and bits == 1 else codes - least_code(bits, signed)
    count, size = _unit(bits)
    codes = codes.to(torch.uint8).unflatten(-1, (-1, count))
    if size == 1:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
        return (codes << shifts).sum(-1, dtype=torch.uint8)
    wide = (codes.long() << bits * torch.arange(count, device=codes.device)).sum(-1, keepdim=True)
    return (wide >> 8 * torch.arange(size, device=codes.device)).bitwise_and_(255).to(torch.uint8).flatten(-2)


def unpacked(stored: Tensor, bits: int, signed: bool) -> Tensor:
    """`packed`, backwards: int8 (..., n), uint8 for unsigned codes of 8 bits."""
    if bits == 8:
        return stored
    codes = _spread(stored, bits)
    if signed and bits == 1:
        return codes.mul_(2).sub_(1)
    return codes.add_(least_code(bits, signed))


def _unit(bits: int) -> tuple[int, int]:
    """So many codes lie in so many bytes."""
    return 8 // gcd(8, bits), bits // gcd(8, bits)


def _spread(stored: Tensor, bits: int) -> Tensor:
    """(..., bytes) uint8 to (..., n) int8, codes from 0."""
    count, size = _unit(bits)
    if size > 1:
        each = stored.unflatten(-1, (-1, size)).long() << 8 * torch.arange(size, device=stored.device)
        wide = each.sum(-1, keepdim=True) >> bits * torch.arange(count, device=stored.device)
        return wide.bitwise_and_(2**bits - 1).to(torch.int8).flatten(-2)
    wide = stored.to(_WIDE[count])
    while count > 1:  # the upper half of the codes that lie together moves up, until each has a byte of its own
        count //= 2
        mask = sum((1 << count * bits) - 1 << 8 * start for start in range(0, 8 // bits, count))
        wide = wide.bitwise_or_(wide << count * (8 - bits)).bitwise_and_(mask)
    return wide.view(torch.int8)


def worth(codes: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What codes stand for, computed in this dtype; scale and offset in shapes that broadcast to theirs."""
    said = codes.to(dtype) * scale.to(dtype)
    return said if offset is None else said + offset.to(dtype)
