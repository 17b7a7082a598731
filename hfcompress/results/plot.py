"""The report as a picture: what the score costs in megabytes and in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.writing import written
from hfcompress.results.measure import Row
from hfcompress.results.ratios import speed
from hfcompress.results.table import shortened

if TYPE_CHECKING:
    from hfcompress.results.report import Report

TRAIL, REFERENCE, STEP, LAST = "#9aa5b1", "#d1495b", "#2e6f95", "#2a9d5c"
BASELINES = [{"facecolors": "none", "edgecolors": REFERENCE, "marker": marker} for marker in ("D", "s")]
"""The reference in the dtype of the result, and compiled: hollow, as they are no steps."""


def plot(report: Report, path: str | Path) -> None:
    """Write a PNG: the headline score against megabytes, and against the least time of the largest batch.

    Points carry the numbers of their rows, a legend below lists the steps.
    Raises CompressionError without matplotlib or rows, or where it can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressionError("plot: matplotlib is not installed; get it with: pip install matplotlib") from error
    if not report.rows:
        raise CompressionError("plot: the report has no rows; measure a model and add its row first.")
    last = report.rows[-1]
    batch = next(reversed(last.latency_ms))
    figure = Figure(figsize=(11, 4.6 + 0.2 * ((len(report.rows) + 1) // 2)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it holds every figure in a global list
    panels = figure.subplots(1, 2, sharey=True)
    across: list[tuple[str, Callable[[Row], float | None]]] = [
        ("weights on disk, megabytes", lambda row: row.megabytes),
        (f"latency at batch {batch[1:]}, least of several runs, milliseconds", lambda row: pace(row, report, batch)),
    ]
    points = [_panel(axes, report, label, value) for axes, (label, value) in zip(panels, across, strict=True)]
    panels[0].set_ylabel(f"{last.headline} ({'higher' if last.higher_is_better else 'lower'} is better)")
    _legend(figure, report)
    figure.draw_without_rendering()  # the layout must be settled before free places for numbers can be told
    for axes, found in zip(panels, points, strict=True):
        _number(axes, found)
    with written(path, "the plot"):
        figure.savefig(path, format="png")


def pace(row: Row, report: Report, batch: str) -> float | None:
    """Milliseconds; where a row took turns with the reference, at the pace the machine had when the reference was measured."""
    reference = report.rows[report.reference]
    if batch not in row.latency_ms:
        return None
    told = speed(row, reference).get(batch)
    return reference.latency_ms[batch]["min"] / told.least if told else row.latency_ms[batch]["min"]


def is_off(report: Report, index: int) -> bool:
    """Whether a row from before the reference, an untrained head mostly, would squeeze all others together: it is left out."""
    metric, first = report.rows[-1].headline, report.reference % len(report.rows)
    known = [score for row in report.rows[first:] if (score := row.score.get(metric)) is not None]
    score = report.rows[index].score.get(metric)
    if index >= first or score is None or not known:
        return False
    room = max(known) - min(known)
    return not min(known) - room <= score <= max(known) + room


def _panel(axes: Any, report: Report, label: str, value: Callable[[Row], float | None]) -> list[tuple[int, float, float]]:
    """Draw the steps in order and return (row number from 1, x, y) of those whose both figures are known."""
    metric = report.rows[-1].headline
    points = [
        (number, x, y)
        for number, row in enumerate(report.rows, start=1)
        if (x := value(row)) is not None and (y := row.score.get(metric)) is not None and not is_off(report, number - 1)
    ]
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], color=TRAIL, linewidth=1.2, zorder=1)
    for number, x, y in points:
        axes.scatter(x, y, s=60, zorder=3, **_look(report, number - 1))
    for row, look in zip(report.baselines, BASELINES, strict=False):
        if (x := value(row)) is not None and (y := row.score.get(metric)) is not None:
            axes.scatter(x, y, s=60, zorder=2, **look)
    axes.set_xlabel(label)
    axes.set_xlim(left=0, right=1.08 * max([x for _, x, _ in points], default=1))
    axes.margins(y=0.12)
    axes.grid(True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return points


def _number(axes: Any, points: list[tuple[int, float, float]]) -> None:
    """Write each row's number near its point."""
    scale = axes.figure.dpi / 72
    dots = [tuple(axes.transData.transform((x, y)) / scale) for _, x, y in points]
    places = free_places(dots, axes.bbox.y0 / scale, axes.bbox.y1 / scale)
    for (number, x, y), (right, up) in zip(points, places, strict=True):
        axes.annotate(
            str(number),
            (x, y),
            xytext=(right, up),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=10,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": TRAIL, "shrinkA": 5, "shrinkB": 4} if is_apart(right, up) else None,
            zorder=4,
        ).set_in_layout(False)


def free_places(
    dots: list[tuple[float, float]], low: float, high: float, others: Iterable[tuple[float, float]] = ()
) -> list[tuple[float, float]]:
    """By how much a number is to stand off each dot, so that it hides neither dots nor numbers nor, if possible, the trail or
    the other points, and stays between two heights."""
    trail = [(a[0] + (b[0] - a[0]) * n / 30, a[1] + (b[1] - a[1]) * n / 30) for a, b in pairwise(dots) for n in range(31)]
    trail += others
    taken: list[tuple[float, float]] = []

    def cost(place: tuple[float, float], radius: float) -> float:
        def crowding(others: list[tuple[float, float]], clearance: float) -> float:
            return sum(max(0.0, clearance - math.dist(place, other)) for other in others)

        outside = max(0.0, low + 7 - place[1], place[1] - high + 7)
        return 10 * crowding(dots, 11) + 10 * crowding(taken, 14) + crowding(trail, 7) + 10 * outside + radius / 2

    found = []
    for dot in dots:
        offsets = [
            (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)), radius)
            for radius in (13, 20, 28)
            for angle in (90, 45, 135, 0, 180, 315, 225, 270)
        ]
        right, up, _ = min(offsets, key=lambda o: cost((dot[0] + o[0], dot[1] + o[1]), o[2]))
        taken.append((dot[0] + right, dot[1] + up))
        found.append((right, up))
    return found


def is_apart(right: float, up: float) -> bool:
    """Whether a number stands so far off its dot that a line should lead to it."""
    return math.hypot(right, up) > 13.5


def _look(report: Report, index: int) -> dict[str, str]:
    if index == report.reference % len(report.rows):
        return {"color": REFERENCE, "marker": "D"}
    return {"color": LAST if index == len(report.rows) - 1 else STEP, "marker": "o"}


def _legend(figure: Any, report: Report) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, row in enumerate(report.rows):
        step, score = shortened(row.step, 56), row.score.get(report.rows[-1].headline)
        note = " (reference)" if index == report.reference % len(report.rows) else ""
        note += f" ({score:.3g}, off the scale)" if is_off(report, index) else ""
        look: dict[str, Any] = _look(report, index)
        handles.append(Line2D([], [], linestyle="none", markersize=7, label=f"{index + 1}  {step}{note}", **look))
        for other, hollow in zip(report.baselines, BASELINES, strict=False) if note.startswith(" (reference") else ():
            name = f"{other.step} (reference)"
            mark: dict[str, Any] = {"markerfacecolor": "none", "color": REFERENCE, "marker": hollow["marker"]}
            handles.append(Line2D([], [], linestyle="none", markersize=7, label=name, **mark))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
