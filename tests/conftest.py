import gc
import logging
import os
from collections.abc import Iterator

import pytest

from tests import fresh

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_collection_finish() -> None:
    """What was imported stays: to look through it for garbage takes half a second every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def reports_are_quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """What tiny models take tells nothing: three runs of each, and no pictures of them. In tests/results both are as they are, and
    in fixtures of whole modules, such as the run that tests/run/test_run.py looks at."""
    with pytest.MonkeyPatch.context() as patch:
        if "results" not in request.path.parts:
            patch.setattr("hfcompress.results.measure.REPETITIONS", {1: 3, 8: 3})
            patch.setattr("hfcompress.run.loop.add_compiled", lambda *_: None)  # half a minute of a compiler's
            for name in ("plot", "plot_layers"):
                patch.setattr(f"hfcompress.run.loop.{name}", lambda _, path: path.touch())
        yield


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
