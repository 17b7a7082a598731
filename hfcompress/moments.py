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

from hfcompress.anatomy import Span, Units
from hfcompress.calibration import Batches, evaluating, given, told
from hfcompress.lockstep import Paused

DAMPING = 0.01
"""The ridge, as a share of the mean of the diagonal of the second moments: SparseGPT's (arXiv 2301.00774)."""


@dataclass
class Moments:
    """Of what one projection reads, x (columns,), over all tokens, padding excluded; float64."""

    tokens: int = 0
    total: Tensor | float = 0.0
    total_square: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """`x`: (tokens, columns)."""
        x = x if x.dtype == torch.float64 else x.float()
        self.tokens += len(x)
        self.total = self.total + x.sum(0).double()
        self.total_square = self.total_square + (x.T @ x).double()

    @property
    def mean(self) -> Any:
        """(columns,)"""
        return self.total / max(self.tokens, 1)

    def square(self, about_mean: bool) -> Any:
        """(columns, columns): mean x x^T, about the means where a bias can take these over."""
        found: Any = self.total_square / max(self.tokens, 1)
        return found - self.mean[:, None] * self.mean if about_mean else found


def unreadable(model: nn.Module, units: Units, span: Span) -> str:
    """Why moments can't tell what one projection does with its units; empty where they can."""
    module = model.get_submodule(span.module)
    if units.lanes > 1:
        return "experts compute inside one forward, and what each of them reads can't be seen"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and max(module.kernel_size) > 1:
        return "it reads several positions at once"
    return ""


def columns_of(weight: Tensor, span: Span) -> Tensor:
    """(out, columns): the weight of a projection as what multiplies the columns that it reads."""
    return weight.detach().movedim(span.axis, -1).flatten(0, -2)


Then = Callable[[str, Moments], None]


@torch.no_grad()
def for_each_projection(
    model: Any, names: Iterable[str], batches: Batches | None, asked: str, then: Then, past_gates: bool = False
) -> None:
    """Call `then` with the name and the moments of every projection that runs, in the order of the model.

    What `then` does to a projection, those after it feel: all batches wait for each other before every projection, so this
    costs one forward in all, with every sample in memory. A projection that serves many layers, as in ALBERT, comes when all of
    them have read. `past_gates`: see what gates leave of x, not what comes to them.
    """
    stops, found = _Stops(), {name: Moments() for name in names}
    with evaluating(model), stops.before(model, found, not past_gates):
        times = _times(model, found, next(iter(given(batches, asked))))
        runs = [_Run(stops, model, batch) for batch in given(batches, asked)]
        try:
            _in_order(model, found, runs, times, then)
        finally:
            for run in runs:
                run.leave()


def _in_order(model: nn.Module, found: dict[str, Moments], runs: list[_Run], times: Counter[str], then: Then) -> None:
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    left = set(times)
    at = {run: run.step() for run in runs}
    while left and (reached := {name for name in at.values() if name is not None}):
        # Batches may differ in their way only where tokens choose it: then the first place in the model goes first.
        name = min(reached, key=order.__getitem__)
        here = [run for run in runs if at[run] == name]
        is_convolution = isinstance(model.get_submodule(name), nn.Conv1d | nn.Conv2d)  # (batch, columns, ...)
        if name in left:
            for run in here:
                x = run.seen.movedim(1, -1) if is_convolution else run.seen
                found[name].add(told(model, run.batch, name, x))
            times[name] -= 1
            if not times[name]:
                then(name, found.pop(name))
                left.discard(name)
        for run in here if left else ():
            at[run] = run.step()


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
    def before(self, model: nn.Module, names: Iterable[str], gates: bool) -> Iterator[None]:
        hooks = {name: model.get_submodule(name).register_forward_pre_hook for name in names}
        handles = [hook(partial(self._reads, name), prepend=gates) for name, hook in hooks.items()]
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
