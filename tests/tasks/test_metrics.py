"""The metrics are right: against values computed by hand, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.metric_classes import F1, Accuracy, Agreement, Perplexity
from hfcompress.tasks.metrics import (
    BUILT_IN,
    LABELS_METRICS,
    VALUE_METRICS,
    below_chance,
    gain,
    higher_is_better,
    load_metrics,
)


def test_by_hand():
    guess, truth = [0, 1, 1, 2], [0, 1, 2, 2]
    assert Accuracy().compute(predictions=guess, references=truth) == {"accuracy": 0.75}
    # F1 of class 0: 1, of class 1: 2/3, of class 2: 2/3
    assert F1().compute(predictions=guess, references=truth)["f1"] == pytest.approx(7 / 9)
    assert Agreement().compute(predictions=guess, originals=[0, 0, 0, 2]) == {"agreement": 0.5}


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_as_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    guess, truth = rng.integers(0, classes, 50), rng.integers(0, classes, 50)
    scores = load_metrics(["accuracy", "f1"])
    for part in (slice(0, 20), slice(20, 50)):  # batches add up
        scores.add_batch(predictions=guess[part], references=truth[part])
    assert scores.compute() == pytest.approx(
        {"accuracy": accuracy_score(truth, guess), "f1": f1_score(truth, guess, average="macro")}
    )


def test_f1_counts_a_class_that_is_only_predicted_as_zero():
    truth, guess = [0, 0, 0, 0], [0, 0, 0, 5]
    assert F1().compute(predictions=guess, references=truth)["f1"] == pytest.approx((6 / 7 + 0) / 2)


def test_perplexity_weighs_blocks_by_their_tokens():
    perplexity = Perplexity().compute(nll=[1.0, 3.0], tokens=[30, 10])["perplexity"]
    assert perplexity == pytest.approx(math.exp((30 * 1.0 + 10 * 3.0) / 40))
    one_token_less_sure = Perplexity().compute(nll=[math.log(8)] * 3, tokens=[1, 2, 3])["perplexity"]
    assert one_token_less_sure == pytest.approx(8)


def test_a_broken_model_is_infinitely_bad():
    assert Perplexity().compute(nll=[1e6], tokens=[1]) == {"perplexity": math.inf}


def test_metrics_of_different_columns_combine():
    scores = load_metrics(["perplexity", "agreement"])
    scores.add_batch(predictions=[1, 2, 3], references=[1, 1, 1], originals=[1, 2, 4], nll=[0.0], tokens=[3])
    assert scores.compute() == pytest.approx({"perplexity": 1.0, "agreement": 2 / 3})


def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Accuracy().compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
    assert not list(tmp_path.iterdir())


def test_direction():
    assert {name for name in BUILT_IN if not higher_is_better(name)} == {"perplexity", "perplexity_also", "mse"}
    assert higher_is_better("matthews_correlation") and not higher_is_better("wer")


def test_an_unknown_metric_is_one_sentence(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("evaluate.load", unreachable)
    with pytest.raises(CompressionError, match=r"'acuracy' is not built in.*Did you mean 'accuracy'\?"):
        load_metrics(["acuracy"])
    with pytest.raises(CompressionError, match=r"'acuracy' is not built in, and the Hub's evaluate-metric can't be had"):
        load_metrics(["acuracy"], trusted=True)


def test_numbers_as_scipy():
    rng = np.random.default_rng(0)
    guess, truth = rng.normal(size=50).round(1), rng.normal(size=50).round(1)  # with ties
    scores = load_metrics(["pearson", "spearman", "mse"], VALUE_METRICS)
    scores.add_batch(predictions=guess, references=truth)
    assert scores.compute() == pytest.approx(
        {
            "pearson": pearsonr(guess, truth).statistic,
            "spearman": spearmanr(guess, truth).statistic,
            "mse": mean_squared_error(truth, guess),
        }
    )


def test_agreement_of_numbers():
    agree = VALUE_METRICS["agreement"]()
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert agree.compute(predictions=values, originals=values) == {"agreement": 1.0}
    # Lin's: 2 cov / (var + var + squared difference of the means) = 2.5 / (2.5 + 1)
    assert agree.compute(predictions=values + 1, originals=values)["agreement"] == pytest.approx(2.5 / 3.5)
    assert agree.compute(predictions=-values, originals=values)["agreement"] < 0


@pytest.mark.parametrize("labels", [2, 5])
def test_several_labels_as_scikit_learn(labels):
    rng = np.random.default_rng(labels)
    guess, truth = (rng.random((30, labels)) < 0.4 for _ in range(2))
    scores = load_metrics(["f1_micro", "f1_macro"], LABELS_METRICS)
    flat = {"predictions": guess.ravel().astype(int), "references": truth.ravel().astype(int)}
    scores.add_batch(**flat, labels=np.tile(np.arange(labels), 30))
    assert scores.compute() == pytest.approx(
        {f"f1_{kind}": f1_score(truth, guess, average=kind) for kind in ("micro", "macro")}
    )


def test_below_chance_is_cohen_s_chance():
    truth = np.array([0, 1] * 10)
    assert below_chance(1 - truth, truth) == pytest.approx(0.5)
    assert below_chance(truth, truth) is None and below_chance(np.zeros(20, int), truth) is None
    rare = np.array([1] * 3 + [0] * 57)
    assert below_chance(np.ones(60, int), rare) is None, "0.05 right, and what chance gives to one who always says 1"


def test_every_mean_over_examples_is_paired():
    """The gain is the difference of the scores, and its interval holds it; a metric that is no such mean has none."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 5, 40)
    total = int(tokens.sum())
    truth, original = rng.integers(0, 3, total), rng.integers(0, 3, total)

    def columns(right: float) -> dict[str, np.ndarray]:
        guess = np.where(rng.random(total) < right, truth, rng.integers(0, 3, total))
        nll = rng.random(40)
        return {"predictions": guess, "references": truth, "originals": original, "nll": nll, "tokens": tokens,
                "nll_also": nll[:7] + 1, "tokens_also": np.full(7, 3)}  # fmt: skip

    one, other = columns(0.9), columns(0.3)
    for name in ("accuracy", "perplexity", "perplexity_also", "agreement"):
        scores = []
        for each in (one, other):
            combined = load_metrics([name])
            combined.add_batch(**each)
            scores.append(combined.compute()[name])
        found = gain(name, one, other)
        assert found.better == pytest.approx((scores[0] - scores[1]) * (1 if higher_is_better(name) else -1)), name
        assert found.interval[0] <= found.better <= found.interval[1] and found.examples == (7 if "also" in name else 40)
        assert gain(name, one, one)[:2] == (0.0, (0.0, 0.0))
    assert gain("f1", one, other) is None and gain("wer", one, other) is None
    values = {"predictions": rng.normal(size=40), "references": rng.normal(size=40), "tokens": np.ones(40, int)}
    assert (
        gain("mse", values, {**values, "predictions": values["references"]}).better < 0
        and gain("pearson", values, values) is None
    )
    assert gain("accuracy", one, {**other, "tokens": tokens[::-1]}) is None, "other questions"
    del one["originals"]
    assert gain("agreement", one, one) is None
