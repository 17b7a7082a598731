"""bitsandbytes' Linear4bit and Linear8bitLt: their fields, and how to make them.

bitsandbytes itself is imported when a layer is made, not before: `library`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.checkpoint.errors import shown
from hfcompress.layers.base import DTYPES, Kind, dense_fields, dense_linear, features, is_conv1d
from hfcompress.layers.beside_codes import bad_scales, bad_tensor
from hfcompress.layers.bnb_hooks import FOUR_BIT, LLM_INT8, follows_input, frozen, row_scales
from hfcompress.layers.bnb_library import library
from hfcompress.layers.stored import StoredLinear

THRESHOLD_LIMIT = 1000.0


class Linear4bit(Kind):
    """NF4 or FP4 codes in blocks, whose size stands beside them, and scales, which are nested under double quantisation."""

    type_name = FOUR_BIT
    names = ("in_features", "out_features", "bias", "quant_type", "compress_statistics", "compute_dtype")
    holds_codes = True
    is_ours = False

    @staticmethod
    def fields(layer: Any) -> dict[str, Any]:  # type: ignore[override]
        return {
            **dense_fields(layer),
            "quant_type": layer.weight.quant_type,
            "compress_statistics": bool(layer.weight.compress_statistics),
            "compute_dtype": None if follows_input(layer) else str(layer.compute_dtype).removeprefix("torch."),
        }

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        bnb = library()

        dtype = fields.pop("compute_dtype")
        layer = bnb.nn.Linear4bit(fields.pop("in_features"), fields.pop("out_features"), compute_dtype=_dtype(dtype), **fields)
        layer.weight.data = layer.weight.data.to(torch.uint8)
        return frozen(layer)

    @classmethod
    def from_linear(
        cls,
        layer: Any,
        quant_type: str = "nf4",
        use_double_quant: bool = True,
        compute_dtype: str | None = None,
        blocksize: int = 64,
    ) -> nn.Module:
        """The low-bit twin of a Linear or Conv1D, on the same device; the arguments are those of `quantize`."""
        new, kept = _four_bit(layer, quant_type, use_double_quant, compute_dtype)
        return _in_place_of(layer, new, _params(_matrix(layer), blocksize=blocksize, **kept))

    @classmethod
    def from_codes(cls, layer: Any, codes: Tensor, scales: Tensor, **fields: Any) -> nn.Module:
        """The same in chosen codes (out, in), uint8, indices into `codebook(quant_type)`, and scales (out, blocks), float32, of
        any sign. The weight is then codebook[codes] times the scales, as `scales_read` gives them under double quantisation."""
        functional = library().functional
        new, kept = _four_bit(layer, **fields)
        quant_type, blocksize = kept["quant_type"], codes.shape[1] // scales.shape[1]
        absmax, offset, nested = _nested(scales) if kept["compress_statistics"] else (scales.flatten().contiguous(), None, None)
        state: Any = functional.QuantState(absmax=absmax, shape=codes.shape, dtype=layer.weight.dtype, quant_type=quant_type)
        state.code, state.blocksize = functional.get_4bit_type(quant_type, device=scales.device), blocksize
        state.offset, state.state2, state.nested = offset, nested, nested is not None
        packed = _packed(codes, quant_type)
        return _in_place_of(layer, new, _params(packed, quant_state=state, bnb_quantized=True, blocksize=blocksize, **kept))

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, Any]) -> bool:
        return {
            "bias": type(value) is bool,
            "compress_statistics": type(value) is bool,
            "quant_type": isinstance(value, str) and value in ("nf4", "fp4"),
            "compute_dtype": value is None or (isinstance(value, str) and value in DTYPES),
        }[key]

    @staticmethod
    def damage(layer: Any) -> str | None:  # type: ignore[override]
        weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
        if state is None:
            return "the scales of its codes are missing"
        if wrong := bad_tensor("its codes", weight.data, (layer.in_features * layer.out_features + 1) // 2, torch.uint8):
            return wrong
        size = (layer.out_features, layer.in_features)
        if tuple(state.shape or ()) != size:
            return f"shape = {shown(tuple(state.shape or ()))} beside its codes is not {size}"
        if state.quant_type != weight.quant_type or state.quant_type not in ("nf4", "fp4"):
            return f"quant_type = {shown(state.quant_type)} beside its codes is not nf4 or fp4"
        if state.dtype not in DTYPES.values():
            return f"dtype = {shown(state.dtype)} beside its codes is not one of {', '.join(DTYPES)}"
        return bad_scales(state, layer.in_features * layer.out_features)

    @staticmethod
    def prepare(layer: Any) -> None:  # type: ignore[override]
        frozen(layer)

    @staticmethod
    def dequantised(layer: Any) -> Tensor:  # type: ignore[override]
        bnb = library()

        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    @staticmethod
    def code_bits(layer: Any) -> int:  # type: ignore[override]
        return 4

    @staticmethod
    def export_form(layer: Any) -> nn.Module:  # type: ignore[override]
        return dense_linear(Linear4bit.dequantised(layer), layer.bias)

    @staticmethod
    def fast_form(layer: Any) -> nn.Module | None:  # type: ignore[override]
        if layer.weight.device.type != "cpu" or not follows_input(layer):
            return None
        if not library().functional.has_avx512bf16():
            return Linear4bit.export_form(layer)
        layer.support_avx512bf16_for_cpu = True
        return layer


class Linear8bit(Kind):
    """LLM.int8(): a scale a row, and columns of large inputs in 16 bits where `threshold` asks for it."""

    type_name = LLM_INT8
    names = ("in_features", "out_features", "bias", "threshold")
    holds_codes = True
    is_ours = False

    @staticmethod
    def fields(layer: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**dense_fields(layer), "threshold": float(layer.state.threshold)}

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        bnb = library()

        layer = bnb.nn.Linear8bitLt(fields.pop("in_features"), fields.pop("out_features"), has_fp16_weights=False, **fields)
        layer.weight.data = layer.weight.data.to(torch.int8)
        return frozen(layer)

    @classmethod
    def from_linear(cls, layer: Any, threshold: float = 0.0) -> nn.Module:
        """The low-bit twin of a Linear or Conv1D, on the same device."""
        bnb = library()

        new = bnb.nn.Linear8bitLt(**_sizes(layer), has_fp16_weights=False, threshold=threshold)
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(_matrix(layer).to(torch.float16).contiguous())
        weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        return _in_place_of(layer, new, weight)

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, Any]) -> bool:
        if key == "threshold":
            return type(value) in (int, float) and 0 <= value <= THRESHOLD_LIMIT
        return key == "bias" and type(value) is bool

    @staticmethod
    def damage(layer: Any) -> str | None:  # type: ignore[override]
        scales = row_scales(layer)
        if scales is None:
            return "SCB, the scales of its codes, is missing"
        if wrong := bad_tensor("its codes", layer.weight.data, layer.in_features * layer.out_features, torch.int8):
            return wrong
        if tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
            return f"its codes are {tuple(layer.weight.shape)}, not {(layer.out_features, layer.in_features)}"
        return bad_tensor("SCB, the scales of its codes,", scales, layer.out_features, torch.float32)

    prepare = Linear4bit.prepare  # type: ignore[assignment]

    @staticmethod
    def dequantised(layer: Any) -> Tensor:  # type: ignore[override]
        return layer.weight.data.float() * (row_scales(layer).float()[:, None] / 127)

    @staticmethod
    def code_bits(layer: Any) -> int:  # type: ignore[override]
        return 8

    @staticmethod
    def export_form(layer: Any) -> nn.Module:  # type: ignore[override]
        return StoredLinear(layer.weight.data[:, None], row_scales(layer).float()[:, None] / 127, None, layer.bias)


def coded(layer: Any, bits: int, **fields: Any) -> nn.Module:
    """The twin of a Linear or Conv1D in 8 or 4 bits."""
    return Linear8bit.from_linear(layer, **fields) if bits == 8 else Linear4bit.from_linear(layer, **fields)


def codes_fit(layer: nn.Module, bits: int, blocksize: int = 64) -> bool:
    """Whether bitsandbytes' kernels read such codes rightly. bitsandbytes 0.50 reads 4-bit rows wrongly on CPUs where a block
    spans two of them, and its AVX512-BF16 path refuses columns that are not in sixty-fours and rows not in thirty-twos."""
    into, out = features(layer)
    return bits == 8 or (into % max(64, blocksize) == 0 and out % 32 == 0)


def codebook(quant_type: str) -> Tensor:
    """(16,), or (15,) where zero has two codes: the values that 4-bit codes stand for, ascending, float32."""
    return _codebook(quant_type)[0]


def scales_read(scales: Tensor) -> Tensor:
    """Scales (out, blocks), float32, as double quantisation gives them back: 8-bit codes, in blocks of 256, of what they are
    off their mean by."""
    codes, offset, state = _nested(scales)
    return library().functional.dequantize_blockwise(codes, state).add_(offset).reshape(scales.shape)


def _four_bit(
    layer: Any, quant_type: str = "nf4", use_double_quant: bool = True, compute_dtype: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """A Linear4bit of a layer's sizes, without its weight, and what the weight is told."""
    bnb = library()

    kept: dict[str, Any] = {"quant_type": quant_type, "compress_statistics": use_double_quant}
    return bnb.nn.Linear4bit(**_sizes(layer), compute_dtype=_dtype(compute_dtype), **kept), kept


