"""The one table of layer kinds: a line a kind. Whoever only loads a compressed model needs this folder and `checkpoint`."""

from __future__ import annotations

import torch
from torch import nn

from hfcompress.layers.base import DTYPES, Kind, dense_linear, features
from hfcompress.layers.bitsandbytes import Linear4bit, Linear8bit
from hfcompress.layers.dense import DenseConv1D, DenseEmbedding, DenseLinear
from hfcompress.layers.low_rank import LowRankEmbedding, LowRankLinear
from hfcompress.layers.quantized import QuantEmbedding, QuantLinear
from hfcompress.layers.quantized_conv import QuantConv

KINDS: dict[str, type[Kind]] = {
    "linear": DenseLinear,
    "conv1d": DenseConv1D,
    "embedding": DenseEmbedding,
    "low_rank_linear": LowRankLinear,
    "low_rank_embedding": LowRankEmbedding,
    "linear_4bit": Linear4bit,
    "linear_8bit": Linear8bit,
    "quant_linear": QuantLinear,
    "quant_embedding": QuantEmbedding,
    "quant_conv": QuantConv,
}
_KIND_BY_TYPE = {kind.type_name: name for name, kind in KINDS.items()}

__all__ = ["DTYPES", "KINDS", "Kind", "dense_form", "features", "holds_codes", "kind_of", "prepare", "stands_in"]


def kind_of(module: nn.Module) -> str | None:
    """The kind's name, or None: subclasses of Linear that other libraries made are not ours to describe."""
    library, name = type(module).__module__.partition(".")[0], _KIND_BY_TYPE.get(type(module).__name__)
    if name is None or library == "hfcompress":
        return name
    # I-BERT has a QuantLinear and a QuantEmbedding of its own, PEFT a Linear and a Linear4bit
    is_theirs = not issubclass(KINDS[name], nn.Module) and library in ("torch", "transformers", "bitsandbytes")
    return name if is_theirs else None


def holds_codes(module: nn.Module) -> bool:
    """Whether a layer holds its weight as codes of few bits."""
    kind = kind_of(module)
    return kind is not None and KINDS[kind].holds_codes


def dense_form(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The Linear that a linear layer of codes stands for, its weight in this dtype, its bias shared; a dense one is its own."""
    if not holds_codes(layer):
        return layer
    return dense_linear(KINDS[kind_of(layer) or ""].dequantised(layer).to(dtype), layer.bias)  # type: ignore[arg-type]


def prepare(layer: nn.Module) -> None:
    """Make a layer of codes ready to compute."""
    KINDS[kind_of(layer) or ""].prepare(layer)


def stands_in(module: nn.Module) -> bool:
    """Whether a layer is another one than the architecture has there: factors, codes."""
    kind = kind_of(module)
    return kind is not None and KINDS[kind].stands_in
