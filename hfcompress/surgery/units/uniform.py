"""Cuts that transformers' own config can tell, so that the result loads without hfcompress."""

from __future__ import annotations

from typing import Any

import torch

from hfcompress.checkpoint.describe import diff, settled
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import rebuild, twin
from hfcompress.surgery.units.cut import cut
from hfcompress.surgery.units.spans import Units


def check_even(model: Any, all_units: list[Units], counts: list[int], where: str) -> None:
    """CompressionError if the config can't tell that so many units of each layer stay; it says which numbers it can."""
    if tells(model, all_units, counts):
        return
    kind, most = all_units[0].kind, max(units.count for units in all_units)
    name = type(model.config).__name__
    # of heads there are few, and some numbers fit where others do not; of neurons the config can tell any number, or none
    tried = range(1, most) if kind == "heads" and len({units.count for units in all_units}) == 1 else ()
    possible = [count for count in tried if tells(model, all_units, [count] * len(all_units))]
    if possible:
        ratios = ", ".join(f"{count} (ratio {1 - count / most:.2f})" for count in possible)
        what = f"possible are {ratios} of {most}; choose such a ratio"
    else:
        what = f"its fields have no number for fewer {kind} of the same size"
    raise CompressionError(
        f"{where}: even: {name} can't tell {counts[0]} {kind} a layer of {all_units[0].count}; {what}, or leave even out, and "
        f"the result loads with hfcompress."
    )


def tells(model: Any, all_units: list[Units], counts: list[int]) -> bool:
    """Whether the config alone would describe the model with so many units of each layer; tried without its weights."""
    before = diff(model)
    smaller: Any = rebuild(twin(model), before)
    for units, count in zip(all_units, counts, strict=True):
        keep = torch.arange(count)
        cut(smaller, units, keep.expand(units.lanes, count) if units.lanes > 1 else keep)
    try:
        return set(settled(smaller, diff(smaller), before)) <= set(before)
    except CompressionError:
        return False
