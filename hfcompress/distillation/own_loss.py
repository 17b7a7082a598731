"""The model's own loss: whether it is the plain one of its labels, or has class weights, focal or auxiliary parts.

A plain loss is computed anew from the logits: in float32, without padding, and as a sum that a whole accumulated batch divides.
Any other can't be computed here and is taken as the model gives it: the mean over its batch, times the labels of that batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.distillation.batch import Batch
from hfcompress.distillation.losses import IGNORED
from hfcompress.distillation.predictions import config_of, shifted_labels

CLOSE, CLOSE_SLOPES = 1e-4, 3e-2
"""Relative difference of two losses that are one, computed in different orders; of their gradients, in half precision."""


def balance(model: Any, output: Any) -> Tensor | None:
    """The auxiliary loss that keeps the experts of a mixture in use: its model adds it to the loss of the labels."""
    weight, found = getattr(config_of(model), "router_aux_loss_coef", None), getattr(output, "aux_loss", None)
    return weight * found if weight and isinstance(found, Tensor) else None


def task_loss(batch: Batch, plain: Tensor | None) -> Tensor:
    """The loss of the labels times their number. `plain`: by cross-entropy (binary, squared error); None without labels.

    CompressionError where neither the model nor its labels give one.
    """
    own = _own(batch)
    if own is None and plain is None:
        raise CompressionError(
            "distill: the model was given no labels (a loss function of the Trainer's own takes them away), so the "
            "task term can't mix in their loss; pass labels, or set alpha to 1 to learn from the teacher alone."
        )
    if own is None:
        return plain  # type: ignore[return-value]
    mine = batch.weights.sum()
    if plain is not None and (not mine or _is_plain(own, plain / mine, batch)):
        return plain
    if not own.requires_grad:
        raise CompressionError(
            f"distill: the loss of {type(batch.model).__name__} is not that of its labels alone, and has no gradient to "
            f"learn by; compute it without detach, or set alpha to 1 to learn from the teacher alone."
        )
    return own.float() * (mine if batch.total is None else _counted(batch))


def _own(batch: Batch) -> Tensor | None:
    """What the model's forward gave as its loss, the mean over its batch, without the balance of experts."""
    loss = getattr(batch.output, "loss", None)
    if not isinstance(loss, Tensor):
        return None
    if loss.numel() != 1:
        raise CompressionError(
            f"distill: the loss of {type(batch.model).__name__} has shape {tuple(loss.shape)}, and a task term needs the mean "
            f"over the batch; return the mean."
        )
    auxiliary = balance(batch.model, batch.output)
    return loss.reshape(()) if auxiliary is None else loss.reshape(()) - auxiliary.to(loss.device)


def _is_plain(own: Tensor, plain: Tensor, batch: Batch) -> bool:
    is_half = own.dtype in (torch.float16, torch.bfloat16)
    if not is_half and _same(own, plain):
        return True
    logits = [getattr(batch.output, one.field) for one in batch.predictions]
    alone = [one.detach().to(own.dtype).requires_grad_(is_half) for one in logits]
    stock = _stock(batch, alone)
    if stock is None or not _same(own, stock):
        return False
    if not is_half or not own.requires_grad:
        return True
    # One bit of half precision hides a difference of a hundredth: slopes tell.
    mine = torch.autograd.grad(own, logits, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(stock, alone)
    return all(
        a is not None and (a.float() - b.float()).norm() <= CLOSE_SLOPES * b.float().norm()
        for a, b in zip(mine, theirs, strict=True)
    )


def _same(own: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(own.detach().float(), other.detach().float(), rtol=CLOSE, atol=1e-6, equal_nan=True))


def _stock(batch: Batch, logits: list[Tensor]) -> Tensor | None:
    """What transformers' heads give for these logits: in their precision, and with a say for padding, in which answers may
    start, and which, on the left, predicts a first token."""
    first = batch.predictions[0]
    if first.field == "start_logits":
        length, count = logits[0].shape[1], len(logits[0])
        ends = [batch.inputs[f"{end}_positions"].reshape(count).clamp(0, length) for end in ("start", "end")]
        return torch.stack([F.cross_entropy(*one, ignore_index=length) for one in zip(logits, ends, strict=True)]).mean()
    labels = shifted_labels(batch.model, batch.inputs)
    if labels is None:
        return None
    if first.kind == "labels":
        return F.binary_cross_entropy_with_logits(logits[0], labels.to(logits[0].dtype))
    if first.kind == "values":
        return F.mse_loss(logits[0], labels.to(logits[0].dtype).reshape(logits[0].shape))
    return F.cross_entropy(logits[0].flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def _counted(batch: Batch) -> Tensor:
    """The labels of this batch, as the Trainer counts those of the whole accumulated one."""
    labels = shifted_labels(batch.model, batch.inputs)
    return batch.weights.sum() if labels is None else (labels != IGNORED).sum()
