"""Metrics of the `evaluate` library, defined in code: its wheel ships no scripts, and `evaluate.load` needs the Hub."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import datasets
import evaluate
import numpy as np

from hfcompress.checkpoint.errors import CompressionError, did_you_mean


class OfflineMetric(evaluate.Metric):
    """A metric without a script and without files: what is added stays in memory.

    `columns`: name -> dtype of what `add_batch` wants; `higher_is_better` tells which way a drop goes.
    """

    columns: ClassVar[dict[str, str]] = {"predictions": "int64", "references": "int64"}
    higher_is_better: ClassVar[bool] = True

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


class Perplexity(OfflineMetric):
    """exp of the mean negative log-likelihood a token, in nats; 1 is best.

    Fed per block: `nll`, the mean over the block's tokens, and `tokens`, how many it predicted, which is its weight.
    """

    columns: ClassVar[dict[str, str]] = {"nll": "float64", "tokens": "int64"}
    higher_is_better: ClassVar[bool] = False

    def _compute(self, *, nll: Sequence[float], tokens: Sequence[int], **_: Any) -> dict[str, float]:
        mean = float(np.average(np.asarray(nll), weights=np.asarray(tokens)))
        # a broken model is reported as infinitely bad, not as an OverflowError
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}


class Agreement(OfflineMetric):
    """Share of predictions that equal those of the original model, 0..1; the truth plays no part."""

    columns: ClassVar[dict[str, str]] = {"predictions": "int64", "originals": "int64"}

    def _compute(self, *, predictions: Sequence[int], originals: Sequence[int], **_: Any) -> dict[str, float]:
        return {"agreement": float(np.mean(np.asarray(predictions) == np.asarray(originals)))}


METRICS: dict[str, type[OfflineMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "perplexity": Perplexity,
    "agreement": Agreement,
}
"""The one table: the name in a recipe, and its metric."""

ERRORS_ON_THE_HUB = frozenset({"brier_score", "cer", "mae", "mape", "mase", "mse", "smape", "ter", "wer"})
"""Metrics of the Hub where less is better."""


def load_metrics(names: Iterable[str]) -> evaluate.CombinedEvaluations:
    """The named metrics, combined: `add_batch(predictions=, references=, ...)`, then `compute() -> {name: value}`.

    A name that is not in `METRICS` is looked for at the Hub; `CompressionError` where that fails.
    """
    return evaluate.combine([METRICS[name]() if name in METRICS else _from_hub(name) for name in names])


def gain(name: str, columns: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], draws: int = 2000) -> Gain | None:
    """By how much one model's predictions score better than another's on the same examples; None for metrics that are no mean
    over examples. The interval is a paired bootstrap over examples: it tells what other texts would have moved, not seeds.
    """
    if name not in ("accuracy", "perplexity"):
        return None
    ends = np.cumsum(columns["tokens"])[:-1]
    sums = []
    for one in (columns, other):
        if name == "accuracy":
            right = np.split(one["predictions"] == one["references"], ends)
            sums.append(np.array([part.sum() for part in right], dtype=np.float64))
        else:
            sums.append(np.asarray(one["nll"] * one["tokens"], dtype=np.float64))
    tokens = np.asarray(columns["tokens"], dtype=np.float64)

    def apart(chosen: Any) -> float:
        means = [part[chosen].sum() / tokens[chosen].sum() for part in sums]
        return means[0] - means[1] if name == "accuracy" else math.exp(min(means[1], 700)) - math.exp(min(means[0], 700))

    generator = np.random.default_rng(0)
    found = [apart(generator.integers(0, len(tokens), len(tokens))) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Gain(apart(slice(None)), (float(low), float(high)), len(tokens))


class Gain(NamedTuple):
    """`better` by how much, positive whichever way the metric runs; `interval` 95 %; over how many `examples`."""

    better: float
    interval: tuple[float, float]
    examples: int


def higher_is_better(name: str) -> bool:
    """Whether more of this metric is better."""
    return METRICS[name].higher_is_better if name in METRICS else name not in ERRORS_ON_THE_HUB


def _from_hub(name: str) -> evaluate.EvaluationModule:
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # evaluate raises anything here, mostly about a script that is missing
        raise CompressionError(
            f"metrics: {name!r} is not built in, and the Hub's evaluate-metric/{name} can't be had;"
            f" take a built-in one, or go online.{did_you_mean(name, METRICS)}"
        ) from error
