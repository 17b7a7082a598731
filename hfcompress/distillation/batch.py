"""One training batch as student and teachers saw it: what the model was asked, what each answered, which rows count."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hfcompress.calibration.batches import foretells_next
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.distillation import losses
from hfcompress.distillation.losses import IGNORED, NEVER


@dataclass(frozen=True)
class Problem:
    """One thing a model answers: the class of an example or a token, labels that are each on or off, a number, a position."""

    answer: str
    """The field of the model's output: "logits", "start_logits"."""
    kind: Literal["classes", "labels", "values"]
    logits: Tensor
    """(B, C), or (B, T, C) where every position is answered for."""
    attended: Tensor
    """(B,) or (B, T), bool: rows that are not padding."""
    known: Tensor
    """The same shape: rows with a label; if there are no labels, those whose answer will be known."""
    labels: Tensor | None
    """As the rows of logits: shifted already where a model foretells the next token."""

    def rows(self, positions: str) -> Tensor:
        return self.attended if positions == "all" else self.known

    def log_probs(self, logits: Tensor, temperature: float) -> Tensor:
        """(N, C) -> (N, C), or (N, C, 2) where labels are on or off."""
        return (losses.log_odds if self.kind == "labels" else losses.log_probs)(logits, temperature)


@dataclass(frozen=True)
class Recorded:
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
class Related:
    """Queries, keys and values of a student and one teacher: layer to kind to (B, T, H)."""

    student: dict[int, dict[str, Tensor]]
    teacher: dict[int, dict[str, Tensor]]
    layers: tuple[int, int]
    heads: int
    """The teacher's attention heads."""


