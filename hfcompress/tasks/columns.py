"""Columns of texts, pictures and labels: found by their names, and read the same however a file writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Value

from hfcompress.checkpoint.errors import CompressionError, did_you_mean, shown

PAIRS = (
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "passage"),
    ("text1", "text2"),
)
TEXTS = (
    "text",
    "sentence",
    "content",
    "document",
    "review",
    "article",
    "premise",
    "question",
    "question1",
    "sentence1",
)
LABELS = ("label", "labels", "target", "category", "class", "fine_label")
WORDS = ("tokens", "words", "text", "sentence")
TAGS = ("ner_tags", "tags", "labels", "label", "ner", "pos_tags", "upos", "chunk_tags")
PICTURES = ("image", "img", "picture", "photo")
IGNORED = -100
"""The label that PyTorch's losses pass over."""

SINGLE, MULTI, VALUE = "single_label_classification", "multi_label_classification", "regression"
"""transformers' words for what a head tells: one of several labels, each label or not, a number."""


def find_column(
    kind: str, asked: str | None, guesses: Iterable[str], columns: Iterable[str], dataset: str, taken: Iterable[str] = ()
) -> str:
    """The column asked for, else the first guess there is; `kind` is the field that names it, such as `text_column`.

    `taken`: columns that are something else already.
    """
    columns, taken = list(columns), set(taken)
    free = [column for column in columns if column not in taken]
    if asked is not None and asked not in free:
        if asked in taken:
            raise CompressionError(f"{kind}: column {asked!r} of dataset {dataset!r} is in use already; name another one.")
        raise CompressionError(f"{kind}: dataset {dataset!r} has no column {asked!r}.{did_you_mean(asked, free)}")
    found = asked or next((guess for guess in guesses if guess in free), None)
    if found is None:
        raise CompressionError(
            f"dataset {dataset!r}: none of its columns ({', '.join(columns)}) is called"
            f" {', '.join(guess for guess in guesses if guess not in taken)}; name the right one with {kind}."
        )
    return found


def find_texts(text: str | None, pair: str | None, columns: Iterable[str], dataset: str) -> list[str]:
    """The column of the texts, and of their second halves if there are any."""
    columns = list(columns)
    if text is None and pair is None:
        for both in PAIRS:
            if set(both) <= set(columns):
                return list(both)
    first = find_column("text_column", text, [guess for guess in TEXTS if guess != pair], columns, dataset)
    return [first, find_column("text_pair_column", pair, (), columns, dataset, [first])] if pair else [first]


def as_texts(rows: Dataset, columns: Iterable[str], field: str, dataset: str) -> Dataset:
    """The rows with these columns as texts: numbers and dates become what they are written as."""
    for column in columns:
        kind = rows.features[column]
        if not isinstance(kind, Value) or kind.dtype in ("binary", "large_binary"):
            what = "lists" if hasattr(kind, "feature") else f"entries of the kind {type(kind).__name__}"
            raise CompressionError(
                f"dataset {dataset!r}: column {column!r} holds {what}, not texts; name the right one with {field}."
            )
        if kind.dtype not in ("string", "large_string"):
            rows = rows.cast_column(column, Value("string"))
    return rows


def filled(text: str | None) -> bool:
    """Whether there is more than blanks."""
    return bool(text and text.strip())


def missing(values: Sequence[Any], kind: Any) -> list[bool]:
    """For each label whether there is none: an empty cell, or -1 where that hides labels, as in the test splits of benchmarks.

    -1 hides where the feature says so (a ClassLabel has no -1) or where nothing else stands in the whole split; beside other
    numbers it is a label.
    """
    absent = [value is None or value == "" or (isinstance(value, float) and math.isnan(value)) for value in values]
    hides = isinstance(kind, ClassLabel) or all(none or number(value) == -1 for none, value in zip(absent, values, strict=True))
    return [none or (hides and number(value) == -1) for none, value in zip(absent, values, strict=True)]


def number(value: Any) -> int | float | None:
    """The number a label is, whatever it is written as ("3", 3.0, True); None for a name. "007" is a name."""
    if isinstance(value, str):
        if not re.fullmatch(r"-?(0|[1-9]\d{0,17})(\.\d{1,17})?", value):
            return None
        value = float(value) if "." in value else int(value)
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value if isinstance(value, int | float) else None


