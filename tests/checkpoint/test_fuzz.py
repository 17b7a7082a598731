"""A few random alterations of saved models (`make fuzz` tries thousands): each is refused, or the model computes what it did."""

from __future__ import annotations

from pathlib import Path

from scripts.fuzz_artifacts import fuzz


def test_altered_artifacts_are_refused_or_compute_the_same(tmp_path: Path) -> None:
    counts, wrong = fuzz(list(range(60)), tmp_path)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == 60 and counts["refused in a sentence"] > 5 and counts["unchanged"] > 2, counts
