"""Which units stay, by their scores: how many of each layer, and which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.units.spans import Units


@dataclass(frozen=True)
class Target:
    """How much is to go, in the words of the methods that ask."""

    where: str
    """The method: it stands first in every sentence."""
    ratio: float
    ranking: Literal["layer", "global"] = "layer"
    round_to: int = 1
    min_ratio: float = 0.0
    max_ratio: float = 1.0


def chosen(
    all_units: list[Units],
    scores: list[Tensor],
    target: Target,
    alive: list[Tensor] | None = None,
    costs: Sequence[float] | None = None,
) -> list[Tensor]:
    """Indices to keep, ascending: (kept,) each, or (lanes, kept). `alive`: bool, the units that are still to choose from.

    Scores of a layer are divided by their L2 norm first, as Michel et al. 2019 do: layers differ in scale. `costs`: of one unit
    of each layer, in parameters, bytes or milliseconds; under ranking global the ratio is then a share of the total cost, and
    what stays is what is worth most for its cost. All alike if absent.
    """
    alive = alive or [torch.ones(units.shape, dtype=torch.bool) for units in all_units]
    _check_leaves(all_units, target)
    ranked = [_ranked(score, some) for score, some in zip(scores, alive, strict=True)]
    possible = [_possible(units, int(some.sum(-1).min()), target) for units, some in zip(all_units, alive, strict=True)]
    if target.ranking == "layer":
        counts = [_nearest(numbers, units.count, target) for numbers, units in zip(possible, all_units, strict=True)]
    else:
        counts = _competing(
            all_units, possible, [values for values, _ in ranked], target.ratio, costs or [1.0] * len(all_units)
        )
    return [order[..., :count].sort(-1).values for (_, order), count in zip(ranked, counts, strict=True)]


def _ranked(score: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """(scores, indices) of a layer, best first, the dead last; equal scores in the order of the units."""
    score = torch.where(alive, score.float(), 0.0)
    score = torch.where(alive, score / score.norm().clamp_min(1e-12), -1.0)
    order = score.argsort(dim=-1, descending=True, stable=True)
    return score.gather(-1, order), order


def _least(units: Units, target: Target) -> int:
    return min(units.count, target.round_to)


def _check_leaves(all_units: list[Units], target: Target) -> None:
    """Rounding up to one unit a layer is fine here and there, but not where nearly all of what stays would be that."""
    total = sum(units.count * units.lanes for units in all_units)
    least = sum(_least(units, target) * units.lanes for units in all_units)
    if total * (1 - target.ratio) < least / 2:
        count, kind = all_units[0].count, all_units[0].kind
        raise CompressionError(
            f"{target.where}: ratio {target.ratio} of {count} {kind} a layer would leave none, and "
            f"{_least(all_units[0], target)} must stay; possible are ratios up to {1 - least / total:.2f}; lower ratio, or cut "
            f"whole layers."
        )


def _possible(units: Units, most: int, target: Target) -> list[int]:
    """Numbers that may stay: multiples of `round_to`, or all; no more than `most`; within `min_ratio` and `max_ratio`."""
    steps = (*range(target.round_to, units.count, target.round_to), units.count)
    numbers = [number for number in steps if number <= most]
    low, high = units.count * (1 - target.max_ratio) - 1e-6, units.count * (1 - target.min_ratio) + 1e-6
    return [number for number in numbers if low <= number <= high] or [_nearest(numbers, units.count, target)]


def _nearest(numbers: list[int], count: int, target: Target) -> int:
    """To what the ratio asks for; of two that are as near, the even multiple, as `round` has it."""
    wanted = count * (1 - target.ratio)
    return min(numbers, key=lambda number: (round(abs(number - wanted), 6), number // target.round_to % 2))


def _competing(
    all_units: list[Units], possible: list[list[int]], ranked: list[Tensor], ratio: float, costs: Sequence[float]
) -> list[int]:
    """How many of each layer stay when all layers compete, with their cost as near to the ratio as the possible numbers permit.

    Every layer begins with the least that may stay, and the step that holds the best scores for its cost is added, until the
    total is reached (Dantzig 1957: what fills a knapsack best). As scores fall within a layer, no other choice with these steps
    holds more of them.
    """
    counts = [numbers[0] for numbers in possible]
    each = [units.lanes * cost for units, cost in zip(all_units, costs, strict=True)]
    wanted = sum(units.count * cost for units, cost in zip(all_units, each, strict=True)) * (1 - ratio)
    total = sum(count * cost for count, cost in zip(counts, each, strict=True))
    steps = sorted(
        (-float(values[..., before:after].mean()) / costs[layer], layer, after)
        for layer, (numbers, values) in enumerate(zip(possible, ranked, strict=True))
        for before, after in pairwise(numbers)
    )
    full: set[int] = set()
    for _, layer, after in steps:
        size = (after - counts[layer]) * each[layer]
        if total + size / 2 > wanted + 1e-6:
            full.add(layer)
        if layer not in full:
            counts[layer], total = after, total + size
    return counts
