"""Where the units of a model are, as data: names of tensors, axes and sizes. And the few questions that module names answer.

A unit is what can be cut alone: an attention head (under grouped-query attention, a whole key-value group) or a feed-forward
neuron. `reader` finds them, `proof` proves them; nothing here depends on the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Segment(NamedTuple):
    """A stretch of an axis: the units one after another, `size` entries each; or `size` entries that all units share."""

    size: int
    is_shared: bool = False


@dataclass(frozen=True)
class Span:
    """Where units lie along one axis of a tensor. GPT-2's c_attn has three segments, a grouped fused projection two sizes."""

    tensor: str
    """Of a parameter or buffer: "bert.encoder.layer.0.attention.self.query.weight"."""
    axis: int
    segments: tuple[Segment, ...]

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Of the tensor, in its module: "weight"."""
        return self.tensor.rpartition(".")[2]

    @property
    def width(self) -> int:
        """Entries that one unit takes."""
        return sum(segment.size for segment in self.segments if not segment.is_shared)

    def length(self, count: int) -> int:
        """Of the axis, with so many units."""
        return sum(segment.size * (1 if segment.is_shared else count) for segment in self.segments)

    def index(self, keep: Tensor, count: int) -> Tensor:
        """The entries that stay when the units `keep` (..., kept) of `count` do: (..., entries), ascending if `keep` is."""
        parts, start = [], 0
        for size, is_shared in self.segments:
            steps = torch.arange(size, device=keep.device)
            if is_shared:
                parts.append((start + steps).expand(*keep.shape[:-1], size))
            else:
                parts.append((start + keep[..., None] * size + steps).flatten(-2))
            start += size * (1 if is_shared else count)
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Counter:
    """An integer attribute that a forward reads, and how much of it one unit is worth."""

    module: str
    attribute: str
    worth: int


@dataclass(frozen=True)
class Units:
    """`count` equal units that nothing but `outputs` reads: cutting them takes entries out of `inputs` and `outputs` alike."""

    name: str
    """The module that holds them: "bert.encoder.layer.0.attention.self"."""
    kind: str
    """heads or neurons."""
    count: int
    inputs: tuple[Span, ...]
    """What makes the units: rows of projections and their biases, columns of a table of relative positions."""
    outputs: tuple[Span, ...]
    """What reads them: columns of the output projection; of several where a table of positions couples layers, as in T5."""
    counters: tuple[Counter, ...] = ()
    lanes: int = 1
    """Experts: their tensors are stacked along axis 0, each has `count` units of its own, and all keep the same number."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the scores: (count,), or (lanes, count) for experts."""
        return (self.count,) if self.lanes == 1 else (self.lanes, self.count)

    @property
    def size(self) -> int:
        """Columns that a unit takes in `outputs`."""
        return self.outputs[0].width

    @property
    def output(self) -> str:
        """The module that reads the units; the first of several."""
        return self.outputs[0].module

    @property
    def projections(self) -> tuple[str, ...]:
        """The modules that make the units, in the order of the model."""
        return tuple(dict.fromkeys(span.module for span in self.inputs))


def channel_axis(module: nn.Module) -> int:
    """Where the columns of a projection lie in what it reads: (..., columns), or of a convolution (batch, columns, ...)."""
    return 1 if isinstance(module, nn.Conv1d | nn.Conv2d) else -1


def roles(units: Units) -> list[tuple[str, tuple[str, ...]]]:
    """(module, which of query, key and value it makes) of heads; empty where names and sizes do not tell."""
    parts = ("query", "key", "value")
    weights = [span for span in units.inputs if span.tensor.endswith(".weight") and len(units.outputs) == 1]
    if len(weights) == 1 and len(weights[0].segments) == 3:
        return [(weights[0].module, parts)]
    named = {span.module.rpartition(".")[2].lower(): span.module for span in weights}
    found: list[tuple[str, tuple[str, ...]]] = [
        (module, (part,)) for part in parts for leaf, module in named.items() if leaf in _SAID[part]
    ]
    return found if len(found) == len(parts) == len(weights) else []


def queries(units: Units) -> int:
    """Query heads in a unit of heads: those that share a key and a value. 1 where nothing tells."""
    widths = [span.segments for span in units.inputs if span.tensor.endswith(".weight")]
    if len(widths) == 1 and len(widths[0]) == 3:
        query, key, _ = (segment.size for segment in widths[0])
        return query // key
    made = {part: name for name, parts in roles(units) for part in parts}
    width = {span.module: span.width for span in units.inputs if span.tensor.endswith(".weight")}
    return width[made["query"]] // width[made["key"]] if made else 1


_SAID = {
    "query": ("query", "q", "q_proj", "q_lin", "query_proj"),
    "key": ("key", "k", "k_proj", "k_lin", "key_proj"),
    "value": ("value", "v", "v_proj", "v_lin", "value_proj"),
}
