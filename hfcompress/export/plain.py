"""A model as exporters read it: each layer of ours in plain operators, and no trace of what stored it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfcompress.checkpoint.artifact import forget_quantization
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import KINDS, dense_form, kind_of


def plain(model: Any, keep_codes: bool = True) -> Any:
    """The same model, its layers replaced in place, in float32.

    `keep_codes`: codes stay codes beside their scales, and are worked out as they are read; else their layers become dense, for
    quantisers that choose codes of their own. An adapter that was kept is merged into dense weights.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CompressionError(
            "export: an adapter lies beside the model, and an export holds one model; set merge: true where it was trained, or "
            "take the folder adapter/ away."
        )
    forms: dict[int, nn.Module] = {}  # a layer that is used in several places stays one
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):  # factors before what they are part of
        kind = kind_of(module)
        if kind is not None and KINDS[kind].stands_in:
            is_dense = not keep_codes and KINDS[kind].holds_codes and "linear" in KINDS[kind].replaces
            if id(module) not in forms:
                forms[id(module)] = dense_form(module, torch.float32) if is_dense else KINDS[kind].export_form(module)  # type: ignore[arg-type]
            model.set_submodule(name, forms[id(module)])
    forget_quantization(model)
    return nn.Module.float(model).eval().requires_grad_(False)
