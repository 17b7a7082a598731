"""The metrics by their names: which fit what a model tells, and by how much one model is better than another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import evaluate
import numpy as np

from hfcompress.checkpoint.errors import CompressionError, did_you_mean, shown
from hfcompress.tasks.metric_classes import (
    F1,
    Accuracy,
    Agreement,
    AnswerF1,
    Columns,
    ExactMatch,
    LabelsF1,
    LabelsMacroF1,
    OfflineMetric,
    Pearson,
    Perplexity,
    PerplexityAlso,
    RecallAtOne,
    Spearman,
    SquaredError,
    ValueAgreement,
)

Table = Mapping[str, type[OfflineMetric]]

METRICS: dict[str, type[OfflineMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "perplexity": Perplexity,
    "agreement": Agreement,
}
"""The name in a recipe, and its metric, where one of several answers is chosen."""

LABELS_METRICS: dict[str, type[OfflineMetric]] = {"f1_micro": LabelsF1, "f1_macro": LabelsMacroF1, "agreement": Agreement}
"""Where each label is told or not."""

VALUE_METRICS: dict[str, type[OfflineMetric]] = {
    "pearson": Pearson,
    "spearman": Spearman,
    "mse": SquaredError,
    "agreement": ValueAgreement,
}
"""Where a number is told."""

NEIGHBOUR_METRICS: dict[str, type[OfflineMetric]] = {"agreement": Agreement}
"""Where each text is told its nearest neighbour."""

PARTNER_METRICS: dict[str, type[OfflineMetric]] = {"recall_at_1": RecallAtOne, "agreement": Agreement}
"""Where it is looked for among the second texts of pairs."""

ANSWER_METRICS: dict[str, type[OfflineMetric]] = {"exact_match": ExactMatch, "f1": AnswerF1, "agreement": Agreement}
"""Where a span of a context answers a question."""

BUILT_IN: dict[str, type[OfflineMetric]] = {
    **ANSWER_METRICS,
    **VALUE_METRICS,
    **LABELS_METRICS,
    **PARTNER_METRICS,
    "perplexity_also": PerplexityAlso,
    **METRICS,
}

ERRORS_ON_THE_HUB = frozenset({"brier_score", "cer", "mae", "mape", "mase", "mse", "smape", "ter", "wer"})
"""Metrics of the Hub where less is better."""


def load_metrics(names: Iterable[str], table: Table = BUILT_IN, trusted: bool = False) -> evaluate.CombinedEvaluations:
    """The named metrics, combined: `add_batch(predictions=, references=, ...)`, then `compute() -> {name: value}`.

    A name that is not in the table is looked for at the Hub if these are trusted; see `check_metrics`.
    """
    names = list(names)
    check_metrics(names, table, trusted)
    return evaluate.combine([table[name]() if name in table else _from_hub(name, table) for name in names])


def check_metrics(names: Iterable[str], table: Table = BUILT_IN, trusted: bool = False) -> None:
    """CompressionError where a name doesn't fit what the model tells, or where its code would come from elsewhere, unasked.

    `evaluate.load` runs what the Hub, or a path, gives it: no file may ask for that, only who starts the run.
    """
    for name in names:
        if name in table:
            continue
        if name in BUILT_IN:
            raise CompressionError(
                f"metrics: {name} does not fit what this model tells (one of several answers, several labels a text, or a"
                f" number); possible here are {', '.join(sorted(table))}."
            )
        if not trusted:
            raise CompressionError(
                f"metrics: {shown(name)} is not built in, and one from elsewhere is code that would run here; name a built-in"
                " one, or allow it on the command line with --trust-metrics (in Python: task.trust_metrics())."
                f"{did_you_mean(name, table)}"
            )


def below_chance(predictions: np.ndarray, references: np.ndarray) -> float | None:
    """What chance would score, if the predictions score less by more than three standard errors; else None.

    Chance is Cohen's (1960): as many answers of each kind, dealt out blindly. So a model that always says the same is at
    chance, whatever the shares of the labels.
    """
    kinds = np.union1d(predictions, references)
    chance = float(sum(np.mean(predictions == kind) * np.mean(references == kind) for kind in kinds))
    error = math.sqrt(chance * (1 - chance) / len(references))
    return chance if float(np.mean(predictions == references)) < chance - 3 * error else None


def gain(name: str, columns: Columns, other: Columns, draws: int = 2000) -> Gain | None:
    """By how much one model's predictions score better than another's on the same examples; None for metrics that are no mean
    over examples, and where the two were asked different questions. `perplexity` is one by its logarithm, and `agreement` one
    where `originals` are among the columns. The interval is a paired bootstrap over examples: it tells what other texts would
    have moved, not seeds.
    """
    metric = BUILT_IN.get(name)
    if metric is None:
        return None
    mine, theirs = metric.parts(columns), metric.parts(other)
    if mine is None or theirs is None or not np.array_equal(mine[1], theirs[1]):
        return None
    tokens, sign = mine[1], 1 if metric.higher_is_better else -1

    def apart(chosen: Any) -> float:
        one, two = (metric.of_mean(part[chosen].sum() / tokens[chosen].sum()) for part in (mine[0], theirs[0]))
        return sign * (min(one, 1e300) - min(two, 1e300))  # infinity less infinity is no number

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
    return BUILT_IN[name].higher_is_better if name in BUILT_IN else name not in ERRORS_ON_THE_HUB


def _from_hub(name: str, table: Table) -> evaluate.EvaluationModule:
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # evaluate raises anything here, mostly about a script that is missing
        raise CompressionError(
            f"metrics: {shown(name)} is not built in, and the Hub's evaluate-metric can't be had; take a built-in one, or go"
            f" online.{did_you_mean(name, table)}"
        ) from error
