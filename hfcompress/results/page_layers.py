"""A model layer by layer, as SVG for the report's page: the bits stored for a weight, and how many of its weights are left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from hfcompress.results.layer_plot import BITS, Cell, Place, short_place
from hfcompress.results.markup import Markup, element, escaped, joined
from hfcompress.results.table import shortened

MOST = 1500
"""How many cells are drawn: of deeper models, neighbouring layers share a row."""
PLACES, NAME = 60, 26
ACROSS, DOWN, GAP = 46.0, 26.0, 2.0
LEFT, LEAN = 74.0, math.radians(50)
COLOURS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
"""Of viridis, for 1 to 32 bits."""


class Drawn(NamedTuple):
    """A cell as it is drawn, of one layer or of neighbours: `bits` is their mean, `left` the share of the weights left."""

    rows: str
    place: str
    bits: float
    left: float | None
    kind: str


def layer_picture(cells: Sequence[Cell], before: Mapping[Place, int] | None = None) -> Markup:
    """A row for each layer, a column for each place. `before`: how many weights the original had there."""
    every = list(dict.fromkeys(cell.place for cell in cells))
    places = every[:PLACES]
    inside = sorted({cell.index for cell in cells if cell.index is not None})
    together = -(-len(inside) * len(places) // MOST) or 1
    groups: list[list[int | None]] = [[*inside[at : at + together]] for at in range(0, len(inside), together)]
    if any(cell.index is None for cell in cells):
        groups.append([None])
    lefts = _lefts(cells, before or {})
    by_place = {(cell.index, cell.place): cell for cell in cells}
    names = [shortened(short_place(place), NAME) for place in places]
    top = 16 + max(len(name) for name in names) * 6.4 * math.sin(LEAN)
    drawn: list[Markup] = []
    for number, name in enumerate(names):
        x = LEFT + ACROSS * (number + 0.5)
        turned = f"rotate({-math.degrees(LEAN):.0f} {x:.0f} {top - 8:.0f})"
        label = [element("title", shortened(places[number], 80)), name]
        drawn.append(element("text", *label, x=x, y=top - 8, transform=turned, class_="tick place"))
    for line, group in enumerate(groups):
        y, rows = top + line * (DOWN + GAP), _rows_name(group)
        drawn.append(element("text", rows, x=LEFT - 8, y=y + 17, class_="tick y"))
        for column, place in enumerate(places):
            found = [by_place[index, place] for index in group if (index, place) in by_place]
            if found:
                drawn.append(_cell(LEFT + column * ACROSS, y, _merged(rows, place, found, lefts)))
    width = LEFT + len(places) * ACROSS + max(len(name) for name in names) * 6.4 * math.cos(LEAN)
    height = top + len(groups) * (DOWN + GAP) + 4
    svg = element(
        "svg",
        *drawn,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=round(width),
        height=round(height),
        role="img",
        aria_label=f"bits stored for each weight: {len(inside)} layers, {len(places)} places",
        class_="layers",
    )
    notes = [*_notes(len(inside), together, len(every)), *_depth(inside, before or {})]
    return joined(
        element("div", svg, class_="scroll", tabindex=0), _key(cells, lefts), element("p", " ".join(notes), class_="note")
    )


def _notes(layers: int, together: int, places: int) -> Iterator[str]:
    if together > 1:
        yield f"The model has {layers} layers: each row is {together} of them, with the mean of their bits."
    if places > PLACES:
        yield f"The first {PLACES} of {places} places are drawn."


def _depth(inside: list[int], before: Mapping[Place, int]) -> Iterator[str]:
    had = len({index for index, _ in before if index is not None})
    if had > len(inside):
        yield f"{len(inside)} of {had} layers are left."


def _lefts(cells: Sequence[Cell], before: Mapping[Place, int]) -> dict[Place, float]:
    """The share of the original's weights that each place still computes with. Where layers were cut, their numbers have moved,
    and the widest layer of the same place is what it is compared with."""
    widest: dict[str, int] = {}
    for (_, place), weights in before.items():
        widest[place] = max(widest.get(place, 0), weights)
    same_depth = len({index for index, _ in before}) == len({cell.index for cell in cells})
    found = {}
    for cell in cells:
        whole = before.get((cell.index, cell.place)) if same_depth else widest.get(cell.place)
        if whole:
            found[cell.index, cell.place] = cell.weights / whole
    return found


def _rows_name(group: list[int | None]) -> str:
    if group == [None]:
        return "outside"
    return str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}"


def _merged(rows: str, place: str, found: list[Cell], lefts: Mapping[Place, float]) -> Drawn:
    known = [lefts[cell.index, cell.place] for cell in found if (cell.index, cell.place) in lefts]
    kinds = sorted({kind for cell in found for kind in cell.kind.split(", ") if kind})
    bits = sum(cell.bits for cell in found) / len(found)
    return Drawn(rows, place, bits, sum(known) / len(known) if known else None, ", ".join(kinds))


def _cell(x: float, y: float, one: Drawn) -> Markup:
    colour = colour_of(one.bits)
    told = f"layer {one.rows}, {shortened(one.place, 80)}: {one.bits:.3g} bits a weight"
    told += f", {100 * one.left:.0f} % of its weights left" if one.left is not None else ""
    told += f", {one.kind}" if one.kind else ""
    full = ACROSS - GAP
    parts = [
        element("title", told),
        element("rect", x=x, y=y, width=full, height=DOWN, fill=f"#{colour}"),
        element("text", f"{one.bits:.3g}", x=x + full / 2, y=y + 15, style=f"fill:{ink_on(colour)}"),
    ]
    if "factors" in one.kind:
        parts.append(element("path", d=f"M{x + full:.1f} {y:.1f}v8l-8 -8z", fill=ink_on(colour)))
    if one.left is not None and one.left < 0.995:
        parts.append(element("rect", x=x, y=y + DOWN - 6, width=full, height=6.0, class_="gone"))
        parts.append(element("rect", x=x, y=y + DOWN - 6, width=full * max(one.left, 0.0), height=6.0, class_="left"))
    return element("g", *parts, class_="cell")


def _key(cells: Sequence[Cell], lefts: Mapping[Place, float]) -> Markup:
    """How to read it."""
    colours = [
        element("span", f"{bits}", class_="bits", style=f"background:#{colour_of(bits)};color:{ink_on(colour_of(bits))}")
        for bits in BITS
    ]
    told = ["Colour and number: bits stored for each weight."]
    if any("factors" in cell.kind for cell in cells):
        told.append("A corner: two factors stand for the matrix.")
    if any(left < 0.995 for left in lefts.values()):
        told.append("The bar below: how many of the original's weights are left.")
    return element("p", *colours, escaped(" " + " ".join(told)), class_="note")


def colour_of(bits: float) -> str:
    """A colour for bits, on a scale of logarithms."""
    share = math.log2(min(max(bits, BITS[0]), BITS[-1])) / math.log2(BITS[-1]) if math.isfinite(bits) else 0.0
    at = share * (len(COLOURS) - 1)
    low = min(int(at), len(COLOURS) - 2)
    pairs = zip(_channels(COLOURS[low]), _channels(COLOURS[low + 1]), strict=True)
    return "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in pairs)


def ink_on(colour: str) -> str:
    """Black or white, whichever is read better: one of them has a contrast of 4.5 on any colour."""
    linear = [(one / 255 / 12.92) if one <= 10 else ((one / 255 + 0.055) / 1.055) ** 2.4 for one in _channels(colour)]
    bright = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (bright + 0.05) / 0.05 > 1.05 / (bright + 0.05) else "#fff"


def _channels(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (0, 2, 4)]
