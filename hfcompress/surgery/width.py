"""Narrower copies: the same architecture with smaller sizes, every parameter a block of the one it had."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError, did_you_mean, first_line
from hfcompress.checkpoint.structure import twin
from hfcompress.surgery.depth.stacks import layer_stacks
from hfcompress.surgery.meta_diff import plain, shapes
from hfcompress.surgery.modules import become
from hfcompress.surgery.units.owned import norms
from hfcompress.surgery.units.spans import Units
from hfcompress.surgery.units.verify import KINDS, units_of

Index = dict[tuple[str, int], Tensor]
"""(parameter, axis) -> which of its entries stay, ascending."""


def narrow(model: Any, sizes: dict[str, int]) -> None:
    """Give the config these smaller sizes and every parameter the block of its old values that is left, in place.

    The same residual dimensions stay in the whole model, and whole heads and neurons of each layer, so that the result is a
    sub-network. Where heads and neurons are proven they are chosen by L2 norm; in others the leading ones stay, where shapes
    show that these are whole units. CompressionError, and no change, where they do not.
    """
    before = twin(model)
    _check_as_described(model, before)
    config, after = _smaller(model, sizes, before)
    changed = _changed(before, after)
    index = _by_norm(model, after, changed) or _leading(model, before, after, changed, sizes)
    with torch.random.fork_rng(devices=[]):
        narrower: Any = type(model)(config)
    _fill(model, narrower, index)
    if hasattr(model, "generation_config"):
        narrower.generation_config = model.generation_config
    become(model, narrower)


def _check_as_described(model: nn.Module, before: nn.Module) -> None:
    mine, described = shapes(model), shapes(before)
    for name in {**mine, **described}:
        if mine.get(name) != described.get(name):
            raise CompressionError(
                f"student: {name} has the shape {mine.get(name)} and the config describes {described.get(name)}, so sizes "
                f"of the config can't narrow it; possible are models as their config describes them; list student before steps "
                f"that cut, factor or quantise."
            )


def _smaller(model: Any, sizes: dict[str, int], before: nn.Module) -> tuple[Any, nn.Module]:
    """The config with these sizes, and its blank model; each size is checked to be one."""
    aliases = getattr(model.config, "attribute_map", {})
    config: Any = copy.deepcopy(model.config)
    named = {aliases.get(key, key): value for key, value in sizes.items()}
    given = set(named)
    # A size that another part of the model took over from this one: DeBERTa's pooler_hidden_size.
    for key in sorted(given):
        for other, now in vars(config).items():
            if "_" in key and other.endswith(f"_{key}") and now == getattr(config, key, None):
                named.setdefault(other, named[key])
    fields = [key for key, value in vars(config).items() if type(value) is int and not key.endswith("_id")]
    for key, value in named.items():
        now = getattr(config, key, None)
        if key not in vars(config):
            raise CompressionError(
                f"student: config: {type(config).__name__} has no field {key!r}.{did_you_mean(key, [*fields, *aliases])}"
            )
        if key.endswith("_id") or type(now) not in (int, type(None)):
            raise CompressionError(f"student: config: {key} = {now!r} is no size.{did_you_mean(key, fields)}")
        if type(value) is not int or value < 1 or (now is not None and value > now):
            raise CompressionError(f"student: config: {key} = {value!r}; possible are integers from 1 to the original's {now}.")
    after = _built(model, config, named)
    if [stack.count for stack in layer_stacks(before)] != [stack.count for stack in layer_stacks(after)]:
        raise CompressionError("student: config: sizes make layers narrower, not fewer; give layers, every or number for that.")
    for key, value in named.items():
        if key in given and value != getattr(model.config, key) and not _is_felt(model, config, key, after):
            raise CompressionError(
                f"student: config: {key} changes no part of {type(model).__name__}, so it is no size; omit it."
            )
    if _vocabulary(model) != _vocabulary(after):
        raise CompressionError(
            "student: config: the vocabulary is the tokenizer's and stays; possible are the sizes of layers."
        )
    return config, after


def _vocabulary(model: Any) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # speech models have none
        return None


def _built(model: nn.Module, config: Any, sizes: dict[str, int]) -> nn.Module:
    for key, value in sizes.items():
        setattr(config, key, value)
    try:
        return twin(model, config)
    except Exception as error:
        said = first_line(error)
        raise CompressionError(
            f"student: config: {_told(sizes)} build no {type(model).__name__} ({said}); give sizes that fit each other."
        ) from error


def _told(sizes: dict[str, int]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in sizes.items())


def _is_felt(model: Any, config: Any, key: str, after: nn.Module) -> bool:
    """Whether the model would be another one with the original's value of this field."""
    other = copy.deepcopy(config)
    setattr(other, key, getattr(model.config, key))
    try:
        without = twin(model, other)
    except Exception:
        return True
    pairs = zip(after.modules(), without.modules(), strict=False)
    return shapes(after) != shapes(without) or any(plain(one) != plain(two) for one, two in pairs)


