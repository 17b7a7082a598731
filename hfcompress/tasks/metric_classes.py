"""Metrics of the `evaluate` library, defined in code: its wheel ships no scripts, and `evaluate.load` needs the Hub."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

Columns = Mapping[str, np.ndarray]
"""What `Task.predict` gives."""


class OfflineMetric(evaluate.Metric):
    """A metric without a script and without files: what is added stays in memory.

    `columns`: name -> dtype of what `add_batch` wants; `higher_is_better` tells which way a drop goes.
    """

    columns: ClassVar[dict[str, str]] = {"predictions": "int64", "references": "int64"}
    higher_is_better: ClassVar[bool] = True

    @classmethod
    def parts(cls, columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
        """Of a metric that is told by a mean over examples: each example's sum, and its weight. None for others."""
        return None

    @classmethod
    def of_mean(cls, mean: float) -> float:
        """The metric of that mean."""
        return mean

    def __init__(self, **options: Any) -> None:
        # evaluate makes its folder even when it then keeps everything in memory
        with TemporaryDirectory(prefix="hfcompress-metric-") as folder:
            super().__init__(**{"seed": 0, **options, "keep_in_memory": True, "cache_dir": folder})

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value(dtype) for name, dtype in self.columns.items()})
        return evaluate.MetricInfo(description=type(self).__doc__ or "", citation="", inputs_description="", features=features)


class Accuracy(OfflineMetric):
    """Share of predictions that equal their reference, 0..1."""

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int], **_: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}

    @classmethod
    def parts(cls, columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
        return _summed(columns["predictions"] == columns["references"], columns["tokens"])


class RecallAtOne(Accuracy):
    """Share of texts whose nearest one among the second texts is their partner, 0..1."""

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int], **_: Any) -> dict[str, float]:
        return {"recall_at_1": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class ExactMatch(OfflineMetric):
    """Share of answers that are one of the right ones but for case, punctuation and articles, 0..1, as in SQuAD."""

    columns: ClassVar[dict[str, str]] = {"exact": "float64"}
    name: ClassVar[str] = "exact_match"

    def _compute(self, **given: Any) -> dict[str, float]:
        return {self.name: float(np.mean(np.asarray(given[next(iter(self.columns))])))}

    @classmethod
    def parts(cls, columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
        values = columns.get(next(iter(cls.columns)))
        return None if values is None else (values, np.ones(len(values)))


class AnswerF1(ExactMatch):
    """The mean F1 of the words of answers with those of the best of the right ones, 0..1, as in SQuAD."""

    columns: ClassVar[dict[str, str]] = {"overlap": "float64"}
    name: ClassVar[str] = "f1"


class F1(OfflineMetric):
    """Macro F1, 0..1: the mean of the F1 of each class that occurs in the references or the predictions.

    Macro for two classes as well (so neither is "the positive one"): scikit-learn's `f1_score(..., average="macro")`.
    """

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int], **_: Any) -> dict[str, float]:
        guess, truth = np.asarray(predictions), np.asarray(references)
        scores = []
        for label in np.union1d(guess, truth):
            hits = np.sum((guess == label) & (truth == label))
            scores.append(2 * hits / (np.sum(guess == label) + np.sum(truth == label)))
        return {"f1": float(np.mean(scores))}


class LabelsF1(OfflineMetric):
    """F1 over all decisions of several labels a text together (micro), 0..1; 0 where no label is given and none told."""

    columns: ClassVar[dict[str, str]] = {"predictions": "int64", "references": "int64", "labels": "int64"}

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int], **_: Any) -> dict[str, float]:
        return {"f1_micro": _f1(np.asarray(predictions), np.asarray(references))}


class LabelsMacroF1(LabelsF1):
    """The mean of the F1 of each label that is given or told at least once, where texts have several labels, 0..1."""

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], labels: Sequence[int] = (), **_: Any
    ) -> dict[str, float]:
        guess, truth, place = np.asarray(predictions), np.asarray(references), np.asarray(labels)
        each = [(guess[place == label], truth[place == label]) for label in np.unique(place[(guess | truth) > 0])]
        return {"f1_macro": float(np.mean([_f1(*pair) for pair in each])) if each else 0.0}


def _f1(guess: np.ndarray, truth: np.ndarray) -> float:
    told = int(guess.sum() + truth.sum())
    return float(2 * np.sum(guess & truth) / told) if told else 0.0


