"""HTML and SVG built of elements, so that no text gets into a page unescaped."""

from __future__ import annotations

import html
import unicodedata
from typing import Any

VOID = frozenset({"meta", "br"})


class Markup(str):
    """Text that is markup already; any other becomes text."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """A text as a page may hold it: it is read as it stands, and what can't be written becomes a question mark."""
    if isinstance(value, Markup):
        return value
    clean = "".join(letter if letter in "\n\t" or unicodedata.category(letter)[0] != "C" else "?" for letter in str(value))
    return Markup(html.escape(clean))


def element(name: str, /, *inside: object, **attributes: Any) -> Markup:
    """`element("p", "a < b", class_="small")`; attributes that are None are left out, numbers are rounded for drawing."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{told}>")
    return Markup(f"<{name}{told}>{joined(*inside)}</{name}>")


def joined(*parts: object) -> Markup:
    """Elements and texts one after another; None is nothing."""
    return Markup("".join(escaped(part) for part in parts if part is not None))


def _short(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
