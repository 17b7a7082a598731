"""What the system refuses to write is a sentence, whoever writes; what was there before stays."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hfcompress import CompressionError
from hfcompress.calibration.score_file import save_scores
from hfcompress.checkpoint.writing import scratch_beside, write_text, written
from hfcompress.results.plot import plot
from hfcompress.results.report import Report
from hfcompress.surgery.units.verify import units_of
from tests.checkpoint.test_artifact import files_up_to
from tests.tiny import tiny_model

REPORT = Path(__file__).parents[1] / "results" / "written-before.json"
END = "; free some space or choose another place, then do the same again: a run goes on after its last finished step."


def _scores(path: Path) -> None:
    model = tiny_model("bert")
    units = units_of(model, "neurons")
    save_scores(str(path), model, units, [torch.ones(some.shape) for some in units])


@pytest.mark.parametrize(
    ("what", "writes"),
    [
        ("the report", lambda path: Report.load(REPORT).save(path)),
        ("the plot", lambda path: plot(Report.load(REPORT), path)),
        ("the scores", _scores),
        ("the text", lambda path: write_text(path, "x" * 1000, "the text")),
    ],
)
def test_every_writer_tells_it_in_a_sentence(what: str, writes: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with files_up_to(100), pytest.raises(CompressionError) as error:
        writes(path)
    told = str(error.value)
    assert told.startswith(f"{path}: {what} can't be written there (") and "File too large" in told
    assert told.endswith(END) and len(told.splitlines()) == 1
    writes(path)
    assert path.stat().st_size > 100


def test_what_was_there_stays_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")
    with files_up_to(100), pytest.raises(CompressionError):
        write_text(path, "x" * 1000, "the report")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_only_what_the_system_refuses_is_told_so() -> None:
    with pytest.raises(KeyError), written("there", "the model"):
        raise KeyError("a fault of ours")
    for error in (Exception("I/O error: Permission denied (os error 13)"), PermissionError(errno.EACCES, "Permission denied")):
        with pytest.raises(CompressionError) as told, written("there", "the model"):
            raise error
        assert str(told.value) == f"there: the model can't be written there ({error}){END}"


def test_what_killed_processes_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    place = tmp_path / "an [export]"
    left, other = tmp_path / f".{place.name}-dead", tmp_path / f".{place.name}-somebody"
    for folder in (left, other):
        folder.mkdir()
    (left / "in-use.lock").touch()
    (other / "notes.txt").touch()
    with scratch_beside(place) as first, scratch_beside(place) as second:
        assert first.is_dir() and second.is_dir() and first.parent == second.parent == tmp_path
        assert other.is_dir() and not left.exists()
    with pytest.raises(ValueError, match="stop"), scratch_beside(place):
        raise ValueError("stop")
    assert [*tmp_path.iterdir()] == [other]
