"""The transformers plug-in: `import hfcompress`, and plain `from_pretrained` loads what hfcompress saved.

Of this package, a checkpoint's config names only layer kinds and sizes; no code, no import path, no pickle comes from it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import FORMAT, Structure, rebuild
from hfcompress.layers import KINDS, holds_codes, stands_in
from hfcompress.layers.bitsandbytes import frozen


@register_quantization_config("hfcompress")
class HfcompressConfig(QuantizationConfigMixin):
    """`config.quantization_config` of a model that its own config can't express."""

    def __init__(self, modules: Structure | None = None, format: int = FORMAT, **unknown: Any) -> None:
        unknown.pop("quant_method", None)
        self.quant_method: Any = "hfcompress"
        self.format, self.modules = format, modules or {}
        if format != FORMAT:
            raise CompressionError(
                f"config.json: hfcompress format {format!r}; this version reads format {FORMAT}; "
                f"upgrade with pip install -U hfcompress."
            )
        if not isinstance(self.modules, dict) or not all(isinstance(edit, dict) for edit in self.modules.values()):
            raise CompressionError(
                "config.json: modules must map module names to edits; the file is damaged; save the model again."
            )
        if unknown:
            raise CompressionError(
                f"config.json: unknown keys {', '.join(sorted(unknown))} in quantization_config; possible are format and "
                f"modules; upgrade with pip install -U hfcompress."
            )

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "format": self.format, "modules": self.modules}

    to_diff_dict = to_dict


class _FromCodes(ConversionOps):
    """Hands a layer's stored tensors to the bitsandbytes reader they belong to; dense weights pass through."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **where: Any) -> dict[str, Any]:
        from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize

        module = where["model"].get_submodule(where["full_layer_name"].rpartition(".")[0])
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if key == "weight" and tensor.dim() == 3:
                input_dict[key], module._clashes = tensor.squeeze(-1), True
        reader = Bnb8bitDeserialize if "SCB" in input_dict else Bnb4bitDeserialize
        return reader(self.hf_quantizer).convert(input_dict, *args, **where)


@register_quantizer("hfcompress")
class HfcompressQuantizer(HfQuantizer):
    """Rebuilds the modules on the meta device before the weights load. bitsandbytes layers may stand among them."""

    quantization_config: HfcompressConfig

    # 4-bit and 8-bit layers may share a model, so one table lists what either stores beside its weight.
    serialized_names = {  # noqa: RUF012  transformers declares it so
        "weight": [
            "weight",
            "SCB",
            "weight_format",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_map",
            "weight.absmax",
            "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4",
        ]
    }

    @property
    def _has_codes(self) -> bool:
        kinds = {edit.get("kind") for edit in self.quantization_config.modules.values()}
        return any(kind.holds_codes for name, kind in KINDS.items() if name in kinds)

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None and self._has_codes and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        rebuild(model, self.quantization_config.modules)
        for module in model.modules():
            if stands_in(module) and not holds_codes(module):
                for part in module.modules():  # what initialises a dense layer would ask for its shape or its bias
                    part._is_hf_initialized = True  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if holds_codes(module):
                frozen(module)
        forget_reading(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and holds_codes(model.get_submodule(owner))

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _FromCodes} if self._has_codes else {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return not self._has_codes


def forget_reading(model: Any) -> None:
    """Let a loaded low-bit model be saved again: transformers 5.23 would try to run the readers backwards, and raises."""
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [
        c
        for c in conversions
        if not any("bit" in type(op).__name__.lower() or isinstance(op, _FromCodes) for op in getattr(c, "operations", ()))
    ]
    if len(kept) != len(conversions):
        model._weight_conversions = kept
