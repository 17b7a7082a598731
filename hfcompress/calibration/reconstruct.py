"""Repairs a cut without training: what is left of an output projection takes over what was cut, as well as it can."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating
from hfcompress.calibration.layerwise import layerwise
from hfcompress.calibration.processes import agreed
from hfcompress.calibration.second_moments import DAMPING, Moments, Projection
from hfcompress.checkpoint.writing import written
from hfcompress.surgery.units.spans import Span, Units, channel_axis
from hfcompress.surgery.units.specimens.inputs import example


@dataclass(frozen=True)
class Repaired:
    """An output projection, or an expert's: the mean squared error of what it adds, as a share of the mean square of that."""

    module: str
    before: float
    after: float
    tokens: int


class Undo:
    """Changes of tensors, so that they can be taken back, whatever training has added since. They are kept on disk: a copy of
    what a weight was and one of what it became would be twice the weights."""

    def __init__(self) -> None:
        self._changed: list[Tensor] = []
        self._folder = tempfile.TemporaryDirectory(prefix="hfcompress-undo-")

    @contextmanager
    def noting(self, *tensors: Tensor | None) -> Iterator[None]:
        given = [tensor for tensor in tensors if tensor is not None]
        before = [tensor.detach().to("cpu", copy=True) for tensor in given]
        try:
            yield
        finally:
            for tensor, old in zip(given, before, strict=True):
                both = {"old": old.contiguous(), "new": tensor.detach().cpu().contiguous()}
                with written(self._folder.name, "what was before a repair"):
                    save_file(both, self._file(len(self._changed)))
                self._changed.append(tensor)

    def undo(self) -> None:
        while self._changed:
            tensor = self._changed.pop()
            told, now = load_file(self._file(len(self._changed))), tensor.detach().cpu()
            old, new = told["old"], told["new"]
            tensor.data.copy_(old if torch.equal(now, new) else now.float() - new.float() + old.float())
        self.forget()

    def forget(self) -> None:
        """Nothing will be taken back any more."""
        self._changed.clear()
        self._folder.cleanup()

    def _file(self, number: int) -> str:
        return f"{self._folder.name}/{number}.safetensors"


@torch.no_grad()
def repair(
    model: Any,
    all_units: list[Units],
    kept: list[Tensor],
    batches: MakeBatches | None,
    damping: float = DAMPING,
    undo: Undo | None = None,
) -> list[Repaired]:
    """Solve the columns that stay in every output projection anew, in place. The units that go must be silent already, and
    become so for good: their columns are zero afterwards.

    With z what the columns that stay read, and r = W_cut x_cut what the others would add, D and d minimise

        mean |r - D z - d|^2 + ridge |D|^2     over all tokens, padding excluded

    which is closed in the second moments, D = mean r z^T (mean z z^T + ridge)^-1, and W_kept + D and b + d take their places.
    Where the projection has a bias, moments are about the means and d = mean r - D mean z: the mean of what is cut is folded
    into the bias. Where it has none, none is added: d is 0, and raw moments let the columns stand in for the mean as well. As
    D = 0 is the cut alone and costs no ridge, the error can't become larger than that on these tokens, whatever the ridge.

    Layers are repaired in the order of the model, each on what those before it make of the data since they were repaired. Least
    squares layer by layer: OBC (Frantar, Alistarh 2022, arXiv 2208.11580), ZipLM (Kurtic et al. 2023, 2302.04089), SlimGPT
    (Ling et al. 2024, 2412.18110). Aiming at what the projection said in the original model, so that later layers mend
    what earlier ones could not, fits the samples rather than the text.
    """
    undo = undo or Undo()
    places: dict[Projection, tuple[Span, Tensor]] = {}
    for units, keep in zip(all_units, kept, strict=True):
        for span in units.outputs:
            projection = Projection.of(units, span)
            why = projection.unreadable(model)
            if why:
                _leave(span, why)
            elif keep.shape[-1] < units.count:
                places[projection] = span, span.index(keep, units.count).reshape(units.lanes, -1)
    told: list[Repaired] = []

    def solve(projection: Projection, moments: list[Moments]) -> None:
        span, columns = places[projection]
        if not any(some.tokens for some in moments):
            _leave(span, "what it reads can't be seen, or is never asked for")
        lanes = zip(projection.weights(model), columns, moments, strict=True)
        with undo.noting(*(owned := _owned(model, span))):
            told.extend(_solve(span.module, *lane, some, mine, damping) for lane, some, mine in lanes if mine.tokens)
            for tensor in owned:  # whatever tokens a process saw, all of them ask the first one here
                if tensor is not None:
                    tensor.data.copy_(agreed(tensor.data))

    if places:
        layerwise(model, list(places), batches, "repair", solve)
    return told


def _leave(span: Span, why: str) -> None:
    logging.getLogger(__name__).warning("repair: %s is left as it is: %s.", span.tensor, why)


