from __future__ import annotations

from typing import Literal

from datasets import Dataset
from pydantic import Field, PositiveInt
from transformers import AutoModelForSequenceClassification

from hfcompress.tasks.data import find_texts, name_labels
from hfcompress.tasks.labels import Classification
from hfcompress.tasks.texts import TextTask


class TextClassification(Classification, TextTask):
    """One label a text, or a pair of texts."""

    auto_class = AutoModelForSequenceClassification

    text_pair_column: str | None = Field(None, description="the column of the second texts; guessed by default")
    max_length: PositiveInt = Field(128, description="tokens a text is cut to")
    name: Literal["text-classification"] = "text-classification"

    @property
    def example_length(self) -> int:
        return self._limit(self.max_length)

    def _texts(self, rows: Dataset) -> list[str]:
        return find_texts(self.text_column, self.text_pair_column, rows.column_names, self.dataset)

    def _clean(self, rows: Dataset) -> Dataset:
        """The texts and `label`, without rows that lack one (a label is -1 where a benchmark hides it)."""
        texts = self._texts(rows)
        label = self._labels_of(rows, texts)
        rows = rows.select_columns([*texts, *label])
        if label and label != ["label"]:
            rows = rows.rename_column(label[0], "label")
        columns = [rows[text][:] for text in texts]
        labels = rows["label"][:] if label else [0] * len(rows)
        values = enumerate(zip(labels, *columns, strict=True))
        given = [index for index, (value, *parts) in values if value not in (None, -1, "") and all(parts)]
        return rows.select(given, keep_in_memory=True)

    def _read(self) -> dict[str, Dataset]:
        rows = super()._read()
        return name_labels(rows, self.dataset) if self.labelled else rows

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        texts, labelled = self._texts(train), self.labelled
        order = self._order(tuple(train.features["label"].names) if labelled else (), path)
        processor, length, wanted = self.processor, self._limit(self.max_length), self._wanted()

        def tokens(rows: dict[str, list]) -> dict[str, list]:
            encoded = processor(*(rows[column] for column in texts), truncation=True, max_length=length)
            kept = {name: values for name, values in encoded.items() if name in wanted}
            return {**kept, "labels": [order[label] for label in rows["label"]]} if labelled else kept

        self._train = self._encoded(train, self.max_train_samples, tokens)
        self._eval = self._encoded(held_out, self.max_eval_samples, tokens)
