"""Layers of codes as exporters read them: the same codes and scales, and plain operators, so that a file stays small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfcompress.layers.packing import worth


class _Stored(nn.Module):
    """Made of codes (rows, groups, group_size), int8 or uint8, and a scale and perhaps an offset (rows, groups) of each."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> None:
        super().__init__()
        is_one = codes.shape[1] == 1  # a group a row is what runtimes know as scales of output channels: (rows, 1)
        self.register_buffer("codes", codes[:, 0] if is_one else codes)
        for name, each in (("scale", scale), ("offset", offset)):
            self.register_buffer(name, None if each is None else each.float() if is_one else each.float()[..., None])


class StoredLinear(_Stored):
    """A Linear that multiplies with what its codes are worth, in the dtype of its input."""

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None) -> None:
        super().__init__(codes, scale, offset)
        self.out_features, self.in_features = len(codes), codes.shape[1:].numel()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)"""
        weight = worth(self.codes, self.scale, self.offset, x.dtype)
        weight = weight.reshape(self.out_features, self.in_features)
        return functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class StoredEmbedding(_Stored):
    """An Embedding whose rows are worked out as they are asked for, in `dtype`."""

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(codes, scale, offset)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., dim)"""
        offset = None if self.offset is None else self.offset[ids]
        rows = worth(self.codes[ids], self.scale[ids], offset, torch.float32)
        return (rows if self.codes.dim() == 2 else rows.flatten(-2)).to(self.dtype)
