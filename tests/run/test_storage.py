"""`storage: packed` in a recipe: the artifact is packed, its row says how small it is, and everything reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import hfcompress  # noqa: F401
from hfcompress import Recipe, compress
from hfcompress.checkpoint.show import described
from hfcompress.checkpoint.verify import verify
from hfcompress.results.load_snippet import load_section
from hfcompress.run.cli import app
from tests.checkpoint.test_packed import tensors_in
from tests.methods.test_laws import logits
from tests.tiny import tiny_checkpoint, tiny_texts


@pytest.fixture(scope="module")
def packed(tmp_path_factory: Any) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("packed")
    raw: dict[str, Any] = {
        "model": str(tiny_checkpoint(folder / "bert", "bert")),
        "task": {"name": "text-classification", "max_length": 32, "dataset": str(tiny_texts(folder / "texts"))},
        "steps": [{"prune_neurons": {"ratio": 0.5, "scores": "l2"}}, {"quantize": {"bits": 8, "engine": "hfcompress"}}],
        "storage": "packed",
        "goal": {"smaller": 1.5},
    }
    return folder, compress(Recipe.from_dict(raw), folder / "out")


def test_the_report_ends_with_the_bytes_on_disk(packed: tuple[Path, Any]) -> None:
    folder, report = packed
    *_, before, last = report.rows
    assert last.step == "storage packed" and last.score == before.score and last.parameters == before.parameters
    size = (folder / "out" / "model.safetensors").stat().st_size
    assert last.megabytes == size / 1e6 < before.megabytes
    assert f"{report.rows[0].megabytes / last.megabytes:.1f}"[0] in report.verdict()


def test_it_is_packed_and_what_reads_artifacts_reads_it(packed: tuple[Path, Any]) -> None:
    out = packed[0] / "out"
    assert all(one.dim() == 1 for one in tensors_in(out).values())
    verify(out)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert logits(model, "bert").isfinite().all()
    lines = [line for line in described(out) if isinstance(line, str)]
    assert any(line.startswith("packed: ") and "bits an element" in line for line in lines)
    told = load_section(out, "me/packed")
    assert "import hfcompress" in told and "pip install constriction" in told


def test_eval_and_compare_tell_what_it_takes_on_disk(packed: tuple[Path, Any]) -> None:
    out = packed[0] / "out"
    size = (out / "model.safetensors").stat().st_size / 1e6
    for digits, arguments in ((3, ["eval", str(out)]), (2, ["compare", str(packed[0] / "bert"), str(out)])):
        said = CliRunner().invoke(app, arguments)
        assert said.exit_code == 0, said.output
        assert f"{size:.{digits}f}" in said.output


def test_it_can_be_compressed_again_and_is_plain_then(packed: tuple[Path, Any]) -> None:
    folder, _ = packed
    raw = {
        "model": str(folder / "out"),
        "task": {"name": "text-classification", "max_length": 32, "dataset": str(folder / "texts")},
        "steps": [{"quantize": {"bits": 4, "engine": "hfcompress"}}],
    }
    compress(Recipe.from_dict(raw), folder / "again")
    assert any(one.dim() == 2 for one in tensors_in(folder / "again").values())
