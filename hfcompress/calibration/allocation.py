"""How few bits each layer may have: the least harm to the loss for a size, or the least size for a harm, solved exactly, and
then tried on the model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating, given, in_parts, loss_of, singles
from hfcompress.calibration.formats import Format, harm, stored_bytes
from hfcompress.calibration.knapsack import Choice, allocated
from hfcompress.calibration.trial import Trial
from hfcompress.checkpoint.errors import CompressionError

log = logging.getLogger("hfcompress")
DENSE = 16
"""The bits that a layer is said to have which is left as it is, whatever its dtype."""
ASKED = "quantize: a target"
ROUNDS = 6
"""How often a harm is foretold anew from what the model does, until max_drop holds."""


@dataclass(frozen=True)
class Target:
    """What is asked for, one of these. `bits`: a weight of the layers, on average, scales included. `bytes`: of the whole model
    on disk. `drop`: by how much the loss on the batches may grow."""

    bits: float | None = None
    bytes: float | None = None
    drop: float | None = None


def least_harm(
    model: Any,
    names: Sequence[str],
    formats: Mapping[int, Format],
    batches: MakeBatches | None,
    target: Target,
    coded: Mapping[str, nn.Module] | None = None,
    swaps: int = 0,
) -> dict[str, Format]:
    """How to store each of these layers, so that the loss is expected to grow the least within a target, or so that they take
    the least bytes: in one of the formats, told by their bits, or dense, and then it is not in the answer. Layers that read
    the same are stored alike.

    `coded`: what is to stand in for other layers, by their names. `swaps`: so many exchanges of bits between layers are tried
    on the model, and kept if its loss is smaller. CompressionError where no choice is small enough; the least is told.
    """
    groups = read_together(model, names, next(singles(model, next(iter(given(batches, ASKED))))))
    costs = _costs(model, names, formats, batches)
    decisions = [_choices(group, formats, costs) for group in groups]
    with Trial(model, groups, formats, batches, ASKED) as trial:
        if target.drop is not None:
            found = _within_drop(trial, decisions, target.drop)
        else:
            budget = _budget(model, names, target, coded or {}, decisions)
            found = _swapped(trial, decisions, budget, swaps)
    chosen = {name: choice.bits for group, choice in zip(groups, found, strict=True) for name in group}
    tally = ", ".join(f"{list(chosen.values()).count(bits)} in {bits} bits" for bits in formats)
    dense = list(chosen.values()).count(DENSE)
    grows = sum(choice.harm for choice in found)
    log.info("quantize: %d layers: %s, %d dense; the loss is to grow by %.3g", len(chosen), tally, dense, grows)
    return {name: formats[bits] for name, bits in chosen.items() if bits != DENSE}


def _budget(
    model: Any, names: Sequence[str], target: Target, coded: Mapping[str, nn.Module], decisions: Sequence[Sequence[Choice]]
) -> float:
    """In bytes of these layers."""
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    least = sum(min(choice.cost for choice in choices) for choices in decisions)
    if target.bytes is None:
        budget = (target.bits or 0) * weights / 8
        told = f"target_bits: {target.bits:g}", f"{8 * least / weights:.3g} bits"
    else:
        others = _bytes_of(model, coded) - sum(_dense_bytes(model, name) for name in names)
        budget = target.bytes - others
        told = f"target_megabytes: {target.bytes / 1e6:g}", f"{(others + least) / 1e6:.4g} MB"
    if least > budget:
        raise CompressionError(
            f"quantize: {told[0]} can't be met: with the fewest bits that fit it takes {told[1]}; choose that or more, code "
            f"the embeddings as well, or cut the model before."
        )
    return budget


def _within_drop(trial: Trial, decisions: Sequence[Sequence[Choice]], drop: float) -> list[Choice]:
    """The fewest bytes with which the model's own loss grows by no more. Harms don't add up: where it grows by more than what
    was foretold, less is allowed."""
    before, allowed = trial.loss([DENSE] * len(decisions)), drop
    turned = [[Choice(one.bits, one.harm, one.cost) for one in choices] for choices in decisions]
    for _ in range(ROUNDS):
        found = allocated(turned, allowed)
        if found is None or all(choice.bits == DENSE for choice in found):
            break
        grown = trial.loss([choice.bits for choice in found]) - before
        log.info("quantize: max_drop: foretold %.3g, the loss grows by %.3g", sum(one.cost for one in found), grown)
        if grown <= drop:
            return [Choice(one.bits, one.harm, one.cost) for one in found]
        allowed *= min(0.8, 0.9 * drop / grown)
    raise CompressionError(
        f"quantize: max_drop: {drop:g} can't be met: the loss grows by more with the fewest layers in codes that were tried; "
        f"choose more, calibrate, or take layers out by skip_modules."
    )


def _swapped(trial: Trial, decisions: Sequence[Sequence[Choice]], budget: float, swaps: int) -> list[Choice]:
    """The least harm within a budget; then more bits for one decision and fewer for another, those first that are foretold to
    do the least harm, and kept if the model's own loss is smaller."""
    found = allocated(decisions, budget) or []
    if not swaps:
        return found
    loss = trial.loss([choice.bits for choice in found])
    for candidate in _exchanges(found, decisions, budget)[:swaps]:
        changed = [candidate.get(place, choice) for place, choice in enumerate(found)]
        if sum(choice.cost for choice in changed) > budget:
            continue  # with what was kept before it
        now = trial.loss([choice.bits for choice in changed])
        log.info("quantize: an exchange: the loss is %.5g, was %.5g", now, loss)
        if now < loss:
            found, loss = changed, now
    return found


def _exchanges(found: Sequence[Choice], decisions: Sequence[Sequence[Choice]], budget: float) -> list[dict[int, Choice]]:
    """More for one decision, less for another, within the budget: each as what changes, the least harm first."""
    spare = budget - sum(choice.cost for choice in found)
    steps = [
        (place, other, other.cost - now.cost, other.harm - now.harm)
        for place, now in enumerate(found)
        for other in decisions[place]
        if other.cost != now.cost
    ]
    pairs = [
        (harm_up + harm_down, {place_up: up, place_down: down})
        for place_up, up, more, harm_up in steps
        if more > 0
        for place_down, down, less, harm_down in steps
        if less < 0 and place_down != place_up and more + less <= spare
    ]
    return [changes for _, changes in sorted(pairs, key=lambda pair: pair[0])]


Costs = dict[tuple[str, int], tuple[float, float]]


def _costs(model: Any, names: Sequence[str], formats: Mapping[int, Format], batches: MakeBatches | None) -> Costs:
    """Bytes and harm of each layer in so many bits, where the format takes it."""
    found: Costs = {}
    for some in in_parts({name: model.get_submodule(name).weight for name in names}):
        slopes = squared_slopes(model, list(some), batches, ASKED)
        for name in some:
            layer = model.get_submodule(name)
            found[name, DENSE] = float(_dense_bytes(model, name)), 0.0
            for bits, storing in formats.items():
                if not storing.misfit(layer):
                    new = storing.rounded(layer)
                    found[name, bits] = float(stored_bytes(new)), harm(layer, new, slopes[name])
    return found


def _choices(group: Sequence[str], formats: Mapping[int, Format], costs: Costs) -> list[Choice]:
    """Every way to store these layers alike."""
    found = []
    for bits in (DENSE, *formats):
        if all((name, bits) in costs for name in group):
            each = [costs[name, bits] for name in group]
            found.append(Choice(bits, sum(cost for cost, _ in each), sum(worse for _, worse in each)))
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
