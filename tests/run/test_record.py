"""What a run writes down beside its steps: the reference in turns, its dtype, intervals, the verdict, and controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hfcompress.run.loop as loop
import hfcompress.run.record as recording
from hfcompress import CompressionError, PruneVocab, Recipe, compress
from hfcompress.results.plot import plot
from hfcompress.results.report import Report
from tests.tiny import tiny_checkpoint, tiny_texts

TRAIN = {"epochs": 1, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "bf16": False}
HEADS = {"prune_heads": {"ratio": 0.5, "scores": "magnitude"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_texts(folder / "texts")
    tiny_checkpoint(folder / "distilbert", "distilbert", layers=4)
    tiny_checkpoint(folder / "llama", "llama")
    return folder


def recipe(place: Path, kind: str, steps: list[Any], **more: Any) -> Recipe:
    task = {"name": "text-classification", "max_length": 32} if kind != "llama" else {"name": "causal-lm", "block_size": 32}
    raw = {"model": str(place / kind), "task": {**task, "dataset": str(place / "texts")}, "steps": steps}
    return Recipe.from_dict({**raw, **more})


def test_every_recipe_is_told_against_its_reference(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a teacher too; a run that was killed tells the same, and a cast added then has its fair baseline."""
    saved, calls = loop.artifact.save, []

    def dies(*given: Any, **how: Any) -> None:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        saved(*given, **how)

    monkeypatch.setattr(loop.artifact, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(place, "distilbert", [HEADS, {"low_rank": {"rank": 4}}]), place / "out")
    monkeypatch.setattr(loop.artifact, "save", saved)
    assert Report.load(place / "out.partial" / "report.json").same_dtype is None
    goal = {"max_drop": 1.0, "smaller": 100}
    report = compress(recipe(place, "distilbert", [HEADS, "cast"], goal=goal), place / "out")
    assert [row.step for row in report.rows] == ["as it came", "prune_heads 0.5", "cast bfloat16"]
    for row in report.rows[1:]:
        assert row.reference_ms is not None and row.times_faster is not None and row.times_faster.keys() == {"b1", "b8"}
        gain = row.gains["accuracy"]
        assert gain["better"] == pytest.approx(row.score["accuracy"] - report.rows[0].score["accuracy"])
        assert gain["interval"][0] <= gain["better"] <= gain["interval"][1] and gain["examples"] == 24
    assert report.rows[0].reference_ms is None and report.rows[0].gains == {}
    same = report.same_dtype
    assert same is not None and same.step == "… in bfloat16" and same.settings["dtype"] == "bfloat16"
    assert same.megabytes == pytest.approx(report.rows[0].megabytes / 2) and same.parameters == report.rows[0].parameters
    assert same.reference_ms is not None and same.score["agreement"] > 0.8
    told = json.loads((place / "out" / "report.json").read_text())
    assert told["verdict"] == report.verdict() and told["goal"] == goal
    assert [one["met"] for one in told["judged"]] == [True, False]
    assert Report.load(place / "out" / "report.json").to_dict() == told


def test_what_plain_pytorch_offers_stands_beside_exports(place: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    chosen = recipe(place, "distilbert", [HEADS])
    report, task = compress(chosen, place / "exported"), chosen.task.open(str(place / "distilbert"))
    task.remember(task.load_model(str(place / "distilbert")))
    monkeypatch.setattr("hfcompress.results.measure.REPETITIONS", {1: 3})  # each size is compiled anew
    recording.add_compiled(chosen, task, report, place)
    row = report.compiled
    assert row is not None and row.step in ("… compiled, float32", "… compiled, bfloat16")
    assert row.latency_ms.keys() == {"b1"} and row.reference_ms is not None and row.times_faster is not None
    assert row.score["agreement"] > 0.8 and row.parameters == report.rows[0].parameters
    assert row.step in report.markdown() and report.baselines == [row]
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.compiled == row and again.to_dict() == report.to_dict()
    plot(again, place / "plot.png")
    monkeypatch.setattr(recording, "measure", fails)
    report.compiled = None
    recording.add_compiled(chosen, task, report, place)
    assert report.compiled is None and "the reference can't be compiled here (no C++ compiler)" in caplog.text


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("no C++ compiler")


def test_the_reference_stands_beside_a_model_of_fewer_tokens(place: Path) -> None:
    report = compress(recipe(place, "distilbert", [{"prune_vocab": {}}, "cast"]), place / "vocabulary")
    assert report.rows[1].parameters < report.rows[0].parameters
    assert len(report.rows) == 3 and all(row.reference_ms is not None for row in report.rows[1:])
    assert report.same_dtype is not None and report.same_dtype.parameters == report.rows[0].parameters


def test_no_interval_where_the_answers_are_other_tokens(place: Path) -> None:
    task = recipe(place, "llama", [{"prune_vocab": {}}]).task.open(str(place / "llama"))
    model = task.load_model(str(place / "llama"))
    score, columns = task.remember(model), task.predict(model)
    assert recording._gains(task, score, columns)["perplexity"]["better"] == 0
    PruneVocab(str(place / "texts")).run(model, task)
    assert recording._gains(task, score, task.predict(model)) == {}


def test_a_reference_without_room_is_not_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "room_for", lambda *_: False)
    report = compress(recipe(place, "distilbert", [HEADS, "cast"], goal={"faster": 1}), place / "small")
    assert report.same_dtype is None and report.faster == {}
    assert report.rows[-1].notes == ("timed by itself, for want of memory for the reference, so its times can't be compared",)
    assert report.verdict().startswith("2.") and "faster" not in report.verdict()


