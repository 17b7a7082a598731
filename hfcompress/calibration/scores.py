"""What a unit is worth: scores of heads and neurons, by their weights, by what they do on data, by what the loss feels.

L is the loss of one example, x what a unit hands to its output projection, W its columns there, w anything that it owns, and g
a gate on it, at 1: the unit is cut where g becomes 0. All scores are 0 or more, of the shape of the units, float32, on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfcompress.calibration.batches import MakeBatches, evaluating, examples, given, in_parts, labelled, loss_of, singles
from hfcompress.calibration.layerwise import layerwise
from hfcompress.calibration.obs import prices
from hfcompress.calibration.processes import agreed
from hfcompress.calibration.second_moments import DAMPING, Moments, Projection
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.units.gates import Removable, gate
from hfcompress.surgery.units.owned import norms, owned, per_unit, spans_of, tensor_of
from hfcompress.surgery.units.spans import Span, Units

WITHOUT_LABELS = "activation, obs or magnitude"


def magnitude(model: nn.Module, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0) -> list[Tensor]:
    """L2 norm of everything a unit owns: its rows in the input projections and its columns in the output."""
    return norms(model, all_units)


def l1(model: nn.Module, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0) -> list[Tensor]:
    """Sum of the absolute values of everything a unit owns. Li et al. 2017, Pruning Filters (arXiv 1608.08710)."""
    return [owned(model, units, torch.abs) for units in all_units]


def at_random(model: nn.Module, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0) -> list[Tensor]:
    """By chance: what every other score must beat."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(units.shape, generator=generator, device="cpu") for units in all_units]


def gradient(model: nn.Module, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0) -> list[Tensor]:
    """Mean over examples of |dL/dg|: how much the loss would notice.

    Michel, Levy, Neubig 2019 (arXiv 1905.10650), equation 2; one gate an example, as a sum over a batch would cancel.
    """
    return _mean(_slopes(model, all_units, batches, "gradient"), torch.abs)


def fisher(model: nn.Module, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0) -> list[Tensor]:
    """Mean over examples of (dL/dg)^2: the empirical Fisher information of the gate, for the Hessian's diagonal.

    LeCun, Denker, Solla 1989, Optimal Brain Damage: cutting costs h g^2 / 2, and the half and g = 1 are the same for all. On
    gates of heads and neurons: Kwon et al. 2022 (arXiv 2204.09656).
    """
    return _mean(_slopes(model, all_units, batches, "fisher"), torch.square)


def taylor(model: Any, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0) -> list[Tensor]:
    """Sum of |w * dL/dw| over every weight that a unit owns, L being the loss over all data: what cutting each of them would
    change, to the first order. Molchanov et al. 2019 (arXiv 1906.10771), equation 8, in absolute values as Ma et al. 2023,
    LLM-Pruner (arXiv 2305.11627), take them."""
    own = {span.tensor: None for units in all_units for span in spans_of(units)}
    weights = {name: weight for name in own if isinstance(weight := tensor_of(model, name), nn.Parameter)}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    found = [torch.zeros(units.shape) for units in all_units]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        for some in in_parts(weights):
            felt = {name: (some[name].detach() * slope).abs() for name, slope in _mean_slopes(model, some, batches).items()}
            for place, units in enumerate(all_units):
                for span in spans_of(units):
                    if span.tensor in felt:
                        found[place] = found[place] + per_unit(units, span, felt[span.tensor])
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return found


def _mean_slopes(model: Any, weights: dict[str, Tensor], batches: MakeBatches | None) -> dict[str, Tensor]:
    """dL/dw over all data, float32, of the loss that is a mean over all labels."""
    totals, seen = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}, 0.0
    with evaluating(model), torch.enable_grad():
        for batch in given(batches, "scores: taylor"):
            output = model(**batch)
            known = labelled(model, batch, output)
            worth = float(known.sum()) if known is not None else examples(model, batch)
            if not worth:
                continue
            loss = loss_of(output, "scores: taylor", WITHOUT_LABELS)
            slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, slope in zip(totals.values(), slopes, strict=True):
                if slope is not None:
                    total.add_(slope, alpha=worth)
            seen += worth
    return {name: total.div_(max(seen, 1.0)) for name, total in totals.items()}


@torch.no_grad()
def activation(model: Any, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0) -> list[Tensor]:
    """Mean over tokens, padding excluded, of |W x|: the norm of what a unit adds to the output of its projection.

    For a neuron this is mean |x| times the norm of its column, as Sun et al. 2023, Wanda (arXiv 2306.11695), weigh activations:
    the norm of x alone would change if x were doubled and W halved. Coupled units: the sum over their projections.
    """
    now: dict[str, Any] = {}
    readings = [[_Reading(model, units, span, now) for span in units.outputs] for units in all_units]
    handles = [reading.watch() for several in readings for reading in several]
    try:
        with evaluating(model):
            for batch in given(batches, "scores: activation"):
                now["batch"] = batch
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.stack([one.mean() for one in several]).sum(0).float().cpu() for several in readings]


