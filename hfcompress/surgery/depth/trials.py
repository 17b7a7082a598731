"""Which layers may go: a cut is tried on a model without weights first, and the best one that the config can tell is found."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import twin
from hfcompress.surgery.depth.drop import keep_layers, shortened, unlike
from hfcompress.surgery.depth.stacks import Stack, layer_stacks, lists
from hfcompress.surgery.meta_diff import reloaded

_CHOICES = 12  # a trial that fails may build dozens of models without weights


def rehearse(model: Any, cuts: Mapping[str, list[int]], asked: str) -> None:
    """Raise the CompressionError that `keep_layers` would, before anything has changed."""
    _check_lengths(_rehearsed(model, cuts, asked), asked)


def _rehearsed(model: Any, cuts: Mapping[str, list[int]], asked: str) -> nn.Module:
    for name, keep in cuts.items():
        _check_placeless(model, name, keep, asked)
    rehearsal = twin(model)
    keep_layers(rehearsal, cuts, asked)
    _check_counted(model, rehearsal, asked)
    return rehearsal


def permitted(model: Any, stack: Stack, scores: Tensor, number: int, asked: str) -> list[int]:
    """So many layers of the stack, of the highest scores that the config can describe; ascending.

    Where the order of sorts of layers is fixed, each place takes the best layers of its sort: the sum of scores is the largest.
    """
    best = scores.topk(number).indices.sort().values.tolist()
    problem: CompressionError | None = None
    tried: list[list[int]] = []
    for keep in itertools.islice(_choices(model, stack, scores.tolist(), best), _CHOICES):
        if keep in tried:
            continue
        tried.append(keep)
        try:
            _rehearsed(model, {stack.name: keep}, asked)
            return keep
        except CompressionError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _choices(model: Any, stack: Stack, scores: list[float], best: list[int]) -> Iterator[list[int]]:
    yield best
    number, groups = len(best), getattr(model.config, "num_hidden_groups", 1)
    if stack.repeats:
        turns = [[index * groups // stack.count == place * groups // number for place in range(number)]
                 for index in range(stack.count)]  # fmt: skip
        ways: Iterable[list[list[bool]]] = [turns]
    else:
        before = reloaded(model, model.config)
        ways = (_fits(before, after, stack, number) for after, _ in shortened(model, before, stack, best))
    for fits in ways:
        keep = _aligned(fits, scores, number)
        if keep is not None and keep != best:
            yield keep
    weakest = min(best, key=scores.__getitem__)
    for index in sorted(set(range(stack.count)) - set(best), key=lambda one: -scores[one]):  # one sort may be missing
        yield sorted({*best, index} - {weakest})


def _fits(before: nn.Module, after: nn.Module, stack: Stack, number: int) -> list[list[bool]]:
    """Whether a layer is what the config describes at a place: (count, number)."""
    old, new = (dict(lists(one))[stack.name] for one in (before, after))
    return [[not unlike(layer, other, index, place) for place, other in enumerate(new)] for index, layer in enumerate(old)]


def _aligned(fits: list[list[bool]], scores: list[float], number: int) -> list[int] | None:
    """Which layer takes which place, in order, so that the sum of scores is the largest; None if a place stays empty."""
    rows: list[tuple[float, list[int]] | None] = [(0.0, []), *[None] * number]
    for index, row in enumerate(fits):
        for place in reversed(range(number)):
            taken = rows[place]
            if taken is not None and row[place]:
                total = (taken[0] + scores[index], [*taken[1], index])
                rows[place + 1] = max(filter(None, (rows[place + 1], total)), key=lambda one: one[0])
    return rows[number][1] if rows[number] is not None else None  # type: ignore[index]


def _check_placeless(model: nn.Module, name: str, keep: list[int], asked: str) -> None:
    """What a layer computed from its place and does not save must not move: a load would compute it anew (decay rates)."""
    layers: Any = model.get_submodule(name)
    old: Any = twin(model).get_submodule(name)
    moved = [(number, index) for number, index in enumerate(keep) if number != index and index < len(layers)]
    for number, index in moved:
        for key, value in _computed(layers[index]).items():
            for place, other in enumerate(layers):
                theirs = _computed(other).get(key, value)
                if not torch.equal(value, theirs) and not unlike(old[index], old[place], index, place):
                    raise CompressionError(
                        f"{asked}: layer {index} of {name} can't become layer {number}: its {key} is made from its place; "
                        f"possible are layers that stay where they are; keep the first ones."
                    )


def _computed(layer: nn.Module) -> dict[str, Tensor]:
    """Buffers that a checkpoint does not hold."""
    saved = layer.state_dict()
    return {key: value for key, value in layer.named_buffers() if key not in saved and not value.is_meta}


def _check_counted(before: Any, after: Any, asked: str) -> None:
    """transformers counts the tokens seen in attention layers: if there was one, one must be left."""
    if _counts_tokens(before) and not _counts_tokens(after):
        raise CompressionError(
            f"{asked}: no attention layer would be left, and transformers counts the tokens in these; possible are choices "
            f"with at least one; keep one."
        )


def _counts_tokens(model: Any) -> bool:
    try:
        DynamicCache(config=model.config.get_text_config(decoder=True)).get_seq_length()
    except Exception:  # there is none, or the model makes no cache of this kind
        return False
    return True


def _check_lengths(model: Any, asked: str) -> None:
    """transformers makes a cache as long as a config's first count of layers, in T5 and ProphetNet the encoder's."""
    if not model.config.is_encoder_decoder or not model.can_generate() or not _counts_tokens(model):
        return
    places = len(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)
    for stack in layer_stacks(model):
        if stack.side == "decoder" and 0 < places < stack.count:
            raise CompressionError(
                f"{asked}: {stack.name} would have {stack.count} layers, and transformers makes the cache of "
                f"{type(model).__name__} as long as its encoder, {places}; possible are encoders that are no shorter than the "
                f"decoder; cut the decoder first."
            )
