"""Files written whole or not at all; what the system refuses to write, told as a sentence."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from hfcompress.checkpoint.errors import CompressionError, first_line


@contextmanager
def written(place: str | Path, what: str) -> Iterator[None]:
    """A full disk, a limit on the size of files, a folder that may not be written to: a CompressionError that says what could
    not be written there. `place`: the folder or the file. `what`: as in "the model"."""
    try:
        yield
    except Exception as error:
        # The writers in Rust have errors of their own, the tokenizers' is a plain Exception: they tell the system's number.
        if not isinstance(error, OSError | SafetensorError) and "(os error" not in str(error):
            raise
        raise CompressionError(
            f"{place}: {what} can't be written there ({first_line(error)}); free some space or choose another place, then do "
            f"the same again: a run goes on after its last finished step."
        ) from error


def write_text(path: str | Path, text: str, what: str) -> None:
    """Put a text into a file, in the place of what was there only when it is whole. CompressionError as `written` tells it."""
    part = Path(path).with_name(f"{Path(path).name}.{uuid4().hex}.part")  # another process may be writing the same
    with written(path, what):
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def scratch_beside(place: Path) -> Iterator[Path]:
    """A hidden folder on the disk of a place, for what is moved there when it is whole; removed afterwards, and so are those
    that processes which were killed have left there: the system has freed their locks."""
    prefix, held = f".{place.name}-", "in-use.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob(f"{glob.escape(prefix)}*/{held}"):
        with suppress(Timeout, OSError, NotImplementedError), FileLock(left, timeout=0):
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=place.parent, prefix=prefix))
    lock = FileLock(folder / held)
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)
