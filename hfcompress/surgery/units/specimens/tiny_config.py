"""A tiny model of any architecture, to look at or to test on: `miniature` shrinks a config, `example` makes its inputs.

Sizes are told apart by the words in their names; what one family means by a name of its own is in `odd_sizes`.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

from transformers import PreTrainedConfig

from hfcompress.surgery.units.specimens import field_words as words
from hfcompress.surgery.units.specimens.family_sizes import ODD, ODD_LAYERS
from hfcompress.surgery.units.specimens.inputs import TOKEN, example

__all__ = ["example", "miniature"]

VOCABULARY, HEAD, OWN_HEAD, NEURONS, EXPERTS, POSITIONS = 97, 8, 16, 48, 4, 64


def miniature(config: Any, *, layers: int | None = None, heads: int | None = None) -> Any:
    """A copy of a config, and of every config in it, with tiny widths; layers, heads and experts stay as many as they are.

    With `layers` and `heads` these become so many, and experts few. Every sort of layer still occurs, so there may be more.
    """
    tiny = copy.deepcopy(config)
    _Shrink(tiny, layers, heads).all()
    return tiny


class _Shrink:
    """One config (of a composite: one part), shrunk in place. `known` maps old widths to new ones."""

    def __init__(
        self, config: Any, layers: int | None, heads: int | None, known: dict[int, int] | None = None, name: str = ""
    ) -> None:
        self.config, self.layers, self.heads, self.name = config, layers, heads, name
        self.known: dict[int, int] = {} if known is None else known

    def all(self) -> None:
        spec = vars(self.config).pop("_heterogeneity_spec", None)  # reading through it raises where layers differ
        self.kept: dict[int, list[int]] = {}
        parts = {key: value for key, value in vars(self.config).items() if isinstance(value, PreTrainedConfig)}
        # the text side first: what the others are projected to is its width
        for key, part in sorted(parts.items(), key=lambda one: not re.search("text|llm|decoder", one[1].model_type)):
            _Shrink(part, self.layers, self.heads, self.known, key).all()
        self.old = {key: value for key, value in vars(self.config).items() if not key.startswith("_")}
        if self.layers is not None:
            self._fewer_layers(self.layers)
        self._heads()
        self._principal()
        self._mamba()
        self._others()
        self._rope()
        self._odd()
        self._tokens()
        if spec is not None:
            self.config.per_layer_config = self._per_layer_overrides(spec.per_layer_overrides)

    def _per_layer_overrides(self, overrides: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """What single layers have of their own: the kept layers', and other widths than the rest."""
        count = self.old.get("num_hidden_layers", 0)
        kept = self.kept.get(count) or list(range(count))
        tiny: dict[int, dict[str, Any]] = {}
        for number, index in enumerate(kept):
            own = tiny[number] = copy.deepcopy(overrides.get(index, {}))
            for key, value in own.items():
                if key == "qk_nope_head_dim":
                    own[key] = HEAD
                elif type(value) is int and "head_dim" in key:
                    own[key] = HEAD + 4 if self.rope else 2 * OWN_HEAD
                elif type(value) is int and (words.WINDOW.search(key) or words.WIDTH.search(key)):
                    own[key] = 12 if "window" in key else NEURONS - 8
                elif type(value) is int and self.heads is not None:
                    own[key] = min(value, self.heads if "heads" in key else 2)
        return tiny

    def put(self, key: str, value: Any) -> None:
        if getattr(self.config, key, None) != value:
            setattr(self.config, key, value)

    def ints(self, pattern: re.Pattern[str], never: re.Pattern[str] | None = None) -> dict[str, int]:
        return {
            key: value
            for key, value in self.old.items()
            if type(value) is int and pattern.search(key) and not (never and never.search(key))
        }

    # how many

    def _fewer_layers(self, layers: int) -> None:
        counts = self.ints(words.LAYERS, words.NO_LAYERS)
        keep = self.kept
        for key, count in counts.items():
            if re.search("dense|sparse|shared", key):
                continue
            keep[count] = keep.get(count) or self._kept(count, layers)
            self.put(key, len(keep[count]) if count else 0)
        for count, kept in keep.items():
            for key, values in self.old.items():
                if isinstance(values, list | tuple) and (few := _entries(key, list(values), kept, count)) != list(values):
                    self.put(key, type(values)(few))
        if len(self.old.get("stage_names") or ()) - 1 in keep:  # a backbone: every layer is a stage
            count = len(keep[len(self.old["stage_names"]) - 1])
            self.config.stage_names = ["stem", *(f"stage{number}" for number in range(1, count + 1))]
            self.config._out_features, self.config._out_indices = [f"stage{count}"], [count]
        for key, value in self.ints(words.PERIOD).items():
            self.put(key, min(value, 2))
        for key, value in self.ints(re.compile("layer_offset$")).items():
            self.put(key, min(value, 1))
        for key, value in self.ints(re.compile("first_k_dense|num_dense_layers|max_window_layers|num_sparse_.*layers")).items():
            self.put(key, min(value, 1))
        for key, values in self.old.items():
            if words.STAGES.search(key) and isinstance(values, list | tuple):
                self.put(key, type(values)(min(value, layers) for value in values))

    def _kept(self, count: int, layers: int) -> list[int]:
        """The first layer of each sort, and more from the start on until there are `layers`."""
        told = {key: value for key, value in self.old.items() if isinstance(value, list | tuple)}
        marks = [set(v) for k, v in told.items() if _indices(k, v, count)]
        lists = [v for k, v in told.items() if len(v) == count and _per_layer(k, v) and not _indices(k, v, count)]
        sorts: dict[str, list[int]] = {}
        for index in range(count):
            sort = str([str(values[index]) for values in lists] + [index in mark for mark in marks])
            sorts.setdefault(sort, []).append(index)
        each = 2 if self.config.model_type in ("zamba", "zamba2") else 1  # these share one layer between two places
        kept = {index for indices in sorts.values() for index in indices[:each]}
        more = iter(index for index in range(count) if index not in kept)
        while len(kept) < min(layers, count):
            kept.add(next(more))
        shared = self.old.get("num_kv_shared_layers") or 0
        if shared and count == self.old.get("num_hidden_layers"):  # the last layers read keys of earlier ones of their sort
            last = sorted({str(lists[0][i]): i for i in range(count - shared, count)}.values())
            kept = {index for index in kept if index < count - shared} | set(last)
            self.put("num_kv_shared_layers", len(last))
        return sorted(kept)

    def _heads(self) -> None:
        """`self.query` and `self.groups`: query heads and key-value groups of this part, after shrinking."""
        self.query = 0
        queries = {k: v for k, v in self.ints(words.QUERY, words.NO_HEADS).items() if not words.KEY_VALUE.search(k) and v > 0}
        groups = {k: v for k, v in self.ints(words.KEY_VALUE).items() if v > 0}
        mamba = {k: v for k, v in queries.items() if words.MAMBA_HEADS.search(k) or self.config.model_type == "mamba2"}
        main = next((v for k, v in queries.items() if k not in mamba), 0)
        for key, value in queries.items():
            if self.heads is not None:
                self.put(key, 2 * self.heads if key in mamba else 1 if value == 1 else self.heads)
            if key not in mamba and not self.query:
                self.query = getattr(self.config, key)
        for key, value in groups.items():
            if self.heads is not None:
                few = (
                    self.heads
                    if value >= main
                    else 1
                    if value == 1
                    else max(2, math.gcd(self.heads, self.heads * value // main))
                )
                self.put(key, few)
        for key, values in self.old.items():
            if re.search("^(num_heads|num_attention_heads(_per_layer)?)$", key) and isinstance(values, list | tuple):
                values = getattr(self.config, key)
                if self.heads is not None:
                    self.put(key, type(values)(1 << (min(value, self.heads).bit_length() - 1) for value in values))
                self.query = self.query or getattr(self.config, key)[0]
        if self.heads is not None:
            for key, value in self.ints(words.EXPERTS).items():
                self.put(key, min(value, EXPERTS))
            for key, value in self.ints(words.CHOSEN).items():
                self.put(key, min(value, 2))
            for key, value in self.ints(re.compile("^(n_groups?|num_expert_group|topk_group|n_group)$")).items():
                self.put(key, min(value, 1 if key == "topk_group" else 2))

    # how wide

    def _principal(self) -> None:
        """The hidden size, the heads' own size, the neurons: the widths that the others are told by."""
        query = self.query or self.heads or 4
        head = HEAD if query <= 16 else HEAD // 2
        told = [self.known[value] for value in self.ints(words.HIDDEN).values() if value in self.known]
        hidden = told[0] if told and not self.query else query * head
        self.hidden = hidden
        for key, value in self.ints(words.HIDDEN).items():
            self.known.setdefault(value, hidden)
            self.put(key, hidden)
        self.rope = self.old.get("qk_rope_head_dim")
        own = {"qk_rope_head_dim": 4, "qk_nope_head_dim": HEAD, "v_head_dim": HEAD, "qk_head_dim": HEAD + 4}
        for key, value in self.ints(words.HEAD).items():
            if key in own:
                self.put(key, own[key])
            elif self.rope:
                self.put(key, 4 if value == self.rope else HEAD + 4)
            elif value > 0:
                self.put(key, head if key == "d_head" else OWN_HEAD if query <= 16 else HEAD)
        for number, (key, value) in enumerate(self.ints(words.NEURONS).items()):
            wide = NEURONS if number == 0 or "encoder" in key or "decoder" in key else NEURONS - 8 * min(number, 3)
            if value > 0 and not words.HIDDEN.search(key):
                self.known.setdefault(value, wide)
                self.put(key, wide)

    def _mamba(self) -> None:
        """State-space heads share the expanded hidden size out."""
        two = self.config.model_type == "mamba2"
        count = next(iter(self.ints(re.compile("^num_heads$") if two else words.MAMBA_HEADS)), None)
        size = next(iter(self.ints(re.compile("^head_dim$" if two else "^mamba_(d_head|head_dim|headdim)$"))), None)
        expand = self.old.get("mamba_expand") or self.old.get("expand")
        if count and size and type(expand) is int:
            inner = expand * self.hidden
            heads = math.gcd(getattr(self.config, count), inner)
            self.put(count, heads)
            self.put(size, inner // heads)

    def _others(self) -> None:
        done = {key for key, value in self.old.items() if type(value) is int and getattr(self.config, key) != value}
        for key, value in self.old.items():
            if key in done or key.startswith("id2label") or value is None:
                continue
            if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
                self._list(key, getattr(self.config, key))
            if type(value) is not int or value <= 1:
                continue
            if re.search("vocab(_size)?$|vocab_size_per_layer_input", key) and value > VOCABULARY and "type_vocab" not in key:
                self.put(key, VOCABULARY)
            elif key == "rotary_dim":
                self.put(key, 4)
            elif words.POSITIONS.search(key):
                self.put(key, min(value, POSITIONS))
            elif words.WINDOW.search(key):
                if "chunk_right_context" not in self.old:
                    self.put(key, min(value, 8))
            elif words.WIDTH.search(key) and not words.NO_WIDTH.search(key) and value > 8:
                self.put(key, self.known.get(value, 12 if "rank" in key else 16))
            elif key in ("image_size", "patch_size", "crop_size", "input_size"):
                self._image(key, value)

    def _list(self, key: str, values: Any) -> None:
        heads: Any = getattr(self.config, "num_attention_heads", None) or getattr(self.config, "num_heads", None)
        if re.search("hidden_sizes$|conv_dim$|tdnn_dim$|embed_dims?$|(stage|stem).*channels$|unit_dims$|channel_size$", key):
            per_stage = isinstance(heads, list | tuple) and len(heads) == len(values)
            small = [HEAD * h for h in heads] if per_stage else [max(8, v * 16 // values[0] // 8 * 8) for v in values]
            self.put(key, type(values)(small))
        elif re.search("^intermediate_size$", key):
            self.put(key, type(values)(NEURONS for _ in values))
        elif key == "image_size":
            self.put(key, type(values)(64 for _ in values))

    def _image(self, key: str, value: int) -> None:
        patch = self.old.get("patch_size")
        tiny = min(patch, 4) if isinstance(patch, int) else 0
        stages = any(words.STAGES.search(key) or key.endswith("hidden_sizes") for key, value in self.old.items() if value)
        if key == "patch_size":
            self.put(key, min(value, 4))
        else:
            self.put(key, 64 if stages or not tiny else 4 * tiny)

    def _rope(self) -> None:
        head = getattr(self.config, "qk_rope_head_dim", None) or getattr(self.config, "head_dim", None)
        if type(head) is not int:
            head = self.hidden // (self.query or 1)
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.old.get(key)
            if isinstance(rope, dict):
                self.put(key, _tiny_rope(copy.deepcopy(rope), head))

    def _odd(self) -> None:
        few = ODD_LAYERS.get(self.config.model_type, {}) if self.layers is not None else {}
        own = ODD.get(self.config.model_type) or ODD.get(self.name, {})
        for key, value in {**own, **few}.items():
            count = getattr(self.config, "num_hidden_layers", 0)
            self.put(key, [value[index % len(value)] for index in range(count)] if key == "layer_types" else value)

    def _tokens(self) -> None:
        """Special tokens within the vocabulary, each another one as far as it can be, and one to pad with."""
        texts = getattr(self.config, "text_config", None) or getattr(self.config, "decoder", None)
        size = getattr(self.config, "vocab_size", None) or getattr(texts, "vocab_size", None)
        if type(size) is not int:
            return
        free = size
        for key in self.old:
            value = vars(self.config).get(key)
            many = value if isinstance(value, list | tuple) else [value]
            if TOKEN.search(key) and "ignore" not in key and many and all(type(one) is int for one in many):
                new = []
                for one in many:
                    free -= one >= size
                    new.append(free if one >= size else one)
                self.put(key, type(value)(new) if isinstance(value, list | tuple) else new[0])
        if getattr(self.config, "pad_token_id", 0) is None:
            used = {value for key, value in vars(self.config).items() if TOKEN.search(key) and type(value) is int}
            self.put("pad_token_id", next(token for token in range(size) if token not in used))


def _tiny_rope(rope: dict[str, Any], head: int) -> dict[str, Any]:
    for key, value in rope.items():
        if isinstance(value, dict):
            rope[key] = _tiny_rope(value, head)
        elif key == "mrope_section":
            half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
            rope[key] = [half - half // len(value) * (len(value) - 1), *[half // len(value)] * (len(value) - 1)]
        elif key in ("short_factor", "long_factor"):
            rope[key] = value[: int(head * rope.get("partial_rotary_factor", 1.0)) // 2]
        elif key == "original_max_position_embeddings":
            rope[key] = POSITIONS // 2
    return rope


def _per_layer(key: str, values: Any) -> bool:
    return bool(re.search("layer|block|pattern|type|intermediate_size|rope|window|heads", key)) and len(values) > 0


def _indices(key: str, values: Any, count: int) -> bool:
    """Whether a list holds indices of layers: ascending, and fewer than the layers."""
    named = re.search("layers|idxs|indices|indexes|layer_ids", key)
    return bool(
        named and values and all(type(v) is int and 0 <= v < count for v in values) and list(values) == sorted(set(values))
        and len(values) <= count and set(values) != {0, 1}
    )  # fmt: skip


def _entries(key: str, values: list[Any], kept: list[int], count: int) -> list[Any]:
    if _indices(key, values, count):
        return [kept.index(value) for value in values if value in kept]
    return [values[index] for index in kept] if len(values) == count and _per_layer(key, values) else values
