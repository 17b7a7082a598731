"""Codes for the layers of a model, chosen layer by layer on what each reads once those before it are codes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches
from hfcompress.calibration.codes import Stage, choose_codes
from hfcompress.calibration.grid import Codes, Grid
from hfcompress.calibration.layerwise import layerwise
from hfcompress.calibration.processes import agreed, processes
from hfcompress.calibration.progress import progress
from hfcompress.calibration.second_moments import DAMPING, Moments, Projection
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import dense_form
from hfcompress.layers.base import features, is_conv1d
from hfcompress.layers.bitsandbytes import codebook, scales_read

log = logging.getLogger(__name__)
NEED_NO_DATA: tuple[Stage, ...] = ("plain", "scales")


@dataclass(frozen=True)
class CodedLayer:
    """What was chosen for a layer; errors as in `Codes`."""

    name: str
    plain_error: float
    error: float
    tokens: int


def four_bit_grid(quant_type: str, blocksize: int, use_double_quant: bool) -> Grid:
    """bitsandbytes' NF4 or FP4."""
    return Grid(codebook(quant_type), blocksize, stored=scales_read if use_double_quant else None)


def calibrated_codes(
    model: Any,
    names: Sequence[str],
    grid_of: Callable[[nn.Module], Grid],
    batches: MakeBatches | None,
    stage: Stage,
    then: Callable[[str, Codes], None],
    damping: float = DAMPING,
    asked: str = "calibrate",
) -> list[CodedLayer]:
    """Call `then` with each of these Linear and Conv1D layers, or codes of one, and its codes, as `choose_codes` finds them.

    `then` puts the codes in the layer's place, so that those after it are chosen on what it says by then. A layer that no token
    comes to gets the codes of the stage `scales`; a line says so. CompressionError where what a layer reads, or its weight, is
    not finite.
    """
    told: list[CodedLayer] = []

    def choose(name: str, moments: Moments | None) -> None:
        module = model.get_submodule(name)
        weight = _matrix(module, model.dtype)
        square = None if moments is None else moments.square(about_mean=False)
        _check_finite(name, weight, asked)
        if square is not None and not bool(square.isfinite().all()):
            raise CompressionError(
                f"{asked}: what {name} reads on the calibration data is infinite or no number; load the model in float32 or "
                f"bfloat16, or choose calibrate: scales, which reads no data."
            )
        grid = grid_of(module)
        codes = choose_codes(weight, grid, stage if square is not None else _without_data(stage), square, damping, name)
        told.append(CodedLayer(name, codes.plain_error, codes.error, moments.tokens if moments is not None else 0))
        then(name, _same_everywhere(codes, grid))

    def read(projection: Projection, moments: list[Moments]) -> None:
        if moments[0].tokens:
            choose(projection.module, moments[0])
            return
        log.warning(
            "%s: no token of the calibration data comes to %s; its scales are chosen without.", asked, projection.module
        )
        choose(projection.module, None)

    if stage in NEED_NO_DATA:
        for name in progress(names, what="choosing scales", shown=processes().is_main_process):
            choose(name, None)
    else:
        targets = [Projection(name, 0 if is_conv1d(model.get_submodule(name)) else 1) for name in names]
        layerwise(model, targets, batches, asked, read)
        _tell_short(model, told, asked)
    if told:
        plain, chosen = (sum(errors) / len(told) for errors in ([one.plain_error for one in told], [one.error for one in told]))
        what = "weights" if stage in NEED_NO_DATA else "outputs on the calibration data"
        line = "%s: the %s of %d layers are off by %.3g of their mean square, and would be by %.3g if rounded plainly."
        log.info(line, asked, what, len(told), chosen, plain)
    return told


def _matrix(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """(out, in): the weight of a dense layer, or what its codes stand for, in this dtype."""
    dense: Any = dense_form(layer, dtype)
    return dense.weight.detach().T if is_conv1d(dense) else dense.weight.detach()  # type: ignore[no-any-return]


def codes_without_data(name: str, layer: Any, grid: Grid, stage: Stage, asked: str) -> Codes:
    """The codes that `calibrated_codes` finds for one layer at a stage that needs no data."""
    weight = _matrix(layer, layer.weight.dtype)
    _check_finite(name, weight, asked)
    return _same_everywhere(choose_codes(weight, grid, stage, name=name), grid)


def _check_finite(name: str, weight: Tensor, asked: str) -> None:
    if not bool(weight.isfinite().all()):
        raise CompressionError(
            f"{asked}: the weight of {name} holds infinite values, or values that are no numbers; load the model again, or "
            f"name {name} in skip_modules."
        )


def _without_data(stage: Stage) -> Stage:
    return stage if stage in NEED_NO_DATA else "scales"


def _same_everywhere(codes: Codes, grid: Grid) -> Codes:
    """Whatever tokens a process saw, all of them take what the first one chose."""
    if processes().num_processes == 1:
        return codes

    def first(tensor: Tensor) -> Tensor:
        return agreed(tensor).to(tensor.device)

    offset = None if codes.raw_offset is None else first(codes.raw_offset)
    scales = first(codes.raw_scales)
    read = grid.read(scales), None if offset is None else grid.read(offset)
    return replace(codes, codes=first(codes.codes), scales=read[0], offset=read[1], raw_scales=scales, raw_offset=offset)


def _tell_short(model: nn.Module, told: list[CodedLayer], asked: str) -> None:
    """Second moments of fewer tokens than columns are not of full rank: the ridge decides what they don't."""
    short = [one for one in told if 0 < one.tokens < _columns(model, one)]
    if short:
        line = "%s: %d of %d layers saw too few tokens (%s reads %d columns and saw %d tokens); give more samples."
        first = short[0]
        log.warning(line, asked, len(short), len(told), first.name, _columns(model, first), first.tokens)


def _columns(model: nn.Module, layer: CodedLayer) -> int:
    return features(model.get_submodule(layer.name))[0]
