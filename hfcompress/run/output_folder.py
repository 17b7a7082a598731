"""The output folder: what may be written and replaced, one run at a time, and all of it found before anything is computed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.results.saved_files import other_files

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNFINISHED = r"recipe\.yaml|report\.json|inputs\.json|own-text\.safetensors|[\w.]+\.part|step-\d+|artifact|replaced"
"""What a run leaves in its OUT.partial."""


def output_folder(given: str | Path) -> Path:
    """The path that was meant: `~` is a home, and `.` has a name."""
    text = str(given)
    try:
        path = Path(text).expanduser()
        path = path if path.name not in ("", "..") else path.resolve()
    except (RuntimeError, ValueError, OSError) as error:  # no such user, no such path
        raise CompressionError(f"output_dir {shown(text)}: {error}; choose another output_dir=....") from error
    if not text.strip() or "\0" in text or not path.name:
        raise CompressionError(f"output_dir {shown(text)}: it names no folder; write one, as in output_dir=out/small.")
    return path


def partial(out: Path) -> Path:
    """Where a run works until its result is whole."""
    return out.with_name(out.name + ".partial")


def check_place(out: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse a place that no result can be moved into, and one that is, holds or lies in what the run reads."""
    where = _where(out)
    reads = {"the working folder": Path.cwd(), **{f"the recipe's {name}": path for name, path in inputs.items()}}
    for place in (out, partial(out)):
        told = where if place is out else f"{where}: {place.name}"
        if place.is_symlink():
            raise CompressionError(f"{told}: it is a link, and a result can't take its place; name where it leads, or another.")
        if os.path.ismount(place):
            raise CompressionError(f"{told}: it is a mount point, and a result can't take its place; name a folder in it.")
        if place.exists() and not place.is_dir():
            raise CompressionError(f"{told}: it is a file; choose another output_dir=....")
        target = Path(os.path.realpath(place))
        for name, path in reads.items():
            real = Path(os.path.realpath(path))
            inside = name != "the working folder" and real.is_dir() and real in target.parents
            word = "is" if target == real else "holds" if target in real.parents else "lies in" if inside else None
            if word:
                raise CompressionError(f"{told}: it {word} {name} ({shown(str(path))}); choose another output_dir=....")


def check_free(out: Path, overwrite: bool) -> None:
    """Only a result of ours is replaced, and only when that was asked for."""
    where, work = _where(out), partial(out)
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise CompressionError(
                f"{where}: something else lies there; choose another output_dir=..., or pass --overwrite to replace it."
            )
        if not all((out / name).is_file() for name in ("recipe.yaml", "report.json")):
            raise CompressionError(
                f"{where}: what lies there is no result of hfcompress (no recipe.yaml and report.json), and --overwrite "
                f"replaces nothing else; choose another output_dir=..., or empty it yourself."
            )
        if others := other_files(out):
            raise CompressionError(
                f"{where}: beside a result it holds {_few(others)}, which hfcompress did not write; move that away, or choose "
                f"another output_dir=...."
            )
    if work.is_dir() and (others := [path.name for path in work.iterdir() if not re.fullmatch(UNFINISHED, path.name)]):
        raise CompressionError(
            f"{where}: {work.name} beside it holds {_few(sorted(others))}, which hfcompress did not write; move that away, or "
            f"choose another output_dir=...."
        )


@contextmanager
def reserved(out: Path, is_main: bool = True) -> Iterator[None]:
    """The place is locked, made, and proven writable, before anything is computed.

    The system itself frees the lock of a process that died. Of several processes the first one holds it for all.
    """
    if not is_main:
        yield
        return
    work = partial(out)
    with _writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for folder in (out.parent, *(place for place in (out, work) if place.is_dir())):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        work.mkdir(exist_ok=True)  # before the lock, which takes any error for another run's lock
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CompressionError(
            f"{_where(out)}: another run is at work there; wait for it, or choose another output_dir=...."
        ) from error
    except NotImplementedError:  # a file system without locks
        pass
    try:
        work.mkdir(exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # it stays if anything came of the run
            work.rmdir()
        lock.release()


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CompressionError(
            f"{_where(out)}: nothing can be written there ({error.strerror or error}); choose another output_dir=...."
        ) from error


@contextmanager
def room_on_disk(out: Path) -> Iterator[None]:
    """A full disk in one sentence: what was finished stays, and the run goes on from there."""
    try:
        yield
    except CompressionError:
        raise
    except Exception as error:
        # safetensors has an exception of its own, with the number in its text
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in FULL:
            raise
        raise CompressionError(
            f"{_where(out)}: {os.strerror(number)}, and the run could not go on; make room and give the same command again: it "
            f"goes on after the last step that was finished."
        ) from error


def put_in_place(whole: Path, out: Path) -> None:
    """Move a whole result to where it belongs; what lay there is gone only after that."""
    work = partial(out)
    try:
        shutil.rmtree(work / "replaced", ignore_errors=True)
        if out.is_dir():
            out.rename(work / "replaced")
        whole.rename(out)
    except OSError as error:
        raise CompressionError(
            f"{_where(out)}: the result can't be moved there ({error.strerror or error}); it is whole in {str(whole)!r}."
        ) from error
    shutil.rmtree(work)


def clear_leftovers(out: Path, recipe_text: str) -> None:
    """After a run that was killed between its last two acts: its work folder, unless another recipe works there."""
    told = partial(out) / "recipe.yaml"
    if not told.is_file() or told.read_bytes() == recipe_text.encode():
        shutil.rmtree(partial(out), ignore_errors=True)


def _where(out: Path) -> str:
    return f"output_dir {shown(str(out), 200)}"


def _few(names: list[str]) -> str:
    told = ", ".join(shown(name)[1:-1] for name in names[:3])
    return told if len(names) <= 3 else f"{told} and {len(names) - 3} more"
