"""A model of low-bit layers switched over to what is fastest here, for inference alone."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import KINDS, holds_codes, kind_of

log = logging.getLogger("hfcompress")
_SWITCHED = "a model that was switched to inference can't be"


def fast(model: Any) -> Any:
    """Switch layers of codes, in place, to the form in which they compute fastest here, at the price of memory; the same model.

    Layers that bitsandbytes unpacks at every forward on CPUs are repacked for its fused kernel where the processor has
    AVX512-BF16 (which multiplies in bfloat16), and else unpacked once, into the dtype they were coded from; those of our own
    keep what they unpack. On CUDA devices our 4 bits are laid out once more for PyTorch's own kernel (tinygemm), which is asked
    for up to 8 rows in bfloat16. All else stays as it is. What was switched can neither be trained nor saved: load it again.
    """
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise CompressionError(f"fast: {away} is not in memory; load the model whole, with device_map='cpu' if need be.")
    model.eval()
    switched = 0
    for name, module in list(model.named_modules()):
        if holds_codes(module):
            new = KINDS[kind_of(module) or ""].fast_form(module)
            if new is not None:
                model.set_submodule(name, _guarded(new.eval()))
                switched += 1
    log.info("fast: %d layers are switched to inference", switched)
    return model


def is_fast(model: nn.Module) -> bool:
    """Whether layers of it are switched to inference."""
    return any(getattr(module, "is_fast", False) for module in model.modules())


def _guarded(layer: Any) -> Any:
    layer.is_fast = True
    layer.register_state_dict_pre_hook(_refuse_saving)
    layer.register_forward_pre_hook(_refuse_training)
    return layer


def _refuse_saving(*_: Any) -> None:
    raise CompressionError(f"fast: {_SWITCHED} saved; save it before, or load it again.")


def _refuse_training(layer: nn.Module, _: Any) -> None:
    if layer.training:
        raise CompressionError(f"fast: {_SWITCHED} trained; call eval(), or load it again.")
