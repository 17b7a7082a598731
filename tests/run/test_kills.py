"""A run that is killed again and again, while it trains, codes, saves, proves and pushes, ends as if nobody had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_test.py"


def test_a_run_killed_in_every_phase_ends_as_one_that_was_not() -> None:
    """The end of scripts/kill_test.py, which kills more often: the same hashes, the push made up, nothing left over."""
    command = [sys.executable, str(SCRIPT), "--chain", "--kills", "4", "--seed", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    for words in ("SIGKILL", "SIGINT", "SIGTERM", "'step 1 of 2'", "'step 2 of 2'", "'saving'", "'pushing'"):
        assert words in run.stdout
    assert run.stdout.endswith("4 kills, 0 faults\n")
