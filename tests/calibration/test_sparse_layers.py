"""Zeros chosen by what they do: what is left is the least-squares solution, nothing is ever worse, patterns hold exactly."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from hfcompress.calibration.sparse_layers import Read, reconstructed, sparse_gpt, wanda
from hfcompress.calibration.sparsity import QUANTILES, Pattern, quantiles, shares

ALONE, TWO_OF_FOUR, BLOCKS = Pattern(), Pattern.parse("2:4"), Pattern.parse("4x2")


def correlated(columns: int = 64, tokens: int = 512, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / (1 + torch.arange(columns))[:, None] ** 0.7
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return x.T @ x / tokens


def gaussian(rows: int = 32, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def read(square: Tensor) -> Read:
    return Read(square, None, 512)


def off(weight: Tensor, found: Tensor, square: Tensor) -> float:
    error = (weight - found).double()
    return float(((error @ square.double()) * error).sum())


@pytest.mark.parametrize("pattern", [ALONE, TWO_OF_FOUR, BLOCKS])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_so_many_weights_stay_the_greatest_of_those_that_may(pattern: Pattern, sparsity: float) -> None:
    scores = gaussian().abs()
    kept = pattern.kept(scores, sparsity)
    assert kept.shape == scores.shape
    if pattern.group:
        groups, chosen = scores.reshape(-1, 4), kept.reshape(-1, 4)
        assert (chosen.sum(1) == 4 - int(sparsity * 4)).all()
        assert (groups.masked_fill(~chosen, torch.inf).amin(1) >= groups.masked_fill(chosen, -1).amax(1)).all()
        return
    if pattern.block:
        blocks = kept.reshape(8, 4, 32, 2).movedim(2, 1).reshape(-1, 8)
        assert (blocks.all(1) | ~blocks.any(1)).all(), "whole blocks"
    assert abs(float((~kept).float().mean()) - sparsity) < 0.005
    if pattern is ALONE:
        assert scores[kept].min() >= scores[~kept].max()
        by_row = pattern.kept(scores, sparsity, by_row=True)
        assert ((~by_row).sum(1) == int(64 * sparsity)).all()


@pytest.mark.parametrize("given", ["2-4", "4:2", "0:4", "4:4", "0x4", "x", "2:4:8", "", "-1:4"])
def test_what_is_no_pattern_says_what_is(given: str) -> None:
    with pytest.raises(ValueError, match=r"is no pattern; possible are N:M, as 2:4.*and blocks of outputs x inputs, as 16x1"):
        Pattern.parse(given)


def test_what_is_left_is_the_least_squares_solution_of_each_row() -> None:
    weight, square, damping = gaussian(), correlated(), 0.01
    kept = ALONE.kept(weight.abs(), 0.5)
    found = reconstructed(weight, weight * kept, kept, square, damping)
    assert (found[~kept] == 0).all()
    ridged = (square + torch.diag(damping * square.diagonal().mean().expand(64))).double()
    for row, mask, solved in zip(weight.double(), kept, found.double(), strict=True):
        exact = torch.linalg.solve(ridged[mask][:, mask], ridged[mask] @ row)
        best = row.new_zeros(64).masked_scatter(mask, exact)
        least, mine = (float((row - one) @ ridged @ (row - one)) for one in (best, solved))
        assert least <= mine <= 1.005 * least


def test_no_row_gets_worse_whatever_the_moments_are() -> None:
    weight = gaussian()
    kept = ALONE.kept(weight.abs(), 0.5)
    twin = correlated(32).repeat_interleave(2, 0).repeat_interleave(2, 1)  # columns that say the same
    for square in (torch.zeros(64, 64), torch.ones(64, 64), twin, correlated() * 1e-12, correlated() * 1e8):
        found = reconstructed(weight, weight * kept, kept, square, 0.01)
        assert found.isfinite().all() and (found[~kept] == 0).all()
        before, after = (((weight - one) @ square * (weight - one)).sum(1) for one in (weight * kept, found))
        assert (after <= before * 1.001 + 1e-6 * before.max()).all()


@pytest.mark.parametrize("pattern", [ALONE, TWO_OF_FOUR, BLOCKS])
def test_each_step_is_worth_something(pattern: Pattern) -> None:
    """Magnitude, Wanda, SparseGPT, and least squares after each: never worse, and far better where inputs are correlated."""
    weight, square = gaussian(128, 256), correlated(256, 2048)
    by_magnitude = pattern.kept(weight.abs(), 0.5)
    by_wanda = pattern.kept(wanda(weight, read(square)), 0.5, by_row=True)
    solved = sparse_gpt(weight, weight != 0, read(square), pattern, 0.5, 0.01, "layer")
    assert solved is not None
    left, mask = solved
    assert (left[~mask] == 0).all()
    if pattern.group:
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
    assert float((~mask).float().mean()) == pytest.approx(0.5, abs=0.005)
    errors = [off(weight, weight * kept, square) for kept in (by_magnitude, by_wanda)]
    assert errors[1] < errors[0]
    assert off(weight, left, square) < 0.6 * errors[1]
    for start, kept in ((weight * by_magnitude, by_magnitude), (weight * by_wanda, by_wanda), (left, mask)):
        again = reconstructed(weight, start, kept, square, 0.01)
        assert off(weight, again, square) < off(weight, start, square)


def test_sparse_gpt_takes_what_costs_least_and_nothing_over_where_inputs_have_nothing_in_common() -> None:
    power = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    weight = gaussian()
    solved = sparse_gpt(weight, weight != 0, read(torch.diag(power)), ALONE, 0.5, 0.0, "layer")
    assert solved is not None
    cost = weight.square() * power
    assert torch.equal(solved[1], ALONE.kept(cost, 0.5))
    torch.testing.assert_close(solved[0], weight * solved[1])


def test_sparse_gpt_of_the_last_column_of_two_is_worked_out_by_hand() -> None:
    """One of two weights goes: the first, whose cost is w^2 / [H^-1]_11, and the second becomes w_2 + w_1 h_12 / h_22."""
    square = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    weight = torch.tensor([[0.2, 3.0]])
    solved = sparse_gpt(weight, weight != 0, read(square), Pattern(group=(1, 2)), 0.5, 0.0, "layer")
    assert solved is not None
    torch.testing.assert_close(solved[0], torch.tensor([[0.0, 3.1]]))


def test_what_is_zero_already_stays_so_and_counts() -> None:
    weight, square = gaussian(), correlated()
    sparse = weight.masked_fill(~TWO_OF_FOUR.kept(weight.abs(), 0.5), 0.0)
    for pattern, sparsity in ((ALONE, 0.6), (ALONE, 0.4), (TWO_OF_FOUR, 0.5), (Pattern.parse("1:4"), 0.75), (BLOCKS, 0.5)):
        solved = sparse_gpt(sparse, sparse != 0, read(square), pattern, sparsity, 0.01, "layer")
        assert solved is not None
        assert (solved[0][sparse == 0] == 0).all() and not solved[1][sparse == 0].any()
        if pattern is ALONE:
            assert float((solved[0] == 0).float().mean()) == pytest.approx(max(sparsity, 0.5), abs=0.01)


def test_moments_without_an_inverse_are_told_and_left(caplog: pytest.LogCaptureFixture) -> None:
    square = torch.full((64, 64), torch.nan)
    with caplog.at_level(logging.WARNING):
        assert sparse_gpt(gaussian(), gaussian() != 0, read(square), ALONE, 0.5, 0.01, "some.layer") is None
    assert "some.layer: the second moments of what it reads have no inverse; its weights are chosen by wanda." in caplog.text


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("most", [1.0, 0.95])
def test_layers_that_compete_lose_so_much_together(sparsity: float, most: float) -> None:
    layers: list[Any] = [gaussian(64, 64).abs(), gaussian(32, 16).abs() * 3, torch.zeros(16, 16), torch.ones(40, 10)]
    sizes = [one.numel() for one in layers]
    found = shares([quantiles(one) for one in layers], sizes, sparsity, most)
    assert all(0 <= share <= most for share in found)
    assert sum(share * size for share, size in zip(found, sizes, strict=True)) == pytest.approx(sparsity * sum(sizes), rel=0.01)
    assert found[2] >= found[1], "what is worth nothing goes first"
    assert len(quantiles(layers[1])) == QUANTILES
