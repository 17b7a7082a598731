"""What strangers may read of a text: no path of this machine, as they can't use it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from hfcompress.checkpoint.errors import CompressionError

ABSOLUTE = re.compile(r"/|~|file:|\\\\|[A-Za-z]:[/\\]")
"""How a path begins that means something on one machine only."""


def without_paths(recipe_text: str) -> str:
    """A recipe's YAML, of its paths on this machine only the last part."""
    paths = paths_in(recipe_text)
    if not paths:
        return recipe_text
    plain = each_text(yaml.safe_load(recipe_text), lambda text: _last_part(text) if text in paths else text)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def paths_in(recipe_text: str) -> set[str]:
    """The absolute paths among a recipe's values. CompressionError for what is no YAML."""
    found: set[str] = set()
    try:
        each_text(yaml.safe_load(recipe_text), lambda text: found.add(text) if ABSOLUTE.match(text) else None)
    except yaml.YAMLError as error:
        raise CompressionError("recipe.yaml: it is not valid YAML; mend it, or take it out of the folder.") from error
    return found


def cut_paths(text: str, paths: set[str]) -> str:
    """A text with these paths cut to their last part."""
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, _last_part(path))
    return text


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """The same plain data with every string changed."""
    if isinstance(value, dict):
        return {key: each_text(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [each_text(part, change) for part in value]
    return change(value) if isinstance(value, str) else value
