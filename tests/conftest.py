import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True)
def a_logger_as_it_came() -> Iterator[None]:
    """The command line sets our logger up for itself: what one test does to it must not reach the next."""
    ours = logging.getLogger("hfcompress")
    before = ours.level, ours.propagate, list(ours.handlers)
    yield
    ours.level, ours.propagate, ours.handlers = before
