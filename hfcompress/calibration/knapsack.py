"""One choice of each decision, so that a budget holds and the harm is the least there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNITS = 50_000
"""Into how many parts a budget is divided: each decision is charged up to one of them too much."""


@dataclass(frozen=True)
class Choice:
    """One way to store a layer, or several that are decided together."""

    bits: int
    cost: float
    """Bytes, or whatever the budget is of."""
    harm: float
    """By how much the loss is expected to grow."""


def allocated(decisions: Sequence[Sequence[Choice]], budget: float) -> list[Choice] | None:
    """One choice of each decision: those of the least harm in all whose costs are within the budget; None if none are.

    The multiple-choice knapsack by dynamic programming, costs rounded up to a part in `UNITS` of the budget; what the rounding
    leaves over is spent on whatever still fits.
    """
    unit = budget / UNITS
    costs = [[int(np.ceil(choice.cost / unit)) if unit > 0 else UNITS + 1 for choice in choices] for choices in decisions]
    if sum(min(choice.cost for choice in choices) for choices in decisions) > budget:
        return None
    if sum(map(min, costs)) > UNITS:  # it fits by less than what rounding takes: then nothing is to be chosen
        return [min(choices, key=lambda one: (one.cost, one.harm)) for choices in decisions]
    least = np.zeros(UNITS + 1)  # of harm, within so many units
    taken = np.zeros((len(decisions), UNITS + 1), dtype=np.int16)
    for place, (choices, whole) in enumerate(zip(decisions, costs, strict=True)):
        following = np.full(UNITS + 1, np.inf)
        for number, (choice, cost) in enumerate(zip(choices, whole, strict=True)):
            if cost <= UNITS:
                harm = np.full(UNITS + 1, np.inf)
                harm[cost:] = least[: UNITS + 1 - cost] + choice.harm
                better = harm < following
                following[better], taken[place, better] = harm[better], number
        least = following
    left, found = UNITS, list[Choice]()
    for place in reversed(range(len(decisions))):
        number = int(taken[place, left])
        found.append(decisions[place][number])
        left -= costs[place][number]
    return _improved(found[::-1], decisions, budget)


def _improved(found: list[Choice], decisions: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """Spend what is left over, on the most harm that each byte takes away."""
    spare = budget - sum(choice.cost for choice in found)
    while True:
        steps = [
            ((now.harm - other.harm) / (other.cost - now.cost), place, other)
            for place, now in enumerate(found)
            for other in decisions[place]
            if 0 < other.cost - now.cost <= spare and other.harm < now.harm
        ]
        if not steps:
            return found
        _, place, other = max(steps, key=lambda step: step[0])
        spare -= other.cost - found[place].cost
        found[place] = other
