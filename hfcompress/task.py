"""The tasks: the data, how to batch it, how to score it, which Auto class. The only thing that knows datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from pydantic import Field, PositiveInt, PrivateAttr
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    default_data_collator,
)

from hfcompress.checkpoints import fit_labels, has_head, head_labels
from hfcompress.data import LABELS, TEXTS, choose, find_column, find_texts, name_labels, resolve_address
from hfcompress.errors import CompressionError, did_you_mean
from hfcompress.task_base import Task

__all__ = ["TASKS", "CausalLM", "Task", "TextClassification", "read_task", "resolve_address"]


class TextClassification(Task):
    """One label a text, or a pair of texts."""

    auto_class = AutoModelForSequenceClassification

    text_pair_column: str | None = Field(None, description="the column of the second texts; guessed by default")
    label_column: str | None = Field(None, description="the column of the labels; guessed by default")
    max_length: PositiveInt = Field(128, description="tokens a text is cut to")
    name: Literal["text-classification"] = "text-classification"

    _labels: tuple[str, ...] | None = PrivateAttr(None)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of the logits."""
        return self._ready(self._labels)

    @property
    def example_length(self) -> int:
        return self._limit(self.max_length)

    def _texts(self, rows: Dataset) -> list[str]:
        return find_texts(self.text_column, self.text_pair_column, rows.column_names, self.dataset)

    def _clean(self, rows: Dataset) -> Dataset:
        """The texts and `label`, without rows that lack one (a label is -1 where a benchmark hides it)."""
        texts = self._texts(rows)
        others = [column for column in rows.column_names if column not in texts]
        column = find_column("label_column", self.label_column, LABELS, others, self.dataset)
        rows = rows.select_columns([*texts, column])
        rows = rows if column == "label" else rows.rename_column(column, "label")
        values = zip(rows["label"][:], *(rows[text][:] for text in texts), strict=True)
        given = [i for i, (label, *parts) in enumerate(values) if label not in (None, -1, "") and all(parts)]
        return rows.select(given, keep_in_memory=True)

    def _read(self) -> dict[str, Dataset]:
        return name_labels(super()._read(), self.dataset)

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        texts, names = self._texts(train), tuple(train.features["label"].names)
        order = list(range(len(names)))
        if has_head(self._config):
            order, self._labels = self._fit(names, self._config, path)
        else:
            self._labels = names
        # no `self` inside `tokens`: map hashes all that it holds
        processor, length = self.processor, self._limit(self.max_length)
        wanted = {name for name in processor.model_input_names if self._accepts(name)}

        def tokens(rows: dict[str, list]) -> dict[str, list]:
            encoded = processor(*(rows[column] for column in texts), truncation=True, max_length=length)
            kept = {name: values for name, values in encoded.items() if name in wanted}
            return {**kept, "labels": [order[label] for label in rows["label"]]}

        def tokenised(rows: Dataset, most: int | None) -> Dataset:
            rows = choose(rows, most, self.seed)
            return rows.map(tokens, batched=True, remove_columns=rows.column_names, keep_in_memory=True)

        self._train = tokenised(train, self.max_train_samples)
        self._eval = tokenised(held_out, self.max_eval_samples)

    def _head(self, config: PreTrainedConfig, path: str) -> tuple[dict[str, Any], bool]:
        if not has_head(config):
            id2label = dict(enumerate(self.labels))
            label2id = {name: index for index, name in id2label.items()}
            return {"num_labels": len(id2label), "id2label": id2label, "label2id": label2id}, True
        order, _ = self._fit(self.labels, config, path)
        if order != list(range(len(order))):
            raise CompressionError(
                f"model {str(path)!r}: its labels ({', '.join(head_labels(config))}) are in another order than those"
                f" the task was opened with ({', '.join(self.labels)}); open a task of its own for it."
            )
        return {}, False

    def _fit(self, names: tuple[str, ...], config: PreTrainedConfig, path: str) -> tuple[list[int], tuple[str, ...]]:
        fit = fit_labels(names, config)
        if fit is None:
            raise CompressionError(
                f"model {str(path)!r}: its head has the labels {', '.join(head_labels(config))}, and dataset"
                f" {self.dataset!r} has {', '.join(names)}; choose data with these labels, or a checkpoint without a"
                " classification head."
            )
        return fit


class CausalLM(Task):
    """The next token; the texts are laid end to end and cut into blocks."""

    auto_class = AutoModelForCausalLM

    block_size: int = Field(512, ge=2, description="tokens a block")
    eval_batch_size: PositiveInt = Field(4, description="blocks a batch when scoring; logits are large")
    metrics: list[str] = Field(["perplexity"], min_length=1, description="what to score; the first is the headline")
    name: Literal["causal-lm"] = "causal-lm"

    @property
    def collator(self) -> Any:
        """Blocks of one length to tensors (batch, block_size)."""
        return default_data_collator

    @property
    def example_length(self) -> int:
        return self._limit(128)

    def _texts(self, rows: Dataset) -> list[str]:
        return [find_column("text_column", self.text_column, TEXTS, rows.column_names, self.dataset)]

    def _clean(self, rows: Dataset) -> Dataset:
        (text,) = self._texts(rows)
        rows = rows.select_columns([text])
        filled = [index for index, value in enumerate(rows[text][:]) if value and value.strip()]
        return rows.select(filled, keep_in_memory=True)

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        self._train = choose(self._packed(train), self.max_train_samples, self.seed)
        self._eval = choose(self._packed(held_out), self.max_eval_samples, self.seed)

    def _packed(self, rows: Dataset) -> Dataset:
        """Blocks of exactly `block_size` tokens; what is left over is dropped, unless it is all there is."""
        (text,) = self._texts(rows)
        size = self._limit(self.block_size)
        pieces: list[np.ndarray] = []
        for start in range(0, len(rows), 1000):
            # a blank line between texts, not eos: that ends a turn in chat models, which no text here does
            texts = [value.strip() + "\n\n" for value in rows[start : start + 1000][text]]
            encoded = self.processor(texts, return_attention_mask=False, verbose=False)["input_ids"]
            pieces.extend(np.asarray(ids, dtype=np.int64) for ids in encoded)
        stream = np.concatenate(pieces)
        if len(stream) < 2:
            raise CompressionError(f"dataset {self.dataset!r}: its texts make less than two tokens; give longer texts.")
        whole = len(stream) // size
        blocks = list(stream[: whole * size].reshape(whole, size)) if whole else [stream]
        masks = [np.ones_like(block) for block in blocks]
        return Dataset.from_dict({"input_ids": blocks, "attention_mask": masks, "labels": blocks})

    def _head(self, config: PreTrainedConfig, path: str) -> tuple[dict[str, Any], bool]:
        return {}, False

    def _decide(self, logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        return super()._decide(logits[:-1], labels[1:])  # position i foretells token i + 1


TASKS: dict[str, type[Task]] = {"text-classification": TextClassification, "causal-lm": CausalLM}
"""The one table: a task's name in a recipe, and its class."""


def read_task(mapping: Mapping[str, Any]) -> Task:
    """`{name: text-classification, dataset: ...}` -> the task. An unknown name is a `CompressionError`, a wrong field
    pydantic's ValidationError."""
    name = mapping.get("name")
    if name not in TASKS:
        said = "there is no name" if name is None else f"there is no task {name!r}"
        raise CompressionError(f"task: {said}; name one.{did_you_mean(str(name or ''), TASKS)}")
    return TASKS[name](**mapping)
