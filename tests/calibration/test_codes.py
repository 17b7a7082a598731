"""Codes chosen by what they do: each stage lowers the error it is for, by as much as its paper claims, and none is ever worse."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from hfcompress.calibration.codes import choose_codes
from hfcompress.calibration.grid import Grid, Nearest
from hfcompress.calibration.layer_codes import four_bit_grid
from hfcompress.layers.bitsandbytes import codebook, scales_read

STAGES: tuple[Any, ...] = ("scales", "diagonal", "feedback", "rounding")


def half(scales: Tensor) -> Tensor:
    return scales.half().float()


GRIDS = {
    "nf4": four_bit_grid("nf4", 64, False),
    "nested nf4": four_bit_grid("nf4", 64, True),
    "fp4": four_bit_grid("fp4", 32, False),
    "int8 rows": Grid(torch.arange(-127, 128.0), 256),
    "Q8_0": Grid(torch.arange(-127, 128.0), 32, stored=half),
    "Q4_0": Grid(torch.arange(-8, 8.0), 32, stored=half),
    "Q4_1": Grid(torch.arange(16.0), 32, affine=True, stored=half),
    "positive scales": Grid(torch.arange(-8, 8.0), 64, signs=False),
}


def correlated(columns: int = 256, tokens: int = 1024, seed: int = 1) -> Tensor:
    """Second moments (columns, columns) of inputs whose variance lies in few directions, as that of hidden states does."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / (1 + torch.arange(columns))[:, None] ** 0.7
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return (x.T @ x / tokens).double()