class _Reading:
    """Sees what units hand to one output projection, and adds up |W x|."""

    def __init__(self, model: nn.Module, units: Units, span: Span, now: dict[str, Any]) -> None:
        self.model, self.units, self.now = model, units, now
        self.projection = Projection.of(units, span)
        self.sizes = (units.count, units.size)
        self.grams = []
        for _, lane in self.projection.weights(model):
            columns = lane.float().flatten(0, -2).unflatten(-1, self.sizes)
            self.grams.append(torch.einsum("ocs,oct->cst", columns, columns))
        self.total = torch.zeros(len(self.grams), units.count, dtype=torch.float64)
        self.tokens = torch.zeros(len(self.grams), 1)

    def watch(self) -> RemovableHandle:
        """After gates; but experts' gates are on weights, and `Projection.rows` looks them up."""
        module, first = self.model.get_submodule(self.projection.module), self.units.lanes > 1
        return module.register_forward_pre_hook(self._see, prepend=first, with_kwargs=True)

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = self.projection.rows(self.model, self.now["batch"], args, kwargs, past_gates=True)
        for lane, (gram, rows) in enumerate(zip(self.grams, read, strict=True)):
            x = rows.float().unflatten(-1, self.sizes)
            norms = torch.einsum("ncs,cst,nct->nc", x, gram, x).clamp_min(0).sqrt()
            self.total[lane] += norms.double().sum(0).cpu()
            self.tokens[lane] += len(norms)

    def mean(self) -> Tensor:
        if self.units.lanes > 1 and not self.tokens.any():
            raise _unseen("activation", self.units)
        return (self.total / self.tokens.clamp_min(1)).reshape(self.units.shape)


def _unseen(name: str, units: Units) -> CompressionError:
    return CompressionError(
        f"scores: {name} can't see what single experts of {units.name} read, as they don't multiply one by one; possible are "
        f"{', '.join(other for other in SCORES if other not in ('activation', 'obs'))}; choose one of these."
    )


def obs(model: Any, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0) -> list[Tensor]:
    """The share of what its layer says that is lost when a unit and all cheaper ones are gone, and the rest makes up for it.

    Layer-wise Optimal Brain Surgeon, which `surgeon` explains: the score to choose before `repair`, which does make up for it.
    Coupled units pay in all their projections. Every layer is seen in the model as it is.
    """
    places = {Projection.of(units, span): units for units in all_units for span in units.outputs}
    for projection in places:
        if why := projection.unreadable(model):
            raise CompressionError(
                f"scores: obs can't tell what {projection.module}.{projection.leaf} makes of its units: {why}; possible are "
                f"{', '.join(name for name in SCORES if name != 'obs')}; choose one of these."
            )
    waiting: dict[str, list[tuple[Tensor, Any]]] = {}
    found: dict[str, Tensor] = {}

    def price(projection: Projection, moments: list[Moments]) -> None:
        units = places[projection]
        if not any(some.tokens for some in moments):
            if units.lanes > 1:
                raise _unseen("obs", units)
            return
        lanes = zip(projection.weights(model), moments, strict=True)
        waiting[projection.module] = [
            (lane.flatten(0, -2), some.square(about_mean=bias is not None)) for (bias, lane), some in lanes
        ]
        if all(one.module in waiting for one in units.outputs):
            coupled = [waiting.pop(one.module) for one in units.outputs]
            per_lane = [prices(list(sides), units.size, DAMPING) for sides in zip(*coupled, strict=True)]
            found[units.output] = torch.stack(per_lane).reshape(units.shape).float()

    layerwise(model, list(places), batches, "scores: obs", price, writes=False, past_gates=True)
    return [found.get(units.output, torch.zeros(units.shape)) for units in all_units]


class _TogetherFails(Exception):
    """The examples of a batch can't be told apart: they must run one by one."""


