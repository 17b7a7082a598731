"""What every step did, and which of two models is faster, as tables, Markdown and JSON.

Ratios are ratios (4.0 = four times), never percent; scores keep the unit of their metric.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.results.measure import Row, finite, machine, measure, weigh

__all__ = ["Report", "Row", "machine", "measure", "weigh"]

SLOWER = 1.05
"""A step made the model slower if its times are more than 5 % longer: less is what a shared machine moves by itself."""

UNKNOWN = "–"


class Report:
    """One row a step. `reference` is the index of the row that ratios and differences are told against."""

    def __init__(self, *rows: Row, reference: int = 0, on: dict[str, Any] | None = None) -> None:
        """`on`: the machine the rows were measured on; this one, if not given."""
        self.rows: list[Row] = []
        self.reference = reference
        self.machine = machine() if on is None else on
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append a row; where it is slower than the row before, note so."""
        notes = [note for note in row.notes if not note.startswith("slower than the step before")]
        if self.rows and (batches := slower(row, before := self.rows[-1])):
            factors = {batch: row.latency_ms[batch]["min"] / before.latency_ms[batch]["min"] for batch in batches}
            told = ", ".join(f"{factor:.2f} times the time at batch {batch[1:]}" for batch, factor in factors.items())
            notes.append(f"slower than the step before: {told}")
        self.rows.append(replace(row, notes=tuple(notes)))

    def _pair(self) -> tuple[Row, Row]:
        """The reference and the last row."""
        if not self.rows or not -len(self.rows) <= self.reference < len(self.rows):
            raise CompressionError(
                f"report: the reference is row {self.reference}, and there are {len(self.rows)} rows; "
                "set `reference` to the index of one of them."
            )
        return self.rows[self.reference], self.rows[-1]

    @property
    def smaller(self) -> float:
        """How many times smaller on disk the last row is than the reference."""
        reference, last = self._pair()
        return reference.megabytes / last.megabytes

    @property
    def faster(self) -> dict[str, float]:
        """How many times faster the last row is than the reference, by least times: {"b1": x, "b8": y}."""
        return _faster(*self._pair())

    @property
    def drop(self) -> float | None:
        """By how much the headline score got worse since the reference, in its own unit; negative if it got better."""
        gain = _gain(*self._pair())
        return None if gain is None else -gain if self.rows[-1].higher_is_better else gain

    def check_goal(self, goal: dict[str, float | None] | None) -> list[str]:
        """A sentence for each missed part of the goal: `max_drop`, `smaller`, `faster` (at every batch size)."""
        goal = goal or {}
        for name in goal:
            if name not in ("max_drop", "smaller", "faster"):
                raise CompressionError(f"goal: {name!r}.{did_you_mean(name, ('max_drop', 'smaller', 'faster'))}")
        _, last = self._pair()
        missed = []
        # Differences like 0.97 - 0.96 carry the noise of floats, and a goal met to the digit is met.
        if (limit := goal.get("max_drop")) is not None and (self.drop is None or self.drop > limit + 1e-9):
            told = "it can't be told" if self.drop is None else f"it dropped by {self.drop:.4f}"
            missed.append(f"max_drop: {last.headline} may drop by {limit:g}, {told}.")
        if (wanted := goal.get("smaller")) is not None and self.smaller < wanted - 1e-9:
            missed.append(f"smaller: {wanted:g} times wanted, {self.smaller:.2f} times reached.")
        if (wanted := goal.get("faster")) is not None:
            missed += [
                f"faster: {wanted:g} times wanted, {ratio:.2f} times reached at batch {batch[1:]}."
                for batch, ratio in self.faster.items()
                if ratio < wanted - 1e-9
            ]
        return missed

    def to_dict(self) -> dict[str, Any]:
        rows = [finite(asdict(row)) for row in self.rows]
        return {"format": 1, "machine": self.machine, "reference": self.reference, "rows": rows}

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """Raises CompressionError for another format, an unknown key or a missing one."""
        if not isinstance(data, dict) or data.get("format") != 1:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise CompressionError(f"report: format {found!r} found; this version of hfcompress reads format 1.")
        report = cls(reference=data.get("reference", 0), on=data.get("machine", {}))
        possible = [part.name for part in fields(Row)]
        for number, row in enumerate(data.get("rows", []), start=1):
            for key in row:
                if key not in possible:
                    raise CompressionError(f"report, row {number}: {key!r} is no field.{did_you_mean(key, possible)}")
            try:
                report.rows.append(Row(**{**row, "notes": tuple(row.get("notes", ()))}))
            except TypeError as error:
                raise CompressionError(f"report, row {number}: {str(error).partition('() ')[2]}.") from error
        return report

    def save(self, path: str | Path) -> None:
        """JSON, written whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        part = Path(path).with_name(Path(path).name + ".part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise CompressionError(f"report {path}: can't be read as a JSON report ({error}).") from error

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Column names and a list of cells for each row: what every rendering shows."""
        reference, last = self._pair()
        agreement = any("agreement" in row.score for row in self.rows)
        names = ["step", "params", "MB", *(f"ms, batch {batch[1:]}" for batch in last.latency_ms), last.headline]
        names += ["agrees"] if agreement else []
        found = []
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            told = None if row is reference else reference
            cells = [row.step, _parameters_cell(row), _size_cell(row, told)]
            flagged = slower(row, before) if before else []
            cells += [_time_cell(row, told, batch, batch in flagged) for batch in last.latency_ms]
            cells.append(_score_cell(row, told))
            cells += [as_number(row.score.get("agreement"), ".4f")] if agreement else []
            found.append(cells)
            if row.control:
                plain = replace(row, score=row.control["score"])
                cells = ["… without teacher", *([""] * (len(names) - 2 - agreement)), _score_cell(plain, told)]
                found.append(cells + ([as_number(plain.score.get("agreement"), ".4f")] if agreement else []))
        return names, found

    def legend(self) -> str:
        """How to read the cells, and the notes of the rows."""
        reference, _ = self._pair()
        told = [f"Ratios: times smaller or faster than “{reference.step}”; differences are to it too. Times: least (median)."]
        told += [f"{row.step}: {note}." for row in self.rows for note in row.notes]
        return " ".join(told + [f"{row.step}: {_helped(row)}." for row in self.rows if row.control])

    def table(self) -> Table:
        names, rows = self.cells()
        return rich_table(names, rows, self.legend())

    def markdown(self) -> str:
        """The same cells as a Markdown table, for a model card."""
        names, rows = self.cells()
        safe = [[cell.replace("|", "\\|") for cell in row] for row in [names, ["---", *["---:"] * (len(names) - 1)], *rows]]
        return "\n".join(f"| {' | '.join(row)} |" for row in safe) + f"\n\n{self.legend()}\n"


