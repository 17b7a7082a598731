import logging
import os
from collections.abc import Iterator

import pytest

from tests import fresh

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True)
def a_logger_as_it_came() -> Iterator[None]:
    """The command line sets our logger up for itself: what one test does to it must not reach the next."""
    ours = logging.getLogger("hfcompress")
    before = ours.level, ours.propagate, list(ours.handlers)
    yield
    ours.level, ours.propagate, ours.handlers = before


@pytest.fixture(autouse=True, scope="session")
def proofs_are_quick() -> None:
    """The process that proves a save is as fresh, without the seconds that its imports take: see tests/fresh.py. Those of
    tests/checkpoint/test_artifact.py are the real ones."""
    from hfcompress.checkpoint import proof

    proof.subprocess = fresh  # type: ignore[assignment]
