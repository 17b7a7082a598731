"""Layers that stand in for a dense one, and how each kind is told in plain numbers and built again from them.

Whoever only loads a compressed model needs this file, `structure` and `loading`, and nothing else of the package.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError


class LowRankLinear(nn.Module):
    """`y = second(first(x))`: an (out, in) matrix as (out, rank) times (rank, in).

    `weight` is an empty marker. It sits under the key of the dense matrix with another shape, so that loading the checkpoint
    without hfcompress fails with a size mismatch instead of leaving the layer random.
    """

    weight: torch.Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, **where: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, **where)
        self.second = nn.Linear(rank, out_features, bias=bias, **where)
        self.register_buffer("weight", torch.empty(0, **where))

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class LowRankEmbedding(nn.Module):
    """A (vocabulary, dim) table as (vocabulary, rank) rows, each expanded by a (dim, rank) matrix. `weight` as above."""

    weight: torch.Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None = None, **where: Any
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.table = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx, **where)
        self.expand = nn.Linear(rank, embedding_dim, bias=False, **where)
        self.register_buffer("weight", torch.empty(0, **where))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.expand(self.table(ids))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THRESHOLD_LIMIT = 1000.0


def blank(model: nn.Module, config: PreTrainedConfig | None = None) -> nn.Module:
    """The model of this class that a config, its own if none is given, describes, on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config or model.config))  # type: ignore[call-arg]


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of anything that maps features: Linear, Conv1D (whose weight is (in, out)) or a stand-in."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding | LowRankEmbedding):
        return module.num_embeddings, module.embedding_dim
    return module.in_features, module.out_features  # type: ignore[return-value]


def is_low_bit(module: nn.Module) -> bool:
    """Whether a bitsandbytes layer holds its weight as codes (told without importing bitsandbytes)."""
    return kind_of(module) in ("linear_4bit", "linear_8bit")


def _dense_sizes(module: Any) -> dict[str, Any]:
    into, out = features(module)
    return {"in_features": into, "out_features": out, "bias": getattr(module, "bias", None) is not None}


def _build_linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
    return nn.Linear(in_features, out_features, bias=bias)


def _build_conv1d(in_features: int, out_features: int, bias: bool) -> nn.Module:
    if not bias:
        raise CompressionError("structure: a conv1d has bias: false, and transformers' Conv1D always has one.")
    return Conv1D(out_features, in_features)


def _build_linear_4bit(compute_dtype: str | None, quant_storage: str = "uint8", **fields: Any) -> nn.Module:
    import bitsandbytes as bnb

    sizes = (fields.pop("in_features"), fields.pop("out_features"))
    layer = bnb.nn.Linear4bit(*sizes, compute_dtype=DTYPES[compute_dtype] if compute_dtype else None, **fields)
    layer.weight.data = layer.weight.data.to(torch.uint8)
    return low_bit(layer)


def _build_linear_8bit(threshold: float, **fields: Any) -> nn.Module:
    import bitsandbytes as bnb

    sizes = (fields.pop("in_features"), fields.pop("out_features"))
    layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold, **fields)
    layer.weight.data = layer.weight.data.to(torch.int8)
    return low_bit(layer)


def low_bit(layer: Any) -> nn.Module:
    """Frozen, as codes can't be trained, and kept off the path that repacks the codes in place.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward; what is saved, dequantised or merged
    after that is wrong. `source_cls` is what transformers' own loader notes on the layer.
    """
    layer.source_cls = nn.Linear
    layer.support_avx512bf16_for_cpu = False
    if kind_of(layer) == "linear_8bit" and not hasattr(layer, "_leading"):
        layer._leading, layer._many_dims, layer._clashes = None, False, False
        layer.register_forward_pre_hook(_flatten)
        layer.register_forward_hook(_unflatten)
        layer.register_state_dict_post_hook(_clash)
    return layer.requires_grad_(False)


