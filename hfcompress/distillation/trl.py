"""TRL's SFTTrainer asks the model for a fused head: log-probabilities of the labels, and no logits to distil from.

`unfused` asks for logits instead, and `as_fused` gives TRL back what it reads, such that the loss it sums up is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfcompress.distillation.predictions import Prediction

ASKED = "fused_lm_head"


def unfused(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, ASKED: False} if ASKED in inputs else inputs


def as_fused(output: Any, prediction: Prediction, total: Tensor) -> None:
    """Write per-token fields into the output, (B, T - 1): TRL's loss, minus the sum of `log_probs` over the number of labels
    of the whole accumulated batch, is then `total` over it. Entropy and accuracy are those of the student's own logits."""
    mask = prediction.known[:, :-1]
    with torch.no_grad():
        logs = torch.log_softmax(prediction.logits[:, :-1][mask].float(), dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1)
        is_top1 = logs.argmax(dim=-1) == prediction.labels[:, :-1][mask]  # type: ignore[index]

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)

    each = -total / mask.sum().clamp_min(1)
    output["log_probs"] = spread(each.expand(int(mask.sum())))
    output["entropy"], output["is_top1"], output["label_mask"] = spread(entropy), spread(is_top1), mask
