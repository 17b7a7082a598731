"""Vocabulary pruning of a model: fewer rows of embeddings and heads, and biases, configs and all that names a token follow.

Where the vocabulary lies is not known by name: two models on the meta device, whose configs differ in it alone, tell it.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from hfcompress.checkpoint.config_fields import parts as config_parts
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import twin
from hfcompress.layers import holds_codes
from hfcompress.layers.low_rank import LowRankEmbedding
from hfcompress.surgery.meta_diff import plain
from hfcompress.surgery.modules import check_editable

_ID = re.compile(r"_token_(id|ids|index|indices)$")
# Fields whose names don't say that they hold tokens: those that need them, and those that rule them out.
_NEEDING = ("forced_decoder_ids", "force_words_ids", "lang_to_id", "task_to_id")
_BARRING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
# Gemma-3n and 4: tokens from here on have no embedding in the layers.
_PARTIAL = "vocab_size_per_layer_input"
# Of a decoder with tokens of its own.
_SECOND = ("decoder_vocab_size", "tgt_vocab_size")


def keep_tokens(model: Any, keep: list[int]) -> None:
    """Keep these tokens (ascending ids), in place; they are counted from 0 after that, in configs as well.

    The result is what its config describes. CompressionError, and no change, where that can't be.
    """
    check_editable(model, "prune_vocab")
    total = vocabulary_size(model)
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= total:
        raise CompressionError(f"prune_vocab: tokens to keep must ascend without repeats, from 0 to {total - 1}.")
    first = fixed_tokens(model)
    if keep[:first] != list(range(first)):
        raise CompressionError(
            f"prune_vocab: {type(model).__name__} reads meaning off the place of token {first - 1} (it counts positions from "
            f"the pad token, or texts end there), so that must stay; keep tokens 0 to {first - 1}."
        )
    before, config = twin(model), copy.deepcopy(model.config)
    for part in config_parts(config):
        _renumber(part, keep, total)
    cuts = _cuts(model, before, after := _described(model, config), keep, total)
    _cut(cuts)
    for part in _configs(model):
        _renumber(part, keep, total)
    _follow(model, before, after)
    model.kept_tokens = [model.kept_tokens[index] for index in keep] if hasattr(model, "kept_tokens") else list(keep)


def vocabulary_size(model: Any) -> int:
    """Rows of the table of token embeddings, as the config tells them."""
    total = _table(model).num_embeddings
    if not any(total in _sizes(part).values() for part in config_parts(model.config)):
        raise CompressionError(
            f"prune_vocab: no field of {type(model.config).__name__} tells the {total} tokens of {type(model).__name__}; "
            f"possible are models whose config has them as vocab_size; leave prune_vocab out."
        )
    for part in config_parts(model.config):
        others = ("vocab_size", *_SECOND) if model.config.is_encoder_decoder else _SECOND
        if other := next((key for key in others if _sizes(part).get(key, total) != total), None):
            raise CompressionError(
                f"prune_vocab: {type(model).__name__} has two vocabularies, of {total} and of {getattr(part, other)} tokens, "
                f"and one tokenizer can't tell both; leave prune_vocab out."
            )
    return total


def _table(model: Any) -> Any:
    """The module with a row for each token."""
    found: Any = None
    with suppress(NotImplementedError, AttributeError):  # transformers' own word for it, and old models' lack of one
        found = model.get_input_embeddings()
    if not hasattr(found, "num_embeddings"):
        # CLIP has two inputs, and transformers does not say which of them are tokens.
        size = getattr(model.config.get_text_config(), "vocab_size", None)
        found = next((one for one in model.modules() if isinstance(one, nn.Embedding) and one.num_embeddings == size), found)
    if not hasattr(found, "num_embeddings"):
        layer = "none" if found is None else f"a {type(found).__name__}"
        raise CompressionError(
            f"prune_vocab: {type(model).__name__} has no table with a row for each token (its input layer: {layer}); possible "
            f"are models that read tokens; leave prune_vocab out."
        )
    return found


def named_tokens(model: Any) -> set[int]:
    """Tokens that configs name, and that generating needs: the ends and starts of texts, pads, languages."""
    return _named(_configs(model), vocabulary_size(model))


def with_tokens(config: Any, keep: list[int]) -> Any:
    """A copy of a config that tells of these tokens, and those it names, alone."""
    config = copy.deepcopy(config)
    parts, total = list(config_parts(config)), config.get_text_config().vocab_size
    keep = sorted({*keep, *_named(parts, total)})
    for part in parts:
        _renumber(part, keep, total)
    return config


def _named(parts: list[Any], total: int) -> set[int]:
    found: set[int] = set()
    for part in parts:
        if not _is_foreign(part, total):
            for key, value in vars(part).items():
                if _ID.search(key) or key in _NEEDING:
                    found |= set(_integers(_tokens_of(key, value)))
    return {token for token in found if 0 <= token < total}


def fixed_tokens(model: Any) -> int:
    """So many tokens from the first on must stay, as a model reads meaning off their place.

    RoBERTa and its kin count positions from the pad token on; CLIP takes a text to end at its highest token if eos is 2.
    """
    table, first = _table(model), 0
    for part in config_parts(model.config):
        pad, eos = getattr(part, "pad_token_id", None), getattr(part, "eos_token_id", None)
        if pad is not None and any(_counts_from(module, pad) for module in model.modules() if module is not table):
            first = max(first, pad + 1)
        if eos == 2 and "clip" in part.model_type:
            first = max(first, 3)
    return first


def _counts_from(module: Any, pad: int) -> bool:
    is_position = "position" in type(module).__name__.lower()
    in_place = isinstance(getattr(module, "position_embeddings", None), nn.Embedding)  # RobertaEmbeddings, EsmEmbeddings
    if in_place and getattr(module.position_embeddings, "padding_idx", None) == pad:
        return True
    return is_position and getattr(module, "padding_idx", None) == pad


def _renumber(config: Any, keep: list[int], total: int) -> None:
    """Make one config, without its parts, tell of these tokens only."""
    if _is_foreign(config, total):
        return
    place = {old: new for new, old in enumerate(keep)}
    for key, size in _sizes(config).items():
        if size == total or key == _PARTIAL:
            setattr(config, key, bisect_left(keep, size))
    for key, value in list(vars(config).items()):
        if key in _BARRING and value is not None:
            setattr(config, key, _without(value, place, total))
        elif (_ID.search(key) or key in _NEEDING) and value is not None:
            setattr(config, key, _moved(value, key, place, total))


def _moved(value: Any, key: str, place: dict[int, int], total: int) -> Any:
    if type(value) is int:
        if 0 <= value < total and value not in place:
            raise CompressionError(f"prune_vocab: {key} names token {value}, which would go; keep it.")
        return place.get(value, value)
    if isinstance(value, list | tuple):
        if key == "forced_decoder_ids":  # pairs of a position and a token
            return [[at, _moved(token, "", place, total)] for at, token in value]
        return type(value)(_moved(one, key, place, total) for one in value)
    if isinstance(value, dict):
        return {name: _moved(one, key, place, total) for name, one in value.items()}
    return value


def _without(value: Any, place: dict[int, int], total: int) -> Any:
    """What rules tokens out, without those that are gone anyway."""

    def stays(one: Any) -> bool:
        return all(token in place or not 0 <= token < total for token in _integers(one))

    if isinstance(value, dict):  # sequence_bias
        return {_moved(tokens, "", place, total): bias for tokens, bias in value.items() if stays(tokens)}
    kept = [one for one in value if stays(one)]
    return [_moved(one, "", place, total) for one in kept] or None


def _integers(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _integers(one)
    elif isinstance(value, dict):
        yield from _integers(list(value.values()))


def _tokens_of(key: str, value: Any) -> Any:
    return [token for _, token in value] if key == "forced_decoder_ids" and value else value


def _sizes(config: Any) -> dict[str, int]:
    """The fields that count tokens of some kind, by the names they are stored under."""
    other = (getattr(config, "attribute_map", None) or {}).get("vocab_size", "vocab_size")
    return {
        key: value
        for key, value in vars(config).items()
        if type(value) is int and (key == other or ("vocab" in key and "type_vocab" not in key))
    }


def _is_foreign(config: Any, total: int) -> bool:
    """Whether a part of a config is about another vocabulary, such as the codes of an audio codec."""
    sizes = _sizes(config)
    return bool(sizes) and total not in sizes.values()


def _configs(model: Any) -> list[Any]:
    """Every config that some module holds, once: T5 gives each stack a copy of its own."""
    holders = [getattr(module, "config", None) for module in model.modules()]
    found = [part for config in holders if isinstance(config, PreTrainedConfig) for part in config_parts(config)]
    found += [
        one for module in model.modules() if isinstance(one := getattr(module, "generation_config", None), GenerationConfig)
    ]
    return list({id(part): part for part in found}.values())


def _described(model: Any, config: Any) -> nn.Module:
    for part in config_parts(config):
        if getattr(part, "vocab_offset", 0):
            raise CompressionError(
                f"prune_vocab: {type(model).__name__} counts the tokens of images or sounds on from those of texts, and these "
                f"can't be told apart; possible is its text model alone; leave prune_vocab out."
            )
    try:
        return twin(model, config)
    except Exception as error:  # the config's own checks, or the model's
        raise CompressionError(
            f"prune_vocab: {type(model).__name__} can't be built with fewer tokens ({error}); leave prune_vocab out."
        ) from error


Place = tuple[Any, str]


def _cuts(
    model: Any, before: nn.Module, after: nn.Module, keep: list[int], total: int
) -> list[tuple[Place, dict[int, Tensor]]]:
    """(owner, attribute) of every tensor with an axis over the vocabulary, and the indices that stay, an axis."""
    sizes = {size: bisect_left(keep, size) for part in config_parts(model.config) for key, size in _sizes(part).items()
             if size == total or key == _PARTIAL}  # fmt: skip
    old, new, found = _tensors(before), _tensors(after), []
    for name in {**old, **new}:
        mine, theirs = (tuple(one[name].shape) if name in one else None for one in (old, new))
        if mine == theirs:
            continue
        dims = [dim for dim, (a, b) in enumerate(zip(mine or (), theirs or (), strict=False)) if a != b]
        if not dims or mine is None or theirs is None or any(sizes.get(mine[dim]) != theirs[dim] for dim in dims):
            raise CompressionError(
                f"prune_vocab: with {len(keep)} tokens instead of {total}, {name} of {type(model).__name__} would go from "
                f"{mine} to {theirs}, and which part of it belongs to which token can't be told; leave prune_vocab out."
            )
        index = {dim: torch.tensor(keep[: theirs[dim]]) for dim in dims}
        found.append((_place(model, name, mine), index))
    table = _table(model)
    table = table.table if isinstance(table, LowRankEmbedding) else table
    if len(keep) < total and not any(owner is table for (owner, _), _ in found):
        raise CompressionError(
            f"prune_vocab: the token embeddings of {type(model).__name__} don't follow its config's vocab_size; possible are "
            f"models whose table does; leave prune_vocab out."
        )
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names: tied ones have several."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


def _place(model: Any, name: str, shape: tuple[int, ...]) -> Place:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, LowRankEmbedding):
        return owner.table, leaf
    tensor = getattr(owner, leaf)
    if holds_codes(owner) or tuple(tensor.shape) != shape:
        raise CompressionError(
            f"prune_vocab: {name} is a {type(owner).__name__} of another shape than the config tells, and can't be cut; list "
            f"prune_vocab before quantize, and before low_rank of the head."
        )
    return owner, leaf


def _cut(cuts: list[tuple[Place, dict[int, Tensor]]]) -> None:
    """Select along the axes; what was tied stays tied, also a module that has two names."""
    done: dict[int, Tensor] = {}
    olds: list[Tensor] = [getattr(owner, leaf) for (owner, leaf), _ in cuts]
    for ((owner, leaf), dims), old in zip(cuts, olds, strict=True):
        if id(old) not in done:
            new = old.detach()
            for dim, index in dims.items():
                new = new.index_select(dim, index.to(new.device))
            is_parameter = isinstance(old, nn.Parameter)
            done[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
        setattr(owner, leaf, done[id(old)])


def _follow(model: Any, before: nn.Module, after: nn.Module) -> None:
    """Set what the two meta models disagree on: numbers that forwards read, padding_idx, out_features, an image's token."""
    mine, others = dict(model.named_modules()), dict(after.named_modules())
    for name, old in before.named_modules():
        was, now = plain(old), plain(others[name])
        for key in {**was, **now}:
            if was.get(key) != now.get(key) and hasattr(mine.get(name), key):
                setattr(mine[name], key, now.get(key))
        if isinstance(mine.get(name), LowRankEmbedding):
            table = mine[name].table
            table.num_embeddings, table.padding_idx = mine[name].num_embeddings, mine[name].padding_idx
