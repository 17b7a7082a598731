"""Laws of the report: counts by hand, bytes as on disk, the model undisturbed, one set of cells, honest comparisons."""

from __future__ import annotations

import builtins
import copy
import io
import json
import math
import time
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
from hfcompress.results.compare import _in_turns, compare, interval, significant
from hfcompress.results.plot import plot
from hfcompress.results.report import Report, Row, machine, measure, slower, weigh
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


def row(step: str, b1: float, b8: float = 100.0, score: float = 0.97, **other: Any) -> Row:
    fields: dict[str, Any] = {
        "parameters": 22_700_000,
        "megabytes": 90.9,
        "latency_ms": {"b1": {"min": b1, "median": b1 * 1.02}, "b8": {"min": b8, "median": b8 * 1.02}},
        "score": {"accuracy": score, "agreement": 0.99},
        "headline": "accuracy",
    }
    return Row(step=step, **(fields | other))


def story() -> Report:
    return Report(
        row("fine-tuned", 24.0, 172.0, 0.972),
        row("prune_heads (ratio: 0.5)", 12.7, 75.0, 0.960, megabytes=69.6, parameters=17_400_000),
        row("quantize [bits | 4]", 14.6, 84.0, 0.974, megabytes=9.8, parameters=17_400_000, peak_memory_megabytes=50.0),
        on={"cpu": "some"},
    )


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
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
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
    report = story()
    report.reference = 1
    report.add(measure(bert(), Inputs(), "measured", seconds=2.0))
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.rows == report.rows and again.to_dict() == report.to_dict()
    data = json.loads((tmp_path / "report.json").read_text())
    assert list(data) == ["format", "machine", "reference", "rows"] and (data["format"], data["reference"]) == (1, 1)
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


@pytest.mark.parametrize(
    ("text", "told"),
    [
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
    assert slower(row("a", 10.4), row("b", 10.0)) == []
    uneven = {"b1": {"min": 10.0, "median": 20.0}, "b8": {"min": 100.0, "median": 100.0}}
    assert slower(row("a", 0, latency_ms=uneven), row("b", 10.0)) == []
    assert slower(row("a", 10.0, 120.0), row("b", 10.0)) == ["b8"]


def test_table_markdown_and_json_agree() -> None:
    report = story()
    names, cells = report.cells()
    table = report.table()
    assert [str(column.header) for column in table.columns] == names
    assert [[str(cell) for cell in column.cells] for column in table.columns] == [list(c) for c in zip(*cells, strict=True)]
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


@pytest.mark.parametrize("width", [80, 160])
def test_no_figure_is_cut_off_in_a_terminal(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(story().table())
    text = out.getvalue()
    for figure in ("17.4M", "(9.3x)", "(175.4)", "(+0.0020)", "0.9900", "[bits", "slower"):
        assert figure in text
    assert any(line.rstrip().endswith("0.9900") for line in text.splitlines())


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
    found = compare(model, model, Inputs())
    assert found.verdict("b1") == found.verdict("b8") == "no significant difference"
    assert found.parameters == (BERT, BERT) and found.score[0] == found.score[1]
    text = io.StringIO()
    Console(file=text, width=140).print(found.table())
    assert text.getvalue().count("no significant difference") == 2
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["latency_ms"]["b1"]["significant"] is False


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
    points = _panel(axes, report, "ms", [one.latency_ms["b8"]["min"] for one in report.rows])
    axes.set_ylim(0.9, 1.0)
    figure.draw_without_rendering()
    _number(axes, points)
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]  # without leader lines
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4", "5", "6"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_plot_without_matplotlib_or_rows_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="no rows"):
        plot(Report(on={}), tmp_path / "report.png")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CompressionError, match=r"hfcompress\[plots\]"):
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
    assert row.reference_ms is not None
    assert all(2 < row.reference_ms[batch]["min"] / row.latency_ms[batch]["min"] < 6 for batch in ("b1", "b8"))


class Waiting(torch.nn.Linear):
    """A model that takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(2, 2)
        self.seconds = seconds

    def forward(self, *_: Any, **__: Any) -> None:
        time.sleep(self.seconds)