@dataclass(frozen=True)
class Lesson:
    inputs: dict[str, Any]
    student: Any
    """The student's output."""
    teachers: list[Any]
    """The teachers' outputs, their classes in the student's order; none if `recorded`."""
    problems: list[Problem]
    weights: Tensor
    """(B,): how much each example counts, which is how many labels it has, or 1 where there are none."""
    temperature: float
    is_encoder_decoder: bool
    project: Callable[[str, Tensor, int], Tensor]
    """(name, (N, H), width) -> (N, width): a learned projection of that name where widths differ."""
    recorded: Recorded | None = None
    relations: list[Related] = field(default_factory=list)

    def mean(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean of parts, each the sum over examples of (its weight) * (mean of its rows' values), not yet divided by the
        weights of all examples: the same however a batch is cut, padded, or spread over processes."""
        totals = []
        for values, rows in parts:
            if rows.dim() == 1:
                each = self.weights[rows]
            else:
                share = self.weights / rows.sum(dim=1).clamp_min(1)
                each = share[:, None].expand(rows.shape)[rows]
            totals.append((values * each).sum())
        return torch.stack(totals).mean()

    def logits(self, problem: Problem, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(student's, mean of the teachers') answers on these rows, (N, C) each, over the classes both have."""
        theirs = self._teachers(problem, rows)
        return problem.logits[rows][..., : theirs[0].shape[-1]], torch.stack([one.float() for one in theirs]).mean(dim=0)

    def log_probs(self, problem: Problem, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(student's, teachers') distributions on these rows, as log-probabilities. Teachers are averaged as probabilities."""
        if self.recorded is not None and self.recorded.index is not None:
            kept = rows[self.recorded.rows]
            mine = problem.log_probs(problem.logits[rows], temperature)
            return losses.bucketed(mine, self.recorded.index[kept]), self.recorded.log_probs[temperature][kept]
        theirs = self._teachers(problem, rows)
        mine = problem.log_probs(problem.logits[rows][..., : theirs[0].shape[-1]], temperature)
        return mine, losses.mean_probs([problem.log_probs(one, temperature) for one in theirs])

    def _teachers(self, problem: Problem, rows: Tensor) -> list[Tensor]:
        if self.recorded is not None:
            kept = rows[self.recorded.rows]
            return common([one[kept] for one in self.recorded.logits])
        found = [getattr(teacher, problem.answer) for teacher in self.teachers]
        if problem.answer != "logits":
            found = [hide_padding(one, self.inputs) for one in found]
        if found[0].shape[: rows.dim()] != rows.shape:
            raise CompressionError(
                f"distill: the teacher answers for {tuple(found[0].shape[: rows.dim()])} rows and the student for "
                f"{tuple(rows.shape)}; take a teacher that cuts its input into the same positions."
            )
        return common([one[rows] for one in found])

    def positions(self, stack: str, length: int) -> Tensor:
        """(B, length), bool: which positions of a stack are not padding."""
        problem = self.problems[0]
        if self.is_encoder_decoder and stack == "decoder":
            given: Any = problem.attended if problem.attended.dim() == 2 else self.inputs.get("decoder_attention_mask")
            if given is None and problem.attended.dim() == 1:  # classifiers show the decoder the same text
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


def hide_padding(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    """(B, T) logits over positions, where padding can't be chosen."""
    mask = inputs.get("attention_mask")
    return logits if mask is None else logits.float().masked_fill(~mask.bool(), NEVER)


def problems(model: Any, inputs: dict[str, Any], output: Any) -> tuple[list[Problem], Tensor]:
    """What the model was asked, and how much each example counts, (B,). CompressionError for heads without classes."""
    if getattr(output, "start_logits", None) is not None and getattr(output, "end_logits", None) is not None:
        return _spans(inputs, output)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise CompressionError(
            f"distill: {type(model).__name__} answers with no logits of examples or tokens; possible are classifiers of texts, "
            f"tokens, images and sounds, language models and question answering."
        )
    labels = inputs.get("labels")
    if logits.dim() == 2:
        return _examples(model, logits, labels)
    return _tokens(model, inputs, logits, labels)


def _examples(model: Any, logits: Tensor, labels: Tensor | None) -> tuple[list[Problem], Tensor]:
    everyone = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    told = getattr(model.config, "problem_type", None)
    if told == "regression" or (told is None and logits.shape[-1] == 1):
        kind: Any = "values"
    elif told == "multi_label_classification" or (told is None and labels is not None and labels.is_floating_point()):
        kind = "labels"
    else:
        kind = "classes"
    if labels is not None and kind == "classes":
        labels = labels.reshape(len(logits))  # (B, 1) will do for the models too
    known = everyone if labels is None or kind != "classes" else labels != IGNORED
    # The Trainer counts every label of an example that has several.
    worth = 1 if labels is None else labels[0].numel()
    problem = Problem("logits", kind, logits, everyone, known, labels)
    return [problem], known.float() * worth


def _tokens(model: Any, inputs: dict[str, Any], logits: Tensor, labels: Tensor | None) -> tuple[list[Problem], Tensor]:
    shift, shifted = foretells_next(model), inputs.get("shift_labels")
    if labels is not None and labels.shape != logits.shape[:2]:
        raise CompressionError(
            f"distill: {type(model).__name__} answers for {tuple(logits.shape[:2])} positions and has labels for "
            f"{tuple(labels.shape)}; possible are models with a label a position, which CTC models don't have."
        )
    mask = inputs.get("attention_mask")
    is_decoder = model.config.is_encoder_decoder
    if is_decoder:
        attended = labels != IGNORED if labels is not None else inputs.get("decoder_attention_mask")
    else:
        attended = mask
    if not isinstance(attended, Tensor) or attended.shape != logits.shape[:2]:
        attended = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    attended = attended.bool()
    if shift and labels is not None and shifted is None:
        shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    labels = shifted if shift and shifted is not None else labels
    if labels is not None:
        known = labels != IGNORED
    else:
        known = F.pad(attended, (0, 1))[:, 1:] if shift else attended
    if shift:
        known = known & attended  # padding on the left foretells the first token, and knows nothing
    weights = known.sum(dim=1).float() if labels is not None else torch.ones(len(logits), device=logits.device)
    return [Problem("logits", "classes", logits, attended, known, labels)], weights


def _spans(inputs: dict[str, Any], output: Any) -> tuple[list[Problem], Tensor]:
    """Start and end of an answer: each a choice among the positions. Padding can't be chosen."""
    found = []
    for end in ("start", "end"):
        logits = hide_padding(getattr(output, f"{end}_logits"), inputs)
        everyone = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        labels, known = inputs.get(f"{end}_positions"), everyone
        if labels is not None:
            labels = labels.reshape(len(logits))
            known = (labels >= 0) & (labels < logits.shape[1])  # an answer that was cut away has no position here
        found.append(Problem(f"{end}_logits", "classes", logits, everyone, known, labels))
    return found, torch.ones(len(found[0].logits), device=found[0].logits.device)
