"""Terms on inner layers: hidden states, attention maps, relations."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.distillation import losses
from hfcompress.distillation.base import Parts, Term
from hfcompress.distillation.batch import Batch
from hfcompress.distillation.predictions import is_encoder_decoder


class Layers(Term):
    """What terms on inner layers share: which of the student's layers learn from which of the teacher's."""

    layers: Literal["last", "even"] | dict[int, int] = Field(
        default="last",
        description="last: the last from the last; even: spread over the teacher's, the last included; "
        "or student layer: teacher layer, counted from 0.",
    )
    stack: Literal["encoder", "decoder"] = Field(default="decoder", description="Of an encoder-decoder: which of its stacks.")

    @field_validator("layers")
    @classmethod
    def _some(cls, given: Any) -> Any:
        if given == {}:
            raise ValueError("no layers are named; write student layer: teacher layer, or even, or last")
        return given

    def pairs(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """(student's layer, teacher's layer) of stacks that have so many."""
        if self.layers == "last":
            return [(student - 1, teacher - 1)]
        if self.layers == "even":
            return [(layer, round((layer + 1) * teacher / student) - 1) for layer in range(student)]
        for mine, theirs in self.layers.items():
            if not (0 <= mine < student and 0 <= theirs < teacher):
                raise CompressionError(
                    f"distill: {self.key}: layers {mine}: {theirs}, but the student has layers 0 to {student - 1} and the "
                    f"teacher 0 to {teacher - 1}; choose among these, or write layers: even."
                )
        return sorted(self.layers.items())

    def states(self, output: Any, batch: Batch) -> tuple[Tensor, ...]:
        """The tuple of hidden states or attention maps that an output holds."""
        name = f"{self.stack}_{self.needs}" if is_encoder_decoder(batch.model) else self.needs
        found = getattr(output, name, None)
        if not found or found[0] is None:
            raise CompressionError(
                f"distill: {self.key} needs {name}, and the model returned none; "
                f"take a term that does without, such as kl or relations."
            )
        return found


class _Hidden(Layers):
    needs = "hidden_states"

    embeddings: bool = Field(default=False, description="Compare what the embeddings give to the first layer as well.")

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError

    def parts(self, batch: Batch) -> Parts:
        mine = self.states(batch.output, batch)
        for number, teacher in enumerate(batch.teachers):
            theirs = self.states(teacher, batch)
            pairs = [(one + 1, other + 1) for one, other in self.pairs(len(mine) - 1, len(theirs) - 1)]
            for one, other in [(0, 0), *pairs] if self.embeddings else pairs:
                student, soft = mine[one], theirs[other]
                if student.shape[:-1] != soft.shape[:-1] or student.dim() != 3:
                    raise CompressionError(
                        f"distill: {self.key}: hidden states have shape {tuple(student.shape)} in the student and "
                        f"{tuple(soft.shape)} in the teacher, and only widths may differ; choose other layers or terms."
                    )
                rows = batch.positions(self.stack, student.shape[1])  # fewer from layer to layer in a pyramid
                fitted = batch.project(f"{self.key}.{number}.{one}.{other}", student[rows], soft.shape[-1])
                yield self.distance(fitted, soft[rows]), rows, batch.weights


class HiddenMSE(_Hidden):
    """Squared difference of hidden states, mean over features, through a learned projection where widths differ (Jiao et al.
    2019, TinyBERT, arXiv 1909.10351, equations 8 and 9). Zero in agreement."""

    key = "hidden_mse"

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.mse(student, teacher)


class HiddenCosine(_Hidden):
    """1 - cosine of hidden states, through a learned projection where widths differ (Sanh et al. 2019, DistilBERT, arXiv
    1910.01108, section 3). Zero where both point the same way."""

    key = "hidden_cosine"

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.cosine(student, teacher)


class _Maps(Layers):
    needs = "attentions"

    def distance(self, student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
        raise NotImplementedError

    def parts(self, batch: Batch) -> Parts:
        mine = self.states(batch.output, batch)
        for teacher in batch.teachers:
            theirs = self.states(teacher, batch)
            for one, other in self.pairs(len(mine), len(theirs)):
                if len(mine[one]) != len(batch.weights):
                    raise CompressionError(
                        f"distill: {self.key}: {len(mine[one])} attention maps for {len(batch.weights)} examples: this model "
                        f"attends within windows; take terms on hidden states, such as hidden_mse."
                    )
                if mine[one].shape != theirs[other].shape:
                    raise CompressionError(
                        f"distill: {self.key}: attention maps have {mine[one].shape[1]} heads in the student's layer {one} and "
                        f"{theirs[other].shape[1]} in the teacher's layer {other}; take relations, where heads may differ."
                    )
                rows = batch.positions(self.stack, mine[one].shape[-2])
                yield self.distance(mine[one], theirs[other], rows)[rows], rows, batch.weights


class AttentionMSE(_Maps):
    """Squared difference of attention maps, mean over heads and attended keys, for each query (after Jiao et al. 2019,
    TinyBERT, arXiv 1909.10351, equation 7, who fit the scores before the softmax). Zero in agreement. Needs eager attention."""

    key = "attention_mse"

    def distance(self, student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
        squared = (student.float() - teacher.float()).square().sum(dim=-1).mean(dim=1)
        return squared / keys.sum(dim=1, keepdim=True).clamp_min(1)


class AttentionKL(_Maps):
    """KL of attention maps, mean over heads, for each query (Wang et al. 2020, MiniLM, arXiv 2002.10957, equation 6). Zero,
    with zero gradient, in agreement. Needs eager attention."""

    key = "attention_kl"

    def distance(self, student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
        tiny = math.exp(-60.0)  # attended keys have more; masked ones are exactly 0
        return losses.kl(student.float().clamp_min(tiny).log(), teacher.float().clamp_min(tiny).log()).mean(dim=1)


class Relations(Layers):
    """KL of how alike positions are to each other in their queries, keys and values, mean over relation heads and kinds (Wang
    et al. 2020, MiniLMv2, arXiv 2012.15828). Zero, with zero gradient, in agreement. Widths and heads may differ; any attention
    implementation will do."""

    key = "relations"
    needs = "relations"

    heads: int | None = Field(
        default=None,
        ge=1,
        description="Relation heads; the most that fit both widths, up to the teacher's attention heads, if absent.",
    )
    of: tuple[Literal["query", "key", "value"], ...] = Field(
        default=("query", "key", "value"), min_length=1, description="Whose relations."
    )

    def parts(self, batch: Batch) -> Parts:
        for states in batch.relations:
            mine, theirs = states.student, states.teacher
            for one, other in self.pairs(*states.layers):
                for kind in self.of:
                    student, teacher = mine[one][kind], theirs[other][kind]
                    heads = self._heads(student.shape[-1], teacher.shape[-1], states.heads)
                    rows = batch.positions("encoder", student.shape[1])
                    logs = [losses.relations(vectors, heads, rows) for vectors in (student, teacher)]
                    yield losses.kl(*logs).mean(dim=1)[rows], rows, batch.weights

    def _heads(self, student: int, teacher: int, attention: int) -> int:
        heads = self.heads or math.gcd(student, teacher, attention)
        if student % heads or teacher % heads:
            raise CompressionError(
                f"distill: relations: {heads} heads don't divide the widths {student} (student) and {teacher} (teacher); "
                f"choose a divisor of {math.gcd(student, teacher)}."
            )
        return heads
