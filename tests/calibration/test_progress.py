"""Progress is a bar in a terminal, and lines in a log file, a pipe or a notebook."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import hfcompress.calibration.progress as progress_module
from hfcompress.calibration.progress import progress
from hfcompress.run.train import _Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was written where there is no terminal, with a line every 10 milliseconds."""
    monkeypatch.setattr(progress_module, "EVERY", 0.01)
    return lambda: capsys.readouterr().err


def test_a_log_file_gets_whole_lines(log: Callable[[], str]) -> None:
    for _ in progress(range(4), what="scoring", total=4):
        time.sleep(0.02)
    written = log()
    lines = written.splitlines()
    assert [line[: line.index("done") + 4] for line in lines] == [f"scoring: {share} % done" for share in (25, 50, 75, 100)][
        : len(lines)
    ]
    assert len(lines) >= 3 and all(re.fullmatch(r"scoring: \d+ % done, 00:00 left", line) for line in lines)
    assert "\r" not in written


def test_what_is_short_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(4), what="scoring", total=4)) == [0, 1, 2, 3]
    assert capsys.readouterr().err == "" and progress_module.EVERY == 30


def test_without_a_total_it_counts_and_only_one_process_speaks(log: Callable[[], str]) -> None:
    for shown in (True, False):
        bar = progress(what="recording", shown=shown)
        time.sleep(0.02)
        bar.update(7)
        bar.close()
    assert log() == "recording: 7 done\n"


def test_training_tells_its_loss(log: Callable[[], str]) -> None:
    bar, state = _Bar(), SimpleNamespace(is_local_process_zero=True, max_steps=100)
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 0.51234})
    time.sleep(0.02)
    bar.on_step_end(None, state, None)
    bar.on_train_end(None, state, None)
    assert re.fullmatch(r"training: 1 % done, 00:0\d left, loss=0.512\n", log())


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    for _ in progress(range(3), what="scoring", total=3):
        time.sleep(0.11)
    assert "scoring" in screen.getvalue() and "|" in screen.getvalue() and "\r" in screen.getvalue()
