"""Distillation losses: pure functions, one value an item, so that whoever sums them also decides what to divide by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def items(logits: Tensor, labels: Tensor | None, mask: Tensor | None, shift: bool) -> tuple[Tensor, Tensor]:
    """Which rows of the logits count. Returns (logits of the items (N, classes), where they were: a boolean mask).

    Classification: logits (B, C), every example counts. Tokens: logits (B, T, V), positions whose label is not -100 count;
    without labels, those of the attention mask. Causal models predict the next token, so `shift` drops the last position and
    looks at the label one ahead.
    """
    if logits.dim() == 2:
        chosen = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        return logits, chosen
    if labels is not None:
        chosen = labels != IGNORED
    elif mask is not None:
        chosen = mask.bool()
    else:
        chosen = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if shift:
        chosen = torch.cat([chosen[:, 1:], torch.zeros_like(chosen[:, :1])], dim=1)
    return logits[chosen], chosen


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of softened classes, (N, C) -> (N,), computed in float32.

    Zero, with zero gradient, when both agree. T^2 keeps the gradient's size when T changes (Hinton et al. 2015, arXiv
    1503.02531, section 2.1).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The task loss of single-label items, (N, C) and (N,) -> (N,), in float32."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
