"""What a report says in words: the verdict, the goal, what a dtype, a teacher or plain training did."""

from __future__ import annotations

from typing import Any

from hfcompress.results.measure import Row
from hfcompress.results.ratios import called, headlines, speed
from hfcompress.results.table import UNKNOWN, as_number, as_times


def verdict(reference: Row, last: Row, same_dtype: Row | None = None) -> str:
    """Size, speed at the largest batch and scores: "6.5 times smaller, 5.4 times faster at batch 8, accuracy 0.966 to 0.972, no
    significant difference"; and what came from the dtype alone."""
    if last is reference:
        return "Nothing was compressed."
    told = [*_sizes(reference, last), *(_scores(last, reference, metric) for metric in headlines([reference, last]))]
    if same_dtype is None:
        return f"{', '.join(told)}."
    return f"{', '.join(told)}; by {_dtype(same_dtype)} alone {', '.join(_sizes(reference, same_dtype))}."


def _sizes(reference: Row, row: Row) -> list[str]:
    ratio = reference.megabytes / row.megabytes
    told = ["as large" if 0.995 < ratio < 1.005 else f"{_times(ratio)} smaller" if ratio > 1 else f"{_times(1 / ratio)} larger"]
    for batch, found in list(speed(row, reference).items())[-1:]:
        if found.is_significant is False:
            told.append(f"no significant difference in speed at batch {batch[1:]}")
        elif found.least >= 1:
            told.append(f"{_times(found.least)} faster at batch {batch[1:]}")
        else:
            told.append(f"{_times(1 / found.least)} slower at batch {batch[1:]}")
    return told


def _times(ratio: float) -> str:
    return f"{as_times(ratio)[:-1]} times"


def _scores(row: Row, reference: Row, metric: str) -> str:
    then, now = (one.score.get(metric) for one in (reference, row))
    form = ".2f" if max(abs(then or 0), abs(now or 0)) >= 10 else ".3f"
    if then is None:
        return f"{called(metric)} {as_number(now, form)}"
    told = f"{called(metric)} {as_number(then, form)} to {as_number(now, form)}"
    if metric not in row.gains:
        return told
    return f"{told}, {significance(row.gains[metric]['interval'], ('significantly better', 'significantly worse'))}"


def significance(interval: tuple[float, float], words: tuple[str, str]) -> str:
    low, high = interval
    return words[0] if low > 0 else words[1] if high < 0 else "no significant difference"


def _dtype(row: Row) -> str:
    return row.settings.get("dtype", UNKNOWN)


def dtypes_part(reference: Row, last: Row, same_dtype: Row) -> str:
    """What of the ratios came from the dtype, and what from compression."""
    by_dtype, by_steps = (", ".join(told) for told in dtype_ratios(reference, last, same_dtype))
    return f"By {_dtype(same_dtype)} alone: {by_dtype}. By compression: {by_steps}."


def dtype_ratios(reference: Row, last: Row, same_dtype: Row) -> tuple[list[str], list[str]]:
    """The ratios that the dtype alone has, and those that the steps add."""
    alone, whole = speed(same_dtype, reference), speed(last, reference)
    by_dtype = [f"{as_times(reference.megabytes / same_dtype.megabytes)} smaller"]
    by_steps = [f"{as_times(same_dtype.megabytes / last.megabytes)} smaller"]
    for batch in whole:
        if batch in alone:
            by_dtype.append(f"{as_times(alone[batch].least)} faster at batch {batch[1:]}")
            by_steps.append(f"{as_times(whole[batch].least / alone[batch].least)} faster at batch {batch[1:]}")
    return by_dtype, by_steps


def missed(part: str, of: str, wanted: float, reached: float | None) -> str:
    """One missed part of a goal."""
    if part == "max_drop":
        told = "it can't be told" if reached is None else f"it dropped by {reached:.4f}"
        return f"max_drop: {called(of)} may drop by {wanted:g}, {told}."
    at = f" at {of}" if part == "faster" else ""
    if reached is None:
        return f"{part}: {wanted:g} times wanted, it can't be told{at} without times taken in turns with the reference."
    return f"{part}: {wanted:g} times wanted, {reached:.2f} times reached{at}."


def judged(part: str, of: str, wanted: float, reached: float | None, met: bool) -> str:
    """One part of a goal, met or missed."""
    if not met or reached is None:
        return f"missed: {missed(part, of, wanted, reached)}"
    if part == "max_drop":
        told = f"it dropped by {reached:.4f}" if reached > 0 else "it did not drop"
        return f"met: {called(of)} may drop by {wanted:g}, {told}."
    return f"met: {part}{f' at {of}' if part == 'faster' else ''}, {wanted:g} times wanted, {reached:.2f} times reached."


def helped(row: Row) -> str:
    """Whether the teacher helped, as far as these examples can tell."""
    told = row.control or {}
    if told.get("better") is None:
        return f"whether the teacher helped can't be told by {row.headline}"
    return f"with the teacher {row.headline} is {_apart(told)} than without {_interval(told)}"


def paid(row: Row) -> str:
    """What compression cost, the training being the same."""
    told = row.uncompressed or {}
    if told.get("better") is None:
        return f"what compression cost can't be told by {row.headline}"
    return f"{row.headline} is {_apart(told)} than that of the uncompressed model trained alike {_interval(told)}"


def _form(told: dict[str, Any]) -> str:
    return ".4f" if abs(told["better"]) < 10 else ".2f"


def _apart(told: dict[str, Any]) -> str:
    return f"{abs(told['better']):{_form(told)}} {'better' if told['better'] >= 0 else 'worse'}"


def _interval(told: dict[str, Any]) -> str:
    (low, high), form = told["interval"], _form(told)
    sure = significance((low, high), ("significant", "significant"))
    return f"(95 % {low:+{form}} to {high:+{form}} over {told['examples']} examples: {sure})"
