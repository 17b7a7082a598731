"""Importance scores of units, and how to rank by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.anatomy import Span, Units
from hfcompress.errors import CompressionError
from hfcompress.layers import features
from hfcompress.processes import processes
from hfcompress.surgery import gate

Batches = Callable[[], Iterable[dict[str, Tensor]]]


def magnitude(model: nn.Module, all_units: list[Units], batches: Batches | None = None) -> list[Tensor]:
    """L2 norm of everything a unit owns: its rows in the input projections and its columns in the output. (count,) each."""
    return [
        torch.stack([_squares(model, units, span) for span in (*units.inputs, *units.outputs)]).sum(0).sqrt()
        for units in all_units
    ]


def _squares(model: nn.Module, units: Units, span: Span) -> Tensor:
    """Sum of the squares of what each unit owns along the span, of the shape of the units."""
    tensor = model.get_submodule(span.module).get_parameter(span.tensor.rpartition(".")[2]).detach().float().square().cpu()
    if units.lanes > 1:
        per_entry = tensor.movedim(span.axis, 1).flatten(2).sum(2) if tensor.dim() > 2 else tensor
    else:
        per_entry = tensor.movedim(span.axis, 0).flatten(1).sum(1) if tensor.dim() > 1 else tensor
    blocks = span.index(torch.arange(units.count)[:, None], units.count)
    return per_entry[..., blocks].sum(-1)


def gradient(model: nn.Module, all_units: list[Units], batches: Batches | None = None) -> list[Tensor]:
    """Mean over examples of |dL/dg| for a gate g = 1 on each unit: how much the loss would notice. (count,) each.

    Michel, Levy, Neubig 2019 (arXiv 1905.10650), equation 2; one gate an example, as a sum over a batch would cancel.
    """
    assert batches is not None, "the method that asks has checked it"
    totals = [torch.zeros(units.shape) for units in all_units]
    gates: list[Tensor] = []

    def ones(position: int, units: Units, x: Tensor) -> Tensor:
        shape = (x.shape[0], *([1] * (x.dim() - 3)), units.count, 1)
        gates[position] = torch.ones(shape, device=x.device, requires_grad=True)
        return gates[position]

    handles = [
        gate(model, units, lambda x, position=position, units=units: ones(position, units, x))  # type: ignore[misc]
        for position, units in enumerate(all_units)
    ]
    was_training = model.training
    model.eval()
    seen = 0
    try:
        for batch in batches():
            gates[:] = [torch.empty(0)] * len(all_units)
            with torch.enable_grad():
                loss = model(**batch).loss
            if loss is None:
                raise CompressionError(
                    "scores: gradient needs a loss, and the batches hold no labels; add labels, or choose scores: magnitude."
                )
            for total, slope in zip(totals, torch.autograd.grad(loss, gates), strict=True):
                total += slope.abs().flatten(1).sum(dim=0).float().cpu()
            seen += 1
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not seen:
        raise CompressionError("scores: gradient needs calibration data, and the task gave no batch; check its data set.")
    return [_agreed(total) for total in totals]


SCORES = {"magnitude": magnitude, "gradient": gradient}


def _agreed(score: Tensor) -> Tensor:
    """The first process decides: kernels that add in another order must not make two processes cut different units."""
    state = processes()
    if state.num_processes == 1:
        return score
    return broadcast(score.to(state.device)).cpu()


def _out_in(layer: Any) -> Tensor:
    """A projection's weight as (out, in), in float32."""
    features(layer)
    weight = layer.weight.detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight


def keep_per_layer(scores: list[Tensor], ratio: float, round_to: int) -> list[Tensor]:
    """Indices to keep when every layer loses the same share; at least one unit, or `round_to` of them, stays."""
    return [score.topk(_rounded(len(score) * (1 - ratio), len(score), round_to)).indices.sort().values for score in scores]


def keep_globally(scores: list[Tensor], ratio: float, round_to: int) -> list[Tensor]:
    """Indices to keep when all layers compete; each layer's scores are divided by their L2 norm first, as Michel et al. do."""
    scaled = [score / score.norm().clamp_min(1e-12) for score in scores]
    everything = torch.cat(scaled)
    threshold = everything.sort(descending=True).values[max(1, round(len(everything) * (1 - ratio))) - 1]
    return [
        score.topk(_rounded(int((score >= threshold).sum()), len(score), round_to)).indices.sort().values for score in scaled
    ]


RANKINGS = {"layer": keep_per_layer, "global": keep_globally}


def _rounded(wanted: float, count: int, round_to: int) -> int:
    """The nearest multiple of `round_to`, never 0; all units where fewer than `round_to` exist."""
    return min(count, max(1, round(wanted / round_to)) * round_to)
