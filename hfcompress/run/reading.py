"""Plain data read into typed objects: every mistake a sentence, and all of them noted."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import ValidationError

from hfcompress.checkpoint.errors import did_you_mean, shown
from hfcompress.checkpoint.fields import Fields
from hfcompress.export import FORMATS


def read_named(raw: Any, where: str, table: dict[str, Any], mistakes: list[str]) -> Any:
    """`{prune_heads: {ratio: 0.3}}` or `cast` as its object; mistakes are noted, and None returned."""
    what, like = ("format", "gguf: {type: Q8_0}") if table is FORMATS else ("method", "prune_heads: {ratio: 0.3}")
    example = like.partition(": ")[2]
    if isinstance(raw, str):
        raw = {raw: {}}
    if not isinstance(raw, dict) or len(raw) != 1:
        name = "step" if what == "method" else what
        mistakes.append(f"{where}: a {name} is one name with its fields, as in `- {like}`, not {shown(raw)}.")
        return None
    ((key, fields),) = raw.items()
    if key not in table:
        mistakes.append(f"{where}: unknown {what} {shown(key)}.{did_you_mean(str(key), table)}")
        return None
    fields = {} if fields is None else fields
    if not isinstance(fields, dict):
        mistakes.append(f"{where}.{key}: its fields must be a mapping, as in {example}, not {shown(fields)}.")
        return None
    before = len(mistakes)
    found = validated(table[key], dict(fields), f"{where}.{key}", mistakes)
    return found if len(mistakes) == before else None


def words_only(raw: dict[Any, Any], where: str, cls: Any, mistakes: list[str]) -> dict[str, Any]:
    """Without keys that are numbers, which are noted: fields have names."""
    for key in (key for key in raw if not isinstance(key, str)):
        mistakes.append(f"{where}: unknown key {shown(key)}.{did_you_mean(str(key), cls.model_fields)}")
    return {key: value for key, value in raw.items() if isinstance(key, str)}


def validated(cls: Any, fields: dict[Any, Any], where: str, mistakes: list[str]) -> Any:
    before = len(mistakes)
    fields = words_only(fields, where, cls, mistakes)
    if len(mistakes) > before:
        return None
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        mistakes += sentences(error, where, cls)
        return None


def sentences(error: ValidationError, where: str, cls: Any) -> list[str]:
    """One sentence a mistake: where, what was written, what is possible."""
    lines = []
    for one in error.errors():
        place = ".".join(part if len(part) <= 80 else shown(part) for part in map(str, (where, *one["loc"])) if part != "")
        if one["type"] == "extra_forbidden":
            owner = _owner(cls, one["loc"][:-1])
            possible = [field.alias or name for name, field in owner.model_fields.items()]
            key, above = str(one["loc"][-1]), ".".join(map(str, (where, *one["loc"][:-1]))).strip(".")
            lines.append(f"{above or 'recipe'}: unknown key {shown(key)}.{did_you_mean(key, possible)}")
        elif one["type"] == "missing":
            lines.append(f"{place}: this key is missing; {_help(cls, one['loc'])}")
        else:
            message = one["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ") or "this can't be"
            message = message if len(message) <= 600 else f"{message[:400]}…{message[-100:]}"
            given = "" if isinstance(one["input"], dict) else f" = {shown(one['input'])}"
            lines.append(f"{place}{given}: {message[0].lower() + message[1:]}{'' if message[-1] in '.?' else '.'}")
    return lines


def _help(cls: Any, loc: tuple[Any, ...]) -> str:
    field = cls.model_fields.get(str(loc[-1]))
    return f"it is {field.description or 'required'}" if field else "add it."


def _owner(cls: Any, place: tuple[Any, ...]) -> Any:
    """The class whose fields are at a place inside another's."""
    for part in place:
        field = cls.model_fields.get(str(part))
        inner = typing.get_args(field.annotation) if field else ()
        cls = next((one for one in inner if isinstance(one, type) and issubclass(one, Fields)), cls)
    return cls
