"""The folder on disk: saved and loaded, with an adapter that was kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hfcompress.checkpoint.checksums import CHECKSUMS, write_checksums
from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.packed import packed_state
from hfcompress.checkpoint.quantizer import cast_dense, check_layer, forget_reading  # this import registers the loader
from hfcompress.checkpoint.sentence_head import sentence_head_of
from hfcompress.checkpoint.structure import is_stored_packed
from hfcompress.checkpoint.writing import written
from hfcompress.layers import holds_codes, prepare
from hfcompress.layers.bnb_hooks import forget_compute_dtype
from hfcompress.layers.quantized import QuantEmbedding

ADAPTER = "adapter"


def save(model: Any, processor: Any, folder: str | Path, packed: bool | None = None) -> None:
    """Write config.json (with the structure), the weights, an adapter that was kept, the tokenizer or processor, checksums.

    `packed`: whether the weights are entropy coded, without loss; None: as the model came.
    """
    model, folder = getattr(model, "_orig_mod", model), Path(folder)
    with written(folder, "the model"), without_bars():
        (folder / CHECKSUMS).unlink(missing_ok=True)
        with _without_adapter(model, folder / ADAPTER):
            describe(model, packed)
            forget_reading(model)
            _save_weights(model, folder)
        if processor is not None:
            processor.save_pretrained(folder)
        if head := sentence_head_of(model):
            head.save(folder)
        write_checksums(folder)


def _save_weights(model: Any, folder: Path) -> None:
    if not is_stored_packed(model.config):
        model.save_pretrained(folder)
        return
    quantizer = vars(model).pop("hf_quantizer", None)  # it would have its own say on what is written
    try:
        model.save_pretrained(folder, state_dict=packed_state(model))
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer


def load(task: Any, folder: str | Path, **kwargs: Any) -> Any:
    """The model of an artifact, with its adapter if it has one, where and as `open_model` puts it; `kwargs` go there."""
    return task.load_model(str(folder), **kwargs)


def complete(model: Any, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """What `from_pretrained` leaves undone: low-bit layers are checked and frozen, dense ones beside them get the dtype that
    was asked for, and an adapter in the folder is put on.

    Of a plain bitsandbytes checkpoint, transformers 5.23 casts biases and leaves weights as they are stored: no forward runs.
    """
    stored, tells = model.dtype, getattr(model.config, "quantization_config", None) is not None
    coded = [(name, module) for name, module in model.named_modules() if tells and holds_codes(module)]
    for name, module in coded:
        check_layer(name, module)
        forget_compute_dtype(module, stored)
        prepare(module)
        if isinstance(module, QuantEmbedding):
            module.hold_codes(as_buffer=False)
    if coded and dtype is not None:
        for name, parameter in model.named_parameters():
            cast_dense(model, name, parameter, dtype)
        model.config.dtype = dtype
    if (Path(folder) / ADAPTER).is_dir():
        conversions = getattr(model, "_weight_conversions", None)
        model.load_adapter(str(Path(folder) / ADAPTER))
        model._weight_conversions = conversions  # loading puts the adapter's there, and a save would rename the base by them


def forget_quantization(model: Any) -> None:
    """Leave no trace of how a model was stored that is a plain one by now."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if name in vars(owner):
            delattr(owner, name)
    vars(model)["is_quantized"] = False


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars; as before afterwards."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _without_adapter(model: Any, folder: Path) -> Iterator[None]:
    """Save a kept LoRA adapter beside the model, as PEFT does, and take it off while the base is saved."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model.save_pretrained(folder)
    wrapped: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    }
    for name, module in wrapped.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        model.set_submodule(name, base)
    model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        for name, module in wrapped.items():
            model.set_submodule(name, module)
        model._hf_peft_config_loaded = True
