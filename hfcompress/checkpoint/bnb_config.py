"""What stock libraries can load without hfcompress: a model that is only quantised is a plain bitsandbytes checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.quantizers.quantizers_utils import should_convert_module

from hfcompress.checkpoint.structure import twin
from hfcompress.layers import features, kind_of
from hfcompress.layers.bnb_hooks import needs_us


def as_bitsandbytes(model: Any, edits: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The plain bitsandbytes config, if low-bit layers of one sort are all that changed; such a checkpoint needs no import."""
    if not all(edit["kind"] in ("linear_4bit", "linear_8bit") for edit in edits.values()):
        return None
    sorts = {
        tuple(sorted((k, v) for k, v in e.items() if k not in ("in_features", "out_features", "bias"))) for e in edits.values()
    }
    described = twin(model)
    if len(sorts) != 1 or any(
        features(described.get_submodule(name)) != (edit.get("in_features"), edit.get("out_features"))
        or edit.get("bias") != (getattr(described.get_submodule(name), "bias", None) is not None)
        for name, edit in edits.items()
    ):
        return None
    sort = dict(sorts.pop())
    skipped = _dense_names(model)
    left_alone = [*skipped, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    if not all(should_convert_module(name, left_alone) and not needs_us(model.get_submodule(name)) for name in edits):
        return None
    if any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in model.modules()):
        return None  # Llama 4's experts: a quantised load puts others in their place, for which there are no weights
    if sort["kind"] == "linear_8bit":
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": sort["threshold"],
            "llm_int8_skip_modules": skipped,
        }
    if sort["kind"] == "linear_4bit":
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": sort["quant_type"],
            "bnb_4bit_use_double_quant": sort["compress_statistics"],
            # It can't say "that of the input", which is the model's.
            "bnb_4bit_compute_dtype": sort["compute_dtype"] or str(model.dtype).removeprefix("torch."),
            "llm_int8_skip_modules": skipped,
        }
    return None


def _dense_names(model: Any) -> list[str]:
    """Linear layers that a load must leave dense, named so that they hold for `AutoModel` too: without the base's prefix,
    and with what only a bare base model has, such as RoBERTa's pooler, which the checkpoint does not hold."""
    names = [name for name, module in model.named_modules() if kind_of(module) in ("linear", "conv1d")]
    prefix = model.base_model_prefix
    inner = getattr(model, prefix, None)
    if isinstance(inner, nn.Module):
        mine = {name for name, _ in inner.named_modules()}
        bare = twin(inner).named_modules()
        names += [name for name, module in bare if name not in mine and kind_of(module) in ("linear", "conv1d")]
    return [name.removeprefix(f"{prefix}.") for name in names]
