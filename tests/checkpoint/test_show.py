"""`hfcompress show` and `hfcompress verify` on folders that are whole, and on folders that anybody may have made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hfcompress import CompressionError, LowRank
from hfcompress.checkpoint.artifact import save
from hfcompress.run import cli
from tests.tiny import tiny_model

BOMB = "\x1b]0;owned\x07\x1b[2J\u202e"


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = tiny_model("bert")
    LowRank(rank=4, target_modules=["query"]).run(model, None)
    save(model, None, tmp_path)
    monkeypatch.setattr(cli, "console", Console(width=200, highlight=False))
    return tmp_path


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **changes}))
    return told


def test_what_was_changed_is_shown(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.show(str(whole))
    shown = capsys.readouterr().out
    assert "BertForSequenceClassification, bert" in shown
    assert "low_rank_linear, bias True, in_features 64, out_features 64, rank 4" in shown


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization_config": [1]}, "config.json: quantization_config = [1] is no mapping; save the model again."),
        (
            {"quantization_config": {"quant_method": "hfcompress"}},
            "config.json: modules = None must map module names to edits; save the model again.",
        ),
        (
            {"quantization_config": {"quant_method": "hfcompress", "modules": {"a": 1}}},
            "config.json: modules = {'a': 1} must map module names to edits; save the model again.",
        ),
    ],
    ids=["list", "nothing", "number"],
)
def test_a_damaged_config_is_a_sentence(whole: Path, changes: dict[str, Any], says: str) -> None:
    config(whole, **changes)
    with pytest.raises(CompressionError) as error:
        cli.show(str(whole))
    assert str(error.value) == f"{whole}/{says}"


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 5000, b'{"a": ' + b"9" * 5000 + b"}"], ids=range(6))
@pytest.mark.parametrize("name", ["config.json", "report.json"])
def test_what_is_no_json_is_a_sentence(whole: Path, name: str, text: bytes) -> None:
    (whole / name).write_bytes(text)
    with pytest.raises(CompressionError) as error:
        cli.show(str(whole))
    assert str(error.value).startswith(f"{whole / name}: ") and len(str(error.value).removeprefix(str(whole))) < 250
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("report", [{"rows": 5}, {"rows": [1]}, {"rows": [{}]}, {"rows": [{"step": BOMB}]}], ids=str)
def test_a_damaged_report_is_a_sentence(whole: Path, report: Any) -> None:
    (whole / "report.json").write_text(json.dumps(report))
    with pytest.raises(CompressionError):
        cli.show(str(whole))


def strings(value: Any) -> Iterator[str]:
    """Every string of a config in turn, replaced by what a terminal would obey."""
    text = json.dumps(value)
    for part in {text.split('"')[i] for i in range(1, text.count('"'), 2)}:
        yield text.replace(f'"{part}"', json.dumps(BOMB))


def test_nothing_of_a_file_is_obeyed_by_the_terminal(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = config(whole)
    small = {key: told[key] for key in ("architectures", "model_type")}
    modules = dict(list(told["quantization_config"]["modules"].items())[:1])
    small["quantization_config"] = {**told["quantization_config"], "modules": modules}
    for text in strings(small):
        (whole / "config.json").write_text(text)
        try:
            cli.show(str(whole))
        except CompressionError as error:
            assert "\x1b" not in str(error)
    out = capsys.readouterr().out
    assert "owned" in out and not set(out) & {"\x1b", "\x07", "\u202e"}


def test_verify_says_what_it_checked(whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cli.verify(str(whole))
    assert capsys.readouterr().out == f"{whole}: whole, as it was saved\n"
    (whole / "checksums.json").unlink()
    cli.verify(str(whole))
    assert capsys.readouterr().out.startswith(f"{whole}: whole, but nothing tells whether its values were changed")
    (whole / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-100])
    monkeypatch.setattr("sys.argv", ["hfcompress", "verify", str(whole)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "it can't be loaded" in capsys.readouterr().err
