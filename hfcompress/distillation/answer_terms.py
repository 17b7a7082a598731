"""Terms on what models answer: soft targets, logits, embeddings, and the task's own loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from hfcompress.distillation import losses
from hfcompress.distillation.base import Parts, Term
from hfcompress.distillation.batch import Batch
from hfcompress.distillation.own_loss import task_loss


class Task(Term):
    """The loss of the labels, without the teacher: the model's own where it has one (class weights, focal, auxiliary parts),
    else cross-entropy, binary if labels are on or off, squared error of numbers. A model's own loss is taken as the
    mean over its batch; accumulated batches are weighted by their labels."""

    key = "task"
    needs = "labels"

    def total(self, batch: Batch) -> Tensor:
        return task_loss(batch, None if batch.predictions[0].labels is None else super().total(batch))

    def parts(self, batch: Batch) -> Parts:
        for prediction in batch.predictions:
            rows, labels = prediction.known, prediction.labels
            logits, labels = prediction.logits[rows], labels[rows]  # type: ignore[index]
            if prediction.kind == "classes":
                values = losses.cross_entropy(logits, labels)
            elif prediction.kind == "labels":
                values = losses.binary_cross_entropy(logits, labels)
            else:
                values = losses.mse(logits, labels.reshape(logits.shape))
            yield values, rows, prediction.weights


class SoftTargets(Term):
    """What terms on the teacher's answers share: a temperature, and which positions count."""

    needs = "logits"

    temperature: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Softens both distributions; distill's own if absent."
    )
    positions: Literal["labels", "all"] = Field(
        default="labels", description="Token tasks: the positions that have a label, or all that are not padding."
    )

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError

    def parts(self, batch: Batch) -> Parts:
        temperature = self.temperature or batch.temperature
        for prediction in batch.predictions:
            rows = prediction.rows(self.positions)
            values = self.divergence(*batch.log_probs(prediction, rows, temperature))
            values = values.flatten(1).mean(dim=1) if values.dim() > 1 else values
            yield losses.scaled(values, temperature), rows, prediction.weights


class KL(SoftTargets):
    __doc__ = losses.kl.__doc__
    key, divergence = "kl", staticmethod(losses.kl)


class SoftCrossEntropy(SoftTargets):
    __doc__ = losses.soft_cross_entropy.__doc__
    key, divergence = "soft_cross_entropy", staticmethod(losses.soft_cross_entropy)


class ReverseKL(SoftTargets):
    __doc__ = losses.reverse_kl.__doc__
    key, divergence = "reverse_kl", staticmethod(losses.reverse_kl)


class JensenShannon(SoftTargets):
    __doc__ = losses.jensen_shannon.__doc__
    key = "jensen_shannon"

    beta: float = Field(default=0.5, gt=0, lt=1, description="The teacher's share in the mixture both are compared with.")

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.jensen_shannon(student, teacher, self.beta)


class SkewedKL(SoftTargets):
    __doc__ = losses.skewed_kl.__doc__
    key = "skewed_kl"

    skew: float = Field(default=0.1, ge=0, lt=1, description="The teacher's share in what it is compared with.")

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.skewed_kl(student, teacher, self.skew)


class LogitsMSE(Term):
    """Squared difference of the logits, mean over classes (Ba and Caruana 2014, arXiv 1312.6184). Zero in agreement; unlike
    soft targets it also matches what all logits have in common. Fits numbers (regression) too."""

    key = "logits_mse"
    needs = "logits"

    positions: Literal["labels", "all"] = Field(default="labels", description=SoftTargets.model_fields["positions"].description)

    def parts(self, batch: Batch) -> Parts:
        for prediction in batch.predictions:
            rows = prediction.rows(self.positions)
            student, teacher = batch.logits(prediction, rows)
            possible = (student > losses.NEVER).sum(dim=-1)  # answers can't lie in the padding
            yield losses.mse(student, teacher) * student.shape[-1] / possible, rows, prediction.weights


class Embedding(Term):
    """1 - cosine of the embeddings of texts; Reimers and Gurevych 2020 (arXiv 2004.09813) take their squared difference. Zero
    where both point the same way, whatever their length. Needs no labels."""

    key = "embedding"
    needs = "logits"

    def parts(self, batch: Batch) -> Parts:
        for prediction in batch.predictions:
            rows = prediction.rows("all")
            yield losses.cosine(*batch.logits(prediction, rows)), rows, prediction.weights
