"""Verbs on modules: put one in another's place, copy a model, make it another; whether it can be edited at all."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hfcompress.checkpoint.errors import CompressionError


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in another's place, in the same train or eval mode."""
    new.train(model.get_submodule(name).training)
    model.set_submodule(name, new)


def copied(model: nn.Module) -> Any:
    """A frozen copy in eval mode. A forward that a library put on the object is left behind, as it may call the original, and
    so are gates."""
    copy = deepcopy(model)
    if "forward" in vars(copy) and not hasattr(copy, "_hf_hook"):
        del copy.forward
    for module in copy.modules():  # deepcopy shares functions: gates would go on fading in the copy
        for number, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "is_gate", False):
                del module._forward_pre_hooks[number]
    return copy.eval().requires_grad_(False)


def become(model: nn.Module, other: nn.Module) -> nn.Module:
    """Make `model` the model that `other` is, in place, so that whoever holds `model` now holds the other. `other` is used up.

    An object is its class and its `__dict__`: both are taken over, the modules, parameters and config with it. What stays is
    train or eval mode, and hooks on the model itself: a distillation that rides along hangs on one.
    """
    hooks = {key: value for key, value in vars(model).items() if "hook" in key}
    training = model.training
    model.__class__ = type(other)
    vars(model).clear()
    vars(model).update({**vars(other), **hooks})
    return model.train(training)


def check_editable(model: Any, where: str) -> None:
    """A transformers model whose weights are here, and its own: PEFT's layers stand where a dense one was."""
    kind = type(model).__name__
    if not isinstance(getattr(model, "config", None), PreTrainedConfig) or hasattr(model, "_orig_mod"):
        raise CompressionError(
            f"{where}: a {kind} is no transformers model, or a wrapper of one; give the PreTrainedModel itself, before "
            f"torch.compile or anything else wraps it."
        )
    if getattr(model, "peft_config", None):
        raise CompressionError(f"{where}: the model carries an adapter; merge it first, or list {where} before adapters.")
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise CompressionError(
            f"{where}: {away} is not in memory, as the model is offloaded to disk or on the meta device; load it where it "
            f"fits, with device_map='cpu' if need be."
        )
