"""GGUF's tensors: the weights of a Llama-like model under llama.cpp's names, in blocks of its types.

Blocks are of 32 weights of a row (ggml's quants): Q8_0 a scale and 32 bytes, Q4_0 a scale and 32 codes from -8, Q4_1 a scale, a
least value and 32 codes from 0; scales in float16. Codes of our own in groups of 32 are these very blocks, and are written as
they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfcompress.layers import KINDS, kind_of

BLOCK = 32
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Of a layer of Llama, Mistral, Qwen2 and Qwen3: transformers' name to llama.cpp's."""
TURNED = ("self_attn.q_proj", "self_attn.k_proj")
"""What is rotated: transformers turns the two halves of a head against each other, llama.cpp's `llama` neighbours."""


class Written(NamedTuple):
    """A tensor of a file: (rows, bytes of a row) of a type's blocks, or numbers, of `type`, a name of GGMLQuantizationType."""

    name: str
    data: np.ndarray
    type: str
    as_coded: bool = False
    """Whether these are the codes that the model had."""


def tensors_of(model: Any, type: str, neighbours: bool) -> Iterator[Written]:
    """All tensors; `neighbours`: rows of queries and keys are put in the order of an architecture that rotates neighbours.

    Matrices are in blocks of `type`, or in F16 where their rows are no multiple of 32; tables of tokens take 8 bits where
    matrices take 4; vectors stay F32.
    """
    base = model.model
    for_tables = "Q8_0" if type.startswith("Q") else type
    yield _matrix("token_embd.weight", base.embed_tokens, for_tables)
    is_tied = model.lm_head.weight.data_ptr() == base.embed_tokens.weight.data_ptr() != 0  # of factors it is an empty marker
    if not is_tied:
        yield _matrix("output.weight", model.lm_head, for_tables)
    yield _vector("output_norm.weight", base.norm.weight)
    for number, layer in enumerate(base.layers):
        for theirs, name in LAYER.items():
            module = _find(layer, theirs)
            if module is None:
                continue
            order = _neighbours(_rows(module), layer.self_attn.head_dim) if neighbours and theirs in TURNED else None
            if theirs.endswith("norm"):
                yield _vector(f"blk.{number}.{name}.weight", module.weight)
                continue
            yield _matrix(f"blk.{number}.{name}.weight", module, type, order)
            if getattr(module, "bias", None) is not None:
                bias = module.bias.detach().float()
                yield _vector(f"blk.{number}.{name}.bias", bias if order is None else bias[order])


def _find(layer: Any, path: str) -> Any:
    for part in path.split("."):
        layer = getattr(layer, part, None)
    return layer


def _rows(module: Any) -> int:
    return int(module.out_features)


def _neighbours(rows: int, head: int) -> Tensor:
    """Where each row of a head is taken from, so that what was turned against each other lies side by side."""
    return torch.arange(rows).reshape(-1, 2, head // 2).transpose(1, 2).flatten()


def _vector(name: str, values: Tensor) -> Written:
    return Written(name, values.detach().float().cpu().numpy(), "F32")


def _matrix(name: str, module: Any, type: str, order: Tensor | None = None) -> Written:
    """Codes as they are if they are blocks of GGUF's, else the dense weight in blocks of `type`."""
    if (found := _blocks(module, order)) is not None:
        return Written(name, *found, as_coded=True)
    weight = KINDS[kind_of(module) or ""].dequantised(module).float().cpu()
    return Written(name, *quantised((weight if order is None else weight[order]).numpy(), type))


def quantised(weight: np.ndarray, type: str) -> tuple[np.ndarray, str]:
    """(rows, columns) in blocks of a type, and the type: F16 where rows are no multiple of a block."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if type.startswith("Q") and weight.shape[1] % BLOCK:
        type = "F16"
    return quantize(np.ascontiguousarray(weight), GGMLQuantizationType[type]), type


def _blocks(module: Any, order: Tensor | None) -> tuple[np.ndarray, str] | None:
    """The codes of one of our layers as blocks of GGUF's, if they are that; a scale a row stands for each of its blocks, in
    float16 then."""
    if kind_of(module) not in ("quant_linear", "quant_embedding"):
        return None
    codes, scale, offset = module.codes().cpu(), module.scale.cpu(), module.offset
    rows, groups, size = codes.shape
    if size != BLOCK and (groups != 1 or size % BLOCK or module.bits != 8):
        return None
    if size != BLOCK:
        codes, scale = codes.reshape(rows, -1, BLOCK), scale.expand(rows, size // BLOCK)
    offset = None if offset is None else offset.cpu()
    if order is not None:
        codes, scale, offset = codes[order], scale[order], None if offset is None else offset[order]
    halves = [_half(scale)] + ([] if offset is None else [_half(offset)])
    if module.bits == 8 and offset is None:
        return _joined(halves, codes.to(torch.int8).numpy().view(np.uint8)), "Q8_0"
    if module.bits == 4:
        nibbles = (codes + (8 if offset is None else 0)).to(torch.uint8).numpy().reshape(rows, -1, 2, BLOCK // 2)
        return _joined(halves, nibbles[:, :, 0] | nibbles[:, :, 1] << 4), "Q4_0" if offset is None else "Q4_1"
    return None


def _half(values: Tensor) -> np.ndarray:
    """(rows, blocks) as the two bytes of each."""
    return values.to(torch.float16).numpy()[..., None].view(np.uint8)


def _joined(parts: list[np.ndarray], codes: np.ndarray) -> np.ndarray:
    """(rows, blocks, bytes) of each part, side by side, as (rows, bytes)."""
    return np.concatenate([*parts, codes], axis=-1).reshape(len(codes), -1)
