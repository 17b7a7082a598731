"""The transformers plug-in: `import hfcompress`, and plain `from_pretrained` loads what hfcompress saved.

Of this package, a checkpoint's config names only layer kinds and sizes; no code, no import path, no pickle comes from it.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.checkpoint.errors import INSTALL, CompressionError, shown
from hfcompress.checkpoint.structure import FORMAT, PACKED, Structure, is_stored_packed, kept_in_float32, name_in, rebuild
from hfcompress.layers import KINDS, holds_codes, kind_of, prepare, stands_in
from hfcompress.layers.quantized import QuantEmbedding

MODULES = "modules.json"
"""What sentence-transformers writes beside a model of its own."""


@register_quantization_config("hfcompress")
class HfcompressConfig(QuantizationConfigMixin):
    """`config.quantization_config` of a model that its own config can't express."""

    def __init__(
        self, modules: Structure | None = None, format: int = FORMAT, storage: str | None = None, **unknown: Any
    ) -> None:
        unknown.pop("quant_method", None)
        self.quant_method: Any = "hfcompress"
        self.format, self.modules, self.storage = format, modules or {}, storage
        if format != FORMAT:
            raise CompressionError(
                f"config.json: hfcompress format {shown(format)}; this version reads format {FORMAT}; "
                f"get a newer hfcompress, which {INSTALL}."
            )
        if not isinstance(self.modules, dict) or not all(isinstance(edit, dict) for edit in self.modules.values()):
            raise CompressionError(
                "config.json: modules must map module names to edits; the file is damaged; save the model again."
            )
        if unknown or storage not in (None, PACKED):
            what = f"unknown keys {shown(', '.join(sorted(unknown)))}" if unknown else f"storage {shown(storage)}"
            raise CompressionError(
                f"config.json: {what} in quantization_config; possible are format, modules and storage: {PACKED}; get a newer "
                f"hfcompress, which {INSTALL}."
            )

    def to_dict(self) -> dict[str, Any]:
        stored = {} if self.storage is None else {"storage": self.storage}
        return {"quant_method": self.quant_method, "format": self.format, "modules": self.modules, **stored}

    to_diff_dict = to_dict


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
        kinds = [edit.get("kind") for edit in self.quantization_config.modules.values()]
        return any(kind.holds_codes for name, kind in KINDS.items() if name in kinds)

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None and self._has_codes and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        self._beside = [Path(file).parent for file in checkpoint_files or ()]
        if self.quantization_config.storage == PACKED:
            self._unpack(checkpoint_files)
        self._files = [str(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        rebuild(model, self.quantization_config.modules)
        # What is read as codes may be is not cast by transformers, so that dense weights must be, afterwards.
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()} if self._has_codes else {}
        for module in model.modules():
            if stands_in(module) and KINDS[kind_of(module) or ""].is_ours:
                for part in module.modules():  # what initialises a dense layer would ask for its shape or its bias
                    part._is_hf_initialized = True  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self._check_loaded(model)
        check_types(model)
        coded = [module for module in model.modules() if holds_codes(module)]
        for module in coded:
            prepare(module)
        if coded:  # as transformers' own quantizers say it, and PEFT asks
            model.is_loaded_in_4bit = any(kind_of(module) == "linear_4bit" for module in coded)
            model.is_loaded_in_8bit = any(kind_of(module) == "linear_8bit" for module in coded)
        for name, parameter in model.named_parameters():
            cast_dense(model, name, parameter, self._dtypes.get(name, parameter.dtype))
        if (unpacked := vars(self).pop("_unpacked", None)) is not None:
            self._after_unpacking(model, unpacked)
        if any((folder / MODULES).is_file() for folder in self._beside):
            for module in model.modules():
                if isinstance(module, QuantEmbedding):
                    module.hold_codes(as_buffer=True)
        forget_reading(model)
        return model

    def _unpack(self, files: list[str] | None) -> None:
        """Have transformers read what the streams in these files hold, from files that are gone when the model is there."""
        from hfcompress.checkpoint.packed import unpack_file

        self._unpacked = TemporaryDirectory(prefix="hfcompress-unpacked-", ignore_cleanup_errors=True)
        for place, file in enumerate(files or ()):
            if str(file).endswith(".safetensors"):
                files[place] = str(Path(self._unpacked.name) / f"{place}.safetensors")  # type: ignore[index]
                unpack_file(file, files[place])  # type: ignore[index]

    def _after_unpacking(self, model: Any, folder: Any) -> None:
        from hfcompress.checkpoint.packed import unpack_state

        model.register_load_state_dict_pre_hook(unpack_state)
        if any(parameter.is_meta for parameter in model.parameters()):  # on disk: read from there when it is needed
            vars(model)["_unpacked_files"] = folder

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """A packed checkpoint is saved packed again, by `save_pretrained` too; an adapter on it is a file of PEFT's."""
        if not is_stored_packed(model.config) or getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        from hfcompress.checkpoint.packed import packed_state

        return packed_state(model), {}

    def _check_loaded(self, model: Any) -> None:
        """Nothing that the structure names is missing, or another than it says, before anything computes with it."""
        lost = missing(model)
        whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name, edit in self.quantization_config.modules.items():
            here = name_in(model, name)
            if here is not None:
                check_layer(name, model.get_submodule(here), edit)
                for tensor in lost:
                    if tensor.startswith(f"{here}.") and tensor not in tied:
                        raise _damaged(tensor, "it is missing from the file of weights")
        optional = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]
        kept: set[str] = set()  # what is there in another size was let go by ignore_mismatched_sizes
        for file in self._files if whole and lost else ():
            with safe_open(file, framework="pt") as tensors:
                kept |= set(tensors.keys())
        for name in lost if whole and kept else ():
            if name not in {*tied, *kept} and not any(re.search(pattern, name) for pattern in optional):
                raise _damaged(name, "it is missing from the file of weights")

    def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and _is_foreign(model.get_submodule(owner))

    def get_load_operations(self) -> dict[str, Any]:
        kinds = [edit.get("kind") for edit in self.quantization_config.modules.values()]
        if all(kind.is_ours for name, kind in KINDS.items() if name in kinds):
            return {}
        from hfcompress.checkpoint.from_codes import FromCodes

        return {"deserialize": FromCodes}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return not self._has_codes


