"""Recipe fields set by their path: `steps.1.train.epochs=2`."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from hfcompress.checkpoint.errors import CompressionError, did_you_mean, shown
from hfcompress.run.safe_yaml import MOST_LEVELS, read_yaml


def apply_override(raw: Any, override: str, possible: Container[str]) -> None:
    """Set `a.b.0.c=value` in plain recipe data; the value is read as YAML. `possible`: what a recipe may hold at its top."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise CompressionError(
            f"override {shown(override)}: it must read key=value, as in steps.1.train.epochs=2 or model=me/my-bert."
        )
    *parents, last = path.split(".")
    if len(parents) > MOST_LEVELS:
        raise CompressionError(f"override {shown(override)}: its path has more than {MOST_LEVELS} parts; shorten it.")
    node = raw
    for done, part in enumerate(parents):
        following = parents[done + 1] if done + 1 < len(parents) else last
        node = _child(node, part, override, () if following.isdigit() else possible)
    if isinstance(node, list):
        node[_index(node, last, override)] = read_yaml(value, f"override {shown(override)}")
    elif isinstance(node, dict):
        node[last] = read_yaml(value, f"override {shown(override)}")
    else:
        raise CompressionError(f"override {shown(override)}: {shown(last)} is inside a value, not a mapping; shorten the path.")


def _child(node: Any, part: str, override: str, possible: Container[str]) -> Any:
    if isinstance(node, list):
        index = _index(node, part, override)
        node[index] = {node[index]: {}} if isinstance(node[index], str) else node[index]
        return node[index]
    if not isinstance(node, dict):
        raise CompressionError(f"override {shown(override)}: {shown(part)} is inside a value, not a mapping; shorten the path.")
    if node.get(part) is None:
        if part not in node and part not in possible:
            raise CompressionError(
                f"override {shown(override)}: the recipe has no {shown(part)} there.{did_you_mean(part, map(str, node))}"
            )
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, override: str) -> int:
    # isdigit() alone takes ², and int() no more than some thousand digits
    if not (part.isascii() and part.isdigit() and len(part) < 10) or int(part) >= len(node):
        possible = f"possible are 0 to {len(node) - 1}" if node else "the list is empty"
        raise CompressionError(f"override {shown(override)}: {shown(part)} is no position in that list; {possible}.")
    return int(part)
