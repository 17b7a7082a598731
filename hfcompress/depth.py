"""Fewer layers: cut a stack of any architecture, and let the config, the indices and the counts follow.

What has to follow is not known by name: two models on the meta device, as the config describes them before and after, tell it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hfcompress.anatomy import layer_stacks
from hfcompress.errors import CompressionError
from hfcompress.layers import blank


def keep_layers(model: Any, stack: str, keep: list[int]) -> None:
    """Keep these layers (ascending indices) of the stack of this name, in place; whoever counts layers is told.

    The result is what its config describes. CompressionError, and no change, where the config can't tell these layers.
    """
    before = blank(model)
    after = _described(model, before, stack, keep)
    old: Any = before.get_submodule(stack)
    new: Any = after.get_submodule(stack)
    layers = model.get_submodule(stack)
    carried = _only_in_the_first(old, new, keep)
    for number, index in enumerate(keep):
        if number or not carried:
            _check_alike(old[index], new[number], index, number, stack)
    _check_rest(before, after, stack)
    for name in carried:  # before the list changes: the layer that owns it is about to go
        parent, _, leaf = name.rpartition(".")
        layers[keep[0]].get_submodule(parent).add_module(leaf, layers[0].get_submodule(name))
    model.set_submodule(stack, nn.ModuleList([layers[index] for index in keep]).train(layers.training))
    for number, index in enumerate(keep):
        _follow(model.get_submodule(f"{stack}.{number}"), old[index], new[number])
    _follow(model, before, after)


def _described(model: Any, before: nn.Module, stack: str, keep: list[int]) -> nn.Module:
    """The blank model whose config tells that the stack has these layers and every other stack has its own."""
    lengths = {one.name: one.count for one in layer_stacks(before)}
    for path, key in _candidates(model.config, lengths[stack]):
        for marks in (("layer", "block"), ("",)):
            config = copy.deepcopy(model.config)
            part = config
            for step in path:
                part = getattr(part, step)
            try:
                _shorten(part, key, keep, lengths[stack], marks)
                after = blank(model, config)
            except Exception:  # a field of another meaning: the config's own checks, or the model's, refuse the number
                continue
            if {one.name: one.count for one in layer_stacks(after)} == {**lengths, stack: len(keep)}:
                return after
    raise CompressionError(
        f"student: no field of {type(model.config).__name__} counts the layers of {stack} alone, so {len(keep)} of its "
        f"{lengths[stack]} layers can't be told; possible are stacks with a count of their own; name one as stack."
    )


def _candidates(config: Any, count: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of sub-configs, field) of every integer equal to the count; fields named after layers first."""
    found = []
    for path, part in _parts(config):
        found += [(path, key) for key, value in vars(part).items() if type(value) is int and value == count]
    yield from sorted(found, key=lambda one: "layer" not in one[1])


def _parts(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value, (*path, key))


def _shorten(config: Any, key: str, keep: list[int], count: int, marks: tuple[str, ...]) -> None:
    """Set the count, and shorten lists with an entry a layer whose names hold one of the marks.

    By name first: a list may be as long as the stack by chance (special tokens, kernel sizes). Longformer's attention_window
    is found at the second try, as its model is not built without.
    """
    setattr(config, key, len(keep))
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and any(mark in name for mark in marks):
            setattr(config, name, type(value)(_entries(list(value), keep, count)))
    if getattr(config, "max_window_layers", None) is not None:  # Qwen: how many layers see everything
        config.max_window_layers = min(config.max_window_layers, len(keep))


