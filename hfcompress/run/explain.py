"""Reference documentation, from the classes themselves: cards and fields of recipes, methods, tasks, loss terms and scores."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hfcompress.calibration.scores import SCORES
from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.distillation.terms import TERMS
from hfcompress.export import FORMATS
from hfcompress.methods import METHODS
from hfcompress.run.recipe import Goal, Recipe
from hfcompress.run.train import Train
from hfcompress.tasks import TASKS

TOPICS: dict[str, dict[str, Any]] = {
    "recipe": {"recipe": Recipe, "goal": Goal},
    "steps": {Train.key(): Train, **METHODS},
    "tasks": dict(TASKS),
    "terms of distill": dict(TERMS),
    "formats of export": dict(FORMATS),
    "scores of prune_heads and prune_neurons": dict(SCORES),
}
"""A heading to the names under it, and the class or score that each is."""

_PLAIN = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "none", dict: "mapping", Any: "any"}
_BOUNDS = {
    annotated_types.Gt: ("gt", "more than"),
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Lt: ("lt", "less than"),
    annotated_types.Le: ("le", "at most"),
}


def explain(name: str, width: int = 100) -> str:
    """The card and the fields of what a recipe calls by this name; CompressionError if there is nothing of that name."""
    found = {key.replace("_", "-"): (kind, key, what) for kind, some in TOPICS.items() for key, what in some.items()}
    if name.replace("_", "-").lower() not in found:
        possible = [key for some in TOPICS.values() for key in some]
        raise CompressionError(f"explain: there is no {name!r}.{did_you_mean(name, possible)}")
    kind, key, what = found[name.replace("_", "-").lower()]
    lines = [key if key == kind else f"{key} ({kind})", "", *_wrapped(card(what), width)]
    for field, type_, default, description in fields(what):
        lines += ["", f"  {field}: {type_}; {default}", *_wrapped(description, width, "      ")]
    if what is Train:
        lines += ["", *_wrapped(_ARGUMENTS, width)]
    return "\n".join(lines)


def overview(width: int = 100) -> str:
    """Everything that can be explained, a line each."""
    lines: list[str] = []
    for kind, some in TOPICS.items():
        lines += ["", kind] if lines else [kind]
        longest = max(map(len, some))
        for key, what in some.items():
            room = max(20, width - longest - 4)
            lines.append(f"  {key:{longest}}  {textwrap.shorten(claim(what), room, placeholder=' …')}")
    return "\n".join(lines)


def reference() -> str:
    """All of it as Markdown."""
    lines = [
        "# Reference",
        "",
        "Made by `scripts/reference.py` from the classes that read recipes; `hfcompress explain NAME` prints the same.",
    ]
    for kind, some in TOPICS.items():
        lines += ["", f"## {kind[0].upper()}{kind[1:]}"]
        for key, what in some.items():
            lines += ["", f"### {key}", "", _markdown(card(what))]
            if rows := fields(what):
                lines += ["", "| field | type | default | meaning |", "|---|---|---|---|"]
                lines += [f"| {' | '.join(_cell(one) for one in row)} |" for row in rows]
            if what is Train:
                lines += ["", _ARGUMENTS]
    return "\n".join(lines) + "\n"


_ARGUMENTS = "Beside these, every field of transformers' TrainingArguments under its own name."


def card(what: Any) -> str:
    """What it says of itself: a class's docstring, or a score's sentence and that of its function."""
    if hasattr(what, "says"):
        needs = "labelled data" if what.needs_labels else "data" if what.needs_data else "no data"
        return f"{what.says[0].upper()}{what.says[1:]}. Needs {needs}.\n\n{inspect.getdoc(what.of) or ''}"
    return inspect.getdoc(what) or ""


def claim(what: Any) -> str:
    """The first sentence of a card."""
    first = " ".join(card(what).split("\n\n")[0].split())
    return re.split(r"(?<!et al)\. ", first)[0].rstrip(".:")


def fields(what: Any) -> list[tuple[str, str, str, str]]:
    """(name, type, default, description) of what a recipe may write there."""
    if not (isinstance(what, type) and issubclass(what, BaseModel)):
        return []
    return [
        (field.alias or name, type_name(field), default_of(field), field.description or "")
        for name, field in what.model_fields.items()
        if not (what in TASKS.values() and name == "name")
    ]


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "default none" if value is None or value == () else f"default {json.dumps(value, default=str, ensure_ascii=False)}"


def type_name(field: FieldInfo) -> str:
    """A type and its bounds in words."""
    return _bounded(_name(field.annotation), field.metadata)


def _name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _bounded(_name(arguments[0]), arguments[1:])
    if origin is Literal:
        return _or(str(one) for one in arguments)
    if origin in (typing.Union, types.UnionType):
        return _or(_name(one) for one in sorted(arguments, key=lambda one: one is type(None)) if one is not type(None))
    if origin in (list, tuple):
        return f"list of {_name(arguments[0])}" if arguments else "list"
    if origin is dict:
        return f"mapping of {_name(arguments[0])} to {_name(arguments[1])}"
    return _PLAIN.get(annotation) or getattr(annotation, "__name__", str(annotation)).lower()


def _or(several: Iterable[str]) -> str:
    *first, last = dict.fromkeys(several)
    return f"{', '.join(first)} or {last}" if first else last


def _bounded(name: str, metadata: Iterable[Any]) -> str:
    known = [(_BOUNDS[type(one)], one) for one in metadata if type(one) in _BOUNDS]
    bounds = [f"{word} {getattr(one, key)}" for (key, word), one in known]
    return f"{name}, {' and '.join(bounds)}" if bounds else name


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Paragraphs, and the lines that begin with a heading (Needs:, Costs:), filled to a width."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        for part in _parts(paragraph):
            lines += textwrap.wrap(part, width, initial_indent=indent, subsequent_indent=indent) or [""]
        lines.append("")
    return lines[:-1]


def _parts(paragraph: str) -> list[str]:
    """A paragraph in one line, but for what begins with a heading."""
    parts: list[str] = []
    for line in paragraph.splitlines():
        if parts and not line.startswith(("Needs:", "Buys:", "Costs:", "Paper:")):
            parts[-1] += f" {line.strip()}"
        else:
            parts.append(line.strip())
    return parts


def _markdown(text: str) -> str:
    return "\n\n".join("\\\n".join(_parts(paragraph)) for paragraph in text.split("\n\n"))


def _cell(text: str) -> str:
    return text.removeprefix("default ").replace("|", "\\|").replace("\n", " ")
