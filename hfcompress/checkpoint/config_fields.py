"""Which fields of transformers' own config may tell a cut, so that what is left needs no import to load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

# Widths that follow from another size where the config has None.
_WIDTHS = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")
_HEADS = {"num_attention_heads": "query", "num_heads": "query", "num_key_value_heads": "key"}


def parts(config: Any) -> Iterator[Any]:
    """The config and those within it, of a text or a vision model."""
    yield from (part for _, part in parts_by_path(config))


def parts_by_path(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A config and every config inside it, each with the way to it."""
    yield path, config
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from parts_by_path(value, (*path, key))


def changes(config: Any, resized: list[tuple[int, int]]) -> Iterator[tuple[Any, dict[str, int]]]:
    """(part of the config, fields to change in it): what may explain that sizes are now others, (as described, as it is) each.

    An even head count, or an even width. Whoever asks tries whether it does explain them; so any field will do that has the
    size which a layer had before, or half of it, where two parts lie fused.
    """
    for part in parts(config):
        yield from ((part, change) for change in _head_changes(part, resized))
        numbers = {key: value for key, value in vars(part).items() if type(value) is int and not key.endswith("_id")}
        for field in (field for field in _WIDTHS if vars(part).get(field, 0) is None):
            yield from ((part, {field: new}) for _, new in resized)
        for field, value in numbers.items():
            for old, new in resized:
                for fused in (1, 2):
                    if value * fused == old and new % fused == 0:
                        yield part, {field: new // fused}


def _one(part: Any, field: str) -> Any:
    """One value for all layers; reading one that differs from layer to layer raises (Gemma 4's head_dim)."""
    try:
        return getattr(part, field, None)
    except RuntimeError:
        return None


def _head_changes(part: Any, resized: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Counts of heads, with the size of a head told beside them, which would follow from the count otherwise."""
    counts = {key: value for key in _HEADS if type(value := vars(part).get(key)) is int and value}
    query = next((value for key, value in counts.items() if _HEADS[key] == "query"), 0)
    width, told = _one(part, "hidden_size"), _one(part, "head_dim") or _one(part, "d_kv")
    size = told or (width // query if query and type(width) is int else 0)
    if not size or not counts:
        return
    new: dict[str, list[int]] = {"query": [], "key": []}
    for key, value in counts.items():
        new[_HEADS[key]] += [now // size for old, now in resized if old == value * size and now % size == 0]
    for of_query in sorted(set(new["query"])):
        for of_key in sorted(set(new["key"])) or [of_query]:
            if of_query % of_key == 0:
                change = {key: of_query if _HEADS[key] == "query" else of_key for key in counts}
                yield change if _one(part, "d_kv") else {**change, "head_dim": size}
