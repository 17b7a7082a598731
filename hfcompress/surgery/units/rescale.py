"""From a small model of an architecture to the user's: the same units in other sizes, counted as the model stands."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.integers import CONFIG_COUNTS, HEAD_COUNTS, largest
from hfcompress.layers import features, stands_in
from hfcompress.surgery.units.spans import Counter, Segment, Span, Units


def fitted(units: Units, specimen: nn.Module, described: nn.Module, model: nn.Module, instead: str) -> Units:
    """The specimen's units in the sizes of the described model, counted as the model stands. `instead`: what errors advise."""
    scaled = replace(
        units,
        inputs=tuple(_scaled(span, units, specimen, described, instead) for span in units.inputs),
        outputs=tuple(_scaled(span, units, specimen, described, instead) for span in units.outputs),
    )
    reader = scaled.outputs[0]
    count = _length(model, reader) // scaled.size
    for span in (*scaled.inputs, *scaled.outputs):
        if span.length(count) != _length(model, span):
            raise CompressionError(
                f"{span.tensor}: {_length(model, span)} entries along axis {span.axis}, where {count} {units.kind} take "
                f"{span.length(count)}; possible are models that nobody cut, or hfcompress did; start from the original."
            )
    before = _length(described, reader) // scaled.size
    counters = tuple(_counted(counter, units, described, before, instead) for counter in units.counters)
    return replace(scaled, count=count, counters=counters)


def _length(model: nn.Module, span: Span) -> int:
    owner, leaf = model.get_submodule(span.module), span.leaf
    if leaf == "weight" and stands_in(owner):
        into, out = features(owner)
        return out if span.axis == 0 else into
    return getattr(owner, leaf).shape[span.axis]


def _scaled(span: Span, units: Units, specimen: nn.Module, described: nn.Module, instead: str) -> Span:
    """The same segments in another model of the class, which has as many heads, or neurons of the same size."""
    reader = units.outputs[0]
    small, large = _length(specimen, span), _length(described, span)
    count = units.count if units.kind == "heads" else _length(described, reader) // units.size
    if any(segment.is_shared for segment in span.segments):
        factor = Fraction(_length(described, reader) * units.count, _length(specimen, reader) * count)
    else:
        factor = Fraction(large * units.count, small * count)
    sizes = [segment.size * factor for segment in span.segments]
    scaled = replace(span, segments=tuple(Segment(int(s), old.is_shared) for s, old in zip(sizes, span.segments, strict=True)))
    if any(size.denominator != 1 for size in sizes) or scaled.length(count) != large:
        raise CompressionError(
            f"{span.tensor}: {large} entries along axis {span.axis} do not fall into {count} {units.kind} as in a small model "
            f"of the class; {instead}."
        )
    return scaled


def _counted(counter: Counter, units: Units, described: nn.Module, count: int, instead: str) -> Counter:
    """What one unit is worth in the described model. As many heads as in the specimen, or the units would be others."""
    value = largest(described.get_submodule(counter.module), counter.attribute) or 0
    if value % count or (counter.attribute in (*HEAD_COUNTS, *CONFIG_COUNTS) and value // count != counter.worth):
        raise CompressionError(
            f"{counter.module}: {counter.attribute} = {value} is not told by {count} {units.kind}, so where they are is not "
            f"proven; {instead}."
        )
    return replace(counter, worth=value // count)