def label_index(kind: Any, values: Iterable[Hashable], dataset: str) -> tuple[list[str], dict[Any, int]]:
    """The names of the labels that occur, and the place of each value among them.

    Names are sorted, numbers are in the order of numbers. Numbers from 0 on become LABEL_0, LABEL_1, ...; others are their own
    names, as a label of 100 tells nothing of 99 more. A ClassLabel's names stay, also those that don't occur.
    """
    if isinstance(kind, ClassLabel):
        return list(kind.names), {index: index for index in range(len(kind.names))}
    distinct: list[Any] = list(dict.fromkeys(values))
    if all(isinstance(value, str) for value in distinct) and {value.casefold() for value in distinct} <= {"false", "true"}:
        numbers: list[Any] = [int(value.casefold() == "true") for value in distinct]
    else:
        numbers = [number(value) for value in distinct]
    if all(isinstance(one, int) for one in numbers):
        order = sorted(set(numbers))
        names = [f"LABEL_{one}" if order == list(range(len(order))) else str(one) for one in order]
        return names, {value: order.index(one) for value, one in zip(distinct, numbers, strict=True)}
    if all(isinstance(value, str) for value in distinct) and None in numbers:
        names = sorted(distinct)
        return names, {name: index for index, name in enumerate(names)}
    wrong = next((one for one in numbers if isinstance(one, float)), distinct[0])
    raise CompressionError(
        f"dataset {dataset!r}: labels must be names or whole numbers, not like {shown(wrong)}; name the right column with"
        " label_column, or set problem_type: regression."
    )


def name_labels(splits: Mapping[str, Dataset], dataset: str) -> dict[str, Dataset]:
    """Make the column `label` a ClassLabel with the same names in all splits, or a list of these; see `label_index`."""
    kind = next(iter(splits.values())).features["label"]
    if hasattr(kind, "feature"):
        return _name_lists(splits, kind.feature, dataset)
    if isinstance(kind, ClassLabel) and all(rows.features["label"] == kind for rows in splits.values()):
        return dict(splits)
    names, places = label_index(kind, (value for rows in splits.values() for value in rows["label"][:]), dataset)
    kind = ClassLabel(names=names)
    return {split: relabelled(rows, [places[value] for value in rows["label"][:]], kind) for split, rows in splits.items()}


def _name_lists(splits: Mapping[str, Dataset], kind: Any, dataset: str) -> dict[str, Dataset]:
    """Lists of labels, or of a 0 or 1 for each label, as lists of places."""
    lists = {split: [[*value] for value in rows["label"][:]] for split, rows in splits.items()}
    every = [one for part in lists.values() for one in part]
    size = len(every[0])
    numbers = {number(value) for one in every for value in one}
    if size > 1 and numbers <= {0, 1} and all(len(one) == size for one in every) and not isinstance(kind, ClassLabel):
        names = [f"LABEL_{index}" for index in range(size)]
        places = {split: [[i for i, v in enumerate(one) if number(v)] for one in part] for split, part in lists.items()}
    else:
        names, known = label_index(kind, (value for one in every for value in one), dataset)
        places = {split: [sorted({known[value] for value in one}) for one in part] for split, part in lists.items()}
    feature = datasets.List(ClassLabel(names=names))
    return {split: relabelled(rows, places[split], feature) for split, rows in splits.items()}


def number_labels(
    splits: Mapping[str, Dataset],
    dataset: str,
    rule: str = "a label of regression is a number",
    field: str = "label_column, or leave problem_type out",
) -> dict[str, Dataset]:
    """Make the column `label` one of numbers."""
    made = {}
    for split, rows in splits.items():
        values = [number(value) for value in rows["label"][:]]
        if None in values:
            wrong = rows["label"][values.index(None)]
            raise CompressionError(f"dataset {dataset!r}: {rule}, not {shown(wrong)}; name the right column with {field}.")
        made[split] = relabelled(rows, [float(value or 0) for value in values], Value("float32"))
    return made


def relabelled(rows: Dataset, labels: list[Any], kind: Any) -> Dataset:
    """The rows with other labels; what else is in them stays on the disk where it was there, as images may be many."""
    rows = rows.remove_columns("label").add_column("label", labels)  # type: ignore[call-arg]
    return rows.cast_column("label", kind)
