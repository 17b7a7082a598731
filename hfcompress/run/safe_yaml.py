"""YAML read as plain data, and no more: keys are words or whole numbers, no tags, no dates, no bigger than a recipe.

The format lets 900 bytes stand for a billion nodes (aliases of aliases), a key stand twice, and `2024-13-45` raise. A file may
come from the internet, so what a recipe never needs is refused with its line.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from hfcompress.checkpoint.errors import CompressionError, shown

MOST_BYTES = 200_000
MOST_NODES = 10_000
"""With aliases counted as often as they are used."""
MOST_LEVELS = 40
KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:int")


def read_yaml(text: str | bytes, where: str) -> Any:
    """Dicts, lists, strings, numbers, booleans and None; keys are strings or ints. CompressionError for the rest."""
    if len(text) > MOST_BYTES:
        raise CompressionError(f"{where}: it is {len(text)} bytes long, and recipes have {MOST_BYTES} at most; shorten it.")
    try:
        return _unshared(yaml.load(text, Loader=_PlainLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompressionError(f"{where}: not valid YAML: {_problem(error)}; mend that line.") from error


def _unshared(value: Any) -> Any:
    """With a copy wherever an alias stood: what is changed in one place later must not change in the other."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _problem(error: Exception) -> str:
    """What is wrong and where, without the lines themselves: they may be long."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return shown(" ".join(str(error).split()), 160).strip("'\"")
    told = " ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + " ".join(told.split())[:200]


class _PlainLoader(yaml.SafeLoader):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._open = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # of each whole node: how many there are under it, how many levels

    def compose_node(self, parent: Node | None, index: int) -> Node | None:  # type: ignore[override]
        event: Any = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise _mistake(event.start_mark, f"the tag {shown(event.tag, 40)} can't be read; write the plain value")
        self._open += 1
        if self._open > MOST_LEVELS:
            raise _mistake(event.start_mark, f"more than {MOST_LEVELS} levels")
        node = super().compose_node(parent, index)
        self._open -= 1
        if node is not None and not isinstance(event, yaml.AliasEvent):
            self._measure(node)
        return node

    def _measure(self, node: Node) -> None:
        """What an alias stands for is counted wherever it stands; an alias of what it stands in has no end."""
        under = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
        sizes = [] if isinstance(node, ScalarNode) else [self._sizes.get(id(part), (MOST_NODES, 0)) for part in under]
        size, levels = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
        self._sizes[id(node)] = size, levels
        if size > MOST_NODES:
            raise _mistake(node.start_mark, f"more than {MOST_NODES} values here, aliases counted")
        if levels > MOST_LEVELS:
            raise _mistake(node.start_mark, f"more than {MOST_LEVELS} levels, aliases counted")

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)  # `<<: *alias`; what the mapping says itself comes last and wins
        seen: dict[str, Node] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag not in KEYS:
                written = shown(key.value, 40) if isinstance(key, ScalarNode) else "a list or mapping"
                raise _mistake(
                    key.start_mark, f"the key {written} is neither a word nor a whole number; put it in quotes if it is meant"
                )
            before = seen.get(key.value)
            if before is not None and key is not before and not self._is_merged(node, before):
                raise _mistake(key.start_mark, f"the key {shown(key.value, 40)} stands twice in one mapping")
            seen[key.value] = key
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: MappingNode) -> None:
        own = {id(key) for key, _ in node.value}
        super().flatten_mapping(node)
        node.merged = {id(key) for key, _ in node.value} - own | getattr(node, "merged", set())  # type: ignore[attr-defined]
        if len(node.value) > MOST_NODES:
            raise _mistake(node.start_mark, f"more than {MOST_NODES} keys are merged here; shorten it")

    @staticmethod
    def _is_merged(node: MappingNode, key: Node) -> bool:
        return id(key) in getattr(node, "merged", ())

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, ArithmeticError) as error:  # Python reads no numbers of thousands of digits, nor 0o99
            raise _mistake(node.start_mark, f"{shown(node.value, 40)} is no number") from error
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _mistake(node.start_mark, f"{shown(node.value, 40)} is a number of more than 64 bits")
        return value


def _mistake(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


# A date is no value of a recipe, and one that does not exist would raise: both stay the words they are.
_PlainLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
