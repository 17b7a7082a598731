"""What bitsandbytes keeps beside codes, checked before a kernel reads it: kernels trust sizes, and read past the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfcompress.checkpoint.errors import shown
from hfcompress.layers.base import DTYPES
from hfcompress.layers.bnb_library import library

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def bad_tensor(what: str, found: Any, count: int, dtype: torch.dtype) -> str | None:
    """What is wrong with a tensor that should hold so many numbers of this dtype, none of them infinite or no number."""
    if not isinstance(found, Tensor) or found.numel() != count or found.dtype != dtype:
        told = f"{found.numel()} of {str(found.dtype).removeprefix('torch.')}" if isinstance(found, Tensor) else shown(found)
        return f"{what} are {told}, not {count} of {str(dtype).removeprefix('torch.')}"
    if dtype.is_floating_point and not bool(found.isfinite().all()):
        return f"{what} hold infinite values, or values that are no numbers"
    return None


def bad_scales(state: Any, count: int) -> str | None:
    """What is wrong with the scales of 4-bit codes of so many weights, nested ones under double quantisation."""
    if type(state.blocksize) is not int or state.blocksize not in BLOCKSIZES:
        return f"blocksize = {shown(state.blocksize)} beside its codes is not one of {', '.join(map(str, BLOCKSIZES))}"
    blocks, nested = -(count // -state.blocksize), state.state2
    if wrong := bad_tensor("quant_map, the values of its codes,", state.code, 16, torch.float32):
        return wrong
    if not torch.allclose(
        state.code, library().functional.get_4bit_type(state.quant_type, device=state.code.device), atol=1e-6
    ):
        return f"quant_map, the values of its codes, are not those of {state.quant_type}, which kernels take for granted"
    if nested is None:
        return bad_tensor("absmax, the scales of its codes,", state.absmax, blocks, torch.float32)
    if type(nested.blocksize) is not int or nested.blocksize not in BLOCKSIZES:
        return f"nested_blocksize = {shown(nested.blocksize)} is not one of {', '.join(map(str, BLOCKSIZES))}"
    if nested.dtype not in DTYPES.values():
        return f"nested_dtype = {shown(nested.dtype)} is not one of {', '.join(DTYPES)}"
    return (
        bad_tensor("absmax, the scales of its codes,", state.absmax, blocks, torch.uint8)
        or bad_tensor("nested_absmax, the scales of its scales,", nested.absmax, -(blocks // -nested.blocksize), torch.float32)
        or bad_tensor("nested_quant_map, the values of its scales,", nested.code, 256, torch.float32)
        or bad_tensor("nested_offset", state.offset, 1, torch.float32)
    )
