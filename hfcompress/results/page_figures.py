"""The figures of the report's page, as SVG: what a score costs, and how losses fell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from hfcompress.results.markup import Markup, element, joined
from hfcompress.results.measure import Row
from hfcompress.results.plot import free_places, is_apart, is_off, pace
from hfcompress.results.ratios import called
from hfcompress.results.table import as_number, score_form, shortened

if TYPE_CHECKING:
    from hfcompress.results.report import Report

WIDTH, HEIGHT = 440.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 18.0, 36.0, 48.0
WIDE, VERY_WIDE = 10.0, 1000.0
"""Scores (perplexities) and losses that are so many times apart are drawn on a scale of logarithms."""


class Scale(NamedTuple):
    """Where values lie along an axis."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, here = (self._even(one) for one in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (self.end - self.start) * (here - low) / (high - low)

    def _even(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def ticks(self) -> list[float]:
        """About five round values."""
        if self.is_log:
            whole = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [digit * 10.0**power for power in whole for digit in (1, 2, 5)]
            found = [one for one in found if self.low <= one <= self.high]
            return found[:: -(-len(found) // 7) or 1]
        step = self._step()
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _step(self) -> float:
        rough = (self.high - self.low) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)

    def named(self, tick: float) -> str:
        """A tick as it is written: all of an axis with the same digits after the point."""
        if abs(tick) >= 1e7 or (self.is_log and tick < 1e-3):
            return f"{tick:.4g}"
        if self.is_log:
            return f"{tick:,.7g}"
        return f"{tick:,.{max(0, -math.floor(math.log10(self._step()) + 1e-9))}f}"


class Point(NamedTuple):
    """A row that is drawn; `number` is None for what is no step."""

    number: int | None
    row: Row
    x: float
    y: float


def scale_of(values: list[float], start: float, end: float, wide: float = WIDE) -> Scale:
    """A scale with some room beyond the values; of logarithms where these are far apart."""
    low, high = min(values), max(values)
    if low > 0 and high / low > wide:
        room = (high / low) ** 0.1
        return Scale(low / room, high * room, start, end, is_log=True)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room, start, end)


def scatter(report: Report, batch: str | None) -> Markup:
    """The headline score against megabytes; or, given a batch size, against the least time that it takes."""
    last, first = report.rows[-1], report.rows[report.reference]

    def across(row: Row) -> float | None:
        return known(row.megabytes if batch is None else pace(row, report, batch))

    x_label = "megabytes on disk" if batch is None else f"milliseconds at batch {batch[1:]}, least of several runs"
    numbered = [
        one
        for number, row in enumerate(report.rows, start=1)
        if (one := _point(number, row, across(row), last.headline)) is not None and not is_off(report, number - 1)
    ]
    hollow = [one for row in report.baselines if (one := _point(None, row, across(row), last.headline)) is not None]
    every = [*hollow, *numbered]
    bars = [(one, spread) for one in every if (spread := interval(one.row, first)) is not None]
    heights = [one.y for one in every] + [end for _, spread in bars for end in spread]
    if not heights:
        return element("p", "No score is known that could be drawn.", class_="note")
    over = Scale(0.0, 1.08 * max(one.x for one in every) or 1.0, LEFT, WIDTH - RIGHT)
    up = scale_of(heights, HEIGHT - BOTTOM, TOP)
    way = "higher" if last.higher_is_better else "lower"
    dots = [(over(one.x), up(one.y)) for one in numbered]
    marks = [baseline_look(one.row, report) if one.number is None else look(report, one.number - 1) for one in every]
    return _svg(
        f"{called(last.headline)} against {x_label}: {len(numbered)} steps",
        _axes(over, up, x_label, f"{called(last.headline)} ({way} is better{', logarithms' if up.is_log else ''})"),
        element("polyline", points=_points(dots), class_="trail"),
        *(_error_bar(over(one.x), up(low), up(high)) for one, (low, high) in bars),
        *(_mark(over(one.x), up(one.y), mark, _told(one, batch)) for one, mark in zip(every, marks, strict=True)),
        *_numbers(
            [one.number for one in numbered], dots, [(over(one.x), up(end)) for one, ends in bars for end in _along(*ends)]
        ),
    )


def _point(number: int | None, row: Row, x: float | None, metric: str) -> Point | None:
    y = known(row.score.get(metric))
    return None if x is None or y is None else Point(number, row, x, y)


def known(value: float | None) -> float | None:
    """None for what is no number."""
    return value if value is not None and math.isfinite(value) else None


def interval(row: Row, reference: Row) -> tuple[float, float] | None:
    """Between which scores a row lies with 95 %, if that is known: the reference's and the interval of what it gained."""
    told, base = row.gains.get(row.headline), known(reference.score.get(row.headline))
    if told is None or base is None:
        return None
    low, high = (base + (1 if row.higher_is_better else -1) * end for end in told["interval"])
    return (min(low, high), max(low, high)) if math.isfinite(low + high) else None


def look(report: Report, index: int) -> str:
    """Which mark stands for a row: a class of the page's style and a shape of `_mark`."""
    if index == report.reference % len(report.rows):
        return "reference"
    return "last" if index == len(report.rows) - 1 else "step"


def baseline_look(row: Row, report: Report) -> str:
    return "same" if row is report.same_dtype else "compiled"


def swatch(mark: str) -> Markup:
    """A mark by itself, for a legend."""
    return element("svg", _mark(8, 8, mark), viewBox="0 0 16 16", width=16, height=16, class_="swatch", aria_hidden="true")


def _mark(x: float, y: float, mark: str, told: str | None = None) -> Markup:
    name = element("title", told) if told else None
    look = f"mark {mark}"
    if mark == "step":
        return element("circle", name, cx=x, cy=y, r=5.0, class_=look)
    shapes: dict[str, list[tuple[float, float]]] = {
        "last": [(0, -7.5), (7, 5), (-7, 5)],
        "compiled": [(-5, -5), (5, -5), (5, 5), (-5, 5)],
    }
    shape = shapes.get(mark, [(0, -8), (8, 0), (0, 8), (-8, 0)])  # so large that a step at the same place hides no corner
    return element("polygon", name, points=_points([(x + a, y + b) for a, b in shape]), class_=look)


def _told(one: Point, batch: str | None) -> str:
    at = f"{one.x:.4g} {'MB' if batch is None else 'ms'}"
    step = shortened(one.row.step, 80)
    score = f"{called(one.row.headline)} {as_number(one.y, score_form(one.y))}"
    return f"{step if one.number is None else f'{one.number} {step}'}: {score}, {at}"


def _error_bar(x: float, low: float, high: float) -> Markup:
    return element("path", d=f"M{x - 3:.1f} {low:.1f}h6m-3 0V{high:.1f}m-3 0h6", class_="spread")


def _along(low: float, high: float) -> list[float]:
    return [low + (high - low) * part / 20 for part in range(21)]


def _numbers(numbers: list[int | None], dots: list[tuple[float, float]], bars: list[tuple[float, float]]) -> Iterator[Markup]:
    places = free_places(dots, TOP, HEIGHT - BOTTOM, bars)
    for number, (x, y), (right, down) in zip(numbers, dots, places, strict=True):
        if is_apart(right, down):
            yield element(
                "path", d=f"M{x + right * 0.3:.1f} {y + down * 0.3:.1f}l{right * 0.4:.1f} {down * 0.4:.1f}", class_="trail"
            )
        yield element("text", number, x=x + right, y=y + down + 4.5, class_="number")


def curve(row: Row) -> Markup:
    """The loss of a training against the optimizer's steps."""
    over = Scale(0.0, float(max(step for step, _ in row.curve)) or 1.0, LEFT, WIDTH - RIGHT)
    up = scale_of([loss for _, loss in row.curve], HEIGHT - BOTTOM, TOP, VERY_WIDE)
    dots = [(over(step), up(loss)) for step, loss in row.curve]
    return _svg(
        f"loss of {shortened(row.step, 80)}: {row.curve[0][1]:.4g} to {row.curve[-1][1]:.4g} in {row.curve[-1][0]} steps",
        _axes(over, up, "optimizer's steps", "loss, logarithms" if up.is_log else "loss"),
        element("polyline", points=_points(dots), class_="loss"),
        element(
            "circle", element("title", f"{row.curve[-1][1]:.4g}"), cx=dots[-1][0], cy=dots[-1][1], r=3.5, class_="mark step"
        ),
    )


def _svg(label: str, *inside: object) -> Markup:
    return element("svg", *inside, viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}", role="img", aria_label=label, class_="figure")


def _points(dots: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)


def _axes(over: Scale, up: Scale, x_label: str, y_label: str) -> Markup:
    lines = [element("path", d=f"M{LEFT:.0f} {up(y):.1f}H{WIDTH - RIGHT:.0f}", class_="grid") for y in up.ticks()]
    lines += [element("text", up.named(y), x=LEFT - 8, y=up(y) + 4, class_="tick y") for y in up.ticks()]
    lines += [element("text", over.named(x), x=over(x), y=HEIGHT - BOTTOM + 18, class_="tick") for x in over.ticks()]
    bottom = element("path", d=f"M{LEFT:.0f} {HEIGHT - BOTTOM:.0f}H{WIDTH - RIGHT:.0f}", class_="axis")
    names = [
        element("text", shortened(y_label, 60), x=0, y=14, class_="label"),
        element("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_="label middle"),
    ]
    return joined(*lines, bottom, *names)
