"""The metrics are right: against values computed by hand, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.metrics import F1, METRICS, Accuracy, Agreement, Perplexity, higher_is_better, load_metrics


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
    assert [name for name in METRICS if not higher_is_better(name)] == ["perplexity"]
    assert higher_is_better("matthews_correlation") and not higher_is_better("wer")


def test_an_unknown_metric_is_one_sentence(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("evaluate.load", unreachable)
    with pytest.raises(CompressionError, match=r"'acuracy' is not built in.*Did you mean 'accuracy'\?"):
        load_metrics(["acuracy"])