class Perplexity(OfflineMetric):
    """exp of the mean negative log-likelihood a token, in nats; 1 is best.

    Fed per block: `nll`, the mean over the block's tokens, and `tokens`, how many it predicted, which is its weight.
    """

    columns: ClassVar[dict[str, str]] = {"nll": "float64", "tokens": "int64"}
    higher_is_better: ClassVar[bool] = False
    name: ClassVar[str] = "perplexity"

    def _compute(self, **given: Any) -> dict[str, float]:
        nll, tokens = (np.asarray(given[column]) for column in self.columns)
        return {self.name: self.of_mean(float(np.average(nll, weights=tokens)))}

    @classmethod
    def parts(cls, columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
        nll, tokens = (np.asarray(columns[column], dtype=np.float64) for column in cls.columns)
        return nll * tokens, tokens

    @classmethod
    def of_mean(cls, mean: float) -> float:
        # a broken model is reported as infinitely bad, not as an OverflowError
        return math.exp(mean) if mean < 700 else math.inf


class PerplexityAlso(Perplexity):
    """The perplexity on the second text of a language model, `also`: what healing on one text cost on others."""

    columns: ClassVar[dict[str, str]] = {"nll_also": "float64", "tokens_also": "int64"}
    name: ClassVar[str] = "perplexity_also"


class Agreement(OfflineMetric):
    """Share of predictions that equal those of the original model, 0..1; the truth plays no part."""

    columns: ClassVar[dict[str, str]] = {"predictions": "int64", "originals": "int64"}

    def _compute(self, *, predictions: Sequence[int], originals: Sequence[int], **_: Any) -> dict[str, float]:
        return {"agreement": float(np.mean(np.asarray(predictions) == np.asarray(originals)))}

    @classmethod
    def parts(cls, columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
        if "originals" not in columns or columns["predictions"].dtype.kind == "f":
            return None
        return _summed(columns["predictions"] == columns["originals"], columns["tokens"])


class ValueAgreement(OfflineMetric):
    """How well numbers agree with the original model's, -1..1: Lin's concordance correlation (Biometrics 45, 1989).

    1 only where they are equal: unlike Pearson's, it falls where they are shifted or stretched.
    """

    columns: ClassVar[dict[str, str]] = {"predictions": "float64", "originals": "float64"}

    def _compute(self, *, predictions: Sequence[float], originals: Sequence[float], **_: Any) -> dict[str, float]:
        one, other = np.asarray(predictions), np.asarray(originals)
        apart = one.var() + other.var() + (one.mean() - other.mean()) ** 2
        if apart == 0:  # the same number for every text, from both
            return {"agreement": 1.0}
        return {"agreement": float(2 * np.mean((one - one.mean()) * (other - other.mean())) / apart)}


class Pearson(OfflineMetric):
    """Pearson's correlation of numbers with their references, -1..1; 0 where either is the same for all."""

    columns: ClassVar[dict[str, str]] = {"predictions": "float64", "references": "float64"}

    def _compute(self, *, predictions: Sequence[float], references: Sequence[float], **_: Any) -> dict[str, float]:
        return {"pearson": _correlation(np.asarray(predictions), np.asarray(references))}


class Spearman(Pearson):
    """Spearman's correlation of numbers with their references, by their ranks, -1..1; equal ones share their mean rank."""

    def _compute(self, *, predictions: Sequence[float], references: Sequence[float], **_: Any) -> dict[str, float]:
        return {"spearman": _correlation(_ranks(np.asarray(predictions)), _ranks(np.asarray(references)))}


class SquaredError(Pearson):
    """The mean of the squared differences between numbers and their references; 0 is best."""

    higher_is_better: ClassVar[bool] = False

    def _compute(self, *, predictions: Sequence[float], references: Sequence[float], **_: Any) -> dict[str, float]:
        return {"mse": float(np.mean((np.asarray(predictions) - np.asarray(references)) ** 2))}

    @classmethod
    def parts(cls, columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
        squares = (columns["predictions"].astype(np.float64) - columns["references"]) ** 2
        return squares, np.ones(len(squares))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = math.sqrt(float(one @ one) * float(other @ other))
    return 0.0 if size == 0 else float(one @ other) / size


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


def _summed(right: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decisions, one after another, summed for each example; and how many each has."""
    sums = np.concatenate([[0], np.cumsum(right, dtype=np.float64)])
    ends = np.cumsum(tokens)
    return sums[ends] - sums[ends - tokens], np.asarray(tokens, dtype=np.float64)
