"""Second moments of what output projections read: all batches walk from projection to projection together."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating, given, told
from hfcompress.calibration.expert_inputs import alive, lanes_read
from hfcompress.calibration.layerwise import Paused
from hfcompress.calibration.processes import processes
from hfcompress.calibration.progress import progress
from hfcompress.surgery.units.spans import Span, Units, channel_axis

DAMPING = 0.01
"""The ridge, as a share of the mean of the diagonal of the second moments: SparseGPT's (arXiv 2301.00774)."""


@dataclass
class Moments:
    """Of what one projection reads, x (columns,), over all tokens, padding excluded; float64.

    Sums are about the mean of the first tokens, as columns that hardly vary would else drown in their own square.
    """

    tokens: int = 0
    origin: Any = 0.0
    total: Any = 0.0
    total_square: Any = 0.0

    def add(self, x: Tensor) -> None:
        """`x`: (tokens, columns); no tokens make zeros."""
        x = x if x.dtype == torch.float64 else x.float()
        if not self.tokens:
            self.origin = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        self.tokens += len(x)
        x = x - self.origin
        self.total = self.total + x.sum(0).double()
        self.total_square = self.total_square + (x.T @ x).double()

    @property
    def mean(self) -> Any:
        """(columns,)"""
        return self.origin + self.total / max(self.tokens, 1)

    def square(self, about_mean: bool) -> Any:
        """(columns, columns): mean x x^T, about the means where a bias can take these over."""
        off, found = self.total / max(self.tokens, 1), self.total_square / max(self.tokens, 1)
        central = found - off[:, None] * off
        return central if about_mean else central + self.mean[:, None] * self.mean


def unreadable(model: nn.Module, span: Span) -> str:
    """Why moments can't tell what one projection does with its units; empty where they can."""
    module = model.get_submodule(span.module)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and max(module.kernel_size) > 1:
        return "it reads several positions at once"
    return ""


def lanes_of(model: nn.Module, units: Units, span: Span) -> list[tuple[Any, Tensor]]:
    """For each lane of a projection: its bias or None, and its weight, columns last, which shares its memory: what is written
    into it is the model's."""
    module = model.get_submodule(span.module)
    weight = getattr(module, span.leaf).data.movedim(span.axis, -1)
    return [(None, lane) for lane in weight] if units.lanes > 1 else [(getattr(module, "bias", None), weight)]


def places_of(all_units: list[Units]) -> Places:
    """Every projection that reads units, by the name of its module."""
    return {span.module: (units, span) for units in all_units for span in units.outputs}


Places = dict[str, tuple[Units, Span]]
Then = Callable[[str, list[Moments]], None]


@torch.no_grad()
def for_each_projection(
    model: Any, places: Places, batches: MakeBatches | None, asked: str, then: Then, past_gates: bool = False
) -> None:
    """Call `then` with the name of every projection that runs and the moments of each of its lanes, in the order of the model.

    What `then` does to a projection, those after it feel: all batches wait for each other before every projection, so this
    costs one forward in all, with every sample in memory. A projection that serves many layers, as in ALBERT, comes when all of
    them have read. `past_gates`: see what gates leave of x, not what comes to them.
    """
    stops, found = _Stops(), {name: [Moments() for _ in range(units.lanes)] for name, (units, _) in places.items()}
    late = [name for name, (units, _) in places.items() if past_gates and units.lanes == 1]
    with evaluating(model), stops.before(model, [name for name in places if name not in late], late):
        # Experts that the first batch leaves out may be asked by another one, once.
        data = list(given(batches, asked))
        times = Counter(dict.fromkeys(places, 1)) | _times(model, places, data[0])
        runs = [_Run(stops, model, batch) for batch in data]

        def see(name: str, run: _Run) -> None:
            read = rows_read(model, *places[name], run.batch, run.args, run.kwargs, past_gates)
            for moments, rows in zip(found[name], read, strict=True):
                moments.add(rows)

        try:
            _in_order(model, runs, times, see, lambda name: then(name, found.pop(name)))
        finally:
            for run in runs:
                run.leave()


def _in_order(
    model: nn.Module, runs: list[_Run], times: Counter[str], see: Callable[[str, _Run], None], done: Callable[[str], None]
) -> None:
    """All runs walk to the same projection, and are seen; when all have been there as often as they will, it is done."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    at = {run: run.step() for run in runs}
    bar = progress(what="calibrating", total=len(times), shown=processes().is_main_process)
    while +times and (reached := {name for name in at.values() if name is not None}):
        # MakeXX in their way only where tokens choose it: then the first place in the model goes first.
        name = min(reached, key=order.__getitem__)
        here = [run for run in runs if at[run] == name]
        if times[name] > 0:
            for run in here:
                see(name, run)
            times[name] -= 1
            if not times[name]:
                done(name)
                bar.update()
        for run in here if +times else ():
            at[run] = run.step()
    bar.close()


def rows_read(
    model: nn.Module,
    units: Units,
    span: Span,
    batch: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    past_gates: bool,
) -> list[Tensor]:
    """(tokens, columns) that each lane of a projection reads when it is given these arguments, padding excluded."""
    module = model.get_submodule(span.module)
    if units.lanes > 1:
        args = tuple(_tokens(model, units, span, batch, one) for one in args)
        kwargs = {key: _tokens(model, units, span, batch, one) for key, one in kwargs.items()}
        rows = lanes_read(module, units, span, args, kwargs)
        if past_gates:
            rows = [some * stays.to(some) for some, stays in zip(rows, alive(module, units, span), strict=True)]
        return rows
    return [told(model, batch, span.module, args[0].movedim(channel_axis(module), -1))]


def _tokens(model: Any, units: Units, span: Span, batch: dict[str, Tensor], value: Any) -> Any:
    """What experts are given, without padding: (tokens, ...) of states, choices and weights, or that for each one in turn."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        return value
    mask = batch.get("attention_mask")
    each = units.lanes if mask is not None and mask.dim() == 2 and len(value) == units.lanes * mask.numel() else 1
    return torch.cat([told(model, batch, span.module, part) for part in value.chunk(each)])


def _times(model: nn.Module, names: Iterable[str], batch: dict[str, Tensor]) -> Counter[str]:
    """How often each projection runs in a forward."""
    times: Counter[str] = Counter()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: times.update([name])) for name in names
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
    def before(self, model: nn.Module, early: Iterable[str], late: Iterable[str]) -> Iterator[None]:
        """Stop before, or after, gates have silenced what comes to these."""
        handles = [
            model.get_submodule(name).register_forward_pre_hook(partial(self._reads, name), prepend=first, with_kwargs=True)
            for names, first in ((early, True), (late, False))
            for name in names
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

    def _reads(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mine, self._pause = self._pause, None
        if mine is not None:
            mine((name, args, kwargs))  # other runs go on meanwhile
            self._pause = mine


class _Run:
    """A batch on its way through the model."""

    def __init__(self, stops: _Stops, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.batch = batch
        self._run = Paused(partial(stops.walk, model, batch))
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def step(self) -> str | None:
        """On to the next projection, which is given `args` and `kwargs`; its name, or None at the end."""
        name, self.args, self.kwargs = self._run.step() or (None, (), {})
        return name

    def leave(self) -> None:
        self._run.leave()
