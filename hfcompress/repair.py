"""Repairs a cut without training: what is left of an output projection takes over what was cut, as well as it can."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.anatomy import Span, Units
from hfcompress.calibration import Batches, attended, evaluating, given
from hfcompress.examples import example
from hfcompress.lockstep import Paused
from hfcompress.scores import agreed
from hfcompress.surgery import copied

DAMPING = 0.01
"""The ridge, as a share of the mean of the diagonal of the second moments: SparseGPT's (arXiv 2301.00774)."""


@dataclass(frozen=True)
class Repaired:
    """One output projection, and the mean squared error of what it adds, as a share of the mean square of what it added."""

    module: str
    before: float
    after: float
    tokens: int


@torch.no_grad()
def repair(
    model: Any, all_units: list[Units], kept: list[Tensor], batches: Batches | None, damping: float = DAMPING
) -> list[Repaired]:
    """Solve the columns that stay in every output projection anew, in place. The units that go must be silent already.

    With y = W x + b what the projection says in the original model, and z what the columns that stay read in the model as cut
    and repaired so far, W' and b' minimise

        mean |y - W' z - b'|^2 + ridge |W' - W|^2     over all tokens, padding excluded

    which is closed in the second moments: W' = W + (C - W S) (S + ridge)^-1, with S = mean z z^T and C = mean y z^T. Where the
    projection has a bias, moments are about the means and b' = mean y - W' mean z: the mean of what was cut is folded into the
    bias. Where it has none, none is added, and raw moments let the columns stand in for the mean as well. The ridge is towards
    the old W, not towards 0, so that the error can't become larger than before on these tokens, whatever the ridge.

    Layers are repaired in the order of the model, each on what those before it make of the data since they were repaired, and
    aims at the original's answer: it mends what earlier layers could not. Least squares layer by layer: OBC (Frantar, Alistarh
    2022, arXiv 2208.11580), ZipLM (Kurtic et al. 2023, arXiv 2302.04089), SlimGPT (Ling et al. 2024, arXiv 2412.18110). Costs
    one forward of the original and one of the model in all, as the batches wait for each other before every projection. One
    that serves many layers, as in ALBERT, can't follow itself: there z is what the original reads.
    """
    places = {}
    for units, keep in zip(all_units, kept, strict=True):
        for span in units.outputs:
            why = _hopeless(model, units, span)
            if why:
                logging.getLogger(__name__).warning("repair: %s is left as it is: %s.", span.tensor, why)
            elif keep.shape[-1] < units.count:
                places[span.module] = _Place(model, units, span, span.index(keep, units.count))
    if not places:
        return []
    stops = _Stops(places)
    with evaluating(model), stops.in_both(copied(model), model) as (original, _):
        runs = [_Pair(original, model, stops, batch) for batch in given(batches, "repair")]
        try:
            return _in_order(model, places, runs, damping)
        finally:
            for run in runs:
                run.leave()


def _hopeless(model: nn.Module, units: Units, span: Span) -> str:
    if units.lanes > 1:
        return "experts compute inside one forward, and what each of them reads can't be seen"
    module = model.get_submodule(span.module)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and max(module.kernel_size) > 1:
        return "it reads several positions at once"
    return ""


