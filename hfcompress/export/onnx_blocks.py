"""Linear layers of codes as ONNX Runtime multiplies with them: by MatMulNBits, which reads codes of 4 and 8 bits in blocks.

In plain operators a layer of groups would be worked out when the graph is written, and take the room of a dense one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.layers.stored import StoredLinear

SMALLEST, LARGEST = 16, 256
"""Of blocks, whose sizes are powers of two."""
IN_FLOAT32, IN_INTEGERS = 0, 4
"""ONNX Runtime's accuracy levels: inputs as they are, or rounded to 8 bits a block."""


class Blocks(nn.Module):
    """What stands in for a StoredLinear while a graph is written: it computes nothing itself."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, layer: StoredLinear, bits: int, block: int, accuracy_level: int) -> None:
        super().__init__()
        rows, columns = layer.out_features, layer.in_features
        codes = layer.codes.reshape(rows, -1, block).int()
        if layer.offset is None:
            codes = codes + 2 ** (bits - 1)  # where the operator has its zero
        codes = codes.to(torch.uint8)
        self.register_buffer("packed", codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4)
        self.register_buffer("scale", self._by_block(layer.scale, codes))
        self.register_buffer("zero", None if layer.offset is None else self._by_block(-layer.offset / layer.scale, codes))
        self.bias = layer.bias
        self.told: dict[str, Any] = {
            "K": columns,
            "N": rows,
            "bits": bits,
            "block_size": block,
            "accuracy_level": accuracy_level,
        }

    @staticmethod
    def _by_block(each: Tensor, codes: Tensor) -> Tensor:
        """(rows, blocks), of a scale a row or a group, of which a block is a part."""
        each = each.reshape(len(codes), -1)
        return each.repeat_interleave(codes.shape[1] // each.shape[1], 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)"""
        given = [x, self.packed, self.scale.flatten(), *([] if self.zero is None else [self.zero.flatten()])]
        shape = (*x.shape[:-1], self.told["N"])
        said = torch.onnx.ops.symbolic("com.microsoft::MatMulNBits", given, self.told, dtype=x.dtype, shape=shape, version=1)
        return said if self.bias is None else said + self.bias


def blocks_of(layer: StoredLinear) -> tuple[int, int] | None:
    """Bits and block size of the operator for such codes; None if it has none, or plain operators keep 8 bits a code anyway."""
    low, high = (-8, 7) if layer.offset is None else (0, 15)
    bits = 4 if low <= int(layer.codes.min()) and int(layer.codes.max()) <= high else 8
    in_groups = layer.codes.dim() == 3
    size = layer.codes.shape[2] if in_groups else layer.in_features
    block = min(size & -size, LARGEST)  # the largest power of two that divides it
    if block < SMALLEST or (bits == 8 and (layer.offset is not None or not in_groups)):
        return None
    return bits, block


@contextmanager
def in_blocks(model: Any, accuracy_level: int = IN_FLOAT32) -> Iterator[None]:
    """Layers of codes are written as that operator, those that it can read; afterwards the model is as it was."""
    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, StoredLinear)]
    fit = [(name, one, found) for name, one in layers if (found := blocks_of(one)) is not None]
    try:
        for name, one, (bits, block) in fit:
            model.set_submodule(name, Blocks(one, bits, block, accuracy_level))
        yield
    finally:
        for name, one, _ in fit:
            model.set_submodule(name, one)