def _entries(values: list[Any], keep: list[int], count: int) -> list[Any]:
    """A list with an entry a layer keeps the kept layers' entries; a list of layer indices is renumbered; others stay."""
    if len(values) == count and values != list(range(count)):
        return [values[index] for index in keep]
    if all(type(value) is int and 0 <= value < count for value in values):
        return [keep.index(value) for value in values if value in keep]
    return values


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def plain(module: nn.Module) -> dict[str, Any]:
    """What a module's forward may read beside tensors: numbers, flags, names. Dropout may differ from layer to layer."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple) and not key.startswith("_") and "drop" not in key
        if key != "training" and not (key == "p" and "Drop" in type(module).__name__)
    }


def _differences(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, str, Any, Any]]:
    """(module, attribute, old value, new value) wherever two blank modules are not the same."""
    others = dict(new.named_modules())
    for name, module in old.named_modules():
        if name not in others:
            yield name, "", type(module).__name__, "nothing"
        elif type(module).__name__ != type(others[name]).__name__:
            yield name, "", type(module).__name__, type(others[name]).__name__
        else:
            mine, theirs = plain(module), plain(others[name])
            yield from (
                (name, key, mine.get(key), theirs.get(key))
                for key in {**mine, **theirs}
                if mine.get(key) != theirs.get(key) or type(mine.get(key)) is not type(theirs.get(key))
            )


def _is_index(before: Any, after: Any, index: int, number: int) -> bool:
    """Whether a value counts the layers: it moves as the layer does (layer_idx, for caches)."""
    return type(before) is int and type(after) is int and before - index == after - number


def _only_in_the_first(old: Any, new: Any, keep: list[int]) -> list[str]:
    """Modules that only the first layer of a stack has, when that layer goes: T5's relative position bias serves all layers."""
    if not keep[0]:
        return []
    first, heir, wanted = shapes(old[0]), shapes(old[keep[0]]), shapes(new[0])
    extra = [name for name in wanted if name not in heir]
    owners = sorted({name.rpartition(".")[0] for name in extra})
    known = {name for name, _ in old[keep[0]].named_modules()}
    if not extra or wanted != first or any(name not in wanted for name in heir):
        return []
    return [] if any(owner in known or owner.rpartition(".")[0] not in known for owner in owners) else owners


def _check_alike(old: nn.Module, new: nn.Module, index: int, number: int, stack: str) -> None:
    """A kept layer must be what the config describes at its new place."""
    told = [
        f"{'.'.join(part for part in (name, key) if part)} is {before!r} and would be {after!r}"
        for name, key, before, after in _differences(old, new)
        if not _is_index(before, after, index, number)
    ]
    mine, theirs = shapes(old), shapes(new)
    told += [f"{name} is {mine.get(name)} and would be {theirs.get(name)}" for name in {**mine, **theirs}
             if mine.get(name) != theirs.get(name)]  # fmt: skip
    if told:
        raise CompressionError(
            f"student: layer {index} of {stack} can't become layer {number}, where the config describes another sort of layer "
            f"({told[0]}); possible are layers that keep the order of sorts; " + ("keep layer 0." if not number else
            f"keep a layer of the sort of layer {number} there.")
        )  # fmt: skip


def _check_rest(before: nn.Module, after: nn.Module, stack: str) -> None:
    mine, theirs = ({k: v for k, v in shapes(one).items() if not k.startswith(f"{stack}.")} for one in (before, after))
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name):
            raise CompressionError(
                f"student: fewer layers of {stack} would give {name} the shape {theirs.get(name)} instead of {mine.get(name)}, "
                f"and it serves all layers together; possible are models without such a part; leave the layers as they are."
            )


def _follow(module: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Set whatever the two blanks disagree on, attributes and configs, in the module that went from one to the other."""
    mine, others = dict(module.named_modules()), dict(after.named_modules())
    for name, key, _, value in _differences(before, after):
        if key and name in mine and hasattr(mine[name], key):
            setattr(mine[name], key, value)
    for name, old in before.named_modules():
        configs = [getattr(one, "config", None) for one in (mine.get(name), old, others.get(name))]
        if all(isinstance(config, PreTrainedConfig) for config in configs):  # T5 gives each stack a copy of its own
            _follow_config(*configs)


def _follow_config(config: Any, before: Any, after: Any) -> None:
    for key, value in vars(after).items():
        if isinstance(value, PreTrainedConfig):
            _follow_config(getattr(config, key), getattr(before, key), value)
        elif getattr(before, key, None) != value:
            setattr(config, key, copy.deepcopy(value))
