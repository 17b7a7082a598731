"""Sparse layers by what they do: Wanda's scores, SparseGPT's updates, and least squares on what is left, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches
from hfcompress.calibration.error_feedback import inverse_factor
from hfcompress.calibration.factoring import matrix_of
from hfcompress.calibration.layerwise import layerwise
from hfcompress.calibration.processes import agreed
from hfcompress.calibration.second_moments import DAMPING, Moments, Projection
from hfcompress.calibration.sparsity import Pattern
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers.base import is_conv1d

log = logging.getLogger(__name__)
SPAN = 128
"""Columns among which SparseGPT chooses together, its authors' block size."""
STEPS = 40
"""Of conjugate gradients, at most."""
ENOUGH = 1e-4
"""They end where a step takes away less than this share of the error."""


@dataclass(frozen=True)
class SparseLayer:
    """What became of a layer: the mean squared error of what it says, as a share of the mean square of that, with the others
    as they were, and after they took over."""

    name: str
    before: float
    after: float
    tokens: int


class Read(NamedTuple):
    """What is known of what a layer reads."""

    square: Tensor
    """(in, in), float32: second moments, about the mean where the layer has a bias."""
    mean: Tensor | None
    """(in,), float32: where the layer has a bias, which can take over what the means bring."""
    tokens: int


@torch.no_grad()
def each_read(
    model: Any,
    names: Sequence[str],
    batches: MakeBatches | None,
    asked: str,
    then: Callable[[str, Read | None], None],
    writes: bool,
) -> None:
    """Call `then` with every layer and what it reads, None where no token comes to it. `writes`: as of `layerwise`."""

    def see(projection: Projection, moments: list[Moments]) -> None:
        name, some = projection.module, moments[0]
        layer: Any = model.get_submodule(name)
        if not some.tokens:
            then(name, None)
            return
        about_mean = layer.bias is not None
        square = some.square(about_mean).float()
        if not bool(square.isfinite().all()):
            raise CompressionError(
                f"{asked}: what {name} reads on the calibration data is infinite or no number; load the model in float32 or "
                f"bfloat16, or choose scores: magnitude."
            )
        then(name, Read(square, some.mean.float() if about_mean else None, some.tokens))

    targets = [Projection(name, 0 if is_conv1d(model.get_submodule(name)) else 1) for name in names]
    layerwise(model, targets, batches, asked, see, writes)


def activity(read: Read) -> Tensor:
    """(in,): the mean square of each input."""
    own = read.square.diagonal()
    return own if read.mean is None else own + read.mean.square()


def wanda(weight: Tensor, read: Read) -> Tensor:
    """(out, in): |w| times the norm of its input. Sun et al. 2023, Wanda (arXiv 2306.11695)."""
    return weight.float().abs() * activity(read).clamp_min(0).sqrt()


