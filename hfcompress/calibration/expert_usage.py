"""Expert usage: the share of the routing weight that each expert of a mixture receives on calibration data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating, told
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.experts import Mixtures


def usage(model: nn.Module, experts: Mixtures, batches: MakeBatches, asked: str) -> list[Tensor]:
    """The share of all routing weight, over tokens that are no padding, that an expert receives. (count,) a layer."""
    totals = [torch.zeros(experts.count) for _ in experts.layers]
    now: dict[str, Tensor] = {}

    def note(name: str, total: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index, weights = (told(model, now, name, one) for one in _routing((*args, *kwargs.values()), experts, asked))
        weights = weights.gather(1, index) if weights.shape != index.shape else weights
        total += torch.zeros(experts.count + 1).index_add_(
            0,
            index.flatten().clamp(max=experts.count).cpu(),
            weights.float().flatten().cpu(),
        )[:-1]

    handles = [
        model.get_submodule(mixture.name).register_forward_pre_hook(
            lambda _, args, kwargs, name=mixture.name, total=total: note(name, total, args, kwargs),  # type: ignore[misc]
            with_kwargs=True,
        )
        for mixture, total in zip(experts.layers, totals, strict=True)
    ]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches():
                now.clear()
                now.update(batch)
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not all(total.sum() for total in totals):
        raise CompressionError(f"{asked}: usage needs calibration data, and the task gave no batch; check its data set.")
    if not all(bool(total.isfinite().all()) for total in totals):
        raise CompressionError(
            f"{asked}: usage is not finite, as the model's answers to the calibration data overflow; load the model in "
            f"float32, or choose scores: magnitude."
        )
    return [total / total.sum() for total in totals]


def _routing(values: tuple[Any, ...], experts: Mixtures, asked: str) -> tuple[Tensor, Tensor]:
    """(tokens, chosen) indices and weights among what a module of experts is given."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim() == 2]
    index = next((one for one in tensors if not one.is_floating_point()), None)
    if index is not None:
        for weights in tensors:
            if (
                weights.is_floating_point()
                and weights.shape[0] == len(index)
                and weights.shape[1] in (index.shape[1], experts.count)
            ):
                return index, weights
    raise CompressionError(
        f"{asked}: the experts are not told which token goes to which, so their use can't be counted; possible are scores: "
        f"magnitude and random."
    )
