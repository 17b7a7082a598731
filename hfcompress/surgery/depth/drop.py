"""Fewer layers: cut a stack of any architecture, and let the config, the indices and the counts follow.

What has to follow is not known by name: two models on the meta device, as the config describes them before and after, tell it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.depth.stacks import Stack, layer_stacks, lists
from hfcompress.surgery.meta_diff import Counter, counters, differences, follow, reloaded, shapes

# How often a list with an entry a layer is looked for: among fields named so, among all, nowhere.
_MARKS = (("layer", "block"), ("",), ())
# Fields that count a part of the layers, the first so many or the last, are tried in at most so many ways.
_TRIES = 24


def keep_layers(model: Any, cuts: Mapping[str, list[int]], asked: str) -> None:
    """Keep of each stack named the layers listed (ascending indices), in place; whoever counts layers is told.

    The result is what its config describes. CompressionError, signed by who asked, where the config can't tell these layers.
    """
    left = dict(cuts)
    while left:
        name = next(iter(left))
        keep = left.pop(name)
        along = {other for other, same in left.items() if same == keep}
        for done in _keep(model, name, keep, along, asked):
            left.pop(done, None)


def _keep(model: Any, name: str, keep: list[int], along: Collection[str], asked: str) -> list[str]:
    """Cut one stack, and the lists that have an entry for each of its layers; their names are returned."""
    before = reloaded(model, model.config)
    stack = next(one for one in layer_stacks(before) if one.name == name)
    if stack.repeats:
        _use_less(model, stack, keep, asked)
        return []
    after, others = _described(model, before, stack, keep, along, asked)
    layers, old = model.get_submodule(name), before.get_submodule(name)
    for part in _only_in_the_first(old, after.get_submodule(name), keep):
        parent, _, leaf = part.rpartition(".")  # before the list changes: the layer that owns it is about to go
        layers[keep[0]].get_submodule(parent).add_module(leaf, layers[0].get_submodule(part))
    for tensor, axis in _sliced(before, after, [name, *others], stack.count, len(keep)).items():
        _slice(model, tensor, axis, keep, stack.count)
    for one in (name, *others):
        held, new = before.get_submodule(one), after.get_submodule(one)
        stood: Any = model.get_submodule(one)
        for index in reversed(range(stack.count)):
            if index not in keep:
                del stood[index]
        for number, index in enumerate(keep):
            if isinstance(stood[number], nn.Module):
                follow(stood[number], held[index], new[number])  # type: ignore[index]
    follow(model, before, after)
    return others


def _described(
    model: Any, before: nn.Module, stack: Stack, keep: list[int], along: Collection[str], asked: str
) -> tuple[nn.Module, list[str]]:
    """The blank model whose config tells that the stack has these layers and every other stack has its own."""
    mistake = (
        f"no field of {type(model.config).__name__} counts the layers of {stack.name} alone, so {len(keep)} of its "
        f"{stack.count} layers can't be told; possible are stacks with a count of their own; name one as stack."
    )
    best = 0
    for after, others in shortened(model, before, stack, keep, along):
        told, rank = _mistake(before, after, stack, keep, others)
        if not told:
            return after, others
        if rank > best:
            mistake, best = told, rank
    raise CompressionError(f"{asked}: {mistake}")


def shortened(
    model: Any, before: nn.Module, stack: Stack, keep: list[int], along: Collection[str] = ()
) -> Iterator[tuple[nn.Module, list[str]]]:
    """Every blank model with so many layers in the stack that comes of telling the config so, in all ways it may be told,
    and the lists that have become shorter like it. Fields that count a part of the layers are tried last."""
    seen: set[str] = set()
    fitting, failing = [], []
    for counter, marks in itertools.product(counters(model.config, stack.count, "layer"), _MARKS):
        after = _told(model, counter, marks, {}, stack.count, keep, seen)
        others = None if after is None else _others(before, after, stack, len(keep), along)
        if after is None:
            failing.append((counter, marks))
        elif others is not None:
            fitting.append((counter, marks))
            yield after, others
    found = {counter for counter, _ in fitting}
    for counter, marks in [*fitting, *(one for one in failing if not found or one[0] in found)]:
        for partial in _partial(counter.part(model.config), counter, keep, stack.count):
            after = _told(model, counter, marks, partial, stack.count, keep, seen)
            others = None if after is None else _others(before, after, stack, len(keep), along)
            if after is not None and others is not None:
                yield after, others


def _told(
    model: Any, counter: Counter, marks: tuple[str, ...], partial: dict[str, Any], count: int, keep: list[int], seen: set[str]
) -> nn.Module | None:
    """The blank model of a config that is told so, or None if it has been seen or can't be built."""
    config = copy.deepcopy(model.config)
    part: Any = counter.part(config)
    try:
        counter.put(config, len(keep))
        _shorten(part, counter, keep, count, marks)
        for key, value in partial.items():
            setattr(part, key, value)
        told = config.to_json_string()
        if told in seen:
            return None
        seen.add(told)
        return reloaded(model, config)
    except Exception:  # a field of another meaning: the config's own checks, or the model's, refuse the number
        return None


