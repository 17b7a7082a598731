"""What a model answers to each example to score on, as columns of numbers that metrics and paired comparisons read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfcompress.calibration.progress import progress

Decision = dict[str, np.ndarray]
"""Of one example: `predictions`, `references` (one a decision), and `nll`, `tokens` (one, for the example)."""


def answers(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], total: int, counted: Callable, said: Callable, decide: Callable
) -> list[Decision]:
    """What `decide` makes of each example's logits and labels. The model answers in eval mode, and is left as it was.

    `counted`: a batch without labels -> what stands in their place. `said`: an output -> its logits.
    """
    modes = [(module, module.training) for module in model.modules()]
    rows: list[Decision] = []
    model.eval()
    try:
        for batch in progress(batches, what="scoring", total=total):
            labels = batch.pop("labels", None)
            labels = counted(batch) if labels is None else labels
            with torch.no_grad():
                logits = said(model(**batch))
                labels = labels.to(logits.device)  # the last of a model's layers may be on another device than its first
                rows.extend(decide(row, label) for row, label in zip(logits, labels, strict=True))
    finally:
        for module, mode in modes:  # not model.train(): some modules may have been frozen in eval mode
            module.training = mode
    return rows


def in_order(rows: list[Decision], order: np.ndarray) -> dict[str, np.ndarray]:
    """The decisions as columns, in the order of the data: row `i` is of example `order[i]`."""
    back = np.argsort(order)
    return {name: np.concatenate([rows[index][name] for index in back]) for name in rows[0]}


def decide_one(logits: Tensor, labels: Tensor) -> Decision:
    """One of the classes, for each label that is not -100. The log-softmax is in float32, and a row at a time, or a large
    vocabulary would not fit."""
    known = labels != -100
    logits, labels = logits[known].float(), labels[known]
    total = F.cross_entropy(logits, labels, reduction="sum").cpu().double()  # not all accelerators have doubles
    return {
        "predictions": logits.argmax(-1).cpu().numpy(),
        "references": labels.cpu().numpy(),
        # a short text may have nothing to foretell; a mean over nothing would spoil the others'
        "nll": (total / max(1, len(labels))).reshape(1).numpy(),
        "tokens": np.array([len(labels)]),
    }


def decide_each(logits: Tensor, labels: Tensor) -> Decision:
    """Of each of several labels, (labels,), whether it holds: where its probability is above a half. `labels` numbers them."""
    logits, truth = logits.float(), labels.float()
    loss = F.binary_cross_entropy_with_logits(logits, truth).cpu().double()
    return {
        "predictions": (logits > 0).long().cpu().numpy(),
        "references": truth.long().cpu().numpy(),
        "labels": np.arange(len(logits)),
        "nll": loss.reshape(1).numpy(),
        "tokens": np.array([len(logits)]),
    }


def decide_value(logits: Tensor, labels: Tensor) -> Decision:
    """The number, or numbers, that a head without classes tells; `nll` is the squared error."""
    values, truth = logits.float().reshape(-1), labels.float().reshape(-1)
    return {
        "predictions": values.cpu().numpy(),
        "references": truth.cpu().numpy(),
        "nll": (values - truth).square().mean().cpu().double().reshape(1).numpy(),
        "tokens": np.array([len(values)]),
    }


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go: its first parameter that is anywhere, as others may lie on the disk until they are needed."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def rows_of(data: Any, indices: Any, size: int, collator: Any, device: torch.device) -> Iterable[dict[str, Tensor]]:
    """These examples of a dataset, in batches on a device."""
    for start in range(0, len(indices), size):
        batch = collator([data[int(index)] for index in indices[start : start + size]])
        yield {name: tensor.to(device) for name, tensor in batch.items()}