def _in_order(model: nn.Module, places: dict[str, _Place], runs: list[_Pair], damping: float) -> list[Repaired]:
    """All batches walk from projection to projection; where all have arrived, it is solved, and they walk on."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    times = _times(model, places, runs[0].batch)
    for name, count in times.items():
        places[name].serves_many = count > 1
    left, told = set(times), []
    at = {run: run.step() for run in runs}
    while left and (reached := {name for name in at.values() if name is not None}):
        # Batches may differ in their way only where tokens choose it: then the first place in the model goes first.
        name = min(reached, key=order.__getitem__)
        here = [run for run in runs if at[run] == name]
        if name in left:
            for run in here:
                run.note(places[name])
            times[name] -= 1
            if not times[name]:
                told.append(places[name].solve(damping))
                left.discard(name)
        for run in here if left else ():
            at[run] = run.step()
    return told


def _times(model: nn.Module, places: dict[str, _Place], batch: dict[str, Tensor]) -> Counter[str]:
    """How often each projection runs in a forward."""
    times: Counter[str] = Counter()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: times.update([name])) for name in places
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return times


class _Stops:
    """Hooks that stop whichever run has come to a projection: the original when it has answered, the model before it reads."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._pause: Callable[[Any], None] | None = None

    @contextmanager
    def in_both(self, original: nn.Module, model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        handles = [original.get_submodule(name).register_forward_hook(partial(self._answered, name)) for name in self._names]
        handles += [model.get_submodule(name).register_forward_pre_hook(partial(self._reads, name)) for name in self._names]
        try:
            yield original, model
        finally:
            for handle in handles:
                handle.remove()

    def walk(self, model: Any, batch: dict[str, Tensor], pause: Callable[[Any], None]) -> None:
        lean = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self._pause = pause
        with torch.no_grad():  # threads have their own grad mode
            model(**batch, **lean)
        self._pause = None

    def _answered(self, name: str, _: nn.Module, args: tuple[Any, ...], answer: Tensor) -> None:
        self._stop((name, answer, args[0]))

    def _reads(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._stop((name, args[0]))

    def _stop(self, said: Any) -> None:
        mine, self._pause = self._pause, None
        if mine is not None:
            mine(said)  # other runs go on meanwhile
            self._pause = mine


class _Pair:
    """A batch on its way through the original and through the model at once."""

    def __init__(self, original: nn.Module, model: nn.Module, stops: _Stops, batch: dict[str, Tensor]) -> None:
        self.batch, self._model = batch, model
        self._runs = [Paused(partial(stops.walk, one, batch)) for one in (original, model)]
        self._now: list[Any] = [None, None]

    def step(self) -> str | None:
        """On to the next projection; its name, or None at the end."""
        self._now = [run.step() for run in self._runs]
        return self._now[1] and self._now[1][0]

    def note(self, place: _Place) -> None:
        """Add what the two have come to."""
        if self._now[0] is None or self._now[0][0] != self._now[1][0]:
            return
        (_, answer, originally), (_, seen) = self._now
        answer, seen = place.rows(answer), place.rows(originally if place.serves_many else seen)
        if answer.shape[:-1] != seen.shape[:-1]:
            return  # the router sent other tokens here than in the original
        mask = attended(self._model, self.batch, place.span.module, seen.shape[:-1])
        place.add(*((one.flatten(0, -2) if mask is None else one[mask]) for one in (answer, seen)))

    def leave(self) -> None:
        for run in self._runs:
            run.leave()


@dataclass
class _Place:
    """An output projection, and the moments of what it should say (y) and of what its remaining columns read (z)."""

    model: nn.Module
    units: Units
    span: Span
    columns: Tensor
    serves_many: bool = False
    tokens: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)

    @property
    def module(self) -> Any:
        return self.model.get_submodule(self.span.module)

    def rows(self, x: Tensor) -> Tensor:
        """(..., features), of convolutions as well."""
        return x.movedim(1, -1) if isinstance(self.module, nn.Conv1d | nn.Conv2d) else x

    def add(self, y: Tensor, x: Tensor) -> None:
        """`y`: (tokens, out); `x`: (tokens, all columns)."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        z, y = x.index_select(-1, self.columns.to(x.device)).to(kind), y.to(kind)
        found = {"zz": z.T @ z, "yz": y.T @ z, "z": z.sum(0), "y": y.sum(0), "yy": y.square().sum()}
        for name, value in found.items():
            self.moments[name] = self.moments[name] + value.double() if self.tokens else value.double()
        self.tokens += len(z)

    def solve(self, damping: float) -> Repaired:
        if not self.tokens:
            return Repaired(self.span.module, 0.0, 0.0, 0)
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        columns = self.columns.to(weight.device)
        spread = weight.detach().index_select(self.span.axis, columns).movedim(self.span.axis, -1)
        old = spread.flatten(0, -2).double()
        s, c, z, y, power = (self.moments[name] / self.tokens for name in ("zz", "yz", "z", "y", "yy"))
        scale, off = power, torch.zeros_like(y)
        if bias is not None:
            off = y - old @ z - bias.detach().double()
            s, c, power = s - z[:, None] * z, c - y[:, None] * z, power - y.square().sum()
        new = old + _divided(c - old @ s, s, damping)
        before, after = (power - 2 * (w * c).sum() + (w * (w @ s)).sum() for w in (old, new))
        weight.data.index_copy_(
            self.span.axis, columns, agreed(new).to(weight).reshape(spread.shape).movedim(-1, self.span.axis)
        )
        if bias is not None:
            bias.data.copy_(agreed(y - new @ z))
        self.moments.clear()
        scale = scale.clamp_min(1e-30)
        was, now = (float((error / scale).clamp_min(0)) for error in (before + off.square().sum(), after))
        return Repaired(self.span.module, was, now, self.tokens)


def _divided(left: Tensor, moments: Tensor, damping: float) -> Tensor:
    """left (moments + ridge)^-1, for (out, k) and (k, k)."""
    ridge = damping * moments.diagonal().mean()
    damped = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not factor.isfinite().all():  # columns that say the same, and no ridge: the least of all solutions
        return left @ torch.linalg.pinv(damped, hermitian=True)
    return torch.cholesky_solve(left.T, factor).T


@torch.no_grad()
def fold_constants(model: Any, all_units: list[Units], doomed: list[Tensor]) -> list[Tensor]:
    """Fold what doomed units always say into the bias that follows; which ones these were, of the shape of the units.

    A neuron whose weights are all zero still speaks if it has a bias: W act(b) is then a constant, and cutting it is exact if
    the next bias takes it over. The constant is read off a forward of random inputs, so that no activation need be known.
    """
    folded = [torch.zeros_like(some) for some in doomed]
    found: dict[tuple[int, int], list[Tensor]] = {}
    for number, (units, some) in enumerate(zip(all_units, doomed, strict=True)):
        if units.kind == "neurons" and units.lanes == 1 and _can_fold(model, units):
            folded[number] = some & _weightless(model, units)
    if not any(some.any() for some in folded):
        return folded

    def look(number: int, place: int, channel: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].movedim(channel, -1)[..., folded[number].to(args[0].device)].flatten(0, -2)
        found.setdefault((number, place), []).append(rows)

    handles = [
        _reader(model, span).register_forward_pre_hook(partial(look, number, place, _channel(_reader(model, span))))
        for number, units in enumerate(all_units)
        for place, span in enumerate(units.outputs)
        if folded[number].any()
    ]
    try:
        with evaluating(model):
            model(**example(model))
    except Exception:  # inputs that only its own processor can make
        return [torch.zeros_like(some) for some in doomed]
    finally:
        for handle in handles:
            handle.remove()
    for (number, place), seen in found.items():
        rows, span = torch.cat(seen), all_units[number].outputs[place]
        if not torch.allclose(rows, rows[:1], atol=1e-5, rtol=1e-3):  # kernels round the last few entries of a row otherwise
            folded[number].zero_()
            continue
        layer = _reader(model, span)
        index = folded[number].nonzero().flatten().to(layer.weight.device)
        columns = layer.weight.detach().index_select(span.axis, index).movedim(span.axis, -1).flatten(0, -2)
        layer.bias.data += (columns.double() @ rows[0].double()).to(layer.bias)
    return folded


def _reader(model: nn.Module, span: Span) -> Any:
    return model.get_submodule(span.module)


def _channel(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Conv1d | nn.Conv2d) else -1


def _can_fold(model: nn.Module, units: Units) -> bool:
    """Every output has a bias, reads one position, and one entry a unit."""
    layers = [_reader(model, span) for span in units.outputs]
    return units.size == 1 and all(
        getattr(layer, "bias", None) is not None and not _hopeless(model, units, span)
        for layer, span in zip(layers, units.outputs, strict=True)
    )


def _weightless(model: nn.Module, units: Units) -> Tensor:
    """(count,), bool: units that have a bias and nothing but zeros in their weights."""
    still, speaks = torch.ones(units.count, dtype=torch.bool), torch.zeros(units.count, dtype=torch.bool)
    for span in units.inputs:
        owner, _, leaf = span.tensor.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf).detach().cpu()
        index = span.index(torch.arange(units.count)[:, None], units.count)
        entries = tensor.movedim(span.axis, 0).reshape(tensor.shape[span.axis], -1).any(1)[index].any(-1)
        if tensor.dim() > 1:
            still &= ~entries
        else:
            speaks |= entries
    return still & speaks
