"""One budget of parameters over all layers: how many components each keeps, or whether it stays dense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """What a layer of (out, in) loses at each rank."""

    shape: tuple[int, int]
    losses: list[float]
    """losses[r]: of rank r, from 0 to that at which two factors are no longer smaller than the matrix; never rising."""

    @classmethod
    def of(cls, shape: tuple[int, int], energies: Tensor, sensitivity: float | None = None) -> Curve:
        """`energies`: of its components, descending. `sensitivity`: how much the model's loss rises with the mean squared error
        of what the layer says, if that is known.

        Else the loss is minus the logarithm of the share of the energy that stays: a share, as layers differ in scale and the
        norms that follow undo that; its logarithm, as shares multiply along the depth.
        """
        if sensitivity is not None:
            tail = energies.flip(0).cumsum(0).flip(0) * sensitivity  # summed from the end, where they are small
            return cls(shape, [*tail.tolist(), 0.0][: pays_up_to(shape) + 1])
        kept = energies.cumsum(0)[: pays_up_to(shape)] / energies.sum().clamp_min(1e-300)
        return cls(shape, [math.inf, *(-kept.clamp(1e-300, 1).log()).tolist()])

    @property
    def cost(self) -> int:
        """Parameters of one component."""
        return sum(self.shape)

    @property
    def dense(self) -> int:
        """Parameters of the whole matrix."""
        return self.shape[0] * self.shape[1]


def pays_up_to(shape: tuple[int, int]) -> int:
    """The largest rank at which two factors have fewer parameters than the matrix; 0 if none has."""
    return (shape[0] * shape[1] - 1) // sum(shape)


def ranks_within(curves: list[Curve], ratio: float, round_to: int = 1) -> list[int | None]:
    """The rank of each layer, None for one that stays dense, of the least total loss with `ratio` of all parameters.

    A dense layer loses nothing, and its factors lose much where they just begin to pay: between the two lies a step that no
    single component fills. So a layer moves along the lower convex hull of (parameters, loss), from its least rank to its dense
    matrix, and the moves that save most loss for their parameters are made first, until the budget is spent (Lagrange's
    relaxation of the knapsack, Shoham, Gersho 1988). What is left then, less than one such step, goes to single components,
    best first.
    """
    budget = ratio * sum(curve.dense for curve in curves)
    hulls = [_hull(curve, round_to) for curve in curves]
    found = [hull[0] for hull in hulls]
    total = sum(parameters for parameters, _, _ in found)
    moves = sorted(
        ((before[1] - after[1]) / (after[0] - before[0]), -number, after)
        for number, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    )
    while moves:
        _, number, after = moves.pop()
        more = after[0] - found[-number][0]
        if total + more > budget:
            break
        found[-number], total = after, total + more
    ranks = [rank for _, _, rank in found]
    _fill(curves, ranks, budget - total, round_to)
    return ranks


def _hull(curve: Curve, round_to: int) -> list[tuple[int, float, int | None]]:
    """(parameters, loss, rank) on the lower convex hull, from the least rank to the dense matrix, whose rank is None."""
    last = len(curve.losses) - 1
    points: list[tuple[int, float, int | None]] = [
        (rank * curve.cost, curve.losses[rank], rank) for rank in range(round_to, last + 1, round_to)
    ]
    hull: list[tuple[int, float, int | None]] = []
    for point in (*points, (curve.dense, 0.0, None)):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(before: tuple[int, float, int | None], after: tuple[int, float, int | None]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def _fill(curves: list[Curve], ranks: list[int | None], left: float, round_to: int) -> None:
    """Give what is left of the budget to single components of the layers that are factored, best first."""
    steps = sorted(
        (
            ((curve.losses[rank] - curve.losses[rank + round_to]) / curve.cost, -number, -rank)
            for number, (curve, from_rank) in enumerate(zip(curves, ranks, strict=True))
            if from_rank is not None
            for rank in range(from_rank, len(curve.losses) - round_to, round_to)
        ),
        reverse=True,
    )
    full: set[int] = set()
    for _, number, rank in steps:
        curve = curves[-number]
        if curve.cost * round_to > left:
            full.add(number)
        elif number not in full:
            ranks[-number], left = -rank + round_to, left - curve.cost * round_to