def sparse_gpt(
    weight: Tensor, alive: Tensor, read: Read, pattern: Pattern, sparsity: float, damping: float, name: str
) -> tuple[Tensor, Tensor] | None:
    """(the weight that is left, its mask), (out, in) each, of those weights that are `alive`; None where the moments have no
    inverse, and a line says so.

    Column after column: what goes is least w^2 / [H^-1]_cc, in the weights as those before left them, and the columns after
    take over what it did. Chosen among `SPAN` columns together, or those of a group or block. Frantar, Alistarh 2023, SparseGPT
    (arXiv 2301.00774), algorithm 1.
    """
    factor = inverse_factor(read.square, damping)
    if factor is None:
        log.warning("%s: the second moments of what it reads have no inverse; its weights are chosen by wanda.", name)
        return None
    left = weight.T.to(torch.float32, copy=True).contiguous()  # (in, out)
    kept = alive.T.to(left.device, copy=True)
    together = pattern.columns or SPAN
    span = max(SPAN // together, 1) * together
    for start in range(0, len(left), span):
        end = min(start + span, len(left))
        inner, told = factor[start:end, start:end], torch.empty_like(left[start:end])
        own, mine = inner.diagonal(), left[start:end]
        for place in range(end - start):
            if place % together == 0:
                some = slice(place, min(place + together, end - start))
                prices = (mine[some] / own[some, None]).square()
                prices.masked_fill_(~kept[start:end][some], -1.0)  # what is zero already is the first to go
                kept[start:end][some] &= pattern.kept(prices.T, sparsity).T
            told[place] = mine[place].masked_fill(kept[start + place], 0.0) / own[place]
            mine[place + 1 :].addr_(inner[place, place + 1 :], told[place], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, told, alpha=-1)
    return (left * kept).T, kept.T


def reconstructed(weight: Tensor, start: Tensor, kept: Tensor, square: Tensor, damping: float) -> Tensor:
    """(out, in): the weights nearest to `weight` in what the layer says, of those that are zero outside the mask `kept`.

    Minimises tr (V - W) (square + ridge) (V - W)^T over V on the mask, from `start`, by conjugate gradients, all rows at once,
    preconditioned by the diagonal: a row's own normal equations, whose matrix no two rows share, are never set up. As Meng et
    al. 2024, ALPS (arXiv 2406.07831), do. No row ends worse than it began.
    """
    ridged = square + torch.diag((damping * square.diagonal().mean()).clamp_min(1e-20).expand(len(square)))
    steep = 1 / ridged.diagonal()
    found, aim = start.clone(), weight.float()
    residual = ((aim - found) @ ridged).mul_(kept)
    scaled = residual * steep
    way, slope = scaled.clone(), (residual * scaled).sum(1)
    first = error = _errors(found - aim, ridged)
    for _ in range(STEPS):
        moved = way @ ridged
        step = slope / (way * moved).sum(1).clamp_min(1e-30)
        found.addcmul_(way, step[:, None])
        residual.sub_(moved.mul_(kept) * step[:, None])
        won = (step * slope).sum()
        error = error - step * slope
        if won <= ENOUGH * error.sum().clamp_min(0):
            break
        torch.mul(residual, steep, out=scaled)
        before, slope = slope, (residual * scaled).sum(1)
        way.mul_((slope / before.clamp_min(1e-30))[:, None]).add_(scaled)
    worse = ~(_errors(found - aim, ridged) <= first)
    return torch.where(worse[:, None], start, found)


def _errors(off: Tensor, square: Tensor) -> Tensor:
    """(out,): the mean squared error of each output, where the weights are off by `off` (out, in)."""
    return ((off @ square) * off).sum(1).clamp_min(0)


@torch.no_grad()
def sparse_layers(
    model: nn.Module,
    names: Sequence[str],
    batches: MakeBatches | None,
    solve: Callable[[str, Tensor, Read | None], tuple[Tensor, Tensor]],
    repair: bool,
    then: Callable[[str, Tensor, Tensor, Tensor | None], None],
    asked: str,
    damping: float = DAMPING,
) -> list[SparseLayer]:
    """Go through these layers in the order of the model; `solve` gives what is left of a weight (out, in) and its mask, and
    `then` is called with the name, the values (out, in), the mask (out, in), and what to add to the bias (out,), or None; it
    writes them, as the layers after are to feel them. `repair`: what is left is solved anew by least squares."""
    told: list[SparseLayer] = []

    def choose(name: str, read: Read | None) -> None:
        weight = matrix_of(model.get_submodule(name))
        values, kept = solve(name, weight, read)
        shift = None
        if read is None:
            log.warning("%s: no token of the calibration data comes to %s; its weights are chosen by magnitude.", asked, name)
        else:
            cut, power = _errors(weight.float() * ~kept, read.square).sum(), _errors(weight.float(), read.square).sum()
            if repair:
                values = reconstructed(weight, values.float(), kept, read.square, damping)
            off = weight.float() - values
            after = _errors(off, read.square).sum()
            if read.mean is not None:
                shift, power = off @ read.mean, power + (weight.float() @ read.mean).square().sum()
            power = power.clamp_min(1e-30)
            told.append(SparseLayer(name, float(cut / power), float(after / power), read.tokens))
        kept = agreed(kept).to(weight.device)
        then(
            name,
            agreed(values).to(weight.device).masked_fill(~kept, 0.0),
            kept,
            None if shift is None else agreed(shift).to(weight.device),
        )

    each_read(model, names, batches, asked, choose, writes=True)
    if told:
        before, after = sum(one.before for one in told) / len(told), sum(one.after for one in told) / len(told)
        line = "%s: the outputs of %d layers are off by %.3g of their mean square, %.3g with zeros alone."
        log.info(line, asked, len(told), after, before)
    return told
