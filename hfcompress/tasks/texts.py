"""What the tasks on texts share: a tokenizer, its limits, examples of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from transformers import DataCollatorWithPadding

from hfcompress.checkpoints import load_tokenizer, positions
from hfcompress.data import TEXTS, choose, find_column
from hfcompress.errors import CompressionError
from hfcompress.tasks.base import Task


class TextTask(Task):
    """A task whose examples are tokens: `input_ids` and `attention_mask` at least."""

    token_columns: ClassVar[tuple[str, ...]] = ("input_ids",)

    text_column: str | None = Field(None, description="the column of the texts; guessed by default")

    def train_tokens(self) -> Iterator[int]:
        for row in self.train_dataset:
            for column in self.token_columns:
                yield from row[column]

    def _asked(self) -> Any:
        if not self.answers_tokens:
            return super()._asked()
        return [[self._as_opened(row[column]).tolist() for column in ("input_ids", "labels")] for row in self.eval_dataset]

    def load_processor(self, path: str) -> Any:
        """The tokenizer of a checkpoint, with a pad token."""
        return load_tokenizer(path)

    @property
    def collator(self) -> Any:
        """Examples to a batch of tensors (batch, longest)."""
        return DataCollatorWithPadding(self.processor)

    def _texts(self, rows: Dataset) -> list[str]:
        """The columns that hold the texts."""
        return [find_column("text_column", self.text_column, TEXTS, rows.column_names, self.dataset)]

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        return zip(*(rows[column][:] for column in self._texts(rows)), strict=True)

    def _clean(self, rows: Dataset) -> Dataset:
        """The texts alone, without empty ones."""
        (text,) = self._texts(rows)
        rows = rows.select_columns([text])
        filled = [index for index, value in enumerate(rows[text][:]) if value and value.strip()]
        return rows.select(filled, keep_in_memory=True)

    def _encoded(self, rows: Dataset, most: int | None, encode: Callable[[dict[str, list]], dict[str, list]]) -> Dataset:
        """At most so many rows, every column replaced by what `encode` makes of it.

        `encode` must not hold the task itself: `map` hashes all that it holds.
        """
        rows = choose(rows, most, self.seed)
        return rows.map(encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True)

    def _limit(self, asked: int) -> int:
        """No longer than asked, than the tokenizer says and than the model has positions."""
        return min(asked, self.processor.model_max_length, positions(self._config))

    def _wanted(self) -> set[str]:
        """The tokenizer's columns that the model's forward knows (DistilBERT, say, has no token_type_ids)."""
        known = self.auto_class._model_mapping.get(type(self._config), None)
        names = set(self.processor.model_input_names)
        if known is None or isinstance(known, tuple):
            return names
        return names & set(inspect.signature(known.forward).parameters)

    def example(self, batch_size: int, length: int | None = None) -> dict[str, Tensor]:
        """The same batch every time, without padding or labels, for latency: both tensors are (batch_size, length).

        The tokens are those of the first texts to score on, repeated or cut to the length.
        """
        tokens = self._first("input_ids", batch_size, length or self.example_length)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def _first(self, column: str, batch_size: int, length: int) -> Tensor:
        """(batch_size, length) of the first rows to score on."""
        rows = [self.eval_dataset[index % len(self.eval_dataset)][column] for index in range(batch_size)]
        return torch.stack([torch.tensor(row).repeat(-(-length // len(row)))[:length] for row in rows])

    def _packed(self, rows: Dataset, size: int, end: str = "") -> list[np.ndarray]:
        """All texts, each with `end` after it, as blocks of exactly `size` tokens.

        What is left over is dropped, unless it is all there is.
        """
        (text,) = self._texts(rows)
        pieces: list[np.ndarray] = []
        for start in range(0, len(rows), 1000):
            texts = [value.strip() + end for value in rows[start : start + 1000][text]]
            encoded = self.processor(texts, return_attention_mask=False, verbose=False)["input_ids"]
            pieces.extend(np.asarray(ids, dtype=np.int64) for ids in encoded)
        stream = np.concatenate(pieces)
        if len(stream) < 2:
            raise CompressionError(f"dataset {self.dataset!r}: its texts make less than two tokens; give longer texts.")
        whole = len(stream) // size
        return list(stream[: whole * size].reshape(whole, size)) if whole else [stream]
