"""Laws of the report: counts by hand, bytes as on disk, the model undisturbed, one set of cells, honest comparisons."""

from __future__ import annotations

import builtins
import copy
import io
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.results import measure as measuring
from hfcompress.results.compare import Comparison, _in_turns, compare
from hfcompress.results.plot import plot
from hfcompress.results.ratios import slower
from hfcompress.results.report import Report, Row, machine, measure, weigh
from hfcompress.results.timing import interval, significant
from hfcompress.tasks.metrics import gain

VOCABULARY, HIDDEN, INNER, LAYERS, LABELS = 2000, 64, 128, 2, 3
BERT = (
    (VOCABULARY + 32 + 2) * HIDDEN
    + 2 * HIDDEN
    + LAYERS * (4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * INNER + INNER + HIDDEN + 4 * HIDDEN)
    + (HIDDEN * HIDDEN + HIDDEN)
    + (HIDDEN * LABELS + LABELS)
)
LLAMA = VOCABULARY * HIDDEN + HIDDEN + LAYERS * (3 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)


def bert(inner: int = INNER, layers: int = LAYERS, hidden: int = HIDDEN) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=LABELS,
    )
    return BertForSequenceClassification(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def low_bit(model: nn.Module, bits: int, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Every Linear but the heads as its bitsandbytes twin."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name in ("classifier", "lm_head"):
            continue
        sizes = (module.in_features, module.out_features)
        if bits == 4:
            twin = bnb.nn.Linear4bit(*sizes, bias=module.bias is not None, quant_type="nf4", compute_dtype=compute_dtype)
        else:
            twin = bnb.nn.Linear8bitLt(*sizes, bias=module.bias is not None, has_fp16_weights=False)
        twin.load_state_dict(module.state_dict())
        model.set_submodule(name, twin.requires_grad_(False).to("cpu"))
    return model


class Inputs:
    headline, higher_is_better = "accuracy", True

    def __init__(self, **score: float) -> None:
        self.told = score or {"accuracy": 0.75, "agreement": 0.5}

    def example(self, batch_size: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(batch_size * 16).reshape(batch_size, 16) % VOCABULARY
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def score(self, model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        model(**self.example(2))
        return self.told


def times(b1: float, b8: float = 100.0) -> Any:
    return {"b1": {"min": b1, "median": b1 * 1.02}, "b8": {"min": b8, "median": b8 * 1.02}}


def row(step: str, b1: float, b8: float = 100.0, score: float = 0.97, **other: Any) -> Row:
    fields: dict[str, Any] = {
        "parameters": 22_700_000,
        "megabytes": 90.9,
        "latency_ms": times(b1, b8),
        "score": {"accuracy": score, "agreement": 0.99},
        "headline": "accuracy",
    }
    return Row(step=step, **(fields | other))


def story() -> Report:
    return Report(
        row("fine-tuned", 24.0, 172.0, 0.972),
        row(
            "prune_heads (ratio: 0.5)",
            12.7,
            75.0,
            0.960,
            megabytes=69.6,
            parameters=17_400_000,
            reference_ms=times(24.0, 172.0),
        ),
        row(
            "quantize [bits | 4]",
            *(14.6, 84.0, 0.974),
            megabytes=9.8,
            parameters=17_400_000,
            peak_memory_megabytes=50.0,
            reference_ms=times(24.0, 172.0),
        ),
        on={"cpu": "some"},
    )


def full() -> Report:
    """A quickstart with all there is to tell: long names, intervals, a dtype of its own, controls, a second text."""
    told = {"better": 0.004, "interval": [-0.01, 0.018], "examples": 500}
    alike = {
        "score": {"accuracy": 0.981, "agreement": 0.97},
        "seconds": 9.0,
        **told,
        "better": -0.009,
        "interval": [-0.02, -0.001],
    }
    beside: dict[str, Any] = {"reference_ms": times(18.0, 100.0), "times_faster": {"b1": [1.9, 2.2], "b8": [4.9, 5.6]}}
    report = Report(
        row("as it came", 18.1, 104.0, 0.312),
        row("train", 18.3, 101.0, 0.966),
        row("prune_heads (ratio: 0.66, ranking: global)", 14.1, 76.5, 0.958, megabytes=81.4, **beside),
        row(
            "train + distill + prune_neurons + prune_weights",
            *(9.0, 42.2, 0.970),
            megabytes=31.4,
            **beside,
            gains={"accuracy": told},
            control={"score": {"accuracy": 0.966, "agreement": 0.95}, "seconds": 9.0, **told},
            uncompressed=alike,
        ),
        row("quantize 4", 8.9, 20.0, 0.972, megabytes=14.0, **beside, gains={"accuracy": told}, settings={"dtype": "bfloat16"}),
        reference=1,
        on={},
        goal={"max_drop": 0.01, "faster": 2},
        same_dtype=row("… in bfloat16", 10.0, 33.0, 0.966, megabytes=45.4, **beside, settings={"dtype": "bfloat16"}),
    )
    return report


# Counts and bytes


@pytest.mark.parametrize(("make", "parameters"), [(bert, BERT), (llama, LLAMA)])
@pytest.mark.parametrize("bits", [32, 4, 8])
def test_parameters_are_the_dense_count_whatever_the_bits(make: Any, parameters: int, bits: int) -> None:
    model = make() if bits == 32 else low_bit(make(), bits)
    assert weigh(model)["parameters"] == parameters


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("bits", [32, 4, 8])
def test_megabytes_are_those_of_the_file(make: Any, bits: int, tmp_path: Path) -> None:
    model = make() if bits == 32 else low_bit(make(), bits)
    task = Inputs()
    megabytes = measure(model, task, "now").megabytes
    model.save_pretrained(tmp_path)
    blob = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(blob[:8], "little")
    assert megabytes * 1e6 == len(blob) - header  # to the byte, after the file's table of contents
    assert bits < 32 or megabytes == pytest.approx(len(blob) / 1e6, rel=0.01)


def test_stored_elements_and_zeros() -> None:
    model = bert()
    dense = weigh(model)
    assert dense["stored_elements"] == BERT and dense["bytes"] == 4 * BERT
    before = dense["nonzero"]
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert int(torch.count_nonzero(weight)) == HIDDEN * INNER
    with torch.no_grad():
        weight[: INNER // 2] = 0
    assert weigh(model)["nonzero"] == before - HIDDEN * INNER // 2

    layer = nn.Sequential(nn.Linear(HIDDEN, INNER))
    packed = weigh(low_bit(layer, 4))
    assert packed["parameters"] == HIDDEN * INNER + INNER
    # half a byte a weight, and the block maxima (nested, 256 a block), the code table and the state as JSON beside them
    assert HIDDEN * INNER // 2 + INNER < packed["stored_elements"] < HIDDEN * INNER
    assert packed["nonzero"] == HIDDEN * INNER + int(torch.count_nonzero(layer[0].bias))


def test_markers_are_not_counted_and_a_meta_model_is() -> None:
    model = bert()
    model.register_buffer("weight", torch.empty(0))
    assert weigh(model)["parameters"] == BERT
    with torch.device("meta"):
        assert weigh(llama())["parameters"] == LLAMA


# Measuring


def test_measure_tells_all_and_changes_nothing() -> None:
    model = bert().train()
    model.bert.pooler.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure(model, Inputs(), "as it came", seconds=1.5)
    assert found.latency_ms.keys() == {"b1", "b8"}
    assert all(0 < times["min"] <= times["median"] for times in found.latency_ms.values())
    assert found.score == {"accuracy": 0.75, "agreement": 0.5} and found.seconds == 1.5
    assert found.settings["length"] == 16 and found.settings["dtype"] == "float32"
    assert found.peak_memory_megabytes is None or found.peak_memory_megabytes >= found.megabytes
    assert model.training and not model.bert.pooler.training and model.bert.encoder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bits", [4, 8])
def test_measuring_never_repacks_nor_casts(bits: int) -> None:
    model = low_bit(bert(), bits, compute_dtype=torch.bfloat16)
    layers = [module for module in model.modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")]
    if bits == 4:  # as on a processor that would repack, and whose user left it so
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
    before = copy.deepcopy(model.state_dict())
    measure(model, Inputs(), "now")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert before and all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert bits == 8 or all(layer.support_avx512bf16_for_cpu for layer in layers)
    assert not measuring._repacked(model)


def test_weighing_a_repacked_model_leaves_it_repacked() -> None:
    model = low_bit(bert(), 4).eval()
    clean = weigh(model)
    with torch.no_grad():
        logits = model(**Inputs().example(2)).logits
    if not measuring._repacked(model):
        pytest.skip("this processor doesn't repack")
    assert weigh(model)["parameters"] == clean["parameters"]
    assert measuring._repacked(model)
    found = measure(model, Inputs(), "now")
    assert any("repacked" in note for note in found.notes)
    with torch.no_grad():
        assert torch.equal(model(**Inputs().example(2)).logits, logits)


def test_peak_memory_sees_what_scoring_holds() -> None:
    class Greedy(Inputs):
        def score(self, model: nn.Module) -> dict[str, float]:
            held = torch.ones(10_000_000)  # 40 MB
            return {"accuracy": float(held[0])}

    for _ in range(2):  # memory that the first run freed must not hide the second's
        found = measure(bert(), Greedy(), "now")
        if found.peak_memory_megabytes is None:
            pytest.skip("memory can't be watched here")
        assert 36 < found.peak_memory_megabytes - found.megabytes < 80


def test_memory_without_a_high_water_mark_is_unknown_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
    monkeypatch.setattr(measuring, "_highest", lambda: 5)
    assert measure(bert(), Inputs(), "now").peak_memory_megabytes is None


def test_a_headline_that_was_not_scored_is_told() -> None:
    with pytest.raises(CompressionError, match=r"headline is 'accuracy'.*Did you mean 'acuracy'"):
        measure(bert(), Inputs(acuracy=0.5), "now")


def test_machine_names_no_person_and_no_host() -> None:
    import getpass
    import platform

    told = machine()
    assert told["threads"] == torch.get_num_threads() and told["cores"] >= 1
    assert torch.__version__.startswith(told["versions"]["torch"]) and "transformers" in told["versions"]
    values = json.dumps(told).split('"')
    assert platform.node() not in values and str(Path.home()) not in values and getpass.getuser() not in values


# The report


def test_round_trip_is_exact(tmp_path: Path) -> None:
    report = Report(*story().rows, reference=1, on={"cpu": "some"})
    report.add(measure(bert(), Inputs(), "measured", seconds=2.0))
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.rows == report.rows and again.to_dict() == report.to_dict()
    data = json.loads((tmp_path / "report.json").read_text())
    assert list(data) == ["format", "machine", "reference", "rows", "verdict"] and (data["format"], data["reference"]) == (1, 1)
    assert data["rows"][0]["latency_ms"]["b1"] == {"min": 24.0, "median": 24.48}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_nan_is_never_written(tmp_path: Path) -> None:
    broken = measure(bert(), Inputs(accuracy=math.nan, perplexity=math.inf), "diverged")
    assert broken.score == {"accuracy": None, "perplexity": None}
    report = Report(row("before", 10.0), row("after", 10.0, score=math.nan, seconds=math.inf), broken)
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert Report.load(tmp_path / "report.json").drop is None
    assert "–" in report.markdown() and report.check_goal({"max_drop": 0.1}) == [
        "max_drop: accuracy may drop by 0.1, it can't be told."
    ]


def test_all_that_is_new_is_kept_and_earlier_readers_read_the_rest(tmp_path: Path) -> None:
    report = full()
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.rows == report.rows and again.same_dtype == report.same_dtype and again.to_dict() == report.to_dict()
    data = json.loads((tmp_path / "report.json").read_text())
    first = {"step", "parameters", "megabytes", "latency_ms", "score", "headline", "higher_is_better", "nonzero"}
    first |= {"stored_elements", "peak_memory_megabytes", "seconds", "settings", "notes", "reference_ms", "control"}
    assert data["format"] == 1 and all(set(told) == first for told in data["rows"]), "what the first readers of format 1 know"
    assert data["beside"][3]["uncompressed"]["better"] == -0.009 and data["beside"][1] == {}
    assert data["verdict"] == report.verdict() and data["judged"] == report.judge(report.goal)


def test_a_report_written_before_is_read() -> None:
    """By the first version of this format, which called a trained model slower than an untrained one."""
    report = Report.load(Path(__file__).with_name("written-before.json"))
    assert report.verdict() == "6.5 times smaller, 5.3 times faster at batch 8, accuracy 0.966 to 0.972."
    names, cells = report.cells()
    assert [cell for line in cells for cell in line if "slower" in cell] == ["8.9 (9.9) 2.2x, slower"]
    assert [line[names.index("ms, batch 8")] for line in cells[:3]] == ["108.5 (118.7)", "98.3 (101.3)", "76.5 (78.0) 1.31x"]
    assert [row.step for row in report.rows if row.notes] == ["quantize 4"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"format": 1, "rows": ["x"]}', "report, row 1: a row is a mapping of its fields."),
        (
            '{"format": 1, "rows": [{"step": "x", "parameters": 1, "megabytes": 1, "latency_ms": {"b1": {"min": 1}}, "score": {}, '
            '"headline": "x"}]}',
            "report, row 1: latency_ms.b1.median: field required.",
        ),
        ("{", "can't be read as a JSON report"),
        ("[]", "format 'list' found"),
        ('{"format": 2}', "format 2 found"),
        ('{"format": 1, "rows": [{"stepp": "x"}]}', "row 1: 'stepp' is no field. Did you mean 'step'"),
        ('{"format": 1, "rows": [{"step": "x"}]}', "row 1: missing 5 required"),
    ],
)
def test_a_file_that_is_no_report_is_one_sentence(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(CompressionError, match=told.replace("(", r"\(")):
        Report.load(tmp_path / "report.json")


def test_smaller_faster_drop_and_goal() -> None:
    report = story()
    assert report.smaller == 90.9 / 9.8
    assert report.faster == {"b1": 24.0 / 14.6, "b8": 172.0 / 84.0}
    assert report.drop == pytest.approx(-0.002)
    assert report.check_goal(None) == [] and report.check_goal({"max_drop": 0.01, "smaller": 9, "faster": 1.6}) == []
    assert report.check_goal({"max_drop": None, "smaller": None}) == []
    assert report.check_goal({"max_drop": -0.01, "smaller": 10, "faster": 2}) == [
        "max_drop: accuracy may drop by -0.01, it dropped by -0.0020.",
        "smaller: 10 times wanted, 9.28 times reached.",
        "faster: 2 times wanted, 1.64 times reached at batch 1.",
    ]
    with pytest.raises(CompressionError, match="Did you mean 'smaller'"):
        report.check_goal({"smalller": 4})
    report.reference = 1
    assert report.drop == pytest.approx(-0.014)


def test_each_part_of_a_goal_is_judged() -> None:
    judged = story().judge({"max_drop": 0.01, "smaller": 10, "faster": 2})
    assert [(one["part"], one["of"], one["wanted"], one["met"]) for one in judged] == [
        ("max_drop", "accuracy", 0.01, True),
        ("smaller", "disk", 10, False),
        ("faster", "batch 1", 2, False),
        ("faster", "batch 8", 2, True),
    ]
    assert [one["reached"] for one in judged] == pytest.approx([-0.002, 90.9 / 9.8, 24.0 / 14.6, 172.0 / 84.0])


def test_times_that_were_not_taken_in_turns_are_not_compared() -> None:
    report = Report(row("whole", 24.0), row("cut", 12.0, megabytes=40.0), on={})
    assert report.faster == {}
    assert report.check_goal({"faster": 1.5}) == [
        f"faster: 1.5 times wanted, it can't be told at batch {size} without times taken in turns with the reference."
        for size in (1, 8)
    ]
    assert report.cells()[1][1][3] == "12.0 (12.2)" and report.verdict() == "2.3 times smaller, accuracy 0.970 to 0.970."


def test_the_largest_drop_holds_for_the_second_text_too() -> None:
    ms = times(10.0)
    rows = [
        Row(
            step,
            10,
            size,
            ms,
            {"perplexity": here, "perplexity_also": there},
            "perplexity",
            higher_is_better=False,
            reference_ms=ms,
        )
        for step, size, here, there in (("whole", 4.0, 31.6, 83.1), ("healed", 2.0, 31.97, 132.2))
    ]
    report = Report(rows[0], replace(rows[1], times_faster={"b1": [0.97, 1.03], "b8": [0.96, 1.02]}), on={})
    assert report.check_goal({"max_drop": 1.0}) == ["max_drop: perplexity on other text may drop by 1, it dropped by 49.1000."]
    assert [one["met"] for one in report.judge({"max_drop": 1.0})] == [True, False]
    names, cells = report.cells()
    assert names[-2:] == ["perplexity", "perplexity on other text"] and cells[1][-2:] == ["31.97 (+0.37)", "132.20 (+49.10)"]
    assert report.verdict() == (
        "2.0 times smaller, no significant difference in speed at batch 8, perplexity 31.60 to 31.97, "
        "perplexity on other text 83.10 to 132.20."
    )


def test_the_verdict_is_one_sentence() -> None:
    assert full().verdict() == (
        "6.5 times smaller, 5.0 times faster at batch 8, accuracy 0.966 to 0.972, no significant difference; "
        "by bfloat16 alone 2.0 times smaller, 3.0 times faster at batch 8."
    )
    report = story()
    for told, said in (([0.001, 0.003], "significantly better"), ([-0.02, -0.01], "significantly worse")):
        gains = {"accuracy": {"better": 0.002, "interval": told, "examples": 9}}
        report.rows[-1] = replace(report.rows[-1], gains=gains)
        assert report.verdict() == f"9.3 times smaller, 2.0 times faster at batch 8, accuracy 0.972 to 0.974, {said}."
    slow = Report(row("whole", 10.0), row("codes", 20.0, 150.0, megabytes=200.0, reference_ms=times(10.0)), on={})
    assert slow.verdict() == "2.2 times larger, 1.50 times slower at batch 8, accuracy 0.970 to 0.970."
    assert Report(row("whole", 10.0), on={}).verdict() == "Nothing was compressed."


def test_the_table_begins_with_fair_baselines_and_tells_what_the_dtype_bought() -> None:
    report = full()
    names, cells = report.cells()
    assert [line[0] for line in cells[:3]] == ["as it came", "train", "… in bfloat16"] and len(report.rows) == 5
    assert cells[2][names.index("MB")] == "45.4 (2.0x)" and cells[2][names.index("ms, batch 8")] == "33.0 (33.7) 3.0x"
    assert (
        "By bfloat16 alone: 2.0x smaller, 1.80x faster at batch 1, 3.0x faster at batch 8. "
        "By compression: 3.2x smaller, 1.12x faster at batch 1, 1.65x faster at batch 8."
    ) in report.legend()


def test_a_score_is_told_with_its_interval() -> None:
    names, cells = full().cells()
    assert cells[-1][names.index("accuracy")] == "0.9720 (+0.0060 ±0.0140)"
    assert "±: half the 95 % interval of a paired bootstrap over 500 examples." in full().legend()


def test_for_perplexity_a_rise_is_a_drop() -> None:
    other: dict[str, Any] = {"headline": "perplexity", "higher_is_better": False}
    report = Report(on={})
    for step, value in (("dense", 21.5), ("int4", 24.8)):
        report.add(Row(step, 10, 1.0, {"b1": {"min": 1.0, "median": 1.0}}, {"perplexity": value}, **other))
    assert report.drop == pytest.approx(3.3)
    assert "24.80 (+3.30)" in report.markdown()


def test_slower_rows_say_so_only_when_least_and_median_agree() -> None:
    report = story()
    assert report.rows[1].notes == ()
    assert report.rows[2].notes == (
        "slower than the step before: 1.15 times the time at batch 1, 1.12 times the time at batch 8",
    )
    names, cells = report.cells()
    assert all("slower" not in cell for cell in cells[1])
    assert cells[2][names.index("ms, batch 1")] == "14.6 (14.9) 1.64x, slower"
    whole, cut = row("whole", 10.0), {"megabytes": 45.0, "reference_ms": times(10.0, 100.0)}
    assert slower(row("a", 10.4, **cut), whole, whole) == {}
    uneven = {"b1": {"min": 10.0, "median": 20.0}, "b8": {"min": 100.0, "median": 100.0}}
    assert slower(row("a", 0, latency_ms=uneven, **cut), whole, whole) == {}
    assert slower(row("a", 10.0, 120.0, **cut), whole, whole) == {"b8": pytest.approx(1.2)}
    certain = {"times_faster": {"b1": [0.95, 1.05], "b8": [0.8, 1.01]}}
    assert slower(row("a", 10.0, 120.0, **cut, **certain), whole, whole) == {}, "the interval holds as fast as well"


def test_the_machine_is_never_taken_for_the_model() -> None:
    """All of these were timed while something else ran as well, and nothing but the machine was slower."""
    whole = row("train", 18.3, 98.3)
    busy = {"megabytes": 31.4, "reference_ms": times(36.6, 196.6)}
    assert slower(row("cut", 36.0, 190.0, **busy), whole, whole) == {}, "so was the reference beside it"
    then = row("low_rank", 9.0, 42.0, megabytes=31.4, reference_ms=times(18.3, 98.3))
    assert slower(row("cast", 18.0, 84.0, **{**busy, "megabytes": 15.7}), then, whole) == {}
    alike = row("train + distill", 20.0, 90.0, megabytes=31.4, reference_ms=times(18.3, 98.3))
    assert slower(alike, then, whole) == {}, "training changes no size and no dtype"
    report = Report(row("as it came", 17.0), row("train", 30.0), on={}, reference=1)
    assert report.rows[1].notes == () and report.cells()[1][0][3] == "17.0 (17.3)", "nobody timed these in turns"


def test_table_markdown_and_json_agree() -> None:
    report = story()
    names, cells = report.cells()
    shown = rendered(report, 160)
    assert [re.split(r" {2,}", line.strip()) for line in shown[: len(cells) + 1]] == [names, *cells]
    lines = report.markdown().splitlines()
    shown = [[cell.strip().replace("\\|", "|") for cell in line.split(" | ")] for line in lines[:5]]
    shown = [[row[0].removeprefix("| "), *row[1:-1], row[-1].removesuffix(" |")] for row in shown]
    assert shown[0] == names and shown[2][1:] == cells[0][1:] and shown[3] == cells[1]
    assert "quantize [bits \\| 4]" in lines[4]
    last = report.to_dict()["rows"][2]
    assert cells[2][names.index("MB")] == f"{last['megabytes']} (9.3x)"
    assert cells[2][names.index("params")] == f"{last['parameters'] / 1e6}M"
    assert cells[2][names.index("accuracy")] == "0.9740 (+0.0020)"
    assert cells[2][names.index("agrees")] == cells[2][-1] == "0.9900"
    assert cells[0][names.index("MB")] == "90.9" and cells[0][names.index("ms, batch 8")] == "172.0 (175.4)"


def rendered(thing: Any, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(thing.table())
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160, 200])
@pytest.mark.parametrize("make", [story, full])
def test_a_line_is_a_row_and_shows_its_score(make: Any, width: int) -> None:
    report = make()
    names, cells = report.cells()
    lines = rendered(report, width)
    assert all(len(line) <= width for line in lines)
    for line, full_cells in zip(lines[1:], cells, strict=False):
        assert line.startswith(full_cells[0][:2]), "one line a row"
        assert full_cells[names.index("accuracy")].partition(" ")[0] in line
    head = lines[0].split()
    assert ("MB" in head, "b8," in head or "batch" in head, "agrees" in head) == (width >= 60, width >= 60, width >= 100)


def test_a_wide_terminal_shows_all() -> None:
    report = full()
    names, cells = report.cells()
    assert [re.split(r" {2,}", line.strip()) for line in rendered(report, 200)[: len(cells) + 1]] == [
        names,
        *([cell for cell in line if cell] for line in cells),
    ]


def test_quickstart_columns_fit_80() -> None:
    assert [line.rstrip() for line in rendered(full(), 80)[:9]] == QUICKSTART_AT_80.splitlines()


QUICKSTART_AT_80 = """\
step                        MB      b1, ms      b8, ms                  accuracy
as it came                90.9        18.1       104.0          0.3120 (-0.6540)
train                     90.9        18.3       101.0                    0.9660
… in bfloat16      45.4 (2.0x)  10.0 1.80x   33.0 3.0x          0.9660 (+0.0000)
prune_heads       81.4 (1.12x)  14.1 1.28x  76.5 1.31x          0.9580 (-0.0080)
train + distill…   31.4 (2.9x)    9.0 2.0x   42.2 2.4x  0.9700 (+0.0040 ±0.0140)
… no teacher                                                    0.9660 (+0.0000)
… uncompressed                                                  0.9810 (+0.0150)
quantize 4         14.0 (6.5x)    8.9 2.0x   20.0 5.0x  0.9720 (+0.0060 ±0.0140)
"""


def test_what_was_asked_for_is_never_cut_off() -> None:
    """A folder of any length leaves room for its perplexity."""
    folder = "/home/somebody/models/compressed/SmolLM2-135M-Instruct-pruned-and-healed-on-the-news-of-the-BBC"
    one = Row(folder, 115_000_000, 458.4, times(156.6, 1148.7), {"perplexity": 12345.678}, "perplexity", higher_is_better=False)
    for width in (60, 80):
        lines = rendered(Report(one, on={}), width)
        assert lines[0].split()[-1] == "perplexity" and lines[1].endswith("12345.68") and len(lines[1]) <= width
        assert "of-the-BBC" in lines[1], "the end of a path tells which it is"


def test_long_names_leave_room_for_a_comparison() -> None:
    names = ("microsoft/a-model-with-a-very-long-name-indeed-v1", "out/a-model-with-a-very-long-name-indeed-compressed")
    sides = {"a": {"min": 24.0, "median": 24.5}, "b": {"min": 12.0, "median": 12.2}}
    told = {**sides, "ratio": {"min": 2.0, "median": 2.0}, "interval": [1.9, 2.1], "significant": True}
    found = Comparison(names, (10, 10), (4.0, 2.0), ({"accuracy": 0.9}, {"accuracy": 0.8}), {"b8": told}, ({}, {}), {})
    lines = rendered(found, 80)
    assert all(len(line) <= 80 for line in lines) and [line.split()[0] for line in lines[1:4]] == ["params", "MB", "ms,"]
    assert lines[3].endswith("12.00 (12.20)  2.0x faster (1.90x to 2.1x)") and "0.8000" in lines[4]
    assert all(name in rendered(found, 250)[0] for name in names)
    assert rendered(found, 250)[3].endswith(f"{names[1]} is 2.0x faster (1.90x to 2.1x)")
    narrow = rendered(found, 60)
    assert all(len(line) <= 60 for line in narrow) and {"0.9000", "0.8000", "12.00", "24.00"} <= set(" ".join(narrow).split())


def test_a_report_without_its_reference_is_told() -> None:
    with pytest.raises(CompressionError, match="the reference is row 0, and there are 0 rows"):
        Report().table()
    report = story()
    report.reference = 3
    with pytest.raises(CompressionError, match="set `reference`"):
        _ = report.smaller


# Comparing


def test_a_model_is_not_faster_than_itself() -> None:
    model = bert()
    found = [compare(model, model, Inputs()) for _ in range(5)]
    same = [one.verdict(size) == "no significant difference" for one in found for size in ("b1", "b8")]
    assert sum(same) >= 7  # an interval of 95 % leaves out the truth in one of twenty
    last = found[-1]
    assert last.parameters == (BERT, BERT) and last.score[0] == last.score[1]
    text = io.StringIO()
    Console(file=text, width=140).print(last.table())
    assert text.getvalue().count("no significant difference") == sum(same[-2:])
    assert json.loads(json.dumps(last.to_dict(), allow_nan=False))["latency_ms"]["b1"]["significant"] is not same[-2]


def test_a_model_three_times_as_wide_is_slower() -> None:
    slim, wide = bert(hidden=128, inner=512, layers=3), bert(hidden=384, inner=1536, layers=3)
    # On a busy machine "no significant difference" is an honest answer; the opposite never is.
    for _ in range(5):
        found = compare(slim, wide, Inputs(), batch_sizes=(8,), names=("slim", "wide"))
        assert "faster" not in found.verdict("b8")
        if found.latency_ms["b8"]["significant"]:
            break
    times = found.latency_ms["b8"]
    assert times["significant"] and times["ratio"]["min"] < 0.7 and times["ratio"]["median"] < 0.7
    assert found.verdict("b8").startswith("wide is ") and "slower" in found.verdict("b8")
    assert found.megabytes[1] > 3 * found.megabytes[0]


def test_three_times_the_time_is_told_as_such() -> None:
    times = _in_turns([lambda: 60.0, lambda: 20.0], pairs=5)
    assert times["ratio"] == {"min": 3.0, "median": 3.0} and times["interval"] == [3.0, 3.0] and times["significant"]


def test_models_take_turns_and_change_places() -> None:
    order: list[str] = []

    def forward(name: str) -> Any:
        def once() -> float:
            order.append(name)
            return 200.0  # slow enough for one run a sample

        return once

    found = _in_turns([forward("a"), forward("b")], pairs=4)
    assert "".join(order[6:]) == "abbaabba"
    assert found["ratio"] == {"min": 1.0, "median": 1.0} and not found["significant"]


def test_the_interval_is_seeded_and_noise_is_not_a_finding() -> None:
    noise = [0.9, 1.1, 0.95, 1.05, 1.0, 1.2, 0.85, 1.02, 0.98, 1.01, 0.99, 1.3, 0.8, 1.0, 1.04]
    assert interval(noise) == interval(noise)
    low, high = interval(noise)
    assert low <= 1 <= high and not significant({"min": 1.1, "median": 1.0}, low, high)
    clear = [2.0 + 0.1 * value for value in noise]
    low, high = interval(clear)
    assert 2.0 < low <= high < 2.2 and significant({"min": 2.0, "median": 2.1}, low, high)
    assert not significant({"min": 0.99, "median": 2.1}, low, high)  # the leasts disagree


# The picture


@pytest.mark.parametrize("report", [story(), Report(row("only", 5.0), on={})])
def test_plot_writes_a_picture(report: Report, tmp_path: Path) -> None:
    plot(report, tmp_path / "report.png")
    blob = (tmp_path / "report.png").read_bytes()
    assert blob.startswith(b"\x89PNG") and int.from_bytes(blob[16:20], "big") > 1000


def test_plot_numbers_keep_apart() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from hfcompress.results.plot import _number, _panel

    report = Report(*(row(f"step {n}", 10.0, 100 + n * 0.2, 0.97 + n * 1e-4) for n in range(6)), on={})
    figure = Figure(figsize=(6, 4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = _panel(axes, report, "ms", lambda one: one.latency_ms["b8"]["min"])
    axes.set_ylim(0.9, 1.0)
    figure.draw_without_rendering()
    _number(axes, points)
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]  # without leader lines
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4", "5", "6"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_scale_of_a_plot_is_that_of_what_was_compressed() -> None:
    from matplotlib.figure import Figure

    from hfcompress.results.plot import _legend, _panel, pace

    report = full()
    figure = Figure()
    axes = figure.subplots()
    points = _panel(axes, report, "ms", lambda one: pace(one, report, "b8"))
    assert [number for number, _, _ in points] == [2, 3, 4, 5], "an untrained head at 0.312 is left out"
    low, high = axes.get_ylim()
    assert 0.95 < low < 0.958 and 0.972 < high < 0.98
    _legend(figure, report)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == ["1  as it came (0.312, off the scale)", "2  train (reference)", "… in bfloat16 (reference)"]
    assert points[-1][1] == pytest.approx(101.0 / 5.0), "milliseconds are those of turns with the reference"
    near = Report(row("as it came", 10.0, 100.0, 0.960), *report.rows[1:], reference=1, on={})
    assert [number for number, _, _ in _panel(figure.subplots(), near, "ms", lambda one: one.megabytes)] == [1, 2, 3, 4, 5]


def test_plot_without_matplotlib_or_rows_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="no rows"):
        plot(Report(on={}), tmp_path / "report.png")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CompressionError, match="get it with: pip install matplotlib"):
        plot(story(), tmp_path / "report.png")


def test_a_gain_is_told_with_its_interval() -> None:
    """Of 200 texts one model has 20 right that the other has wrong, and 4 the other way round."""
    references, right, other = np.zeros(200, int), np.zeros(200, int), np.zeros(200, int)
    right[:4], other[10:30] = 1, 1
    columns = [{"predictions": p, "references": references, "tokens": np.ones(200, int)} for p in (right, other)]
    found = gain("accuracy", *columns)
    assert found is not None and found.better == pytest.approx(0.08) and found.examples == 200
    assert 0.03 < found.interval[0] < 0.06 < 0.1 < found.interval[1] < 0.14
    same = gain("accuracy", columns[0], columns[0])
    assert same is not None and same.better == 0 == same.interval[0] == same.interval[1]
    assert gain("f1", *columns) is None
    losses = [{"nll": np.array([1.0, 2.0, 3.0]) - shift, "tokens": np.array([5, 1, 4])} for shift in (0.1, 0.0)]
    lower = gain("perplexity", *losses)
    assert lower is not None and lower.better == pytest.approx(math.exp(1.9) - math.exp(1.8))
    assert lower.interval[0] > 0


def test_a_control_stands_below_its_row() -> None:
    told = {"score": {"accuracy": 0.9}, "seconds": 1.0, "better": 0.05, "interval": (-0.01, 0.11), "examples": 100}
    times = {"b1": {"min": 1.0, "median": 1.0}}
    first = Row("as it came", 10, 1.0, times, {"accuracy": 0.97}, "accuracy")
    row = Row("train + distill", 10, 1.0, times, {"accuracy": 0.95}, "accuracy", control=told)
    report = Report(first, row)
    names, cells = report.cells()
    assert cells[2] == ["… without teacher", "", "", "", "0.9000 (-0.0700)"] and len(names) == 5
    paid = Report(first, replace(row, control=None, uncompressed=told | {"better": -0.02, "interval": (-0.03, -0.01)}))
    assert paid.cells()[1][2] == ["… uncompressed, trained alike", "", "", "", "0.9000 (-0.0700)"]
    assert paid.legend().endswith(
        "train + distill: accuracy is 0.0200 worse than that of the uncompressed model trained alike "
        "(95 % -0.0300 to -0.0100 over 100 examples: significant)."
    )
    assert report.legend().endswith(
        "train + distill: with the teacher accuracy is 0.0500 better than without "
        "(95 % -0.0100 to +0.1100 over 100 examples: no significant difference)."
    )
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).cells() == (names, cells)


def test_ratios_are_told_by_times_taken_in_turns() -> None:
    """The machine was twice as slow when the second row was measured; the reference was timed again beside it."""
    times = [{"b1": {"min": ms, "median": ms}} for ms in (10.0, 10.0, 20.0)]
    first = Row("as it came", 10, 1.0, times[0], {"accuracy": 1.0}, "accuracy")
    report = Report(first, Row("cut", 10, 1.0, times[1], {"accuracy": 1.0}, "accuracy", reference_ms=times[2]))
    assert report.faster == {"b1": 2.0}
    slow, fast = Waiting(0.004), Waiting(0.001)
    row = measure(fast, Inputs(), "x", score=lambda _: {"accuracy": 1.0}, beside=slow)
    assert row.reference_ms is not None and row.times_faster is not None
    assert set(row.times_faster) == {"b1", "b8"} and all(2 < low <= high < 6 for low, high in row.times_faster.values())
    assert all(2 < row.reference_ms[batch]["min"] / row.latency_ms[batch]["min"] < 6 for batch in ("b1", "b8"))


class Waiting(torch.nn.Linear):
    """A model that takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(2, 2)
        self.seconds = seconds

    def forward(self, *_: Any, **__: Any) -> None:
        time.sleep(self.seconds)