def _partial(config: Any, counter: Counter, keep: list[int], count: int) -> Iterator[dict[str, Any]]:
    """Values of fields that may count the first layers (DeepSeek's dense ones) or the last (Gemma 3n's, which share keys)."""
    choices: dict[str, list[int]] = {}
    for key, value in vars(config).items():
        if type(value) is int and 0 < value <= count and key != counter.key and any(
            word in key for word in ("layer", "dense", "first", "last", "shared", "num_blocks")
        ):  # fmt: skip
            first, last = sum(index < value for index in keep), sum(index >= count - value for index in keep)
            choices[key] = list(dict.fromkeys((value, first, last)))
    ways = itertools.product(*choices.values())
    for way in itertools.islice(ways, 1, _TRIES):
        yield dict(zip(choices, way, strict=True))
    for key, value in vars(config).items():
        if isinstance(value, float) and "scale" in key:  # MiniCPM3 divides it by the root of the number of layers
            yield {key: value * math.sqrt(len(keep) / count)}


def _shorten(config: Any, counter: Counter, keep: list[int], count: int, marks: tuple[str, ...]) -> None:
    """Shorten lists with an entry a layer whose names hold one of the marks.

    By name first: a list may be as long as the stack by chance (special tokens, kernel sizes). Longformer's attention_window
    is found at the second try, as its model is not built without.
    """
    spec = vars(config).pop("_heterogeneity_spec", None)  # it forbids to read the fields in which single layers differ
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and name != counter.key and name[0] != "_" and any(mark in name for mark in marks):
            setattr(config, name, type(value)(_entries(list(value), keep, count)))
        if isinstance(value, str) and len(value) == count and "pattern" in name:  # a letter a layer
            setattr(config, name, "".join(value[index] for index in keep))
        elif name == "attention_types":  # GPT-Neo: [[["global", "local"], 12]], from which it makes attention_layers
            sorts = [sort for pattern, times in value for _ in range(times) for sort in pattern]
            setattr(config, name, [[[sorts[index]], 1] for index in keep] if len(sorts) == count else value)
    if getattr(config, "max_window_layers", None) is not None:  # Qwen: how many layers see everything
        config.max_window_layers = min(config.max_window_layers, len(keep))
    _shorten_outputs(config, keep, count)
    if spec is not None:
        own = spec.per_layer_overrides
        config.per_layer_config = {number: copy.deepcopy(own[index]) for number, index in enumerate(keep) if index in own}


def _shorten_outputs(config: Any, keep: list[int], count: int) -> None:
    """A backbone names the stem and each layer, and says which of their outputs are wanted: the last, if nobody else did."""
    names = list(vars(config).get("stage_names") or [])
    if len(names) == count + 1:
        places = {0: 0, count: len(keep), **{index + 1: number + 1 for number, index in enumerate(keep)}}
        wanted = [places[index] for index in config.out_indices]
        left = names[: len(keep) + 1]
        vars(config).update(stage_names=left, _out_indices=wanted, _out_features=[left[place] for place in wanted])


def _entries(values: list[Any], keep: list[int], count: int) -> list[Any]:
    """A list with an entry a layer keeps the kept layers' entries; a list of layer indices is renumbered; others stay."""
    if len(values) == count and values != list(range(count)):
        return [values[index] for index in keep]
    if all(type(value) is int and 0 <= value < count for value in values):
        return [keep.index(value) for value in values if value in keep]
    return values


def _others(before: nn.Module, after: nn.Module, stack: Stack, length: int, along: Collection[str]) -> list[str] | None:
    """Lists that have an entry for each layer of the stack, if these are all that else got shorter; None if they are not."""
    stacks = {one.name for one in layer_stacks(before)} - {stack.name}
    mine, theirs = (
        {name: len(one) for name, one in lists(model) if not name.startswith(f"{stack.name}.")} for model in (before, after)
    )
    if theirs.get(stack.name) != length:
        return None
    others = [name for name in mine if name != stack.name and theirs.get(name, 0) != mine[name]]
    inside = tuple(f"{name}." for name in others)
    others = [name for name in others if not name.startswith(inside)]
    fits = all(mine[name] == stack.count and theirs.get(name) == length for name in others)
    return others if fits and not (stacks & set(others)) - set(along) else None


def _is_index(key: str, before: Any, after: Any, index: int, number: int) -> bool:
    """Whether a value counts the layers: it moves as the layer does (layer_idx, for caches), or twice as fast (two each)."""
    step = before - after if type(before) is int and type(after) is int else 0
    return step != 0 and (step == index - number or (key == "layer_idx" and step == 2 * (index - number)))


