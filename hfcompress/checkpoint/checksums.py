"""Checksums of an artifact's weights, in a small file beside them: a value that was changed inside a tensor is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfcompress.checkpoint.errors import CompressionError, first_line, shown
from hfcompress.checkpoint.writing import write_text

CHECKSUMS = "checksums.json"
# Of config.json, what may be edited later without making another model of it.
_NAMES = ("id2label", "label2id", "_name_or_path", "transformers_version")


def write_checksums(folder: Path, others: Iterable[str] = ()) -> None:
    """Note the SHA-256 of every file of weights, of others that hold what is computed, and of what config.json says of that."""
    files = {name: _of_file(folder / name) for name in (*_weights(folder), *others)}
    told = {"algorithm": "sha256", "config": _config_in(folder), "files": files}
    write_text(folder / CHECKSUMS, json.dumps(told, indent=2) + "\n", "the checksums")


def check_checksums(folder: Path) -> bool:
    """Whether there are checksums; CompressionError if something is not what they were taken of."""
    if not (folder / CHECKSUMS).is_file():
        return False
    told = read_json(folder / CHECKSUMS)
    files = told.get("files")
    if not isinstance(files, dict) or not all(isinstance(one, str) for one in (told.get("config"), *files.values())):
        raise _changed(folder / CHECKSUMS, "it holds no checksums")
    if _config_in(folder) != told["config"]:
        raise _changed(folder / "config.json", "it describes another model than was saved")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}  # and nothing outside it
    if missing := sorted(set(files) - there):
        raise _changed(folder, f"{shown(missing[0])} is missing")
    if unknown := sorted(set(_weights(folder)) - set(files)):
        raise _changed(folder, f"{shown(unknown[0])} was not saved with the others")
    for name in sorted(files):
        if _of_file(folder / name) != files[name]:
            raise _changed(folder / name, "it is not the file that was saved, its checksum is another")
    return True


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file maps; CompressionError where it is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CompressionError(
            f"{path}: it can't be read ({shown(first_line(error))}); download it again, or save the model again."
        ) from error
    if not isinstance(told, dict):
        raise CompressionError(f"{path}: it holds {shown(told)}, not a mapping; download it again, or save the model again.")
    return told


def _changed(path: Path, what: str) -> CompressionError:
    return CompressionError(
        f"{path}: {what}; download the artifact again, or run its recipe again; after a change of your own, remove {CHECKSUMS}."
    )


def _weights(folder: Path) -> list[str]:
    found = [*folder.glob("model*.safetensors"), *folder.glob("adapter/*.safetensors")]
    found += folder.glob("[0-9]*_*/*.safetensors")  # modules of sentence-transformers
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _config_in(folder: Path) -> str:
    """Exports for llama.cpp have none."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    told = {key: value for key, value in config.items() if key not in _NAMES}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
