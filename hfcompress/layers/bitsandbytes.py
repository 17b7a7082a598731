"""bitsandbytes' Linear4bit and Linear8bitLt: their fields, how to make and freeze them, and what they need worked around.

bitsandbytes itself is imported when a layer is made, not before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.layers.base import DTYPES, Kind, dense_fields, dense_linear, features

THRESHOLD_LIMIT = 1000.0


class Linear4bit(Kind):
    """NF4 or FP4 codes in blocks of 64, their scales nested under double quantisation."""

    type_name = "Linear4bit"
    names = ("in_features", "out_features", "bias", "quant_type", "compress_statistics", "compute_dtype")
    holds_codes = True

    @staticmethod
    def fields(layer: Any) -> dict[str, Any]:  # type: ignore[override]
        return {
            **dense_fields(layer),
            "quant_type": layer.weight.quant_type,
            "compress_statistics": bool(layer.weight.compress_statistics),
            "compute_dtype": str(layer.compute_dtype).removeprefix("torch.") if layer.compute_dtype else None,
        }

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        import bitsandbytes as bnb

        dtype = fields.pop("compute_dtype")
        layer = bnb.nn.Linear4bit(fields.pop("in_features"), fields.pop("out_features"), compute_dtype=_dtype(dtype), **fields)
        layer.weight.data = layer.weight.data.to(torch.uint8)
        return frozen(layer)

    @classmethod
    def from_linear(
        cls, layer: Any, quant_type: str = "nf4", use_double_quant: bool = True, compute_dtype: str | None = None
    ) -> nn.Module:
        """The low-bit twin of a Linear or Conv1D, on the same device; the arguments are those of `quantize`."""
        import bitsandbytes as bnb

        kept: dict[str, Any] = {"quant_type": quant_type, "compress_statistics": use_double_quant}
        new: Any = bnb.nn.Linear4bit(*features(layer), layer.bias is not None, compute_dtype=_dtype(compute_dtype), **kept)
        new.weight = bnb.nn.Params4bit(_matrix(layer), requires_grad=False, **kept)
        return _in_place_of(layer, new)

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, int]) -> bool:
        return {
            "bias": type(value) is bool,
            "compress_statistics": type(value) is bool,
            "quant_type": isinstance(value, str) and value in ("nf4", "fp4"),
            "compute_dtype": value is None or (isinstance(value, str) and value in DTYPES),
        }[key]

    @staticmethod
    def dequantised(layer: Any) -> Tensor:  # type: ignore[override]
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    @staticmethod
    def export_form(layer: Any) -> nn.Module:  # type: ignore[override]
        return dense_linear(Linear4bit.dequantised(layer), layer.bias)


class Linear8bit(Kind):
    """LLM.int8(): a scale a row, and columns of large inputs in 16 bits where `threshold` asks for it."""

    type_name = "Linear8bitLt"
    names = ("in_features", "out_features", "bias", "threshold")
    holds_codes = True

    @staticmethod
    def fields(layer: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**dense_fields(layer), "threshold": float(layer.state.threshold)}

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(fields.pop("in_features"), fields.pop("out_features"), has_fp16_weights=False, **fields)
        layer.weight.data = layer.weight.data.to(torch.int8)
        return frozen(layer)

    @classmethod
    def from_linear(cls, layer: Any, threshold: float = 0.0) -> nn.Module:
        """The low-bit twin of a Linear or Conv1D, on the same device."""
        import bitsandbytes as bnb

        new = bnb.nn.Linear8bitLt(*features(layer), layer.bias is not None, has_fp16_weights=False, threshold=threshold)
        new.weight = bnb.nn.Int8Params(_matrix(layer).cpu(), requires_grad=False, has_fp16_weights=False)
        return _in_place_of(layer, new)

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, int]) -> bool:
        if key == "threshold":
            return type(value) in (int, float) and 0 <= value <= THRESHOLD_LIMIT
        return key == "bias" and type(value) is bool

    @staticmethod
    def dequantised(layer: Any) -> Tensor:  # type: ignore[override]
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * (scales.float()[:, None] / 127)

    @staticmethod
    def export_form(layer: Any) -> nn.Module:  # type: ignore[override]
        return dense_linear(Linear8bit.dequantised(layer), layer.bias)


def coded(layer: Any, bits: int, **fields: Any) -> nn.Module:
    """The twin of a Linear or Conv1D in 8 or 4 bits."""
    return Linear8bit.from_linear(layer, **fields) if bits == 8 else Linear4bit.from_linear(layer, **fields)


def codes_fit(layer: nn.Module, bits: int) -> bool:
    """Whether bitsandbytes' kernels read such codes rightly. bitsandbytes 0.50 reads 4-bit rows wrongly on CPUs where a block
    of 64 spans two of them, and its AVX512-BF16 path refuses rows that are not in thirty-twos."""
    into, out = features(layer)
    return bits == 8 or (into % 64 == 0 and out % 32 == 0)


def frozen(layer: Any) -> nn.Module:
    """A low-bit layer, frozen, as codes can't be trained, and kept off the path that repacks the codes in place.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward; what is saved, dequantised or merged
    after that is wrong. `source_cls` is what transformers' own loader notes on the layer.
    """
    layer.source_cls = nn.Linear
    layer.support_avx512bf16_for_cpu = False
    if type(layer).__name__ == Linear8bit.type_name and not hasattr(layer, "_leading"):
        layer._leading, layer._many_dims, layer._clashes = None, False, False
        layer.register_forward_pre_hook(_flatten)
        layer.register_forward_hook(_unflatten)
        layer.register_state_dict_post_hook(_clash)
    return layer.requires_grad_(False)


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


def _dtype(name: str | None) -> torch.dtype | None:
    return DTYPES[name] if name else None


def _matrix(layer: Any) -> Tensor:
    """(out, in)"""
    weight = layer.weight.detach()
    return weight.T.contiguous() if isinstance(layer, Conv1D) else weight


def _in_place_of(old: Any, new: Any) -> nn.Module:
    new.bias = old.bias
    return frozen(new.to(old.weight.device))


def _flatten(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """bitsandbytes 0.50 gives an input of more than three dimensions back as a matrix: (..., in) goes in as (rows, in)."""
    layer._leading = inputs[0].shape[:-1] if inputs[0].dim() > 3 else None
    layer._many_dims |= layer._leading is not None
    return inputs if layer._leading is None else (inputs[0].flatten(0, -2), *inputs[1:])


def _unflatten(layer: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if layer._leading is None else output.unflatten(0, layer._leading)


def _clash(layer: Any, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Codes look like a dense weight: (out, in, 1) can't be loaded as one."""
    if layer._clashes:
        tensors[f"{prefix}weight"] = tensors[f"{prefix}weight"][..., None]
