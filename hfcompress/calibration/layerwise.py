"""The layer-by-layer walk: each projection with the second moments of what it reads in the model as it is by then.

What is done to a projection, those after it feel. Hidden states between layers are kept, and a layer is run again on them:
once for each tensor that its projections read, and once more to go on. So memory is that of one layer and its activations, over
the weights and the hidden states, which may lie on the CPU; time is that of two or three forwards, however deep the model is.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating, given
from hfcompress.calibration.processes import processes
from hfcompress.calibration.progress import progress
from hfcompress.calibration.replay import Replay, Route, WontReplay, routed
from hfcompress.calibration.second_moments import Moments, Projection

log = logging.getLogger(__name__)
Then = Callable[[Projection, list[Moments]], None]


@torch.no_grad()
def layerwise(
    model: Any,
    targets: Sequence[Projection],
    batches: MakeBatches | None,
    asked: str,
    then: Then,
    writes: bool = True,
    past_gates: bool = False,
    offload: bool = False,
) -> None:
    """Call `then` with every projection and the moments of each of its lanes, in the order of the model.

    `writes`: `then` may change the projection, so that each is seen after those before it were changed; else all of a layer are
    seen at once, which costs one forward in all. One that never runs comes last, with moments of no tokens. `past_gates`: see
    what gates leave of what is read, not what comes to them. `offload`: keep the hidden states on the CPU.

    A model whose layers can't be run one by one, as they share weights or pass more from one to another than their output, is
    run whole for every projection instead; a line says so. So it is for a projection before or after all layers.
    """
    walk = _Walk(model, targets, past_gates)
    with evaluating(model):
        data = list(given(batches, asked))
        try:
            route = routed(model, [target.module for target in targets], data[0], around=True)
        except WontReplay as why:
            log.info("%s: %s is run whole for every projection, which takes longer: %s.", asked, type(model).__name__, why)
            walk.by_forwards(walk.targets, data, then, writes)
        else:
            walk.by_layers(route, data, then, writes, offload)


def _reading_alike(targets: list[Projection], route: Route) -> list[list[Projection]]:
    """Neighbours that read the very same tensor, as q, k and v do: what is done to one of them, the others don't feel."""
    groups: list[list[Projection]] = []
    for target in targets:
        last = groups[-1][-1] if groups else None
        alone = target.lanes > 1 or not route.once(target.module) or target.module not in route.reads
        if last is None or alone or last.lanes > 1 or route.reads[target.module] != route.reads.get(last.module):
            groups.append([target])
        else:
            groups[-1].append(target)
    return groups


class _Seen(BaseException):
    """Raised where a projection has been read as often as it will be, to leave the forward."""


class _Walk:
    def __init__(self, model: Any, targets: Sequence[Projection], past_gates: bool) -> None:
        self.model, self.targets, self.past_gates = model, list(targets), past_gates

    def by_layers(self, route: Route, data: list[dict[str, Tensor]], then: Then, writes: bool, offload: bool) -> None:
        self.by_forwards([one for one in self.targets if one.module in route.before], data, then, writes)
        after = [one for one in self.targets if one.module in route.after]
        inside: dict[int, list[Projection]] = {}
        for target in sorted(self.targets, key=lambda one: route.place(one.module)):
            if target.module not in {*route.before, *route.after}:
                inside.setdefault(route.layer_of(target.module), []).append(target)
        never = inside.pop(-1, [])
        last = max(inside, default=-1)
        kept: list[dict[int, Any]] = [{} for _ in data]
        replay = Replay(self.model, route, offload)
        for layer in progress(range(last + 1), what="calibrating", shown=processes().is_main_process):
            mine = inside.get(layer, [])
            for group in _reading_alike(mine, route) if writes else ():
                runs = (partial(replay.run, batch, states, layer) for batch, states in zip(data, kept, strict=True))
                moments = self._read(group[:1], zip(data, runs, strict=True), route.once(group[0].module))[group[0]]
                for target in group:  # who solves with moments may use them up
                    then(target, moments if target is group[-1] else copy.deepcopy(moments))
            if layer == last and writes:
                break
            found = self._moments(mine)
            for batch, states in zip(data, kept, strict=True):
                with self._seeing({} if writes else found, batch):
                    replay.advance(batch, states, layer)
            for target in () if writes else mine:
                then(target, found.pop(target))
        self.by_forwards(after, data, then, writes)
        for target in never:
            then(target, self._moments([target])[target])

    def by_forwards(self, targets: list[Projection], data: list[dict[str, Tensor]], then: Then, writes: bool) -> None:
        if not targets:
            return
        lean = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}

        def runs() -> Iterator[tuple[dict[str, Tensor], Callable[[], Any]]]:
            yield from ((batch, lambda batch=batch: self.model(**batch, **lean)) for batch in data)

        if not writes:
            for target, moments in self._read(targets, runs(), 0).items():
                then(target, moments)
            return
        times: Counter[str] = Counter()
        with ExitStack() as stack:
            for name in {target.module for target in targets}:
                hook = self.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: times.update([name]))
                stack.callback(hook.remove)
            self.model(**data[0], **lean)
        order = {name: place for place, name in enumerate(times)}
        ordered = sorted(targets, key=lambda one: order.get(one.module, len(order)))
        for target in progress(ordered, what="calibrating", shown=processes().is_main_process):
            then(target, self._read([target], runs(), times[target.module])[target])

    def _moments(self, targets: Iterable[Projection]) -> dict[Projection, list[Moments]]:
        return {target: [Moments() for _ in range(target.lanes)] for target in targets}

    def _read(
        self, targets: list[Projection], runs: Iterable[tuple[dict[str, Tensor], Callable[[], Any]]], times: int
    ) -> dict[Projection, list[Moments]]:
        """The moments of these over all runs, each of which is left when a projection was read so often; 0: never."""
        found = self._moments(targets)
        for batch, run in runs:
            with self._seeing(found, batch, times), suppress(_Seen):
                run()
        return found

    @contextmanager
    def _seeing(self, found: dict[Projection, list[Moments]], batch: dict[str, Tensor], times: int = 0) -> Iterator[None]:
        seen: Counter[Projection] = Counter()

        def see(target: Projection, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = target.rows(self.model, batch, args, kwargs, self.past_gates)
            for moments, rows in zip(found[target], read, strict=True):
                moments.add(rows)
            seen[target] += 1
            if seen[target] == times:
                raise _Seen

        with ExitStack() as stack:
            for target in found:
                module, early = self.model.get_submodule(target.module), not self.past_gates or target.lanes > 1
                hook = module.register_forward_pre_hook(partial(see, target), prepend=early, with_kwargs=True)
                stack.callback(hook.remove)
            yield
