"""What the tasks on texts share: a tokenizer, its limits, examples of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, PrivateAttr
from torch import Tensor
from transformers import DataCollatorWithPadding

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.vocabulary.embeddings import with_tokens
from hfcompress.tasks.base import Task
from hfcompress.tasks.columns import TEXTS, as_texts, find_column
from hfcompress.tasks.data import choose, quiet_datasets
from hfcompress.tasks.pretrained import load_tokenizer, positions


class TextTask(Task):
    """A task whose examples are tokens: `input_ids` and `attention_mask` at least."""

    token_columns: ClassVar[tuple[str, ...]] = ("input_ids",)

    text_column: str | None = Field(default=None, description="the column of the texts; guessed by default")

    _positions: tuple[Any, int] | None = PrivateAttr(None)

    def data_tokens(self, split: str = "train") -> Iterator[int]:
        """The tokens of the training data, or of "all", as models are given them."""
        for data in (self.train_dataset, self.eval_dataset)[: 1 if split == "train" else 2]:
            for row in data:
                for column in self.token_columns:
                    yield from (token for token in row[column] if token >= 0)

    def _asked(self) -> Any:
        if not self.answers_tokens:
            return super()._asked()
        return [[self._as_opened(row[column]).tolist() for column in ("input_ids", "labels")] for row in self.eval_dataset]

    def adopt(self, tokenizer: Any) -> None:
        """Go on with a tokenizer that has some of the tokens of the one there is: the data are tokenised anew.

        What was remembered of the original stays comparable where the questions are the same; else `agreement` is left out.
        """
        before, asked, path = self.processor.get_vocab(), self._asked(), self._opened
        kept = sorted(before[token] for token in tokenizer.get_vocab())
        self._opened = self._train = self._eval = None  # no mixture if something fails below
        self._processor, self._config, self._retold = tokenizer, with_tokens(self._config, kept), None
        self._kept = kept if self._kept is None else [self._kept[index] for index in kept]
        with quiet_datasets():
            train, held_out = self._split(self._read())
            self._prepare(train, held_out, str(path))
        self._opened = path
        self._is_other = self._is_other or self._asked() != asked
        if self._reference is not None and self._is_other:
            self._reference = None
            if self.headline == "agreement":
                raise CompressionError(
                    "prune_vocab: the texts to score on are other tokens now, and an answer to each token can't be compared "
                    "with the original's; give a corpus that holds them, or score something else."
                )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a score must be read with."""
        if not self.answers_tokens or self._kept is None:
            return ()
        other = "and on texts cut into other tokens, " if self._is_other else ""
        return (f"scored over {len(self._kept):,} tokens, {other}so compare perplexity with rows of the same tokens only",)

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

    def _used(self, rows: Dataset) -> list[str]:
        return self._texts(rows)

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        return zip(*(rows[column][:] for column in self._texts(rows)), strict=True)

    def _clean(self, rows: Dataset) -> Dataset:
        """The texts alone, without empty ones."""
        (text,) = self._used(rows)
        rows = as_texts(rows.select_columns([text]), [text], "text_column", self.dataset)
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
        return min(asked, self.processor.model_max_length, self._most())

    def _most(self) -> int:
        """Tokens the model has positions for."""
        if self._positions is None or self._positions[0] is not self._config:
            self._positions = self._config, positions(self._config)
        return self._positions[1]

    def _examples_to_check(self) -> list[Any]:
        return [self._train, self._eval]

    def _check_tokens(self, path: str) -> None:
        """CompressionError where the texts have tokens that the model has no embeddings for.

        A tokenizer with more tokens than that does no harm where no text has them.
        """
        rows = getattr(self._config.get_text_config(), "vocab_size", None)
        if not isinstance(rows, int) or len(self.processor) <= rows:
            return
        most = self.processor.pad_token_id or 0  # padding is read as well
        for data in self._examples_to_check():
            for column in self.token_columns:
                most = max(most, max((max(ids, default=0) for ids in data[column][:]), default=0))
        if most >= rows:
            written = self.processor.convert_ids_to_tokens(most)
            raise CompressionError(
                f"model {path!r}: its tokenizer makes token {most} ({written!r}), and its embeddings have {rows} rows; save it"
                f" anew after model.resize_token_embeddings({len(self.processor)}), or give it the tokenizer it was trained"
                " with."
            )

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
