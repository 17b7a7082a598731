"""Layers by their components, as calibration data show them: one after another, each in the model as it is by then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.activation_svd import Components, components, damped
from hfcompress.calibration.batches import MakeBatches, evaluating, given, singles, told
from hfcompress.calibration.layerwise import layerwise
from hfcompress.calibration.paired import Pair, paired
from hfcompress.calibration.replay import lean
from hfcompress.calibration.second_moments import Moments, Projection
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers.base import is_conv1d
from hfcompress.surgery.depth.stacks import layer_stacks

ASKED = "low_rank: whiten"


@dataclass(frozen=True)
class Found:
    """A layer by its components; where it has a bias, with the means of what it read, (in,), as the model came and now."""

    components: Components
    mean_before: Tensor | None = None
    mean_now: Tensor | None = None


Then = Callable[[str, Found], None]


def matrix_of(layer: Any) -> Tensor:
    """The weight of a Linear, Conv1D or Embedding as (out, in); a table's columns are its rows, one a token."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, nn.Embedding) or is_conv1d(layer) else weight


def by_weights(model: nn.Module, names: Sequence[str], then: Then) -> None:
    """Call `then`, which may replace the layer, with every one; nothing is known of what they read."""
    for name in names:
        then(name, Found(components(matrix_of(model.get_submodule(name)))))


@torch.no_grad()
def by_outputs(
    model: Any,
    names: Sequence[str],
    batches: MakeBatches | None,
    then: Then,
    damping: float,
    writes: bool = True,
    pairs: bool = False,
) -> None:
    """Call `then` with every layer, by the components of what it says on the data; one that no token reaches, by its weights.

    Tables come first, then layers in the order of the model. `writes`: `then` may replace the layer. `pairs`: it is to say what
    it said in the model as it came, of what it reads now.
    """
    dense = {name: model.get_submodule(name) for name in names}
    tables = [name for name in names if isinstance(dense[name], nn.Embedding)]
    for name, counts in _counted(model, tables, batches).items():
        # One more of each: a token that the samples lack may come yet.
        then(name, Found(components(matrix_of(dense[name]), (counts + 1) / (counts + 1).sum())))
    linears = [name for name in names if name not in tables]
    alike = _reading_alike(model, linears, batches) if linears else {}

    def of_moments(target: Projection, moments: list[Moments]) -> None:
        for name in alike[target.module]:
            then(name, _of_moments(name, dense[name], moments[0], damping))

    def of_pair(target: Projection, pair: Pair) -> None:
        for name in alike[target.module]:
            then(name, _of_pair(name, dense[name], pair, damping))

    targets = [Projection(name, _columns(dense[name])) for name in alike]
    if not pairs:
        if targets:
            layerwise(model, targets, batches, ASKED, of_moments, writes=writes)
        return
    stacks = tuple(f"{stack.name}." for stack in layer_stacks(model))
    for inside in (True, False):  # what stands in no layer, such as a pooler, would have the whole model run for every one
        if some := [target for target in targets if target.module.startswith(stacks) == inside]:
            paired(model, some, batches, ASKED, of_pair, dense)


def _columns(layer: nn.Module) -> int:
    """The axis of the weight that reads."""
    return 0 if is_conv1d(layer) else 1


def _reading_alike(model: Any, names: list[str], batches: MakeBatches | None) -> dict[str, list[str]]:
    """The first of those that read the very same tensor, to all of them, as query, key and value do: told by one example.

    No change of one of them is felt by the others, so that they need their moments but once.
    """
    reads: dict[str, list[Any]] = {name: [] for name in names}
    kept: list[Tensor] = []  # while they live, no two tensors lie in one place

    def see(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        kept.append(x)
        reads[name].append((x.data_ptr(), x.shape, x.stride(), x._version))

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(see, name)) for name in names]
    try:
        with evaluating(model):
            for batch in given(batches, ASKED):
                model(**next(singles(model, batch)), **lean(model))
                break
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(tuple(reads[name]) or name, []).append(name)
    return {group[0]: group for group in groups.values()}


def _of_moments(name: str, layer: Any, moments: Moments, damping: float) -> Found:
    weight, has_bias = matrix_of(layer), layer.bias is not None
    if not moments.tokens:
        return Found(components(weight))
    square = _finite(name, moments.square(about_mean=has_bias))
    mean = moments.mean if has_bias else None
    return Found(components(weight, damped(square, damping)), mean, mean)


def _of_pair(name: str, layer: Any, pair: Pair, damping: float) -> Found:
    weight, has_bias = matrix_of(layer), layer.bias is not None
    if not pair.tokens:
        return Found(components(weight))
    square = _finite(name, pair.now.square(about_mean=has_bias))
    aim = _finite(name, pair.aimed(weight, square, damping, about_mean=has_bias))
    return Found(components(aim, damped(square, damping)), *((pair.mean_before, pair.now.mean) if has_bias else ()))


def _finite(name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise CompressionError(
            f"{ASKED}: what {name} reads on the calibration data is not finite; load the model in float32 or bfloat16."
        )
    return values


def _counted(model: Any, names: list[str], batches: MakeBatches | None) -> dict[str, Tensor]:
    """(rows,), float64: how often the data ask for each row of these tables, padding excluded."""
    counts = {name: torch.zeros(len(model.get_submodule(name).weight), dtype=torch.float64) for name in names}
    if not names:
        return counts

    def see(name: str, batch: dict[str, Tensor], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = told(model, batch, name, next(iter((*args, *kwargs.values())))[..., None]).flatten().cpu()
        counts[name] += ids.bincount(minlength=len(counts[name]))

    with evaluating(model):
        for batch in given(batches, ASKED):
            handles = [
                model.get_submodule(name).register_forward_pre_hook(partial(see, name, batch), with_kwargs=True)
                for name in names
            ]
            try:
                model(**batch)
            finally:
                for handle in handles:
                    handle.remove()
    return counts
