"""What every step did, as a table, Markdown and JSON; what the goal asked; and the whole in one sentence.

Ratios are ratios (4.0 = four times), never percent; scores keep the unit of their metric.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.checkpoint.writing import write_text
from hfcompress.results.measure import Row, finite, machine, measure, weigh
from hfcompress.results.ratios import difference, headlines, slower, speed
from hfcompress.results.sentences import dtypes_part, helped, missed, paid, verdict
from hfcompress.results.table import Fitted, cells_of, columns, forms

__all__ = ["Report", "Row", "machine", "measure", "weigh"]

GOALS = ("max_drop", "smaller", "faster")
ADDED = ("uncompressed", "times_faster", "gains", "curve")
"""Fields of a row that the first readers of format 1 would refuse: in the file they stand under `beside`."""

BASELINES = ("same_dtype", "compiled")
"""What the reference could be without compression."""


class Report:
    """One row a step. `reference` is the index of the row that ratios and differences are told against.

    `goal`: what was asked, by the names of `GOALS`. `same_dtype`: the reference in the floating dtype that the result computes
    in, where that is another one: what it buys is no compression. `compiled`: the reference by torch.compile, beside exports.
    """

    def __init__(
        self,
        *rows: Row,
        reference: int = 0,
        on: dict[str, Any] | None = None,
        goal: Mapping[str, float | None] | None = None,
        same_dtype: Row | None = None,
        compiled: Row | None = None,
    ) -> None:
        """`on`: the machine the rows were measured on; this one, if not given."""
        self.rows: list[Row] = []
        self.reference = reference
        self.machine = machine() if on is None else on
        self.goal = goal
        self.same_dtype, self.compiled = same_dtype, compiled
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append a row; where it is slower than the row before, note so."""
        notes = [note for note in row.notes if not note.startswith("slower than the step before")]
        if 0 <= self.reference < len(self.rows) and (found := slower(row, self.rows[-1], self.rows[self.reference])):
            told = ", ".join(f"{factor:.2f} times the time at batch {batch[1:]}" for batch, factor in found.items())
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
        """How many times faster the last row is than the reference, by least times taken in turns: {"b1": x, "b8": y}."""
        reference, last = self._pair()
        return {batch: told.least for batch, told in speed(last, reference).items()}

    @property
    def drop(self) -> float | None:
        """By how much the headline score got worse since the reference, in its own unit; negative if it got better."""
        return self._drop(self._pair()[1].headline)

    def _drop(self, metric: str) -> float | None:
        reference, last = self._pair()
        gain = difference(last, reference, metric)
        return None if gain is None else -gain if last.higher_is_better else gain

    def judge(self, goal: Mapping[str, float | None] | None) -> list[dict[str, Any]]:
        """Each part of a goal: `part`, `of` which metric or batch, what was `wanted`, what was `reached` (None where it can't
        be told), and whether it was `met`. `max_drop` holds for every text that was scored, `faster` at every batch size."""
        goal = goal or {}
        for name in goal:
            if name not in GOALS:
                raise CompressionError(f"goal: {name!r}.{did_you_mean(name, GOALS)}")
        faster: dict[str, float | None] = {**dict.fromkeys(self._pair()[1].latency_ms), **self.faster}
        reached: dict[str, dict[str, float | None]] = {
            "max_drop": {metric: self._drop(metric) for metric in headlines(self.rows)},
            "smaller": {"disk": self.smaller},
            "faster": {f"batch {batch[1:]}": ratio for batch, ratio in faster.items()},
        }
        found = []
        for part in GOALS:
            if (wanted := goal.get(part)) is None:
                continue
            for of, value in reached[part].items():
                # Differences like 0.97 - 0.96 carry the noise of floats, and a goal met to the digit is met.
                beyond = None if value is None else wanted - value if part == "max_drop" else value - wanted
                met = beyond is not None and beyond >= -1e-9
                found.append({"part": part, "of": of, "wanted": wanted, "reached": value, "met": met})
        return found

    def check_goal(self, goal: Mapping[str, float | None] | None) -> list[str]:
        """A sentence for each missed part of the goal: `max_drop`, `smaller`, `faster` (at every batch size)."""
        return [missed(one["part"], one["of"], one["wanted"], one["reached"]) for one in self.judge(goal) if not one["met"]]

    @property
    def baselines(self) -> list[Row]:
        """What the reference could be without compression, as far as it was measured."""
        return [row for name in BASELINES if (row := getattr(self, name)) is not None]

    def verdict(self) -> str:
        """The last row against the reference in one sentence."""
        return verdict(*self._pair(), self.same_dtype)

    def to_dict(self) -> dict[str, Any]:
        rows = [finite(asdict(row)) for row in self.rows]
        added = [{name: value for name in ADDED if (value := row.pop(name))} for row in rows]
        told: dict[str, Any] = {"format": 1, "machine": self.machine, "reference": self.reference, "rows": rows}
        if any(added):
            told["beside"] = added
        told |= {name: finite(asdict(row)) for name in BASELINES if (row := getattr(self, name)) is not None}
        if self.goal:
            told["goal"] = dict(self.goal)
        if 0 <= self.reference < len(rows) - 1:
            told |= {"verdict": self.verdict(), **({"judged": finite(self.judge(self.goal))} if self.goal else {})}
        return told

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """Raises CompressionError for another format, an unknown key or a missing one."""
        if not isinstance(data, dict) or data.get("format") != 1:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise CompressionError(f"report: format {found!r} found; this version of hfcompress reads format 1.")
        report = cls(reference=data.get("reference", 0), on=data.get("machine", {}), goal=data.get("goal"))
        added = data.get("beside") or []
        for number, row in enumerate(data.get("rows", [])):
            report.add(_row(row, f"row {number + 1}", added[number] if number < len(added) else {}))
        for name in BASELINES:
            if data.get(name):
                setattr(report, name, _row(data[name], name, {}))
        return report

    def save(self, path: str | Path) -> None:
        """JSON, written whole or not at all. CompressionError where it can't be."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(path, text + "\n", "the report")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise CompressionError(f"report {path}: can't be read as a JSON report ({error}).") from error

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Column names and a list of cells for each line, nothing left out."""
        self._pair()
        return cells_of(columns(self))

    def legend(self, narrow: bool = False) -> str:
        """How to read the cells, and the notes of the rows. `narrow`: the table is shown without medians."""
        reference, last = self._pair()
        told = []
        if len(self.rows) > 1:
            told.append(f"Ratios: times smaller or faster than “{reference.step}”; differences are to it too.")
        told.append("Times: least of several runs." if narrow else "Times: least (median).")
        examples = {gain["examples"] for row in self.rows for gain in row.gains.values()}
        if examples:
            told.append(
                f"±: half the 95 % interval of a paired bootstrap over {' or '.join(map(str, sorted(examples)))} examples."
            )
        if self.same_dtype is not None:
            told.append(dtypes_part(reference, last, self.same_dtype))
        told += [f"{row.step}: {note}." for row in self.rows for note in row.notes]
        for row in self.rows:
            if row.control:
                told.append(f"{row.step}: {helped(row)}.")
            if row.uncompressed:
                told.append(f"{row.step}: {paid(row)}.")
        return " ".join(told)

    def table(self) -> Fitted:
        """For a console of any width."""
        self._pair()
        return Fitted(forms(self), self.legend(), self.legend(narrow=True))

    def markdown(self) -> str:
        """The same cells as a Markdown table, for a model card."""
        names, rows = self.cells()
        safe = [[cell.replace("|", "\\|") for cell in row] for row in [names, ["---", *["---:"] * (len(names) - 1)], *rows]]
        return "\n".join(f"| {' | '.join(row)} |" for row in safe) + f"\n\n{self.legend()}\n"


def _row(told: Any, where: str, added: Any) -> Row:
    """A row of a file, which anybody may have written."""
    if not isinstance(told, dict) or not isinstance(added, dict):
        raise CompressionError(f"report, {where}: a row is a mapping of its fields.")
    possible = [part.name for part in fields(Row)]
    for key in (found := {**told, **added}):
        if key not in possible:
            raise CompressionError(f"report, {where}: {key!r} is no field.{did_you_mean(key, possible)}")
    try:
        Row(**found)
        return TypeAdapter(Row).validate_python(found)
    except TypeError as error:
        raise CompressionError(f"report, {where}: {str(error).partition('() ')[2]}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CompressionError(f"report, {where}: {place}: {first['msg'][0].lower()}{first['msg'][1:]}.") from error
