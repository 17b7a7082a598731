"""What language models are calibrated and trained on: a mixture of the task's data, of text they write and of other texts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.columns import TEXTS, as_texts, filled, find_column
from hfcompress.tasks.data import read_splits, resolve_address

log = logging.getLogger("hfcompress")

DATA, OWN = "data", "own"
"""In a mixture: the task's train split; what the model as it came writes itself. All else is an address."""


def same_place(one: str, other: str) -> bool:
    """Whether two addresses are the same, or lead to the same file or folder here."""
    if one.rstrip("/") == other.rstrip("/"):
        return True
    places = [Path(resolve_address(address)).expanduser() for address in (one, other)]
    return all(place.exists() for place in places) and places[0].samefile(places[1])


def rows_of(address: str, splits: Iterable[str], asked: str | None, column: str, where: str) -> Dataset:
    """The texts of an address, in a column of this name: of the first of these splits that it has, or of its first.

    `asked`: a column to look for before the usual ones. `where`: the field that names the address, as errors call it.
    """
    there = read_splits(address)[0]
    rows = there[next((name for name in splits if name in there), next(iter(there)))]
    text = find_column("text_column", asked if asked in rows.column_names else None, TEXTS, rows.column_names, address)
    rows = as_texts(rows.select_columns([text]), [text], "text_column", address)
    rows = rows.select([i for i, value in enumerate(rows[text][:]) if filled(value)], keep_in_memory=True)
    if not len(rows):
        raise CompressionError(f"{where}: no text is left of {address!r}; give one that has some.")
    return rows if text == column else rows.rename_column(text, column)


def without(rows: Dataset, column: str, scored: Iterable[Dataset], address: str) -> Dataset:
    """The rows whose texts are not among those to score on."""
    known = {text.strip() for part in scored for text in part[column][:]}
    left = [index for index, text in enumerate(rows[column][:]) if text.strip() not in known]
    if not left:
        raise CompressionError(
            f"mixture: every text of {address!r} is one that is scored, and what was trained on shows nothing; take it out."
        )
    if len(left) < len(rows):
        log.info(f"mixture: {len(rows) - len(left):,} of {len(rows):,} texts of {address!r} are scored, and left out")
    return rows.select(left, keep_in_memory=True)


def shares(mixture: list[str], sizes: dict[str, int], most: int | None) -> dict[str, int]:
    """How many examples each source gives: equal shares, an entry a share; `most` in all. `sizes`: of all that have an end.

    The smallest source decides for all; what `most` leaves over by division goes to the first ones.
    """
    asked = Counter(mixture)
    limits = [size / asked[source] for source, size in sizes.items()] + ([] if most is None else [most / len(mixture)])
    if not limits:
        raise CompressionError(
            "mixture: a model can write own text without end; say with max_train_samples how many blocks are wanted."
        )
    counts = {source: int(min(limits) * number) for source, number in asked.items()}
    for source in counts:
        if most is not None and min(limits) == most / len(mixture) and sum(counts.values()) < most:
            counts[source] += counts[source] < sizes.get(source, most)
    if not all(counts.values()):
        raise CompressionError(
            f"mixture: max_train_samples {most} gives not each of {', '.join(asked)} an example; raise it to {len(mixture)} or "
            "more."
        )
    return counts
