from __future__ import annotations

from typing import Any, Literal

from datasets import ClassLabel, Dataset, List
from pydantic import Field, PositiveInt, model_validator
from transformers import AutoModelForSequenceClassification

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.columns import (
    MULTI,
    SINGLE,
    VALUE,
    as_texts,
    filled,
    find_column,
    find_texts,
    missing,
    name_labels,
    number,
    number_labels,
)
from hfcompress.tasks.labels import Classification
from hfcompress.tasks.texts import TextTask


class TextClassification(Classification, TextTask):
    """One label a text, or a pair of texts; or, by `problem_type`, several, or a number."""

    auto_class = AutoModelForSequenceClassification

    text_pair_column: str | None = Field(default=None, description="the column of the second texts; guessed by default")
    label_columns: list[str] | None = Field(
        default=None,
        min_length=2,
        description="columns of 0 and 1, one a label, where a text has several; instead of label_column",
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = Field(
        default=None,
        description="what the head tells: one label, several (lists of labels in the data), or a number; by default as the "
        "checkpoint's config says, else what the labels are",
    )
    max_length: PositiveInt = Field(default=128, description="tokens a text is cut to")
    name: Literal["text-classification"] = "text-classification"

    @model_validator(mode="after")
    def _one_kind_of_labels(self) -> TextClassification:
        if self.label_columns and (self.label_column or not self.labelled):
            other = "label_column" if self.label_column else "labelled: false"
            raise ValueError(f"label_columns and {other} exclude each other; leave one of the two out")
        if self.label_columns and self.problem_type not in (None, MULTI):
            raise ValueError(f"label_columns are for {MULTI}, not {self.problem_type}; leave one of the two out")
        return self

    @property
    def example_length(self) -> int:
        return self._limit(self.max_length)

    def _texts(self, rows: Dataset) -> list[str]:
        return find_texts(self.text_column, self.text_pair_column, rows.column_names, self.dataset)

    def _labels_of(self, rows: Dataset, others: Any, guesses: Any = ()) -> list[str]:
        if self.label_columns is None:
            return super()._labels_of(rows, others, *([guesses] if guesses else []))
        return [find_column("label_columns", one, (), rows.column_names, self.dataset, others) for one in self.label_columns]

    def _used(self, rows: Dataset) -> list[str]:
        texts = self._texts(rows)
        return [*texts, *self._labels_of(rows, texts)]

    def _clean(self, rows: Dataset) -> Dataset:
        """The texts and `label`, without rows that lack one."""
        texts = self._texts(rows)
        label = self._labels_of(rows, texts)
        rows = as_texts(rows.select_columns([*texts, *label]), texts, "text_column", self.dataset)
        if self.label_columns:
            rows = self._gathered(rows, label)
        elif label and label != ["label"]:
            rows = rows.rename_column(label[0], "label")
        columns = [rows[text][:] for text in texts]
        hidden = missing(rows["label"][:], rows.features["label"]) if label else [False] * len(rows)
        values = enumerate(zip(hidden, *columns, strict=True))
        given = [index for index, (is_hidden, *parts) in values if not is_hidden and all(map(filled, parts))]
        return rows.select(given, keep_in_memory=True)

    def _gathered(self, rows: Dataset, columns: list[str]) -> Dataset:
        """Columns of 0 and 1 as one column `label` of lists; None where a cell is empty or -1, as hidden labels are."""
        lists: list[list[int] | None] = []
        for index, cells in enumerate(zip(*(rows[column][:] for column in columns), strict=True)):
            numbers = [number(cell) for cell in cells]
            if any(one not in (0, 1, -1) and cell not in (None, "") for one, cell in zip(numbers, cells, strict=True)):
                raise CompressionError(
                    f"dataset {self.dataset!r}: row {index} has {', '.join(map(str, cells))} under {', '.join(columns)}, not 0"
                    " or 1; mend it, or name other label_columns."
                )
            lists.append([i for i, one in enumerate(numbers) if one] if set(numbers) <= {0, 1} else None)
        return rows.remove_columns(columns).add_column("label", lists, feature=List(ClassLabel(names=columns)))  # type: ignore[call-arg]

    def _read(self) -> dict[str, Dataset]:
        rows = super()._read()
        if not self.labelled:
            self._problem = self.problem_type or self._told_by_head() or SINGLE
            return rows
        kind = next(iter(rows.values())).features["label"]
        several = hasattr(kind, "feature")
        self._problem = self.problem_type or self._told_by_head() or (MULTI if several else SINGLE)
        if several and self._problem != MULTI:
            raise CompressionError(
                f"dataset {self.dataset!r}: its texts have lists of labels, which is {MULTI}, and here {self._problem} is asked"
                " for, by problem_type or by the checkpoint's config; set problem_type, or name another label_column."
            )
        if self._problem == VALUE:
            return number_labels(rows, self.dataset)
        return name_labels(rows, self.dataset)

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        texts, labelled, problem = self._texts(train), self.labelled, self._problem
        kind = train.features["label"] if labelled else None
        kind = getattr(kind, "feature", kind)
        order = self._order(tuple(kind.names) if isinstance(kind, ClassLabel) else (), path)
        processor, length, wanted, count = self.processor, self._limit(self.max_length), self._wanted(), len(self.labels)

        def tokens(rows: dict[str, list]) -> dict[str, list]:
            encoded = processor(*(rows[column] for column in texts), truncation=True, max_length=length)
            kept = {name: values for name, values in encoded.items() if name in wanted}
            return {**kept, "labels": targets(rows["label"], order, problem, count)} if labelled else kept

        self._train = self._encoded(train, self.max_train_samples, tokens)
        self._eval = self._encoded(held_out, self.max_eval_samples, tokens)


def targets(labels: list[Any], order: list[int], problem: str, count: int) -> list[Any]:
    """What the head's loss wants: the place of the label, a 0.0 or 1.0 for each of `count` labels, or the number."""
    if problem == VALUE:
        return labels
    if problem == SINGLE:
        return [order[label] for label in labels]
    places = [{order[label] for label in (one if isinstance(one, list) else [one])} for one in labels]
    return [[float(index in held) for index in range(count)] for held in places]