def _is_foreign(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    return kind is not None and not KINDS[kind].is_ours


def check_layer(name: str, layer: nn.Module, edit: dict[str, Any] | None = None) -> None:
    """That a loaded layer has all its tensors, of the sizes and types that belong together; CompressionError if not."""
    kind = kind_of(layer)
    if kind is not None:
        if wrong := getattr(layer, "unread", None) or KINDS[kind].damage(layer):
            raise _damaged(name, wrong)
        fields = KINDS[kind].fields(layer)
        for key, value in (edit or {}).items():
            if key in fields and fields[key] != value:
                raise _damaged(name, f"{key} is {shown(fields[key])} in the file of weights and {shown(value)} in config.json")


def check_types(model: nn.Module) -> None:
    """That what is not codes holds floating-point numbers; transformers casts between those alone. CompressionError if not."""
    for owner, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() and not (leaf == "weight" and holds_codes(module)):
                raise _damaged(f"{owner}.{leaf}", f"it holds {str(parameter.dtype).removeprefix('torch.')} where floats belong")


def cast_dense(model: nn.Module, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Cast a parameter that is not codes, in place, as transformers casts while it loads: some kinds stay in float32."""
    dtype = torch.float32 if kept_in_float32(model, name, dtype) else dtype
    if parameter.is_floating_point() and dtype.is_floating_point and parameter.dtype != dtype:
        parameter.data = parameter.data.to(dtype)


def missing(model: nn.Module) -> list[str]:
    """The parameters, and buffers that a checkpoint holds, which transformers did not find there; it marks what it found."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        kept = [(key, buffer) for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set]
        tensors |= {f"{prefix}.{key}".removeprefix("."): buffer for key, buffer in kept if buffer is not None}
    found = {name for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    return [name for name in tensors if name not in found] if found else []


def _damaged(name: str, what: str) -> CompressionError:
    return CompressionError(f"{shown(name)}: {what}; the checkpoint is damaged: download it again, or save the model again.")


def forget_reading(model: Any) -> None:
    """Let a loaded low-bit model be saved again: transformers 5.23 would try to run the readers backwards, and raises."""
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [
        c
        for c in conversions
        if not any(
            "bit" in type(op).__name__.lower() or type(op).__name__ == "FromCodes" for op in getattr(c, "operations", ())
        )
    ]
    if len(kept) != len(conversions):
        model._weight_conversions = kept
