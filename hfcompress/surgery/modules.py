"""Verbs on modules: put one in another's place, copy a model, make it another, give it back as it was after an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hfcompress.checkpoint.config_fields import parts
from hfcompress.checkpoint.errors import CompressionError

HALVES = (torch.float16, torch.bfloat16)


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in another's place, in the same train or eval mode."""
    new.train(model.get_submodule(name).training)
    model.set_submodule(name, new)


def copied(model: nn.Module) -> Any:
    """A frozen copy in eval mode. A forward that a library put on the object is left behind, as it may call the original, and
    so are gates."""
    twin = deepcopy(model)
    if "forward" in vars(twin) and not hasattr(twin, "_hf_hook"):
        del twin.forward
    for module in twin.modules():  # deepcopy shares functions: gates would go on fading in the copy
        for hooks in (module._forward_pre_hooks, module._state_dict_hooks):
            for number, hook in list(hooks.items()):
                if getattr(hook, "is_gate", False):
                    del hooks[number]
    return twin.eval().requires_grad_(False)


def forget_codes(model: Any) -> None:
    """transformers takes a model that was loaded in low bits for one until these are gone, and refuses to train or cast it."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)


def is_gated(module: nn.Module) -> bool:
    """Whether units that this module reads are fading."""
    return any(getattr(hook, "is_gate", False) for hook in module._forward_pre_hooks.values())


def body_of(model: Any) -> Any:
    """The transformers model inside what a Trainer is given: DistributedDataParallel, or a SentenceTransformer, whose first
    module holds it as `auto_model`."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    held = (getattr(part, "auto_model", None) for part in model) if isinstance(model, nn.Sequential) else ()
    return next((one for one in held if isinstance(one, nn.Module)), model)


@contextmanager
def restored_on_error(model: Any) -> Iterator[None]:
    """On an error, the model is given back as it was: its modules, parameters, counts and config, and what of it is trained.

    What was replaced is kept until then, not copied. Values that were written in place are not taken back, nor are hooks, which
    belong to whoever put them there.
    """
    modules = [(module, type(module), _attributes(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fields = [(part, _shallow(vars(part))) for part in _configs(model)]
    try:
        yield
    except GeneratorExit:  # nothing failed: whoever held this open has let go of it
        raise
    except BaseException:
        devices = {parameter.device for parameter in model.parameters()}
        for module, kind, attributes in modules:
            module.__class__ = kind
            _keep_only_hooks(module).update(attributes)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)
        for part, values in fields:
            vars(part).clear()
            vars(part).update(values)
        if len(devices) == 1 and devices != {parameter.device for parameter in model.parameters()}:
            nn.Module.to(model, devices.pop())  # what was out of the model stayed behind when the rest moved
        raise


def _configs(model: Any) -> list[Any]:
    found = [*parts(model.config)] if isinstance(getattr(model, "config", None), PreTrainedConfig) else []
    generation = getattr(model, "generation_config", None)
    return found if generation is None else [*found, generation]


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: copy(value) if isinstance(value, dict | list | set) else value for key, value in attributes.items()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    return _shallow({key: value for key, value in vars(module).items() if "hook" not in key and key != "training"})


def _keep_only_hooks(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, emptied but for its hooks and its mode."""
    attributes = vars(module)
    for key in [key for key in attributes if "hook" not in key and key != "training"]:
        del attributes[key]
    return attributes


@contextmanager
def in_float32(model: nn.Module, halves: tuple[torch.dtype, ...] = HALVES, gives_back: bool = True) -> Iterator[None]:
    """Dense weights of half precision in float32, as training and gradients need them; afterwards in the dtype they had, unless
    something in the meantime casts them and it is not to be given back.

    Half of a training's updates are below what bfloat16 can tell of a weight, and small gradients vanish in float16. What was
    put in meanwhile gets the dtype that most of the model had.
    """
    before = {name: value.dtype for name, value in _floats(model)}
    most = Counter(before.values()).most_common(1)
    if not any(dtype in halves for dtype in before.values()):
        yield
        return
    _to_dtypes(model, {name: torch.float32 for name, dtype in before.items() if dtype in halves}, None)
    try:
        yield
    finally:
        if gives_back:
            _to_dtypes(model, before, most[0][0])  # what is in half precision by now was cast on purpose


def _floats(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_floating_point()]


def _to_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype], others: torch.dtype | None) -> None:
    for name, value in _floats(model):
        dtype = dtypes.get(name, others)
        if dtype is not None and value.dtype != dtype and (others is None or value.dtype == torch.float32):
            value.data = value.data.to(dtype)


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
    check_here(model, where)


def check_here(model: nn.Module, where: str) -> None:
    """No weight is on the meta device."""
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise CompressionError(
            f"{where}: {away} is not in memory, as the model is offloaded to disk or on the meta device; load it where it "
            f"fits, with device_map='cpu' if need be."
        )