def _solve(name: str, bias: Any, lane: Tensor, columns: Tensor, moments: Moments, damping: float) -> Repaired:
    """Write into the columns that stay of a lane (..., columns), and into its bias."""
    columns, about_mean = columns.to(lane.device), bias is not None
    gone = torch.ones(lane.shape[-1], dtype=torch.bool, device=lane.device).index_fill_(0, columns, False).nonzero().flatten()
    power, mean = moments.mean_square(lane.flatten(0, -2).double()), moments.mean.double()
    lost = lane[..., gone].flatten(0, -2).double()
    rest = _mean_square(lost, moments.block(gone, gone, about_mean))
    before = rest + (lost @ mean[gone]).square().sum() if about_mean else rest  # told about zero, as the power is
    rz = lost @ moments.block(gone, columns, about_mean)
    more, moved = divided(rz, moments.block(columns, columns, about_mean, last=True), damping)
    after = rest - 2 * (more * rz).sum() + moved
    lane[..., columns] = (lane[..., columns].flatten(0, -2).double() + more).to(lane).reshape(*lane.shape[:-1], -1)
    lane[..., gone] = 0.0
    if bias is not None:
        bias.data += (lost @ mean[gone] - more @ mean[columns]).to(bias)
    was, now = (float((error / power.clamp_min(1e-30)).clamp_min(0)) for error in (before, after))
    return Repaired(name, was, now, moments.tokens)


def _mean_square(weight: Tensor, square: Tensor) -> Tensor:
    """mean |W x|^2, of the second moments of x."""
    return (weight * (weight @ square)).sum()


def divided(left: Tensor, moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """D = left (moments + ridge)^-1, for (out, k) and (k, k), which is overwritten; and tr D moments D^T."""
    ridge = damping * moments.diagonal().mean()
    moments.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(moments)
    if int(failed) or not factor.diagonal().isfinite().all():  # columns that say the same, and no ridge: the least solution
        found = left @ torch.linalg.pinv(moments, hermitian=True)
        return found, _mean_square(found, moments) - ridge * found.square().sum()
    found = torch.cholesky_solve(left.T, factor).T
    return found, (found @ factor).square().sum() - ridge * found.square().sum()


@torch.no_grad()
def fold_constants(model: Any, all_units: list[Units], pruned: list[Tensor], undo: Undo | None = None) -> list[Tensor]:
    """Fold what pruned units always say into the bias that follows; which ones these were, of the shape of the units. Their
    columns are zero afterwards.

    A neuron whose weights are all zero still speaks if it has a bias: W act(b) is then a constant, and cutting it is exact if
    the next bias takes it over. The constant is read off a forward of random inputs, so that no activation need be known.
    """
    undo = undo or Undo()
    folded = [torch.zeros_like(some) for some in pruned]
    found: dict[tuple[int, int], list[Tensor]] = {}
    for number, (units, some) in enumerate(zip(all_units, pruned, strict=True)):
        if units.kind == "neurons" and units.lanes == 1 and _can_fold(model, units):
            folded[number] = some & _weightless(model, units)
    if not any(some.any() for some in folded):
        return folded

    def look(number: int, place: int, channel: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].movedim(channel, -1)[..., folded[number].to(args[0].device)].flatten(0, -2)
        found.setdefault((number, place), []).append(rows)

    handles = [
        _reader(model, span).register_forward_pre_hook(partial(look, number, place, channel_axis(_reader(model, span))))
        for number, units in enumerate(all_units)
        for place, span in enumerate(units.outputs)
        if folded[number].any()
    ]
    try:
        with evaluating(model):
            model(**example(model))
    except Exception:  # inputs that only its own processor can make
        return [torch.zeros_like(some) for some in pruned]
    finally:
        for handle in handles:
            handle.remove()
    for (number, place), seen in found.items():
        rows, span = torch.cat(seen), all_units[number].outputs[place]
        if not torch.allclose(rows, rows[:1], atol=1e-5, rtol=1e-3):  # kernels round the last few entries of a row otherwise
            folded[number].zero_()
            continue
        ((bias, weight),) = Projection.of(all_units[number], span).weights(model)
        index = folded[number].to(weight.device)
        with undo.noting(*_owned(model, span)):
            bias.data += (weight[..., index].flatten(0, -2).double() @ rows[0].double()).to(bias)
            weight[..., index] = 0.0
    return folded


def _reader(model: nn.Module, span: Span) -> Any:
    return model.get_submodule(span.module)


def _owned(model: nn.Module, span: Span) -> tuple[Tensor | None, ...]:
    """The weight, and the bias if there is one."""
    return tuple(getattr(_reader(model, span), leaf, None) for leaf in (span.leaf, "bias"))


def _can_fold(model: nn.Module, units: Units) -> bool:
    """Every output has a bias, reads one position, and one entry a unit."""
    layers = [_reader(model, span) for span in units.outputs]
    return units.size == 1 and all(
        getattr(layer, "bias", None) is not None and not Projection.of(units, span).unreadable(model)
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