def gaussian(rows: int = 128, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def off(weight: Tensor, found: Any, grid: Grid, square: Tensor | None = None) -> float:
    error = (weight - found.dequantised(grid)).double()
    return float(error.square().sum() if square is None else ((error @ square) * error).sum())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_table_finds_the_nearest_value(grid: Grid) -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * grid.values.abs().max()
    middles = (grid.values[1:] + grid.values[:-1]) / 2
    around = [torch.nextafter(middles, torch.tensor(torch.inf)), torch.nextafter(middles, torch.tensor(-torch.inf))]
    x = torch.cat([x, middles, *around, torch.tensor([-1e30, 1e30, 0.0])])
    assert torch.equal(Nearest(grid.values)(x).long(), torch.bucketize(x, middles))


def test_searched_scales_lower_the_squared_error_of_gaussian_blocks() -> None:
    weight = gaussian(512, 512)
    for quant_type, share in (("nf4", 0.18), ("fp4", 0.13)):
        grid = four_bit_grid(quant_type, 64, False)
        plain = off(weight, choose_codes(weight, grid, "plain"), grid)
        assert off(weight, choose_codes(weight, grid, "scales"), grid) < (1 - share) * plain
    positive = Grid(codebook("nf4"), 64, signs=False)
    signed, unsigned = (choose_codes(weight, grid, "scales") for grid in (four_bit_grid("nf4", 64, False), positive))
    assert (unsigned.scales > 0).all() and (signed.scales < 0).float().mean() > 0.3
    assert off(weight, signed, positive) < 0.97 * off(weight, unsigned, positive), "signs alone are worth some percent"


def test_signs_are_kept_where_they_pay_after_nesting() -> None:
    """Nested scales are coded about their mean: mixed signs lose some precision, and are worth more than that here; where rows
    are alike but for a few, they are not."""
    weight, grid = gaussian(512, 512), four_bit_grid("nf4", 64, True)
    mixed = choose_codes(weight, grid, "scales")
    assert (mixed.scales < 0).any() and torch.equal(mixed.scales, scales_read(mixed.raw_scales))
    positive = Grid(codebook("nf4"), 64, signs=False, stored=scales_read)
    assert off(weight, mixed, grid) < off(weight, choose_codes(weight, positive, "scales"), grid)
    coarse = Grid(codebook("nf4"), 64, stored=lambda scales: (scales * 4).round() / 4 if (scales < 0).any() else scales)
    assert (choose_codes(weight, coarse, "scales").scales > 0).all(), "a format that can't tell mixed signs well gets none"


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_each_stage_lowers_the_error_of_outputs(grid: Grid) -> None:
    weight, square = gaussian(), correlated()
    errors = {stage: off(weight, choose_codes(weight, grid, stage, square), grid, square) for stage in ("plain", *STAGES)}
    assert errors["diagonal"] <= errors["plain"]
    assert errors["feedback"] < 0.5 * errors["diagonal"]
    assert errors["rounding"] < 0.99 * errors["feedback"]
    told = choose_codes(weight, grid, "feedback", square)
    power = float(((weight.double() @ square) * weight).sum())
    assert told.error == pytest.approx(errors["feedback"] / power, rel=1e-3)
    assert told.plain_error == pytest.approx(errors["plain"] / power, rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", GRIDS)
def test_no_stage_is_worse_than_plain(name: str, stage: Any) -> None:
    """On data that have no structure to make use of, of few tokens, and on weights that lie on the grid already."""
    grid, few = GRIDS[name], torch.randn(3, 256, generator=torch.Generator().manual_seed(5)).double()
    normal = gaussian(16)
    on_grid = choose_codes(normal, grid, "plain").dequantised(grid)
    for weight in (normal, on_grid, normal + 100 * (torch.arange(256) == 7), torch.zeros(16, 256), normal.round()):
        for square in (torch.eye(256, dtype=torch.float64), few.T @ few / 3):
            measured = None if stage == "scales" else square
            plain = off(weight, choose_codes(weight, grid, "plain", square), grid, measured)
            found = off(weight, choose_codes(weight, grid, stage, square), grid, measured)
            assert found <= plain * (1 + 1e-4) + 1e-6 * float(weight.square().mean())


def test_columns_that_were_never_asked_for_are_rounded_and_tell_none() -> None:
    weight, square = gaussian(), correlated()
    dead = torch.zeros(256, dtype=torch.bool).index_fill_(0, torch.tensor([0, 5, 63, *range(64, 128)]), True)
    square[dead] = square[:, dead] = 0
    for grid in (GRIDS["nf4"], GRIDS["Q4_1"]):
        plain = choose_codes(weight, grid, "plain").dequantised(grid)
        for stage in ("diagonal", "feedback", "rounding"):
            found = choose_codes(weight, grid, stage, square)
            assert found.scales.isfinite().all()
            error, before = ((weight - one)[:, dead].square().mean() for one in (found.dequantised(grid), plain))
            assert error < 1.5 * before, "they are as near as others"
    assert choose_codes(weight, GRIDS["nf4"], "feedback", torch.zeros(256, 256)).codes.shape == (128, 256)


def test_what_says_the_same_twice_is_damped_until_it_can_be_inverted() -> None:
    weight, x = gaussian(), torch.randn(16, 256, generator=torch.Generator().manual_seed(3)).double()
    x[:, 128:] = x[:, :128]
    square, grid = x.T @ x / 16, GRIDS["nf4"]
    errors = [
        off(weight, choose_codes(weight, grid, stage, square, damping=0.0), grid, square) for stage in ("plain", "feedback")
    ]
    assert errors[1] < 0.1 * errors[0]


def test_moments_without_an_inverse_leave_the_nearest_codes(caplog: pytest.LogCaptureFixture) -> None:
    weight, square, grid = gaussian(), correlated(), GRIDS["nf4"]
    broken = square - 1e6 * torch.outer(*[torch.nn.functional.normalize(torch.ones(256).double(), dim=0)] * 2)
    broken.fill_diagonal_(1.0)
    with caplog.at_level(logging.WARNING, logger="hfcompress"):
        found = choose_codes(weight, grid, "feedback", broken, name="encoder.dense")
    assert "encoder.dense: the second moments of what it reads have no inverse, with whatever ridge;" in caplog.text
    assert torch.equal(found.codes, choose_codes(weight, grid, "diagonal", broken).codes)


def test_columns_that_do_not_fill_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="a layer: 100 columns are no multiple of the block size 64"):
        choose_codes(torch.ones(4, 100), GRIDS["nf4"], "plain")