def _flatten(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """bitsandbytes 0.50 gives an input of more than three dimensions back as a matrix: (..., in) goes in as (rows, in)."""
    layer._leading = inputs[0].shape[:-1] if inputs[0].dim() > 3 else None
    layer._many_dims |= layer._leading is not None
    return inputs if layer._leading is None else (inputs[0].flatten(0, -2), *inputs[1:])


def _unflatten(layer: Any, _: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output if layer._leading is None else output.unflatten(0, layer._leading)


def _clash(layer: Any, tensors: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Codes look like a dense weight: (out, in, 1) can't be loaded as one."""
    if layer._clashes:
        tensors[f"{prefix}weight"] = tensors[f"{prefix}weight"][..., None]


def needs_us(layer: nn.Module) -> bool:
    """Whether a low-bit layer was given what bitsandbytes alone can't multiply: its checkpoint needs hfcompress."""
    return bool(getattr(layer, "_many_dims", False))


@contextmanager
def quiet_casts() -> Iterator[None]:
    """Without the line that bitsandbytes logs for every cast of every layer at every forward."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")

    def quiet(record: logging.LogRecord) -> bool:
        return "inputs will be cast" not in record.getMessage()

    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)


def codes_fit(layer: nn.Module, bits: int) -> bool:
    """Whether bitsandbytes' kernels read such codes rightly. bitsandbytes 0.50 reads 4-bit rows wrongly on CPUs where a block
    of 64 spans two of them, and its AVX512-BF16 path refuses rows that are not in thirty-twos."""
    into, out = features(layer)
    return bits == 8 or (into % 64 == 0 and out % 32 == 0)


def coded(
    layer: Any,
    bits: int,
    quant_type: str = "nf4",
    use_double_quant: bool = True,
    compute_dtype: str | None = None,
    threshold: float = 0.0,
) -> nn.Module:
    """The low-bit twin of a Linear or Conv1D, on the same device; the arguments are those of `quantize`."""
    import bitsandbytes as bnb

    weight = layer.weight.detach()
    weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    sizes, device = features(layer), weight.device
    if bits == 4:
        kept: dict[str, Any] = {"quant_type": quant_type, "compress_statistics": use_double_quant}
        compute = DTYPES[compute_dtype] if compute_dtype else None
        new: Any = bnb.nn.Linear4bit(*sizes, layer.bias is not None, compute_dtype=compute, **kept)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kept)
    else:
        new = bnb.nn.Linear8bitLt(*sizes, layer.bias is not None, has_fp16_weights=False, threshold=threshold)
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return low_bit(new.to(device))


@dataclass(frozen=True)
class Kind:
    """One kind of layer: `fields(module)` tells it in plain JSON values, `build(**fields)` makes an empty one."""

    type_name: str
    fields: Callable[[Any], dict[str, Any]]
    build: Callable[..., nn.Module]
    names: tuple[str, ...]
    """The keys of `fields`, all of them required."""


_SIZES = ("in_features", "out_features", "bias")
_TABLE = ("num_embeddings", "embedding_dim", "padding_idx")
KINDS: dict[str, Kind] = {
    "linear": Kind("Linear", _dense_sizes, _build_linear, _SIZES),
    "conv1d": Kind("Conv1D", _dense_sizes, _build_conv1d, _SIZES),
    "embedding": Kind(
        "Embedding",
        lambda m: {
            "num_embeddings": m.num_embeddings,
            "embedding_dim": m.embedding_dim,
            "padding_idx": m.padding_idx,
        },
        nn.Embedding,
        _TABLE,
    ),
    "low_rank_linear": Kind(
        "LowRankLinear",
        lambda m: {**_dense_sizes(m), "bias": m.second.bias is not None, "rank": m.rank},
        LowRankLinear,
        (*_SIZES, "rank"),
    ),
    "low_rank_embedding": Kind(
        "LowRankEmbedding",
        lambda m: {
            "num_embeddings": m.num_embeddings,
            "embedding_dim": m.embedding_dim,
            "rank": m.rank,
            "padding_idx": m.padding_idx,
        },
        LowRankEmbedding,
        (*_TABLE, "rank"),
    ),
    "linear_4bit": Kind(
        "Linear4bit",
        lambda m: {
            **_dense_sizes(m),
            "quant_type": m.weight.quant_type,
            "compress_statistics": bool(m.weight.compress_statistics),
            "compute_dtype": str(m.compute_dtype).removeprefix("torch.") if m.compute_dtype else None,
        },
        _build_linear_4bit,
        (*_SIZES, "quant_type", "compress_statistics", "compute_dtype"),
    ),
    "linear_8bit": Kind(
        "Linear8bitLt",
        lambda m: {**_dense_sizes(m), "threshold": float(m.state.threshold)},
        _build_linear_8bit,
        (*_SIZES, "threshold"),
    ),
}
_KIND_BY_TYPE = {kind.type_name: name for name, kind in KINDS.items()}


def kind_of(module: nn.Module) -> str | None:
    """The kind's name, or None: subclasses of Linear that other libraries made are not ours to describe."""
    ours = type(module).__module__.partition(".")[0] in ("torch", "transformers", "bitsandbytes", "hfcompress")
    return _KIND_BY_TYPE.get(type(module).__name__) if ours else None  # PEFT has a Linear and a Linear4bit of its own
