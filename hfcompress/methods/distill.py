from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import transformers
from pydantic import Field, field_serializer
from torch import Tensor, nn

from hfcompress.errors import CompressionError
from hfcompress.losses import cross_entropy, items, kl
from hfcompress.methods.base import Method, Tick


class Distill(Method):
    """Learn from a teacher's soft targets beside the labels: alpha * T^2 KL + (1 - alpha) * task loss.

    Needs: training around it, and a teacher with the same labels or vocabulary.
    Buys: what pruning, factoring or fewer layers cost, in part or whole (docs/quickstart.md has it measured).
    Costs: the teacher's forward pass at every step.
    Paper: Hinton et al. 2015 (arXiv 1503.02531); Sanh et al. 2019, DistilBERT (arXiv 1910.01108)
    """

    needs_training: ClassVar[bool] = True
    replaces_loss: ClassVar[bool] = True

    teacher: Any = Field(
        "original",
        description="original: the model before its first compressing step; a path or Hub id; or, in Python, a model.",
    )
    temperature: float = Field(2.0, gt=0, description="Softens both distributions.")
    alpha: float = Field(0.7, ge=0, le=1, description="Weight of the soft targets; the task loss gets the rest.")

    @field_serializer("teacher")
    def _name_of_teacher(self, teacher: Any) -> str:
        return teacher if isinstance(teacher, str) else type(teacher).__name__

    @property
    def wants_original(self) -> bool:
        return isinstance(self.teacher, str) and self.teacher == "original"

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        # The teacher lives in this frame, not in the model: no checkpoint, optimizer or train() can reach it.
        teacher = self._teacher(model, task)
        _check_kind(model)
        columns = _fitting(model, teacher)
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        teacher.eval()

        def distilled(student: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if student.training and torch.is_grad_enabled():
                given = _by_name(student, args, kwargs)
                # An encoder-decoder makes its decoder's inputs of the labels.
                left_out = {"num_items_in_batch"} | (set() if student.config.is_encoder_decoder else {"labels"})
                teacher.to(output.logits.device)
                with torch.no_grad():
                    soft = teacher(**{key: value for key, value in given.items() if key not in left_out}).logits
                output.loss = self._loss(student, given, output, soft if columns is None else soft[..., columns])
            return output

        handle = model.register_forward_hook(distilled, with_kwargs=True)
        try:
            yield None
        finally:
            handle.remove()

    def _teacher(self, model: nn.Module, task: Any) -> nn.Module:
        if isinstance(self.teacher, nn.Module):
            return self.teacher
        if self.teacher == "original":
            return task.original  # the drivers keep it, before any method has touched the model
        if hasattr(task, "load_model"):
            return task.load_model(self.teacher)
        head = type(model).__name__.rpartition("For")[2] if "For" in type(model).__name__ else "CausalLM"
        auto = getattr(transformers, f"AutoModelFor{head}", transformers.AutoModelForCausalLM)
        try:
            return auto.from_pretrained(self.teacher)
        except (OSError, ValueError) as error:
            raise CompressionError(
                f"distill: teacher {self.teacher!r} can't be loaded: {error}; give 'original', a folder, a Hub id or a model."
            ) from error

    def _loss(self, student: Any, kwargs: dict[str, Any], output: Any, soft: Tensor) -> Tensor:
        """The mixed loss, divided by the items of the whole accumulated batch where the Trainer counted them.

        With `num_items_in_batch` the Trainer does not divide by the accumulation steps; without, it does.
        """
        labels, shift = kwargs.get("labels"), _predicts_next(student)
        logits, chosen = items(output.logits, labels, kwargs.get("attention_mask"), shift)
        teacher_logits = soft if soft.dim() == 2 else soft[chosen]
        mean = 1 / max(1, len(logits))
        total = kwargs.get("num_items_in_batch")
        share = mean if total is None else 1 / total
        loss = kl(logits, teacher_logits, self.temperature).sum() * share
        if self.alpha == 1:
            return loss
        if labels is None:
            raise CompressionError(
                f"distill: the model was given no labels (a loss function of the Trainer's own takes them away), so alpha "
                f"{self.alpha} can't mix in their loss; pass labels, or set alpha to 1 to learn from the teacher alone."
            )
        ahead = torch.cat([labels[:, 1:], labels[:, :1]], dim=1) if shift else labels
        own = cross_entropy(logits, ahead[chosen].long()).sum()
        return self.alpha * loss + (1 - self.alpha) * own * share


def _by_name(student: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the student was called with, positional arguments by their names."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(student.forward).parameters if name != "self"]
    return dict(zip(names, args, strict=False)) | kwargs


def _check_kind(model: Any) -> None:
    """Soft targets are classes: one of several, for an example or a token."""
    name, problem = type(model).__name__, getattr(model.config, "problem_type", None)
    if "QuestionAnswering" in name:
        raise CompressionError(
            f"distill: {name} points at a start and an end and has no classes; possible are classifiers and language models."
        )
    if "ForSequenceClassification" in name and (
        model.config.num_labels == 1 or problem in ("regression", "multi_label_classification")
    ):
        raise CompressionError(
            f"distill: soft targets need one label of several, and this {name} has {problem or 'regression'}; "
            f"train it without distill, or on labels of which one is right."
        )


def _predicts_next(model: Any) -> bool:
    name = type(model).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) and not model.config.is_encoder_decoder


def _fitting(model: Any, teacher: Any) -> Tensor | None:
    """Columns that put the teacher's classes in the student's order, or None if they already are."""
    if "ForSequenceClassification" in type(model).__name__ or "ForTokenClassification" in type(model).__name__:
        mine, theirs = model.config.label2id, teacher.config.label2id
        if set(mine) != set(theirs):
            raise CompressionError(
                f"distill: the teacher's labels {sorted(theirs)} are not the student's {sorted(mine)}; "
                f"take a teacher that was trained on the same labels."
            )
        by_id = sorted(mine, key=mine.__getitem__)
        columns = torch.tensor([theirs[label] for label in by_id])
        return None if columns.tolist() == list(range(len(columns))) else columns
    mine, theirs = model.config.vocab_size, teacher.config.vocab_size
    if theirs < mine:
        raise CompressionError(
            f"distill: the teacher's vocabulary has {theirs} tokens and the student's {mine}; "
            f"take a teacher with the same tokenizer."
        )
    return None if theirs == mine else torch.arange(mine)
