"""The greedy elimination against least squares solved anew for every set of units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfcompress.calibration.obs import PANEL, prices


def problem(units: int, size: int, sides: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and second moments of columns that are far from independent."""
    generator = torch.Generator().manual_seed(units + size + sides)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    columns = units * size
    weights = [drawn(5, columns) for _ in range(sides)]
    rows = [drawn(3 * columns, columns) @ drawn(columns, columns) for _ in range(sides)]
    return weights, [some.T @ some / len(some) for some in rows]


def lost(weight: Tensor, square: Tensor, gone: list[int], size: int, damping: float) -> float:
    """mean |W x - W' x|^2 + ridge |W - W'|^2, W' the best that is 0 at the columns of what is gone."""
    square = square + damping * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    stays = [column for column in range(len(square)) if column // size not in gone]
    off = weight.clone()
    off[:, stays] -= weight @ square[:, stays] @ torch.linalg.inv(square[stays][:, stays])
    return float((off @ square @ off.T).trace())


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize(("units", "size"), [(PANEL + 9, 1), (12, 3)])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_cheapest_goes_first_and_is_paid_for_in_full(units: int, size: int, sides: int, damping: float) -> None:
    weights, squares = problem(units, size, sides)
    found = prices(list(zip(weights, squares, strict=True)), size, damping)

    def cost(gone: list[int]) -> float:
        return sum(lost(weight, square, gone, size, damping) for weight, square in zip(weights, squares, strict=True))

    gone: list[int] = []
    whole = cost(list(range(units)))
    for _ in range(units):
        left = [unit for unit in range(units) if unit not in gone]
        gone.append(min(left, key=lambda unit: cost([*gone, unit])))
        assert float(found[gone[-1]]) == pytest.approx(cost(gone) / whole, rel=1e-6)
    assert float(found.max()) == pytest.approx(1.0) and found.argsort().tolist() == gone


def test_what_is_never_read_or_never_seen_is_free() -> None:
    (weight,), (square,) = problem(8, 2, 1)
    weight[:, 4:6] = 0.0
    square[10:12] = square[:, 10:12] = 0.0
    found = prices([(weight, square)], 2, 0.01)
    assert (found[[2, 5]] < 1e-2).all() and (found[[0, 1, 3, 4, 6, 7]] > found[[2, 5]].max()).all()
    assert torch.equal(prices([(weight, torch.zeros_like(square))], 2, 0.01).isfinite(), torch.ones(8, dtype=torch.bool))
    assert prices([(weight, square * torch.inf)], 2, 0.01).isnan().all(), "which is refused where scores are taken"