def _only_in_the_first(old: Any, new: Any, keep: list[int]) -> list[str]:
    """Modules that only the first layer of a stack has, when that layer goes: T5's relative position bias serves all layers."""
    if not keep[0]:
        return []
    first, heir, wanted = shapes(old[0]), shapes(old[keep[0]]), shapes(new[0])
    extra = [name for name in wanted if name not in heir]
    owners = sorted({name.rpartition(".")[0] for name in extra})
    known = {name for name, _ in old[keep[0]].named_modules()}
    kinds = {name: type(one) for name, one in new[0].named_modules()}
    if not extra or wanted != first or any(wanted.get(name) != shape for name, shape in heir.items()):
        return []
    if any(kinds.get(name) is not type(one) for name, one in old[keep[0]].named_modules()):
        return []  # ResNet's first layer is of another sort than the others
    return [] if any(owner in known or owner.rpartition(".")[0] not in known for owner in owners) else owners


def _mistake(before: nn.Module, after: nn.Module, stack: Stack, keep: list[int], others: list[str]) -> tuple[str, int]:
    """Why the described model is not the one whose other layers were skipped, or nothing; and how close it came."""
    for name in (stack.name, *others):
        old: Any = before.get_submodule(name)
        new: Any = after.get_submodule(name)
        carried = name == stack.name and _only_in_the_first(old, new, keep)
        for number, index in enumerate(keep):
            if (number or not carried) and isinstance(old[index], nn.Module):
                told = unlike(old[index], new[number], index, number)
                if told:
                    return (
                        f"layer {index} of {name} can't become layer {number}, where the config describes another sort of "
                        f"layer ({told}); possible are layers that keep the order of sorts; "
                        + ("keep layer 0." if not number else f"keep a layer of the sort of layer {number} there.")
                    ), 1 + number
    mine, theirs = (_outside(one, [stack.name, *others]) for one in (before, after))
    sliced = _sliced(before, after, [stack.name, *others], stack.count, len(keep))
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name) and name not in sliced:
            return (
                f"fewer layers of {stack.name} would give {name} the shape {theirs.get(name)} instead of {mine.get(name)}, "
                f"and it serves all layers together; possible are models without such a part; leave the layers as they are."
            ), 1 + len(keep)
    return "", 0


def unlike(old: nn.Module, new: nn.Module, index: int, number: int) -> str:
    """The first way in which a kept layer is not what the config describes at its new place. Lists follow the config's."""
    for name, key, before, after in differences(old, new):
        if type(before) is type(after) and isinstance(before, list | set | dict):
            continue
        if isinstance(before, float) and isinstance(after, float) and math.isclose(before, after, rel_tol=1e-12):
            continue
        if not _is_index(key, before, after, index, number):
            return f"{'.'.join(part for part in (name, key) if part)} is {before!r} and would be {after!r}"
    mine, theirs = shapes(old), shapes(new)
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name):
            return f"{name} is {mine.get(name)} and would be {theirs.get(name)}"
    return ""


def _outside(model: nn.Module, names: list[str]) -> dict[str, tuple[int, ...]]:
    inside = tuple(f"{name}." for name in names)
    return {name: shape for name, shape in shapes(model).items() if not name.startswith(inside)}


def _sliced(before: nn.Module, after: nn.Module, names: list[str], count: int, length: int) -> dict[str, int]:
    """Tensors that hold the parts of all layers side by side, and along which axis: Gemma 3n's embeddings per layer, ESM's
    weights of their attention maps."""
    mine, theirs = _outside(before, names), _outside(after, names)
    found = {}
    for name, shape in mine.items():
        other = theirs.get(name, shape)
        unequal = [axis for axis in range(len(shape)) if len(shape) == len(other) and shape[axis] != other[axis]]
        if (
            ("per_layer" in name or "contact_head" in name)
            and len(unequal) == 1
            and shape[unequal[0]] * length == other[unequal[0]] * count
        ):
            found[name] = unequal[0]
    return found


def _slice(model: nn.Module, name: str, axis: int, keep: list[int], count: int) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    kept = old.detach().unflatten(axis, (count, -1)).index_select(axis, torch.tensor(keep, device=old.device))
    new = kept.flatten(axis, axis + 1).contiguous()
    setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _use_less(model: Any, stack: Stack, keep: list[int], asked: str) -> None:
    """One layer used fewer times: the config alone tells it. Groups of layers take turns in the order they did."""
    groups, count = model.config.num_hidden_groups, stack.count
    turns = [index * groups // count for index in keep]
    now = [number * groups // len(keep) for number in range(len(keep))]
    if turns != now:
        raise CompressionError(
            f"{asked}: layers {keep} of {stack.name} are of the groups {turns}, and the config describes {now}; possible are "
            f"as many of each group; choose others."
        )
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config.num_hidden_layers = len(keep)