def _helped(row: Row) -> str:
    """Whether the teacher helped, as far as these examples can tell."""
    told = row.control or {}
    if told.get("better") is None:
        return f"whether the teacher helped can't be told by {row.headline}"
    low, high = told["interval"]
    form = ".4f" if abs(told["better"]) < 10 else ".2f"
    word = "better" if told["better"] >= 0 else "worse"
    sure = "significant" if low > 0 or high < 0 else "no significant difference"
    return (
        f"with the teacher {row.headline} is {abs(told['better']):{form}} {word} than without "
        f"(95 % {low:+{form}} to {high:+{form}} over {told['examples']} examples: {sure})"
    )


def slower(row: Row, before: Row) -> list[str]:
    """The batch sizes ("b1", "b8") at which a row's least and median times are both more than 5 % above another's."""
    both = [batch for batch in row.latency_ms if batch in before.latency_ms]
    return [
        batch
        for batch in both
        if all(row.latency_ms[batch][kind] > SLOWER * before.latency_ms[batch][kind] for kind in ("min", "median"))
    ]


def _faster(reference: Row, row: Row) -> dict[str, float]:
    """By the reference's times of the same minutes, where it was timed in turns with the row."""
    then = row.reference_ms or reference.latency_ms
    return {batch: then[batch]["min"] / times["min"] for batch, times in row.latency_ms.items() if batch in then}


def _gain(reference: Row, row: Row) -> float | None:
    """The headline score minus the reference's, whichever way is better."""
    now, then = row.score.get(row.headline), reference.score.get(row.headline)
    return None if now is None or then is None else now - then


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
    if 0.995 < ratio < 1.005:
        return size
    return f"{size} ({as_times(ratio)})"


def _time_cell(row: Row, reference: Row | None, batch: str, flagged: bool) -> str:
    if batch not in row.latency_ms:
        return UNKNOWN
    times = row.latency_ms[batch]
    cell = f"{times['min']:.1f} ({times['median']:.1f})"
    if reference and batch in reference.latency_ms:
        cell += f" {as_times(_faster(reference, row)[batch])}"
    return cell + (", slower" if flagged else "")


def _score_cell(row: Row, reference: Row | None) -> str:
    score = row.score.get(row.headline)
    form = ".2f" if score is not None and abs(score) >= 10 else ".4f"
    gain = _gain(reference, row) if reference else None
    return as_number(score, form) + ("" if gain is None else f" ({gain:+{form}})")


def rich_table(names: list[str], rows: list[list[str]], caption: str) -> Table:
    """Cells as plain text: a step may hold brackets, which rich would take for markup."""
    table = Table(caption=Text(caption), caption_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(names):
        # A narrow terminal may break between words, never cut a figure short.
        widest = max(len(word) for cell in [name, *(row[number] for row in rows)] for word in (cell.split() or [""]))
        table.add_column(
            name,
            justify="right" if number else "left",
            min_width=widest,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
