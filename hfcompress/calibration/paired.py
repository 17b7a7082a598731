"""The layer-by-layer walk of two: what each projection reads in the model as it is by then, beside what it read as it came.

As in `layerwise`, what is done to a projection, those after it feel; but the model as it came runs beside, so that a projection
can be asked to say what it once said, of inputs that are no longer the same. Hidden states of both are kept between layers, and
the dense modules are put back for as long as theirs are made: no second model is built.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating, given
from hfcompress.calibration.processes import processes
from hfcompress.calibration.progress import progress
from hfcompress.calibration.reconstruct import divided
from hfcompress.calibration.replay import Replay, Route, WontReplay, lean, routed
from hfcompress.calibration.second_moments import Moments, Projection
from hfcompress.surgery.modules import swap

log = logging.getLogger(__name__)


class Pair:
    """Moments of what one projection reads, z (columns,), and of z with what it read as the model came, x (columns,)."""

    def __init__(self) -> None:
        self.now = Moments()
        self._before_origin: Any = 0.0
        self._before_total: Any = 0.0
        self._cross: Any = 0.0
        self._is_paired = True

    def add(self, now: Tensor, before: Tensor) -> None:
        """(tokens, columns) each. Tokens that an expert is sent now and was not sent then have no counterpart."""
        self._is_paired &= now.shape == before.shape
        is_first = not self.now.tokens
        self.now.add(now)
        if not self._is_paired or not len(now):
            return
        if is_first:
            self._before_origin = before.float().mean(0)
        off = before.float() - self._before_origin
        self._before_total = self._before_total + off.double().sum(0)
        self._cross = self._cross + (off.T @ (now.float() - self.now.origin)).double()

    @property
    def tokens(self) -> int:
        return self.now.tokens

    @property
    def mean_before(self) -> Any:
        """(columns,), of x; of z where tokens have no counterpart."""
        return self._before_origin + self._before_total / max(self.tokens, 1) if self._is_paired else self.now.mean

    def aimed(self, weight: Tensor, square: Tensor, damping: float, about_mean: bool) -> Tensor:
        """(out, columns), float64: of all W', the one whose W' z comes nearest to W x by least squares, with a ridge on what it
        is away from W: W (mean x z^T + ridge) (mean z z^T + ridge)^-1. `square`: mean z z^T, without the ridge."""
        if not self._is_paired:
            return weight.double()
        cross = self._cross / self.tokens
        cross = cross - torch.outer(self._before_total / self.tokens, self.now.total / self.tokens)
        if not about_mean:
            cross = cross + torch.outer(self.mean_before, self.now.mean)
        return weight.double() + divided(weight.double() @ (cross - square), square.clone(), damping)[0]


@torch.no_grad()
def paired(
    model: Any,
    targets: Sequence[Projection],
    batches: MakeBatches | None,
    asked: str,
    then: Callable[[Projection, Pair], None],
    dense: dict[str, nn.Module],
) -> None:
    """Call `then`, which may put another module in its place, with every projection, in the order of the model. `dense`: what
    stood in the model as it came, of these and of whatever else was replaced since.

    A model whose layers can't be run one by one is run whole for every projection instead; a line says so.
    """
    with evaluating(model):
        data = list(given(batches, asked))
        walk = _Walk(model, targets, data, dense)
        try:
            route = routed(model, [target.module for target in targets], data[0])
        except WontReplay as why:
            log.info("%s: %s is run whole for every projection, which takes longer: %s.", asked, type(model).__name__, why)
            walk.by_forwards(then)
        else:
            walk.by_layers(route, then)


class _Seen(BaseException):
    """Raised where a projection has been read as often as it will be, to leave the forward."""


class _Walk:
    def __init__(
        self, model: Any, targets: Sequence[Projection], data: list[dict[str, Tensor]], dense: dict[str, nn.Module]
    ) -> None:
        self.model, self.targets, self.data, self.dense = model, list(targets), data, dense

    def by_layers(self, route: Route, then: Callable[[Projection, Pair], None]) -> None:
        inside: dict[int, list[Projection]] = {}
        for target in sorted(self.targets, key=lambda one: route.place(one.module)):
            inside.setdefault(route.layer_of(target.module), []).append(target)
        never = inside.pop(-1, [])
        last, replay = max(inside, default=-1), Replay(self.model, route, offload=False)
        now: list[dict[int, Any]] = [{} for _ in self.data]
        before: list[dict[int, Any]] = [{} for _ in self.data]
        for layer in progress(range(last + 1), what="calibrating", shown=processes().is_main_process):
            for target in inside.get(layer, []):
                pair, times = Pair(), route.once(target.module)
                for batch, here, there in zip(self.data, now, before, strict=True):
                    read = self._read(target, batch, lambda: replay.run(batch, here, layer), times)  # noqa: B023
                    with self._as_it_came(route, layer):
                        read_before = self._read(target, batch, lambda: replay.run(batch, there, layer), times)  # noqa: B023
                    pair.add(read, read_before)
                then(target, pair)
            for batch, here, there in zip(self.data, now, before, strict=True):
                if layer < last:
                    replay.advance(batch, here, layer)
                    with self._as_it_came(route, layer):
                        replay.advance(batch, there, layer)
        for target in never:
            then(target, Pair())

    def by_forwards(self, then: Callable[[Projection, Pair], None]) -> None:
        order: dict[str, int] = {}

        def note(name: str, *_: Any) -> None:
            order.setdefault(name, len(order))

        hooks = [self.model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in self.dense]
        try:
            self._forward(self.data[0])
        finally:
            for hook in hooks:
                hook.remove()
        for target in sorted(self.targets, key=lambda one: order.get(one.module, len(order))):
            pair = Pair()
            for batch in self.data if target.module in order else ():
                read = self._read(target, batch, lambda: self._forward(batch), 0)  # noqa: B023
                with self._as_it_came():
                    pair.add(read, self._read(target, batch, lambda: self._forward(batch), 0))  # noqa: B023
            then(target, pair)

    def _forward(self, batch: dict[str, Tensor]) -> None:
        self.model(**batch, **lean(self.model))

    def _read(self, target: Projection, batch: dict[str, Tensor], run: Callable[[], Any], times: int) -> Tensor:
        """(tokens, columns) that it reads in a run, which is left when it was read so often; 0: never."""
        found: list[Tensor] = []
        module = self.model.get_submodule(target.module)

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.extend(target.rows(self.model, batch, args, kwargs, False))
            if len(found) == times:
                raise _Seen

        hook = module.register_forward_pre_hook(see, prepend=True, with_kwargs=True)
        try:
            with suppress(_Seen):
                run()
        finally:
            hook.remove()
        if found:
            return torch.cat(found)
        weight: Any = self.dense[target.module].weight
        return weight.new_zeros(0, weight.shape[target.axis])

    @contextmanager
    def _as_it_came(self, route: Route | None = None, layer: int = -1) -> Iterator[None]:
        """The dense modules in their places, of the whole model, or of one layer and of what is in none."""
        names = [name for name in self.dense if route is None or route.layer_of(name) in (layer, -1)]
        instead = {name: self.model.get_submodule(name) for name in names}
        try:
            for name in names:
                swap(self.model, name, self.dense[name])
            yield
        finally:
            for name, module in instead.items():
                swap(self.model, name, module)
