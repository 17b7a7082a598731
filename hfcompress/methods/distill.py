from __future__ import annotations

import copy
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

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        # The teacher lives in this frame, not in the model: no checkpoint, optimizer or train() can reach it.
        teacher = self._teacher(model, task)
        columns = _fitting(model, teacher)
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        teacher.eval()

        def distilled(student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if student.training and torch.is_grad_enabled():
                inputs = {key: value for key, value in kwargs.items() if key not in ("labels", "num_items_in_batch")}
                teacher.to(output.logits.device)
                with torch.no_grad():
                    soft = teacher(*args, **inputs).logits
                output.loss = self._loss(student, kwargs, output, soft if columns is None else soft[..., columns])
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
            original = getattr(task, "original", None)
            return original if original is not None else copy.deepcopy(model)
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
        if labels is None or self.alpha == 1:
            return loss
        own = output.loss / mean  # of regression and several labels: the model's own mean, as a sum
        if output.logits.dim() == 3 or getattr(student.config, "problem_type", None) in (None, "single_label_classification"):
            ahead = torch.cat([labels[:, 1:], labels[:, :1]], dim=1) if shift else labels
            own = cross_entropy(logits, ahead[chosen].long()).sum()
        return self.alpha * loss + (1 - self.alpha) * own * share


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
