"""Losses of knowledge distillation: pure functions, one value an item, so that whoever sums them decides what to divide by.

Distributions come as log-probabilities (..., C) in float32, see `log_probs`; T^2 is the caller's to multiply, see `scaled`.
Each docstring tells the value where student and teacher agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
NEVER = -1e4
"""The log-probability of what can't happen: exp(NEVER) is exactly 0 in float32, and 0 * NEVER is 0, where 0 * -inf is not."""


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Softened classes, (..., C) -> (..., C), in float32."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def log_odds(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Labels that are each on or off, (..., C) -> (..., C, 2): so many distributions over two classes, in float32."""
    logits = logits.float() / temperature
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)


def mean_probs(several: list[Tensor]) -> Tensor:
    """The log of the mean of distributions given by their logs, all (..., C): an ensemble's answer (Hinton et al. 2015)."""
    return several[0] if len(several) == 1 else torch.stack(several).logsumexp(dim=0) - math.log(len(several))


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """-sum p log q, (..., C) -> (...). In agreement it is the teacher's entropy, with zero gradient: KL and a constant."""
    return -(teacher.exp() * student).sum(dim=-1)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), (..., C) -> (...). Zero, with zero gradient, in agreement. Covers every mode of the teacher."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), (..., C) -> (...). Zero, with zero gradient, in agreement. Seeks the teacher's main mode
    (Gu et al. 2023, MiniLLM, arXiv 2306.08543)."""
    return kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, p the teacher and 0 < beta < 1.

    (..., C) -> (...). Zero, with zero gradient, in agreement; never above log 2. Over beta it tends to KL as beta goes to 0,
    over 1 - beta to reverse KL as it goes to 1 (Agarwal et al. 2023, GKD, arXiv 2306.13649, equation 1).
    """
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(mixed, teacher) + (1 - beta) * kl(mixed, student)


def skewed_kl(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q), p the teacher and 0 <= skew < 1; (..., C) -> (...). Zero, with zero gradient, in
    agreement; never above log(1 / skew), so no token can blow up the gradient (Ko et al. 2024, DistiLLM, arXiv 2402.03898)."""
    if skew == 0:
        return kl(student, teacher)
    return kl(torch.logaddexp(teacher + math.log(skew), student + math.log1p(-skew)), teacher)


def scaled(value: Tensor, temperature: float) -> Tensor:
    """T^2 keeps the gradient's size when T changes (Hinton et al. 2015, arXiv 1503.02531, section 2.1)."""
    return temperature**2 * value


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the last dimension, (..., H) -> (...), in float32. Zero in agreement."""
    return (student.float() - teacher.float()).square().mean(dim=-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of the angle between them, (..., H) -> (...), in float32. Zero where they point the same way."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def relations(vectors: Tensor, heads: int, mask: Tensor) -> Tensor:
    """How alike each position is to every other, (B, T, H) -> (B, heads, T, T): log softmax of x x^T / sqrt(d).

    `mask` (B, T): positions that don't count are `NEVER` alike to any. The number of heads is free, so student and teacher may
    differ in width and in attention heads (Wang et al. 2020, MiniLMv2, arXiv 2012.15828, section 3.1).
    """
    parts = vectors.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    alike = parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])
    return F.log_softmax(alike.masked_fill(~mask[:, None, None, :], NEVER), dim=-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The task loss of single-label items, (N, C) and (N,) -> (N,), in float32."""
    return F.cross_entropy(logits.float(), labels.long(), reduction="none")


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The task loss of items with labels on or off, (N, C) and (N, C) -> (N,): the mean over labels, in float32."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(dim=-1)


def bucketed(logs: Tensor, index: Tensor) -> Tensor:
    """The k classes of `index`, and all others in one bucket: (N, C) and (N, k) -> (N, k + 1), still distributions.

    A divergence between two bucketed distributions is never more than between the whole ones (data processing inequality).
    """
    if index.shape[-1] == logs.shape[-1]:  # nothing is left for the bucket, and the log of nothing has no gradient
        return logs.gather(-1, index)
    rest = logs.scatter(-1, index, -torch.inf).logsumexp(dim=-1, keepdim=True).clamp_min(NEVER)
    return torch.cat([logs.gather(-1, index), rest], dim=-1)
