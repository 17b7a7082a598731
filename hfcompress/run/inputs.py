"""What a recipe reads from this machine, and fingerprints of it: a run that goes on must find what it began with."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfcompress.checkpoint.artifact import ADAPTER
from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.methods import Method
from hfcompress.run.recipe import Recipe
from hfcompress.run.train import Train
from hfcompress.tasks.data import resolve_address
from hfcompress.tasks.mixture import DATA, OWN

INPUTS = "inputs.json"
WHOLE = 256 * 2**20
"""Bytes: up to so many in all, every byte counts; of more, 64 pieces a file do."""
PIECES, PIECE = 64, 64 * 2**10
UNREAD = ("README.md",)


def local_inputs(recipe: Recipe) -> dict[str, Path]:
    """Every file and folder here that the recipe names to be read, by its place in the recipe, such as `task.dataset`."""
    fields: dict[str, Any] = {"model": recipe.model, "task": recipe.task.model_dump(mode="json")}
    for number, step in enumerate(recipe.steps):
        methods = step.riders if isinstance(step, Train) else (step,)
        for method in (one for one in methods if isinstance(one, Method)):
            fields[f"steps.{number}.{method.key()}"] = method.model_dump(mode="json", exclude=set(method.writes))
    found = {}
    for place, text in _strings(fields):
        try:
            path = Path(resolve_address(text)).expanduser()
        except (CompressionError, RuntimeError):  # no such package, no such user: opening it will say so
            continue
        # a word that some folder here happens to be called, such as a split's, is no path
        is_address = place in ("model", "task.dataset", "task.also")
        is_address |= place.startswith("task.mixture.") and text not in (DATA, OWN)
        is_path = is_address or not re.fullmatch(r"[\w-]*", text)
        if is_path and text and "\0" not in text and os.path.exists(path):
            found[place] = path
    return found


def _strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(part, f"{place}.{key}" if place else str(key))
    elif isinstance(value, str):
        yield place, value


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Of each local input; the same content gives the same on every machine, whatever its dates and where it lies."""
    return {place: fingerprint(path) for place, path in local_inputs(recipe).items()}


def fingerprint(path: Path) -> str:
    """Of a file or a folder: names, sizes and content, but for what is hidden and model cards, which no run reads."""
    if path.is_dir():
        inside = (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
        files = sorted((file.relative_to(path).as_posix(), file) for file in inside if file.is_file())
        files = [(name, file) for name, file in files if not any(part.startswith(".") for part in name.split("/"))]
        files = [(name, file) for name, file in files if name not in UNREAD]
    else:
        files = [("", path)]
    total, digest = sum(file.stat().st_size for _, file in files), hashlib.sha256()
    for name, file in files:
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as opened:
            if total <= WHOLE or size <= PIECES * PIECE:
                for piece in iter(lambda: opened.read(2**20), b""):
                    digest.update(piece)
            else:
                for number in range(PIECES):
                    opened.seek((size - PIECE) * number // (PIECES - 1))
                    digest.update(opened.read(PIECE))
    return digest.hexdigest()


def changed_inputs(folder: Path, now: dict[str, str]) -> list[str]:
    """The places whose content is not what `folder` noted when its run began; none where it noted nothing."""
    try:
        then = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [place for place, noted in then.items() if now.get(place, noted) != noted] if isinstance(then, dict) else []


def check_no_adapter(recipe: Recipe, model: Any = None) -> None:
    """Adapter files beside a model's weights would be loaded with them, and no method could tell one from the other. Those in a
    folder of their own are what a step of ours kept. `model`: as it was loaded, from the Hub perhaps."""
    place = local_inputs(recipe).get("model")
    ours = place is not None and (place / ADAPTER).is_dir()
    beside = place is not None and (place / "adapter_config.json").is_file()
    if beside or (getattr(model, "peft_config", None) and not ours):
        raise CompressionError(
            f"model {shown(recipe.model, 200)}: adapter files (adapter_config.json) lie beside its weights, and a recipe needs "
            f"one model; merge the adapter with PEFT's merge_and_unload and save the result, or take its files away."
        )