def _sizes(layer: nn.Module) -> dict[str, Any]:
    """Of a layer whose weight comes later: on no device, as random numbers for a large one would take seconds."""
    into, out = features(layer)
    return {"input_features": into, "output_features": out, "bias": getattr(layer, "bias", None) is not None, "device": "meta"}


def _params(data: Tensor, **kept: Any) -> Any:
    bnb = library()

    return bnb.nn.Params4bit(data, requires_grad=False, **kept)


def _codebook(quant_type: str) -> tuple[Tensor, Tensor]:
    """The values of the codes, ascending and distinct, and the code of each, uint8."""
    values, codes = library().functional.get_4bit_type(quant_type, device="cpu").sort(stable=True)
    first = torch.cat([torch.ones(1, dtype=torch.bool), values.diff() > 0])  # FP4 has a zero and another below it
    return values[first], codes[first].to(torch.uint8)


def _packed(codes: Tensor, quant_type: str) -> Tensor:
    """(out * in / 2, 1), uint8, of indices into the codebook (out, in): two codes a byte, the first one above."""
    own = _codebook(quant_type)[1].to(codes.device)[codes.flatten().int()]
    return ((own[::2] << 4) | own[1::2])[:, None]


def _nested(scales: Tensor) -> tuple[Tensor, Tensor, Any]:
    flat = scales.float().flatten()
    offset = flat.mean()
    codes, state = library().functional.quantize_blockwise(flat - offset, blocksize=256)
    return codes, offset, state


def _dtype(name: str | None) -> torch.dtype | None:
    return DTYPES[name] if name else None


def _matrix(layer: Any) -> Tensor:
    """(out, in)"""
    weight = layer.weight.detach()
    return weight.T.contiguous() if is_conv1d(layer) else weight


def _in_place_of(old: Any, new: Any, weight: Any) -> nn.Module:
    new.weight, new.bias = weight, old.bias
    return frozen(new.to(old.weight.device))
