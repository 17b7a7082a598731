"""What may be said of two rows: times smaller, times faster by times taken in turns, the difference of a score."""

from __future__ import annotations

from typing import NamedTuple

from hfcompress.results.measure import Row
from hfcompress.results.timing import significant

SLOWER = 1.05
"""A step made the model slower if it takes more than 5 % longer: less is what a shared machine moves by itself."""


class Speed(NamedTuple):
    """How many times faster a row is than the reference, by least and by median times, and the 95 % interval if it is known."""

    least: float
    median: float
    low: float | None = None
    high: float | None = None

    @property
    def is_significant(self) -> bool | None:
        """None where it can't be told."""
        if self.low is None or self.high is None:
            return None
        return significant({"min": self.least, "median": self.median}, self.low, self.high)


def speed(row: Row, reference: Row) -> dict[str, Speed]:
    """By batch size, where both were timed in turns: rows timed minutes apart tell of the machine, not of the model."""
    if row is reference:
        return {batch: Speed(1.0, 1.0, 1.0, 1.0) for batch in row.latency_ms}
    then = row.reference_ms or {}
    intervals = row.times_faster or {}
    return {
        batch: Speed(then[batch]["min"] / times["min"], then[batch]["median"] / times["median"], *intervals.get(batch, ()))
        for batch, times in row.latency_ms.items()
        if batch in then
    }


def slower(row: Row, before: Row, reference: Row) -> dict[str, float]:
    """By batch size, how many times as long as the row before a row takes, where it is clearly longer.

    Each is told by times taken in turns with the reference. A step that left sizes and dtype alone slows nothing down.
    """
    if _is_alike(row, before):
        return {}
    now, then = speed(row, reference), speed(before, reference)
    found = {}
    for batch in now:
        if batch not in then:
            continue
        one, other = now[batch], then[batch]
        apart = one.high is None or other.low is None or one.high < other.low
        if apart and min(other.least / one.least, other.median / one.median) > SLOWER:
            found[batch] = other.least / one.least
    return found


def _is_alike(one: Row, other: Row) -> bool:
    """Whether two models have the same sizes in the same dtype, so that they compute the same products."""
    return all(
        getattr(one, name) == getattr(other, name) for name in ("parameters", "stored_elements", "megabytes")
    ) and one.settings.get("dtype") == other.settings.get("dtype")


def difference(row: Row, reference: Row, metric: str) -> float | None:
    """A score minus the reference's, whichever way is better."""
    now, then = row.score.get(metric), reference.score.get(metric)
    return None if now is None or then is None else now - then


def half_interval(row: Row, metric: str) -> float | None:
    """Half the 95 % interval of the difference to the reference's score, if it is known."""
    told = row.gains.get(metric)
    return (told["interval"][1] - told["interval"][0]) / 2 if told else None


def headlines(rows: list[Row]) -> list[str]:
    """The metric that matters most; and, if it was scored, the same on a second text."""
    first = rows[-1].headline
    return [first, *([f"{first}{ALSO}"] if any(f"{first}{ALSO}" in row.score for row in rows) else [])]


ALSO = "_also"
"""How the name of a metric ends that was scored on a text of another source."""


def called(metric: str) -> str:
    """How a metric is called in sentences and above columns."""
    return f"{metric.removesuffix(ALSO)} on other text" if metric.endswith(ALSO) else metric
