"""One training batch of a distillation: the outputs of student and teachers, and the mean of a loss over its examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.distillation import losses
from hfcompress.distillation.predictions import Prediction, config_of, hide_padding, is_encoder_decoder
from hfcompress.distillation.relations import RelationStates

Part = tuple[Tensor, Tensor, Tensor]
"""(values, rows, weights): a value for each of the rows that count, (N,); which these are, (B,) or (B, T), bool; and how much
each example counts, (B,)."""


@dataclass(frozen=True)
class CachedAnswers:
    """A batch's teacher answers from the cache, for the rows it was recorded for, in their order."""

    rows: Tensor
    """(B,) or (B, T), bool."""
    logits: list[Tensor] = field(default_factory=list)
    """Whole answers, (N, C) a teacher."""
    index: Tensor | None = None
    """Else the likeliest classes, (N, k), and ..."""
    log_probs: dict[float, Tensor] = field(default_factory=dict)
    """... a temperature to the log-probabilities of these and of all the rest, (N, k + 1)."""


@dataclass(frozen=True)
class Batch:
    model: Any
    """The student."""
    inputs: dict[str, Any]
    output: Any
    """The student's output."""
    teachers: list[Any]
    """The teachers' outputs, their classes in the student's order; none if `recorded`."""
    predictions: list[Prediction]
    weights: Tensor
    """(B,): how much each example counts, which is how many labels it has, or 1 where there are none."""
    temperature: float
    project: Callable[[str, Tensor, int], Tensor]
    """(name, (N, H), width) -> (N, width): a learned projection of that name where widths differ."""
    total: Any = None
    """The Trainer's count of labels in the whole accumulated batch, which the loss will be divided by; else its own."""
    recorded: CachedAnswers | None = None
    relations: list[RelationStates] = field(default_factory=list)

    def mean(self, parts: Iterable[Part]) -> Tensor:
        """The mean of parts, each the sum over examples of (its weight) * (mean of its rows' values), not yet divided by the
        weights of all examples: the same however a batch is cut, padded, or spread over processes."""
        totals = []
        for values, rows, weights in parts:
            if rows.dim() == 1:
                each = weights[rows]
            else:
                share = weights / rows.sum(dim=1).clamp_min(1)
                each = share[:, None].expand(rows.shape)[rows]
            totals.append((values * each).sum())
        return torch.stack(totals).mean()

    def logits(self, prediction: Prediction, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(student's, mean of the teachers') answers on these rows, (N, C) each, over the classes both have."""
        theirs = self._teachers(prediction, rows)
        width, other = prediction.logits.shape[-1], theirs[0].shape[-1]
        if prediction.kind == "embeddings" and other != width:
            raise CompressionError(
                f"distill: the teacher's embeddings are {other} wide and the student's {width}; take a teacher of the same "
                f"width."
            )
        return prediction.logits[rows][..., : theirs[0].shape[-1]], torch.stack([one.float() for one in theirs]).mean(dim=0)

    def log_probs(self, prediction: Prediction, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(student's, teachers') distributions on these rows, as log-probabilities. Teachers are averaged as probabilities."""
        if self.recorded is not None and self.recorded.index is not None:
            kept = rows[self.recorded.rows]
            mine = prediction.log_probs(prediction.logits[rows], temperature)
            return losses.bucketed(mine, self.recorded.index[kept]), self.recorded.log_probs[temperature][kept]
        theirs = self._teachers(prediction, rows)
        mine = prediction.log_probs(prediction.logits[rows][..., : theirs[0].shape[-1]], temperature)
        return mine, losses.mean_probs([prediction.log_probs(one, temperature) for one in theirs])

    def _teachers(self, prediction: Prediction, rows: Tensor) -> list[Tensor]:
        if self.recorded is not None:
            kept = rows[self.recorded.rows]
            return common([one[kept] for one in self.recorded.logits])
        found = [getattr(teacher, prediction.field, None) for teacher in self.teachers]
        for one in found:
            self._check(one, prediction, rows)
        if prediction.field != "logits":
            found = [hide_padding(one, self.inputs) for one in found]  # type: ignore[arg-type]
        return common([one[rows] for one in found])  # type: ignore[index]

    def _check(self, answer: Any, prediction: Prediction, rows: Tensor) -> None:
        """CompressionError unless a teacher's answer is one to the student's question."""
        if not isinstance(answer, Tensor):
            raise CompressionError(
                f"distill: the teacher returns no {prediction.field}, which the student has; take a teacher with the same head."
            )
        if answer.shape[: rows.dim()] != rows.shape:
            raise CompressionError(
                f"distill: the teacher answers for {tuple(answer.shape[: rows.dim()])} rows and the student for "
                f"{tuple(rows.shape)}; take a teacher that cuts its input into the same positions."
            )
        is_padded = prediction.logits.dim() == 3 and hasattr(config_of(self.model), "vocab_size")
        if not is_padded and answer.shape != prediction.logits.shape and prediction.kind != "embeddings":
            raise CompressionError(
                f"distill: the teacher answers with {answer.shape[-1]} classes and the student with "
                f"{prediction.logits.shape[-1]}; take a teacher that was trained on the same labels."
            )

    def positions(self, stack: str, length: int) -> Tensor:
        """(B, length), bool: which positions of a stack are not padding."""
        prediction = self.predictions[0]
        if is_encoder_decoder(self.model) and stack == "decoder":
            given: Any = prediction.attended if prediction.attended.dim() == 2 else self.inputs.get("decoder_attention_mask")
            if given is None and prediction.attended.dim() == 1:  # classifiers show the decoder the same text
                given = self.inputs.get("attention_mask")
        else:
            given = self.inputs.get("attention_mask")
        if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == length:
            return given.bool()
        # Images have no padding, and audio encoders halve the length of their mask.
        return torch.ones(len(self.weights), length, dtype=torch.bool, device=self.weights.device)


def common(answers: list[Tensor]) -> list[Tensor]:
    """The classes that all of several teachers have: vocabularies are padded to round sizes."""
    fewest = min(one.shape[-1] for one in answers)
    return [one[..., :fewest] for one in answers]