@pytest.fixture(scope="module")
def healed(place: Path) -> Report:
    steps = [{"prune_neurons": {"ratio": 0.5, "samples": 16}}, {"train": {**TRAIN, "with": ["distill"]}}]
    return compress(recipe(place, "llama", steps, control=True), place / "healed")


def test_a_healed_model_is_compared_with_the_whole_one_trained_alike(healed: Report) -> None:
    whole, cut, trained = healed.rows
    assert whole.uncompressed is None and cut.uncompressed is None
    alike = trained.uncompressed
    assert alike is not None and alike["score"]["perplexity"] < whole.score["perplexity"], "it has learnt the texts too"
    assert alike["better"] == pytest.approx(alike["score"]["perplexity"] - trained.score["perplexity"])
    assert alike["interval"][0] <= alike["better"] <= alike["interval"][1] and alike["seconds"] > 0
    assert trained.control is not None and trained.control["score"] != alike["score"]
    assert [line[0] for line in healed.cells()[1]][-2:] == ["… without teacher", "… uncompressed, trained alike"]
    assert "than that of the uncompressed model trained alike" in healed.markdown()


def test_what_is_trained_alike(place: Path) -> None:
    """All training so far, with teachers and adapters, without what compresses; nothing if the reference knows the data."""

    def alike(*steps: Any, number: int) -> list[str]:
        return [step.label for step in recording._alike(recipe(place, "llama", list(steps)), number)]

    cut, adapt = {"prune_neurons": {"ratio": 0.5}}, {"train": {**TRAIN, "with": [{"adapters": {"r": 2}}]}}
    healing = {"train": {**TRAIN, "with": ["distill", {"prune_heads": {"ratio": 0.5}}]}}
    assert alike(cut, healing, number=2) == ["train + distill"]
    assert alike(cut, {"train": TRAIN}, adapt, number=3) == ["train", "train + adapters"]
    assert alike(healing, number=1) == ["train + distill"]
    assert alike({"train": {**TRAIN, "with": ["distill"]}}, cut, number=1) == [], "nothing is compressed yet"
    assert alike({"train": TRAIN}, cut, healing, number=3) == [], "the reference was trained on these texts"


def test_control_needs_something_to_compare(place: Path) -> None:
    steps = [{"prune_neurons": {"ratio": 0.5}}, {"train": TRAIN}]
    assert recipe(place, "llama", steps, control=True).control
    for refused in ([{"train": TRAIN}, steps[0], {"train": TRAIN}], [steps[0], "cast"]):
        with pytest.raises(CompressionError, match="control: no train step has a teacher to do without"):
            recipe(place, "llama", refused, control=True)


def test_the_ending_dtype_is_that_of_the_last_step_that_decides(place: Path) -> None:
    four = {"quantize": {"bits": 4, "compute_dtype": "bfloat16"}}
    for steps, dtype in (
        ([HEADS], None),
        (["cast"], "bfloat16"),
        (["cast", {"cast": {"dtype": "float16"}}], "float16"),
        ([HEADS, four], "bfloat16"),
    ):
        assert recipe(place, "distilbert", steps).ending_dtype == dtype
