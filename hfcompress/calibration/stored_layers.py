"""Layers in the formats that were chosen for them: each weight rounded to the nearest code, or codes chosen by what they do."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from hfcompress.calibration.batches import MakeBatches
from hfcompress.calibration.codes import Stage
from hfcompress.calibration.formats import Format
from hfcompress.calibration.grid import Codes, Grid
from hfcompress.calibration.layer_codes import calibrated_codes, codes_without_data
from hfcompress.layers import dense_form
from hfcompress.surgery.modules import forget_codes, swap
from hfcompress.surgery.targets import readable


def store_layers(
    model: Any, formats: Mapping[str, Format], stage: Stage, batches: MakeBatches | None, damping: float, asked: str
) -> None:
    """Store these Linear and Conv1D layers, or codes of one, as told; `stage` as in `choose_codes`, for formats whose codes may
    be chosen. `asked`: who is named in lines and errors."""
    grids = {name: storing.grid(model.get_submodule(name)) for name, storing in formats.items()}
    chosen = [name for name in formats if stage != "plain" and grids[name] is not None]
    biases: dict[str, Any] = {}
    again, dtype = readable(model, formats, asked), model.dtype

    def grid_of(layer: nn.Module) -> Grid:
        return by_layer[id(layer)]

    def put(name: str, found: Codes) -> None:
        new: Any = formats[name].of_codes(dense_form(model.get_submodule(name), dtype), found)
        biases[name] = new.bias
        new.bias = deepcopy(new.bias)  # which bitsandbytes casts to compute_dtype, in place, whenever the layer runs
        swap(model, name, new)

    for name in formats:
        if name not in chosen:
            swap(model, name, formats[name].rounded(dense_form(model.get_submodule(name), dtype)))
    by_layer: dict[int, Any] = {id(model.get_submodule(name)): grids[name] for name in chosen}
    if chosen:
        calibrated_codes(model, chosen, grid_of, batches, stage, put, damping, f"{asked}: calibrate: {stage}")
    for name, bias in biases.items():
        layer: Any = model.get_submodule(name)
        layer.bias = bias
    if again:
        forget_codes(model)


def stored_alone(name: str, layer: nn.Module, storing: Format, stage: Stage, asked: str) -> nn.Module:
    """What takes a layer's place, by a stage that needs no data."""
    grid = storing.grid(layer) if stage != "plain" else None
    if grid is None:
        return storing.rounded(layer)
    return storing.of_codes(layer, codes_without_data(name, layer, grid, stage, f"{asked}: calibrate: {stage}"))
