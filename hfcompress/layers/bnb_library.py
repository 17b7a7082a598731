"""bitsandbytes itself, without what it says and asks of the network."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


def library() -> Any:
    """bitsandbytes, imported without its look over the network for a kernel, which comes with a warning, whenever the processor
    has AVX512-BF16: it has one of its own for that."""
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    logger, absent = logging.getLogger("bitsandbytes.backends.cpu.ops"), object()
    before, level = sys.modules.get("kernels", absent), logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # as if it were not installed
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes

        return bitsandbytes
    finally:
        logger.setLevel(level)
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


def import_first() -> None:
    """Import it, if it is installed, before transformers or peft does."""
    if find_spec("bitsandbytes"):
        library()


@contextmanager
def quiet_casts() -> Iterator[None]:
    """Without the line that bitsandbytes logs for every cast of every layer at every forward."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")

    def quiet(record: logging.LogRecord) -> bool:
        return "inputs will be cast" not in record.getMessage()

    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)