def _changed(before: nn.Module, after: nn.Module) -> dict[tuple[str, int], tuple[int, int]]:
    """(parameter, axis) -> (size, smaller size), wherever it is smaller."""
    old, new = shapes(before), shapes(after)
    changed = {}
    for name in {**old, **new}:
        if len(old.get(name, ())) != len(new.get(name, ())) or any(map(int.__lt__, old.get(name, ()), new.get(name, ()))):
            raise CompressionError(
                f"student: config: {name} would change from {old.get(name)} to {new.get(name)}, which is no block of it; "
                f"possible are sizes that make every parameter smaller; give sizes in the original's proportions."
            )
        changed.update({(name, axis): pair for axis, pair in enumerate(zip(old[name], new[name], strict=True))})
    return {place: pair for place, pair in changed.items() if pair[0] != pair[1]}


def _by_norm(model: Any, after: Any, changed: dict[tuple[str, int], tuple[int, int]]) -> Index | None:
    """Heads and neurons by the norm of all they own, residual dimensions by the norm of all that touches them.

    None where it is not proven which these are, or other parts shrink as well.
    """
    index: Index = {}
    try:
        units = [(old, new) for kind in KINDS for old, new in zip(units_of(model, kind), units_of(after, kind), strict=True)]
        width = (model.get_input_embeddings().embedding_dim, after.get_input_embeddings().embedding_dim)
    except (ValueError, NotImplementedError, AttributeError):
        return None
    if any([span.tensor for span in old.inputs] != [span.tensor for span in new.inputs] for old, new in units):
        return None  # other sorts of units: one key and value for all heads
    for (old, new), score in zip(units, norms(model, [old for old, _ in units]), strict=True):
        if (old.count, old.size) != (new.count, new.size):
            _check_whole(old, new)
            keep = score.reshape(-1, old.count).sum(0).topk(new.count).indices.sort().values
            index |= {(span.tensor, span.axis): span.index(keep, old.count) for span in (*old.inputs, *old.outputs)}
    residual = []
    for (name, axis), (size, left) in changed.items():
        if (name, axis) in index:
            continue
        if axis == 0 and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            index[name, axis] = torch.arange(left)  # positions: the first ones
        elif (size, left) == width:
            residual.append((name, axis))
        else:
            return None
    if residual:
        state, total = model.state_dict(), torch.zeros(width[0])
        for name, axis in residual:
            total += state[name].float().square().transpose(0, axis).flatten(1).sum(1).cpu() if state[name].dim() > 1 else (
                state[name].float().square().cpu()
            )  # fmt: skip
        chosen = total.topk(width[1]).indices.sort().values
        index |= dict.fromkeys(residual, chosen)
    return index


def _check_whole(old: Units, new: Units) -> None:
    before, after = (tuple(s.width for s in one.inputs if s.tensor.endswith(".weight")) for one in (old, new))
    if (old.size, before) != (new.size, after):
        raise CompressionError(
            f"student: config: a head of {old.name} would change from {before} to {after} features of its projections, and "
            f"only whole heads can go; possible are sizes with the same head size and as many query heads for "
            f"each key and value head; change num_attention_heads, num_key_value_heads and hidden_size together."
        )


