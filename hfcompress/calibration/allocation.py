"""How few bits each layer may have: the least harm to the loss for a size, solved exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating, given, loss_of, singles
from hfcompress.calibration.formats import Format, harm, stored_bytes
from hfcompress.checkpoint.errors import CompressionError

log = logging.getLogger("hfcompress")
DENSE = 16
"""The bits that a layer is said to have which is left as it is, whatever its dtype."""

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


def least_harm(
    model: Any,
    names: Sequence[str],
    formats: Mapping[int, Format],
    batches: MakeBatches | None,
    target_bits: float | None = None,
    target_bytes: float | None = None,
    coded: Mapping[str, nn.Module] | None = None,
) -> dict[str, Format]:
    """How to store each of these layers, so that the loss is expected to grow the least within a target: in one of the formats,
    told by their bits, or dense, and then it is not in the answer. Layers that read the same are stored alike.

    `target_bits`: a weight of theirs, on average, scales included. `target_bytes`: of the whole model on disk, in which
    `coded` stand in for the layers of these names. CompressionError where no choice is small enough; the least is told.
    """
    slopes = squared_slopes(model, names, batches, "quantize: a target")
    groups = read_together(model, names, next(singles(model, next(iter(given(batches, "quantize: a target"))))))
    decisions = [_choices(model, group, formats, slopes) for group in groups]
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    others = 0.0 if target_bytes is None else _bytes_of(model, coded or {}) - sum(_dense_bytes(model, name) for name in names)
    budget = (target_bits or 0) * weights / 8 if target_bytes is None else target_bytes - others
    found = allocated(decisions, budget)
    if found is None:
        least = sum(min(choice.cost for choice in choices) for choices in decisions)
        if target_bytes is None:
            told = f"target_bits: {target_bits:g}", f"{8 * least / weights:.3g} bits"
        else:
            told = f"target_megabytes: {target_bytes / 1e6:g}", f"{(others + least) / 1e6:.4g} MB"
        raise CompressionError(
            f"quantize: {told[0]} can't be met: with the fewest bits that fit it takes {told[1]}; choose that or more, code "
            f"the embeddings as well, or cut the model before."
        )
    chosen = {name: choice.bits for group, choice in zip(groups, found, strict=True) for name in group}
    tally = ", ".join(f"{list(chosen.values()).count(bits)} in {bits} bits" for bits in formats)
    dense = list(chosen.values()).count(DENSE)
    grows = sum(choice.harm for choice in found)
    log.info("quantize: %d layers: %s, %d dense; the loss is to grow by %.3g", len(chosen), tally, dense, grows)
    return {name: formats[bits] for name, bits in chosen.items() if bits != DENSE}


def _choices(model: Any, group: Sequence[str], formats: Mapping[int, Format], slopes: Mapping[str, Tensor]) -> list[Choice]:
    """Every way to store these layers alike."""
    layers = {name: model.get_submodule(name) for name in group}
    found = [Choice(DENSE, float(sum(_dense_bytes(model, name) for name in group)), 0.0)]
    for bits, storing in formats.items():
        if not any(storing.misfit(layer) for layer in layers.values()):
            cost = worse = 0.0
            for name, layer in layers.items():
                new = storing.rounded(layer)
                cost, worse = cost + stored_bytes(new), worse + harm(layer, new, slopes[name])
            found.append(Choice(bits, cost, worse))
    return found


def _dense_bytes(model: Any, name: str) -> int:
    weight = model.get_submodule(name).weight
    return weight.numel() * weight.element_size()


def _bytes_of(model: nn.Module, coded: Mapping[str, nn.Module]) -> float:
    """What a model takes on disk, tied tensors once, these standing in for its layers of their names."""
    tensors = {
        key: value
        for key, value in model.state_dict(keep_vars=True).items()
        if not any(key.startswith(f"{name}.") for name in coded) and isinstance(value, Tensor)
    }
    for name, layer in coded.items():
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict(keep_vars=True).items()}
    return float(sum(one.numel() * one.element_size() for one in {id(one): one for one in tensors.values()}.values()))


def squared_slopes(model: Any, names: Sequence[str], batches: MakeBatches | None, asked: str) -> dict[str, Tensor]:
    """Of each layer, the mean over examples of (dL/dW)^2, float32, of the shape of its weight: the diagonal of the empirical
    Fisher information, which stands for the Hessian's. What rounding W to Q costs is about half the sum of slopes * (W - Q)^2
    (LeCun, Denker, Solla 1989; Dong et al. 2020, HAWQ-V2, arXiv 1911.03852). One backward pass an example."""
    weights = {name: model.get_submodule(name).weight for name in names}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    seen = 0
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            for batch in given(batches, asked):
                for example in singles(model, batch):
                    loss = loss_of(model(**example), asked, "bits for all layers alike")
                    slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                    for total, slope in zip(totals.values(), slopes, strict=True):
                        if slope is not None:
                            total.addcmul_(slope.float(), slope.float())
                    seen += 1
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return {name: total.div_(max(seen, 1)) for name, total in totals.items()}


@torch.no_grad()
def read_together(model: Any, names: Sequence[str], example: dict[str, Tensor]) -> list[list[str]]:
    """The names in groups that read the very same tensor, as q, k and v do: stored alike, a kernel may do them at once. Those
    that the example does not reach stand alone."""
    groups: dict[int, tuple[Tensor, list[str]]] = {}
    handles = [model.get_submodule(name).register_forward_pre_hook(_noting(groups, name)) for name in names]
    try:
        with evaluating(model):
            model(**example)
    finally:
        for handle in handles:
            handle.remove()
    reached = {name for _, group in groups.values() for name in group}
    return [group for _, group in groups.values()] + [[name] for name in names if name not in reached]


def _noting(groups: dict[int, tuple[Tensor, list[str]]], name: str) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        names = groups.setdefault(id(args[0]), (args[0], []))[1]  # it is kept, so that no other tensor gets its place
        if name not in names:
            names.append(name)

    return note
