"""Verbs on modules. No choices are made here: index lists say what to keep."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Span, Units, body_linears, channel_axis, reads_weight
from hfcompress.counts import set_count
from hfcompress.errors import CompressionError, did_you_mean
from hfcompress.layers import codes_fit, is_low_bit, kind_of


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


def check_cuttable(model: nn.Module, units: Units) -> None:
    """Raise before the first cut, so that none is left half done."""
    for span in (*units.inputs, *units.outputs):
        layer = model.get_submodule(span.module)
        if is_low_bit(layer) or kind_of(layer) in ("low_rank_linear", "low_rank_embedding"):
            raise CompressionError(
                f"{span.module}: can't cut a {type(layer).__name__}; only dense layers can be cut; list methods that cut "
                f"before low_rank, adapters and quantize."
            )


def cut(model: nn.Module, units: Units, keep: Tensor) -> None:
    """Cut every unit out whose index is not in `keep`, ascending, (kept,), or (lanes, kept). Equal to silencing them."""
    check_cuttable(model, units)
    for span in (*units.inputs, *units.outputs):
        keep_entries(model, span, span.index(keep, units.count))
    for counter in units.counters:
        set_count(model.get_submodule(counter.module), counter.attribute, counter.worth * keep.shape[-1])


def keep_entries(model: nn.Module, span: Span, index: Tensor) -> None:
    """Keep these entries along an axis of a tensor, in place; the module that owns it counts its features anew.

    `index`: (entries,), or (lanes, entries) for a tensor whose axis 0 are the lanes.
    """
    owner, leaf = model.get_submodule(span.module), span.leaf
    old = getattr(owner, leaf)
    index = index.to(old.device)
    if index.dim() == 1:
        new = old.detach().index_select(span.axis, index)
    else:
        shape = [1] * old.dim()
        shape[0], shape[span.axis] = index.shape
        expanded = [*old.shape]
        expanded[span.axis] = index.shape[1]
        new = old.detach().gather(span.axis, index.reshape(shape).expand(expanded))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
    setattr(owner, leaf, new)
    for key, value in vars(owner).items():
        if key.endswith("cache") and isinstance(value, dict):  # LeViT keeps biases that it computed of the old ones
            value.clear()
    if leaf == "weight":
        for attribute in _sizes_along(owner, span.axis):
            setattr(owner, attribute, index.shape[-1])


def _sizes_along(layer: nn.Module, axis: int) -> tuple[str, ...]:
    """The attributes in which a layer keeps the length of its weight along an axis."""
    if isinstance(layer, Conv1D):
        return ("nx", "nf")[axis : axis + 1]
    if isinstance(layer, nn.Linear):
        return ("out_features", "in_features")[axis : axis + 1]
    if isinstance(layer, nn.Embedding):
        return ("num_embeddings", "embedding_dim")[axis : axis + 1]
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        depthwise = layer.groups == layer.out_channels == layer.in_channels != 1
        return ("out_channels", "in_channels", "groups") if depthwise else ("out_channels", "in_channels")[axis : axis + 1]
    return ()


class Gates(Protocol):
    """Factors for what holds the units: `x` (..., count, size) is an activation, its batch first, or experts' weights."""

    def __call__(self, x: Tensor) -> Tensor: ...


def gate(model: nn.Module, units: Units, gates: Gates) -> Removable:
    """Multiply what each unit hands to `outputs` by `gates(x)`, which broadcasts against (..., count, size), until removed.

    A hook and not a module, so that a checkpoint's keys stay the model's own. It is called once for every time that a module
    in `outputs` runs.
    """
    return Removable([_gate_one(model, units, span, gates) for span in units.outputs])


class Removable:
    """Several hooks that come off together."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _gate_one(model: nn.Module, units: Units, span: Span, gates: Gates) -> Any:
    module = model.get_submodule(span.module)
    if units.lanes > 1:
        return _gate_weight(module, span.leaf, units, span, gates)
    channel = channel_axis(module)

    def scale(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_scaled(inputs[0], channel, (units.count, span.width), gates), *inputs[1:])

    scale.is_gate = True  # type: ignore[attr-defined]
    return module.register_forward_pre_hook(scale)


def _gate_weight(module: nn.Module, leaf: str, units: Units, span: Span, gates: Gates) -> Removable:
    """Experts read their units inside one forward: there, the weight itself is seen multiplied, (lanes, ..., count, size)."""

    def scale(module: nn.Module, _: Any) -> None:
        # An instance attribute hides the parameter of the same name, which stays where it is.
        vars(module)[leaf] = _scaled(module._parameters[leaf], span.axis, (units.count, span.width), gates)

    def restore(module: nn.Module, *_: Any) -> None:
        vars(module).pop(leaf, None)

    scale.is_gate = True  # type: ignore[attr-defined]
    return Removable([module.register_forward_pre_hook(scale), module.register_forward_hook(restore, always_call=True)])


def _scaled(x: Any, axis: int, sizes: tuple[int, int], gates: Gates) -> Tensor:
    blocks = x.movedim(axis, -1).unflatten(-1, sizes)
    return (blocks * gates(blocks)).flatten(-2).to(x.dtype).movedim(-1, axis)


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
    # What transformers keeps in float32, or casts an input to the dtype of, must not become codes: T5 does both with `wo`.
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    dense = [part for attribute in kept for part in getattr(model, attribute, None) or ()]
    renames = get_model_conversion_mapping(model, add_legacy=False)
    return [
        name
        for name in body_linears(model)
        if codes_fit(model.get_submodule(name), bits)
        and not any(f".{part}." in f".{name}." for part in dense)
        and not any(reads_weight(*one, even_dtype=True) for one in _owners(model, name))
        # The scales of codes are found by the name of their weight, which a load must leave as it is and not find twice.
        and not any(part.endswith("weight") for part in name.split("."))
        and all(one.rename_source_key(key)[0] == key for key in (f"{name}.weight", f"{name}.SCB") for one in renames)
    ]


def _owners(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Every module on the way to one, with the attribute under which the way goes on."""
    parts = name.split(".")
    yield from ((model.get_submodule(".".join(parts[:depth])), part) for depth, part in enumerate(parts))


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