def _leading(
    model: Any, before: nn.Module, after: nn.Module, changed: dict[tuple[str, int], tuple[int, int]], sizes: dict[str, int]
) -> Index:
    """The leading entries of every axis, where these are whole units: not of projections that stack several parts."""
    probe = _probe(model, sizes)
    numbers = [_numbers(one.config) for one in (before, after, probe)]
    counts = [tuple(one.get(key, 0) for one in numbers) for key in numbers[0]]
    heads = [tuple(one.get(key, 0) for one in numbers) for key in numbers[0] if "head" in key]
    of_a_head = {value for one in before.modules() for key, value in plain(one).items() if _is_head_size(key)}
    whole = {*counts, *(tuple(count * size for count in counted) for counted in heads for size in of_a_head)}
    larger = shapes(probe)
    names = dict(after.named_modules())
    for name, module in before.named_modules():
        mine, theirs = plain(module), plain(names[name])
        for key in mine:
            if mine[key] != theirs.get(key) and (_is_head_size(key) or key == "num_key_value_groups"):
                raise CompressionError(
                    f"student: config: {_told(sizes)} would change {key} of {name} from {mine[key]} to {theirs.get(key)}, and "
                    f"only whole heads can go; possible are as many features for each head as before; change the number of "
                    f"heads and hidden_size together."
                )
    for (name, axis), pair in changed.items():
        if (*pair, larger[name][axis]) not in whole:
            raise CompressionError(
                f"student: config: axis {axis} of {name} would shrink from {pair[0]} to {pair[1]}, and where its parts begin "
                f"is not known for {model.config.model_type!r}; possible are models whose heads and neurons are proven, and "
                f"others whose projections are not fused; give layers, every or number, or an architecture."
            )
    return {place: torch.arange(left) for place, (_, left) in changed.items()}


def _probe(model: Any, sizes: dict[str, int]) -> nn.Module:
    """A blank model whose sizes are multiples of the model's, one for the feed-forward and another for the rest.

    An axis that is the hidden size and one that stacks queries, keys and values may both go from 96 to 48, but only by chance,
    and then they differ here.
    """
    config: Any = copy.deepcopy(model.config)
    wide = ("ff", "inter", "inner", "mlp", "expert")
    multiples = {key: 5 if any(word in key for word in wide) else 3 for key in sizes}
    return _built(model, config, {key: getattr(config, key) * multiples[key] for key in sizes if getattr(config, key)})


def _numbers(config: Any) -> dict[str, int]:
    return {key: value for key, value in vars(config).items() if type(value) is int}


def _is_head_size(key: str) -> bool:
    return "head" in key and key.endswith(("dim", "size")) and not key.startswith("all_")


def _fill(model: Any, narrower: Any, index: Index) -> None:
    """Give the narrower model its blocks. What was tied stays tied: one new parameter for each old one."""
    made: dict[int, nn.Parameter] = {}
    mine = dict(model.named_parameters(remove_duplicate=False))
    computed = set(model._keys_to_ignore_on_save or ())  # sinusoids: a load computes them anew
    for name, new in list(narrower.named_parameters(remove_duplicate=False)):
        old, (owner, _, leaf) = mine[name], name.rpartition(".")
        if name in computed and [id(one) for one in mine.values()].count(id(old)) == 1:
            new.data = new.data.to(old)
            continue
        if id(old) not in made:
            made[id(old)] = nn.Parameter(_block(old.detach(), name, index), requires_grad=old.requires_grad)
        setattr(narrower.get_submodule(owner), leaf, made[id(old)])
    kept, buffers = model.state_dict(), dict(model.named_buffers())
    for name, new in list(narrower.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        # what a checkpoint does not hold follows from the new sizes: Gemma's embed_scale
        value = _block(kept[name], name, index) if name in kept else new.to(buffers[name].device)
        narrower.get_submodule(owner)._buffers[leaf] = value


def _block(tensor: Tensor, name: str, index: Index) -> Tensor:
    for axis in range(tensor.dim()):
        if (name, axis) in index:
            tensor = tensor.index_select(axis, index[name, axis].to(tensor.device))
    return tensor.clone()
