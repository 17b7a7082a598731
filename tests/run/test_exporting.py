"""Exports by the command line and by recipes: folders that the runtimes load alone, measured beside PyTorch, pushed whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer
from transformers.exporters import ExportedModel
from typer.testing import CliRunner

from hfcompress import CompressionError, Recipe, compress, export_model
from hfcompress.export import FORMATS
from hfcompress.export.served import Served
from hfcompress.results.report import Report
from hfcompress.results.saved_files import other_files
from hfcompress.run.cli import app
from hfcompress.run.exporting import export_lines, format_of, verify_export
from hfcompress.tasks.pretrained import open_model
from tests.export.models import byte_tokenizer
from tests.tiny import SPECIAL, WORDS, tiny_checkpoint, tiny_model, tiny_texts

PAIRS = ("cat", "dog", "bank", "goal", "team", "tax")
STEPS = [
    {"prune_heads": {"ratio": 0.5, "scores": "l1"}},
    {"quantize": {"bits": 8, "engine": "hfcompress", "embeddings": 8}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_texts(folder / "texts")
    tiny_checkpoint(folder / "bert", "bert")
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """A recipe that exports what it made."""
    told = {"name": "text-classification", "dataset": str(place / "texts"), "max_length": 32}
    recipe = Recipe.from_dict({"model": str(place / "bert"), "task": told, "steps": STEPS, "export": ["openvino"]})
    compress(recipe, place / "small")
    return place / "small"


def test_a_recipe_exports_what_it_made(made: Path) -> None:
    report = Report.load(made / "report.json")
    assert [row.step for row in report.rows] == ["as it came", "prune_heads 0.5", "quantize 8", "export openvino"]
    served, coded = report.rows[-1], report.rows[-2]
    assert served.score["accuracy"] == pytest.approx(coded.score["accuracy"], abs=0.02) and served.reference_ms is not None
    assert set(served.score) == set(coded.score), (served.score, coded.score)
    assert served.parameters == coded.parameters and served.settings["dtype"] == "float32"
    told = json.loads((made / "openvino" / "exported.json").read_text())
    assert told["to"] == "openvino" and told["agreement"]["off"] < 1e-3
    assert other_files(made) == [], "all of it is part of the saved model, and is pushed"
    recipe = Recipe.load(str(made / "recipe.yaml"))
    assert [one.key() for one in recipe.export] == ["openvino"] and Recipe.from_dict(recipe.to_dict()) == recipe


def test_an_export_loads_without_us_and_by_its_snippet(made: Path) -> None:
    folder, texts = made / "openvino", ["the cat and the dog", "a bank"]
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    program = code.replace('["a text", "another, longer text"]', repr(texts))
    program += "\nimport sys\nassert 'hfcompress' not in sys.modules\nprint(logits.tolist())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=made)
    assert run.returncode == 0, run.stderr[-600:]
    model = open_model(made)
    inputs = Recipe.load(str(made / "recipe.yaml")).task.open(str(made)).processor(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout.splitlines()[-1])), expected, atol=1e-3, rtol=1e-3)
    found = ExportedModel.from_pretrained(folder)(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_command_line_takes_and_gives_exports(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    told = CliRunner().invoke(app, ["export", str(made), "--to", "onnx", "--output", str(out)])
    assert told.exit_code == 0, told.output
    assert f"exported to {out}" in " ".join(told.output.split())
    assert isinstance(open_model(out), Served) and isinstance(
        open_model(out, Recipe.load(str(out / "recipe.yaml")).task), Served
    )
    for command in (["eval", str(out)], ["compare", str(made), str(out)]):
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 0 and "accuracy" in told.output, told.output
    again = CliRunner().invoke(app, ["export", str(made), "--to", "onnx", "--output", str(out)])
    assert again.exit_code == 1 and "pass --overwrite to replace it, or choose another --output" in str(again.exception)
    assert CliRunner().invoke(app, ["export", str(made), "--to", "onnx", "--output", str(out), "--overwrite"]).exit_code == 0


def test_show_and_verify_know_an_export(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "openvino"
    shutil.copytree(made / "openvino", folder)
    told = CliRunner().invoke(app, ["show", str(folder)]).output
    assert "an export to openvino, which its runtime loads alone" in told and "off from what PyTorch says by" in told
    assert CliRunner().invoke(app, ["verify", str(folder)]).output.split(": ")[1] == "whole, as it was saved\n"
    weights = folder / "openvino_model.bin"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    with pytest.raises(CompressionError, match="bin: it is not the file that was saved, its checksum is another"):
        verify_export(folder)
    (folder / "checksums.json").unlink()
    assert verify_export(folder) is False
    (folder / "openvino_model.xml").write_text("<net>")
    with pytest.raises(CompressionError, match="openvino can't open it"):
        verify_export(folder)


def test_segments_of_pairs_are_read(place: Path, tmp_path: Path) -> None:
    rows = [
        {"one": f"the {a}", "two": f"a {b} of the {b}", "label": "same" if a == b else "other"} for a in PAIRS for b in PAIRS
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "name": "text-classification",
        "dataset": str(tmp_path / "pairs.jsonl"),
        "text_column": "one",
        "text_pair_column": "two",
    }
    tiny = tiny_model("bert", num_labels=2)
    tiny.bert.embeddings.token_type_embeddings.weight.data *= 50  # so that segments are felt
    tiny.save_pretrained(tmp_path / "bert")
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate([*SPECIAL, *WORDS])})
    tokenizer.save_pretrained(tmp_path / "bert")
    out = export_model(tmp_path / "bert", "onnx", task=task)
    served, model = open_model(out), open_model(tmp_path / "bert")
    batch = (
        Recipe.from_dict({"model": "x", "task": task, "steps": ["cast"]})
        .task.open(str(tmp_path / "bert"))
        .processor("the cat", "a dog", return_tensors="pt")
    )
    assert batch["token_type_ids"].any()
    with torch.no_grad():
        expected, blind = model(**batch).logits, model(**{**batch, "token_type_ids": 0 * batch["token_type_ids"]}).logits
    assert (blind - expected).abs().max() > 1e-4
    torch.testing.assert_close(served(**batch).logits, expected, atol=1e-5, rtol=1e-4)


def test_inputs_that_a_graph_never_saw_are_refused(made: Path) -> None:
    served = Served(made / "openvino")
    ids = torch.tensor([[2, 5, 6, 3]])
    assert served(input_ids=ids, attention_mask=torch.ones_like(ids), surprise=torch.zeros(1)).logits.shape == (1, 3)
    with pytest.raises(
        CompressionError, match="the graph was traced without surprise, which these inputs hold; it takes input_ids"
    ):
        served(input_ids=ids, attention_mask=torch.ones_like(ids), surprise=torch.ones(1))


def test_a_gguf_needs_no_task(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=600)
    model.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    out = export_model(tmp_path / "llama", "gguf", type="F16")
    assert out == tmp_path / "llama" / "gguf" and (out / "model.gguf").is_file() and (out / "Modelfile").is_file()
    assert verify_export(out) is True and export_lines(out)[0] == "an export to gguf, which its runtime loads alone"
    assert "xllamacpp" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("to", "fields", "sentence"),
    [
        ("openvinno", {}, "export: unknown format 'openvinno'. Did you mean 'openvino'?"),
        ("gguf", {"typ": "F16"}, "export.gguf: unknown key 'typ'. Did you mean 'type'?"),
        ("openvino", {"quantize": "int4"}, "export.openvino.quantize = 'int4': input should be 'int8'."),
        ("openvino", {"samples": 0}, "export.openvino.samples = 0: input should be greater than 0."),
    ],
)
def test_a_mistake_has_its_sentence(to: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CompressionError) as told:
        format_of(to, fields)
    assert str(told.value) == sentence


def test_mistakes_of_a_recipe_are_shown_at_once() -> None:
    raw = {
        "model": "x",
        "task": {"name": "causal-lm", "dataset": "x.txt"},
        "steps": ["cast"],
        "export": ["onx", {"gguf": 4}, 7],
    }
    with pytest.raises(CompressionError) as told:
        Recipe.from_dict(raw)
    assert str(told.value).splitlines() == [
        "recipe: export.0: unknown format 'onx'. Did you mean 'onnx'?",
        "recipe: export.1.gguf: its fields must be a mapping, as in {type: Q8_0}, not 4.",
        "recipe: export.2: a format is one name with its fields, as in `- gguf: {type: Q8_0}`, not 7.",
    ]


def test_one_format_may_be_asked_for_with_and_without_rounding_but_not_twice() -> None:
    raw = {"model": "x", "task": {"name": "causal-lm", "dataset": "x.txt"}, "steps": ["cast"]}
    both = Recipe.from_dict({**raw, "export": ["openvino", {"openvino": {"quantize": "int8"}}, {"onnx": {"quantize": "int8"}}]})
    assert [one.place for one in both.export] == ["openvino", "openvino-int8", "onnx-int8"]
    with pytest.raises(CompressionError) as told:
        Recipe.from_dict({**raw, "export": ["openvino", {"gguf": {"type": "Q8_0"}}, {"gguf": {"type": "Q4_1"}}, "openvino"]})
    assert str(told.value).splitlines() == [
        f"recipe: export.{number}: {place} is asked for by export.{first} already, and has one folder; leave one out, or write the "
        f"other with: hfcompress export ... --output."
        for number, place, first in ((2, "gguf", 1), (3, "openvino", 0))
    ]


def test_what_is_no_export_is_never_replaced(made: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CompressionError, match="which is no export of hfcompress; choose another --output"):
            export_model(made, "onnx", tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_missing_runtime_is_asked_for(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("hfcompress.export.base.find_spec", lambda name: None if name == "openvino" else find_spec(name))
    with pytest.raises(CompressionError) as told:
        export_model(made, "openvino", tmp_path / "out")
    assert str(told.value) == (
        "export to openvino: openvino can't be imported here; get it with: pip install openvino, or all that exports need with: "
        "pip install '.[export]' in a checkout."
    )


def test_a_model_that_needs_remote_code_is_refused(place: Path, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    told = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.MyConfig", "AutoModelForSequenceClassification": "code.Mine"},
    }
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(CompressionError, match="can't be loaded"):
        export_model(folder, "onnx", tmp_path / "out", task=Recipe.load(str(made / "recipe.yaml")).task)


def test_a_damaged_export_says_so(made: Path, tmp_path: Path) -> None:
    (tmp_path / "exported.json").write_text("{")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CompressionError, match=r"exported\.json'?: it is damaged"):
        open_model(tmp_path)


def test_every_format_is_explained() -> None:
    for name in FORMATS:
        told = CliRunner().invoke(app, ["explain", name])
        assert told.exit_code == 0 and "Needs:" in told.output