class _Gates:
    """A gate for every unit and example, the same one wherever and however often a forward asks for it."""

    def __init__(self, all_units: list[Units]) -> None:
        self.all_units, self.count = all_units, 1
        self.leaves: list[Tensor | None] = []

    def __call__(self, position: int, x: Tensor) -> Tensor:
        """`x`: (..., count, size), or experts' weights (lanes, ..., count, size)."""
        units = self.all_units[position]
        together = self.count > 1
        if together and (x.dim() < 4 or x.shape[0] != self.count or x.shape[1] == self.count):
            raise _TogetherFails  # tokens or windows of all examples in one line, or perhaps (tokens, examples)
        leaf = self.leaves[position]
        if leaf is None:
            leaf = torch.ones(self.count, *units.shape, device=x.device, requires_grad=True)
            self.leaves[position] = leaf
        leaf = leaf.to(x.device)
        if units.lanes > 1:
            return leaf.reshape(units.lanes, *[1] * (x.dim() - 3), units.count, 1)
        return leaf.reshape(self.count, *[1] * (x.dim() - 3), units.count, 1) if together else leaf.reshape(units.count, 1)

    def slopes(self, model: Any, batch: dict[str, Tensor], name: str) -> list[Tensor]:
        """dL/dg of every example's own loss, (examples, *units.shape) each."""
        self.count = examples(model, batch)
        self.leaves = [None] * len(self.all_units)
        output = model(**batch)
        loss = loss_of(output, f"scores: {name}", WITHOUT_LABELS)
        known = labelled(model, batch, output)
        if self.count > 1 and known is None:
            raise _TogetherFails
        if known is not None and not known.any():  # a mean over nothing
            return [torch.zeros(self.count, *units.shape) for units in self.all_units]
        reached = [leaf for leaf in self.leaves if leaf is not None]
        found = iter(torch.autograd.grad(loss, reached, allow_unused=True) if reached else ())
        slopes = [None if leaf is None else next(found) for leaf in self.leaves]
        # the loss is a mean over what is known: an example's own is that over its own part
        share = torch.ones(1) if known is None or self.count == 1 else known / known.sum().clamp_min(1)
        own = torch.where(share > 0, 1 / share.clamp_min(1e-12), 0.0)
        return [
            torch.zeros(self.count, *units.shape)
            if slope is None
            else slope.float().cpu() * own.cpu().reshape(-1, *[1] * len(units.shape))
            for units, slope in zip(self.all_units, slopes, strict=True)
        ]


def _slopes(model: Any, all_units: list[Units], batches: MakeBatches | None, name: str) -> Iterator[list[Tensor]]:
    """dL/dg at g = 1 of every example's own loss, a batch at a time: (examples, *units.shape) for each of the units.

    Examples run together where their gates can be told apart, else one by one, with the same result.
    """
    gates = _Gates(all_units)
    handles = Removable(gate(model, units, partial(gates, position)) for position, units in enumerate(all_units))
    alone = any(units.lanes > 1 for units in all_units)
    try:
        with evaluating(model), torch.enable_grad():
            for batch in given(batches, f"scores: {name}"):
                if not alone:
                    try:
                        yield gates.slopes(model, batch, name)
                        continue
                    except _TogetherFails:
                        alone = True
                for one in singles(model, batch):
                    yield gates.slopes(model, one, name)
    finally:
        handles.remove()


def _mean(slopes: Iterator[list[Tensor]], of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    totals: list[Tensor] = []
    seen = 0
    for several in slopes:
        values = [of(slope.double()).sum(0) for slope in several]
        totals = [total + value for total, value in zip(totals, values, strict=True)] if totals else values
        seen += len(several[0])
    return [(total / seen).float() for total in totals]


@dataclass(frozen=True)
class Score:
    """A way to score, and whether it needs data, and labels in them."""

    of: Callable[..., list[Tensor]]
    says: str
    needs_data: bool = False
    needs_labels: bool = False


SCORES = {
    "gradient": Score(gradient, "how much the loss would notice (Michel et al. 2019)", True, True),
    "fisher": Score(fisher, "the same squared (Optimal Brain Damage)", True, True),
    "taylor": Score(taylor, "|weight x gradient| of all it owns (Molchanov et al. 2019)", True, True),
    "activation": Score(activation, "what it adds to its layer's output, no labels needed", True),
    "obs": Score(
        obs,
        "what its layer loses though the rest makes up for it: the one for repair, no labels needed",
        True,
    ),
    "magnitude": Score(magnitude, "the L2 norm of its weights, no data needed"),
    "l2": Score(magnitude, "the same as magnitude"),
    "l1": Score(l1, "the L1 norm"),
    "random": Score(at_random, "a control, by seed"),
}


def score(
    name: str, model: nn.Module, all_units: list[Units], batches: MakeBatches | None = None, seed: int = 0
) -> list[Tensor]:
    """What every unit is worth by the score of that name; the same on all processes."""
    found = SCORES[name].of(model, all_units, batches, seed)
    for units, values in zip(all_units, found, strict=True):
        if not values.isfinite().all():
            why = "the model's answers to the calibration data overflow" if SCORES[name].needs_data else "its weights are not"
            raise CompressionError(
                f"scores: {name} of {units.name} is not finite, as {why}; load the model in float32, and check its weights."
            )
        if SCORES[name].needs_data and not values.any():
            logging.getLogger(__name__).warning(
                "scores: %s: no example ever asks %s, so all of its units count as nothing; add samples.", name, units.name
            )
    return [agreed(values) for values in found]
