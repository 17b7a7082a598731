"""Verbs on modules. No choices are made here: index lists say what to keep."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Units, body_linears
from hfcompress.errors import CompressionError, did_you_mean
from hfcompress.layers import codes_fit, kind_of


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


def keep_rows(layer: nn.Module, index: Tensor, name: str = "") -> None:
    """Keep these output features of a Linear, weight (out, in), or a Conv1D, weight (in, out). In place."""
    _dense(layer, name)
    dim = 1 if isinstance(layer, Conv1D) else 0
    layer.weight = _kept(layer.weight, index, dim)  # type: ignore[assignment]
    if layer.bias is not None:
        layer.bias = _kept(layer.bias, index, 0)  # type: ignore[assignment]
    setattr(layer, "nf" if isinstance(layer, Conv1D) else "out_features", len(index))


def keep_columns(layer: nn.Module, index: Tensor, name: str = "") -> None:
    """Keep these input features of a Linear or a Conv1D. In place."""
    _dense(layer, name)
    dim = 0 if isinstance(layer, Conv1D) else 1
    layer.weight = _kept(layer.weight, index, dim)  # type: ignore[assignment]
    setattr(layer, "nx" if isinstance(layer, Conv1D) else "in_features", len(index))


def _kept(parameter: Any, index: Tensor, dim: int) -> nn.Parameter:
    index = index.to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index).contiguous(), requires_grad=parameter.requires_grad)


def _dense(layer: nn.Module, name: str) -> None:
    if kind_of(layer) not in ("linear", "conv1d"):
        raise CompressionError(
            f"{name}: can't cut a {type(layer).__name__}; only dense layers can be cut; list prune_heads and prune_neurons "
            f"before low_rank, adapters and quantize."
        )


def check_cuttable(model: nn.Module, units: Units) -> None:
    """Raise before the first cut, so that none is left half done."""
    for name in (*units.inputs, units.output):
        _dense(model.get_submodule(name), name)


def cut(model: nn.Module, units: Units, keep: Tensor) -> None:
    """Cut every unit out whose index is not in `keep` (sorted, shape (kept,)). Equal to silencing them."""
    check_cuttable(model, units)
    for name, rows in zip(units.inputs, units.rows, strict=True):
        blocks = [_columns(keep, rows) + block * units.count * rows for block in range(units.fused)]
        keep_rows(model.get_submodule(name), torch.cat(blocks), name)
    keep_columns(model.get_submodule(units.output), _columns(keep, units.size), units.output)
    owner = model.get_submodule(units.owner)
    for attribute, worth in units.counters.items():
        setattr(owner, attribute, worth * len(keep))


def _columns(units: Tensor, size: int) -> Tensor:
    """Indices of the features that units of `size` features cover."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def gate(model: nn.Module, units: Units, gates: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Multiply what the output projection reads from each unit by `gates(x)`, of shape (..., count, 1), until removed.

    A hook and not a module, so that a checkpoint's keys stay the model's own.
    """

    def scale(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        scaled = x.unflatten(-1, (units.count, units.size)) * gates(x)
        return (scaled.flatten(-2).to(x.dtype), *inputs[1:])

    scale.is_gate = True  # type: ignore[attr-defined]
    return model.get_submodule(units.output).register_forward_pre_hook(scale)


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


def codable(model: Any, bits: int = 8) -> list[str]:
    """Names of the body's dense layers that may become codes of so many bits."""
    # T5 casts its input to the dtype of `wo`, so what transformers keeps in float32 must not become codes.
    dense = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    names = [name for name in body_linears(model) if not any(f".{part}." in f".{name}." for part in dense)]
    return [name for name in names if codes_fit(model.get_submodule(name), bits)]


def check_no_adapter(model: Any, where: str) -> None:
    """PEFT's layers stand where a dense one was: nothing may be cut, factored or coded below an adapter."""
    if getattr(model, "peft_config", None):
        raise CompressionError(f"{where}: the model carries an adapter; merge it first, or list {where} before adapters.")


def matching(model: nn.Module, targets: list[str], possible: list[str], where: str) -> list[str]:
    """The names among `possible` that end with one of the targets, as PEFT's `target_modules` do; each must match."""
    for target in targets:
        if not any(_matches(name, target) for name in possible):
            leaves = {name.rpartition(".")[2] for name in possible}
            raise CompressionError(
                f"{where}: target_modules {target!r} matches no layer of {type(model).__name__}."
                + did_you_mean(target.rpartition(".")[2], leaves)
            )
    return [name for name in possible if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
