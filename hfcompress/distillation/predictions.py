"""Logits, labels and masks of one forward pass: what a model predicts, and which rows of it count in a loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from hfcompress.calibration.batches import foretells_next
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.sentence_head import sentence_head_of
from hfcompress.distillation import losses
from hfcompress.distillation.losses import IGNORED, NEVER


@dataclass(frozen=True)
class Prediction:
    """One thing a model tells: the class of an example or a token, labels that are each on or off, a number, a position, an
    embedding."""

    field: str
    """The field of the model's output: "logits", "start_logits"."""
    kind: Literal["classes", "labels", "values", "embeddings"]
    logits: Tensor
    """(B, C), or (B, T, C) where every position is predicted for."""
    attended: Tensor
    """(B,) or (B, T), bool: rows that are not padding."""
    known: Tensor
    """The same shape: rows with a label; if there are no labels, those whose label will be known."""
    labels: Tensor | None
    """As the rows of logits: shifted already where a model predicts the next token."""
    weights: Tensor
    """(B,): how much each example counts, which is how many labels it has, or 1 where there are none."""

    def rows(self, positions: str) -> Tensor:
        return self.attended if positions == "all" else self.known

    def log_probs(self, logits: Tensor, temperature: float) -> Tensor:
        """(N, C) -> (N, C), or (N, C, 2) where labels are on or off."""
        return (losses.log_odds if self.kind == "labels" else losses.log_probs)(logits, temperature)


def config_of(model: Any) -> Any:
    """A model's config; an empty one for a plain nn.Module."""
    return getattr(model, "config", None) or SimpleNamespace()


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


def by_name(output: Any) -> Any:
    """A model's output with its fields as attributes: a plain nn.Module may return a dict, a teacher its logits alone."""
    if isinstance(output, Tensor):
        return SimpleNamespace(logits=output)
    return SimpleNamespace(**output) if isinstance(output, dict) and not isinstance(output, ModelOutput) else output


def put_loss(output: Any, loss: Tensor) -> None:
    if isinstance(output, dict) and not isinstance(output, ModelOutput):
        output["loss"] = loss
    else:
        output.loss = loss


def check_output(model: Any, output: Any) -> None:
    """CompressionError unless a loss can be put into it, for whoever trains to find."""
    if isinstance(output, Tensor | tuple | list):
        raise CompressionError(
            f"distill: {type(model).__name__} returns a {type(output).__name__}, and its loss is put into a field of "
            f"the output; return a dict or a ModelOutput with logits, and train on its loss."
        )


def hide_padding(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    """(B, T) logits over positions, where padding can't be chosen."""
    mask = _mask_of(logits, inputs)
    return logits if mask is None else logits.float().masked_fill(~mask, NEVER)


def _mask_of(logits: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == logits.shape else None


def predictions(model: Any, inputs: dict[str, Any], output: Any) -> tuple[list[Prediction], Tensor]:
    """What the model predicts, and how much each example counts, (B,). CompressionError for heads without classes."""
    if getattr(output, "start_logits", None) is not None and getattr(output, "end_logits", None) is not None:
        return _spans(inputs, output)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise CompressionError(
            f"distill: {type(model).__name__} answers with no logits of examples or tokens; possible are classifiers of texts, "
            f"tokens, images and sounds, language models and question answering."
        )
    labels = inputs.get("labels")
    found = _examples(model, logits, labels) if logits.dim() == 2 else _tokens(model, inputs, logits, labels)
    return [found], found.weights


def _examples(model: Any, logits: Tensor, labels: Tensor | None) -> Prediction:
    everyone = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    problem = getattr(config_of(model), "problem_type", None)
    if sentence_head_of(model) is not None:
        return Prediction("logits", "embeddings", logits, everyone, everyone, None, everyone.float())
    if problem == "regression" or (problem is None and logits.shape[-1] == 1):
        kind: Any = "values"
    elif problem == "multi_label_classification" or (problem is None and labels is not None and labels.is_floating_point()):
        kind = "labels"
    else:
        kind = "classes"
    if labels is not None and kind == "classes":
        labels = labels.reshape(len(logits))  # (B, 1) will do for the models too
    known = everyone if labels is None or kind != "classes" else labels != IGNORED
    # The Trainer counts every label of an example that has several.
    each = 1 if labels is None else labels[0].numel()
    return Prediction("logits", kind, logits, everyone, known, labels, known.float() * each)


def _tokens(model: Any, inputs: dict[str, Any], logits: Tensor, labels: Tensor | None) -> Prediction:
    shift = predicts_next(model)
    if labels is not None and labels.shape != logits.shape[:2]:
        raise CompressionError(
            f"distill: {type(model).__name__} answers for {tuple(logits.shape[:2])} positions and has labels for "
            f"{tuple(labels.shape)}; possible are models with a label a position, which CTC models don't have."
        )
    mask = inputs.get("attention_mask")
    if is_encoder_decoder(model):
        attended = labels != IGNORED if labels is not None else inputs.get("decoder_attention_mask")
    else:
        attended = mask
    if not isinstance(attended, Tensor) or attended.shape != logits.shape[:2]:
        attended = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    attended = attended.bool()
    labels = shifted_labels(model, inputs)
    if labels is not None:
        known = labels != IGNORED
    else:
        known = F.pad(attended, (0, 1))[:, 1:] if shift else attended
    if shift:
        known = known & attended  # padding on the left predicts the first token, and knows nothing
    weights = known.sum(dim=1).float() if labels is not None else torch.ones(len(logits), device=logits.device)
    return Prediction("logits", "classes", logits, attended, known, labels, weights)


def predicts_next(model: Any) -> bool:
    return hasattr(model, "config") and foretells_next(model)


def shifted_labels(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """(B, T): the labels, each at the position that predicts it."""
    labels = inputs.get("labels")
    if not predicts_next(model):
        return labels
    shifted = inputs.get("shift_labels")
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shifted is None and labels is not None else shifted


def _spans(inputs: dict[str, Any], output: Any) -> tuple[list[Prediction], Tensor]:
    """Start and end of an answer: each a choice among the positions, of which padding can't be chosen.

    An answer that was cut away has a label past the end, or in the padding. Models ignore it and divide by the labels that are
    left, of the starts and of the ends apart; `weights` have every term do so.
    """
    found = []
    for end in ("start", "end"):
        logits = hide_padding(getattr(output, f"{end}_logits"), inputs)
        everyone = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        labels, known = inputs.get(f"{end}_positions"), everyone
        if labels is not None:
            labels = labels.reshape(len(logits))
            known = _is_position(logits, labels, inputs)
        found.append(Prediction(f"{end}_logits", "classes", logits, everyone, known, labels, known.float()))
    weights = (found[0].known | found[1].known).float()
    return [replace(one, weights=one.weights * weights.sum() / one.weights.sum().clamp_min(1)) for one in found], weights


def _is_position(logits: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    """(B,), bool: which labels are a position of their text."""
    inside, mask = (labels >= 0) & (labels < logits.shape[1]), _mask_of(logits, inputs)
    return inside if mask is None else inside & mask.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
