"""Tables: one set of cells for the terminal, where it must fit, and for Markdown, where all is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from hfcompress.results.measure import Row
from hfcompress.results.ratios import called, difference, half_interval, headlines, slower, speed

if TYPE_CHECKING:
    from hfcompress.results.report import Report

UNKNOWN = "–"
GAP = 2  # columns of the terminal between two cells
MIDDLING, SHORT = 24, 16  # to how many characters names are shortened before figures are left out
Cells = tuple[list[str], list[list[str]]]


class Column(NamedTuple):
    """`key`: step, params, megabytes, b1, b8, ..., score, also or agreement."""

    key: str
    name: str
    cells: list[str]


class Fitted:
    """A table that a console shows in the fullest of several forms that fits its width; the last one may fold.

    `caption`: below the first form; `short_caption`: below the others.
    """

    def __init__(self, forms: Iterable[Cells], caption: str, short_caption: str | None = None) -> None:
        self._forms, self._captions = list(forms), (caption, caption if short_caption is None else short_caption)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        last = len(self._forms) - 1
        chosen = next((n for n, form in enumerate(self._forms) if width_of(form) <= options.max_width), last)
        yield rich_table(*self._forms[chosen], self._captions[chosen > 0])


def width_of(form: Cells) -> int:
    names, rows = form
    return sum(max(map(cell_len, column)) for column in zip(names, *rows, strict=True)) + GAP * (len(names) - 1)


def rich_table(names: list[str], rows: list[list[str]], caption: str) -> Table:
    """Cells as plain text: a step may hold brackets, which rich would take for markup."""
    table = Table(caption=Text(caption), caption_justify="left", box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for number, name in enumerate(names):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


# The table of a report


def columns(report: Report, narrow: bool = False, interval: bool = True) -> list[Column]:
    """Every column with a cell for each line. `narrow`: without medians, remarks and the fields of steps."""
    reference = report.rows[report.reference]
    lines = list(_lines(report))
    batches, metrics = list(report.rows[-1].latency_ms), headlines(report.rows)

    def column(key: str, name: str, cells: Iterator[str]) -> Column:
        hidden = key in ("params", "megabytes", *batches)
        return Column(key, name, ["" if one.is_score and hidden else cell for one, cell in zip(lines, cells, strict=True)])

    found = [
        Column("step", "step", [one.short if narrow else one.label for one in lines]),
        column("params", "params", (_parameters_cell(one.row) for one in lines)),
        column("megabytes", "MB", (_size_cell(one.row, one.told) for one in lines)),
    ]
    for batch in batches:
        times = (_time_cell(one, reference, batch, narrow) for one in lines)
        found.append(column(batch, f"b{batch[1:]}, ms" if narrow else f"ms, batch {batch[1:]}", times))
    for key, metric in zip(("score", "also"), metrics, strict=False):
        name = "other text" if narrow and key == "also" else called(metric)
        found.append(column(key, name, (_score_cell(one.row, one.told, metric, interval) for one in lines)))
    if any("agreement" in row.score for row in report.rows) and "agreement" not in metrics:
        found.append(column("agreement", "agrees", (as_number(one.row.score.get("agreement"), ".4f") for one in lines)))
    return found


def cells_of(found: list[Column]) -> Cells:
    return [one.name for one in found], [list(row) for row in zip(*(one.cells for one in found), strict=True)]


def forms(report: Report) -> Iterator[Cells]:
    """The table, and what is left of it on narrower and narrower terminals: the step and its score are there to the end."""
    yield cells_of(columns(report))
    without: set[str] = set()
    batches = list(report.rows[-1].latency_ms)
    for most, interval, left_out in (
        (MIDDLING, True, ()),
        (MIDDLING, True, ("params",)),
        (MIDDLING, True, ("agreement",)),
        (SHORT, True, ()),
        (SHORT, False, ()),
        (SHORT, False, batches[:-1]),
        (SHORT, False, batches),
        (SHORT, False, ("megabytes",)),
    ):
        without |= {*left_out}
        found = [one for one in columns(report, narrow=True, interval=interval) if one.key not in without]
        steps = [shortened(cell, most) for cell in found[0].cells]
        yield cells_of([found[0]._replace(cells=steps), *found[1:]])


class _Line(NamedTuple):
    """A line: `told` is the row that it is compared with; `is_score`: nothing but its score is shown."""

    label: str
    short: str
    row: Row
    told: Row | None
    before: Row | None = None
    is_score: bool = False


def _lines(report: Report) -> Iterator[_Line]:
    reference = report.rows[report.reference]
    for before, row in zip([None, *report.rows], report.rows, strict=False):
        told = None if row is reference else reference
        yield _Line(row.step, row.step.partition(" (")[0], row, told, before)
        for other in report.baselines if row is reference else ():
            yield _Line(other.step, other.step, other, reference)
        if row.control:
            other = replace(row, score=row.control["score"], gains={})
            yield _Line("… without teacher", "… no teacher", other, told, is_score=True)
        if row.uncompressed:
            other = replace(row, score=row.uncompressed["score"], gains={})
            yield _Line("… uncompressed, trained alike", "… uncompressed", other, told, is_score=True)


def shortened(name: str, most: int) -> str:
    """A name in so many characters: of a path the end tells which it is, of a step the beginning."""
    if cell_len(name) <= most:
        return name
    return f"…{name[1 - most :]}" if "/" in name else f"{name[: most - 1].rstrip()}…"


def as_number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def as_times(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 1.995 else 1 if ratio < 9.95 else 0}f}x"


def as_count(parameters: int) -> str:
    """22.7M, 6.74B, 201K."""
    unit, letter = next(((u, s) for u, s in ((1e9, "B"), (1e6, "M")) if parameters >= u), (1e3, "K"))
    return f"{parameters / unit:.3g}{letter}"


def _parameters_cell(row: Row) -> str:
    zeros = 0 if row.nonzero is None or not row.parameters else 1 - row.nonzero / row.parameters
    # Padding rows and fresh biases are zero too: only sparsity that somebody made is told.
    return as_count(row.parameters) + (f" ({100 * zeros:.0f} % zeros)" if zeros > 0.02 else "")


def _size_cell(row: Row, reference: Row | None) -> str:
    size = f"{row.megabytes:.{1 if row.megabytes >= 1 else 3}f}"
    ratio = reference.megabytes / row.megabytes if reference else 1.0
    return size if 0.995 < ratio < 1.005 else f"{size} ({as_times(ratio)})"


def _time_cell(line: _Line, reference: Row, batch: str, narrow: bool) -> str:
    row = line.row
    if batch not in row.latency_ms:
        return UNKNOWN
    times = row.latency_ms[batch]
    cell = f"{times['min']:.1f}" + ("" if narrow else f" ({times['median']:.1f})")
    if line.told and (found := speed(row, line.told).get(batch)):
        cell += f" {as_times(found.least)}"
    flagged = not narrow and line.before is not None and batch in slower(row, line.before, reference)
    return f"{cell}, slower" if flagged else cell


def _score_cell(row: Row, reference: Row | None, metric: str, interval: bool) -> str:
    score = row.score.get(metric)
    form = score_form(score)
    apart = difference(row, reference, metric) if reference else None
    half = half_interval(row, metric) if interval else None
    told = "" if apart is None else f" ({apart:+{form}}" + (")" if half is None else f" ±{half:{form}})")
    return as_number(score, form) + told


def score_form(score: float | None) -> str:
    return ".2f" if score is not None and abs(score) >= 10 else ".4f"
