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
from hfcompress.processes import agreed

DAMPING = 0.01
"""The ridge, as a share of the mean of the diagonal of the second moments: SparseGPT's (arXiv 2301.00774)."""


@dataclass(frozen=True)
class Repaired:
    """One output projection, and the mean squared error of what it adds, as a share of the mean square of that."""

    module: str
    before: float
    after: float
    tokens: int


@torch.no_grad()
def repair(
    model: Any, all_units: list[Units], kept: list[Tensor], batches: Batches | None, damping: float = DAMPING
) -> list[Repaired]:
    """Solve the columns that stay in every output projection anew, in place. The units that go must be silent already.

    With z what the columns that stay read, and r = W_cut x_cut what the others would add, D and d minimise

        mean |r - D z - d|^2 + ridge |D|^2     over all tokens, padding excluded

    which is closed in the second moments, D = mean r z^T (mean z z^T + ridge)^-1, and W_kept + D and b + d take their places.
    Where the projection has a bias, moments are about the means and d = mean r - D mean z: the mean of what is cut is folded
    into the bias. Where it has none, none is added: d is 0, and raw moments let the columns stand in for the mean as well. As
    D = 0 is the cut alone and costs no ridge, the error can't become larger than that on these tokens, whatever the ridge.

    Layers are repaired in the order of the model, each on what those before it make of the data since they were repaired. All
    batches wait for each other before every projection, so this costs one forward in all, with every sample in memory. Least
    squares layer by layer: OBC (Frantar, Alistarh 2022, arXiv 2208.11580), ZipLM (Kurtic et al. 2023, 2302.04089), SlimGPT
    (Ling et al. 2024, 2412.18110). Aiming at what the projection said in the original model, so that later layers mend
    what earlier ones could not, fits the samples rather than the text.
    """
    places = {}
    for units, keep in zip(all_units, kept, strict=True):
        for span in units.outputs:
            why = _hopeless(model, units, span)
            if why:
                logging.getLogger(__name__).warning("repair: %s is left as it is: %s.", span.tensor, why)
            elif keep.shape[-1] < units.count:
                places[span.module] = _Place(model, span, span.index(keep, units.count))
    if not places:
        return []
    stops = _Stops()
    with evaluating(model), stops.before(model, places):
        times = _times(model, places, next(iter(given(batches, "repair"))))
        runs = [_Run(stops, model, batch) for batch in given(batches, "repair")]
        try:
            return _in_order(model, places, runs, times, damping)
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


def _in_order(
    model: nn.Module, places: dict[str, _Place], runs: list[_Run], times: Counter[str], damping: float
) -> list[Repaired]:
    """All batches walk from projection to projection; where all have arrived, it is solved, and they walk on."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    left, told = set(times), []
    at = {run: run.step() for run in runs}
    while left and (reached := {name for name in at.values() if name is not None}):
        # Batches may differ in their way only where tokens choose it: then the first place in the model goes first.
        name = min(reached, key=order.__getitem__)
        here = [run for run in runs if at[run] == name]
        if name in left:
            for run in here:
                places[name].add(run.batch, run.seen)
            times[name] -= 1
            if not times[name]:
                told.append(places[name].solve(damping))
                left.discard(name)
        for run in here if left else ():
            at[run] = run.step()
    return told


def _times(model: nn.Module, places: dict[str, _Place], batch: dict[str, Tensor]) -> Counter[str]:
    """How often each projection runs in a forward: one that serves many layers, as in ALBERT, is solved when all have read."""
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
    """Hooks that stop whichever run has come to a projection."""

    def __init__(self) -> None:
        self._pause: Callable[[Any], None] | None = None

    @contextmanager
    def before(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """The hooks see what was to be read before gates have silenced any of it."""
        handles = [
            model.get_submodule(name).register_forward_pre_hook(partial(self._reads, name), prepend=True) for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def walk(self, model: Any, batch: dict[str, Tensor], pause: Callable[[Any], None]) -> None:
        lean = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self._pause = pause
        with torch.no_grad():  # threads have their own grad mode
            model(**batch, **lean)
        self._pause = None

    def _reads(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        mine, self._pause = self._pause, None
        if mine is not None:
            mine((name, args[0]))  # other runs go on meanwhile
            self._pause = mine


class _Run:
    """A batch on its way through the model."""

    def __init__(self, stops: _Stops, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.batch = batch
        self._run = Paused(partial(stops.walk, model, batch))
        self.seen = torch.empty(0)

    def step(self) -> str | None:
        """On to the next projection; its name, or None at the end."""
        name, self.seen = self._run.step() or (None, torch.empty(0))
        return name

    def leave(self) -> None:
        self._run.leave()


@dataclass
class _Place:
    """An output projection, and the moments of what its remaining columns read (z) and of what is lost with the others (r)."""

    model: Any
    span: Span
    columns: Tensor
    tokens: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)

    @property
    def module(self) -> Any:
        return self.model.get_submodule(self.span.module)

    @property
    def weight(self) -> Tensor:
        """(out, in), as columns."""
        return self.module.weight.detach().movedim(self.span.axis, -1).flatten(0, -2)

    def add(self, batch: dict[str, Tensor], x: Tensor) -> None:
        """`x`: (..., all columns), or of a convolution (batch, all columns, ...)."""
        x = x.movedim(1, -1) if isinstance(self.module, nn.Conv1d | nn.Conv2d) else x
        mask = attended(self.model, batch, self.span.module, x.shape[:-1])
        x = x.flatten(0, -2) if mask is None else x[mask]
        x = x if x.dtype == torch.float64 else x.float()
        columns, weight = self.columns.to(x.device), self.weight.to(x)
        gone = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device).index_fill_(0, columns, False)
        z, r = x[:, columns], x[:, gone] @ weight[:, gone].T
        power = (z @ weight[:, columns].T + r).square().sum()
        found = {"zz": z.T @ z, "rz": r.T @ z, "z": z.sum(0), "r": r.sum(0), "rr": r.square().sum(), "power": power}
        for name, value in found.items():
            self.moments[name] = self.moments[name] + value.double() if self.tokens else value.double()
        self.tokens += len(z)

    def solve(self, damping: float) -> Repaired:
        if not self.tokens:
            return Repaired(self.span.module, 0.0, 0.0, 0)
        layer, axis = self.module, self.span.axis
        zz, rz, z, r, before, power = (self.moments.pop(name) / self.tokens for name in ("zz", "rz", "z", "r", "rr", "power"))
        after, has_bias = before, getattr(layer, "bias", None) is not None
        if has_bias:
            zz, rz, after = zz - z[:, None] * z, rz - r[:, None] * z, before - r.square().sum()
        more = agreed(_divided(rz, zz, damping))
        after = after - 2 * (more * rz).sum() + (more * (more @ zz)).sum()
        columns = self.columns.to(layer.weight.device)
        old = layer.weight.detach().index_select(axis, columns).movedim(axis, -1)
        new = (old.flatten(0, -2).double() + more.to(old.device)).to(old).reshape(old.shape)
        layer.weight.data.index_copy_(axis, columns, new.movedim(-1, axis))
        if has_bias:
            layer.bias.data += agreed(r - more.to(z) @ z).to(layer.bias)
        was, now = (float((error / power.clamp_min(1e-30)).clamp_min(0)) for error in (before, after))
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
