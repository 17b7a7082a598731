from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Literal

import torch
from datasets import ClassLabel, Dataset, List, Value
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.columns import IGNORED, TAGS, WORDS, find_column, label_index, missing
from hfcompress.tasks.labels import Classification
from hfcompress.tasks.pretrained import load_fast_tokenizer, load_tokenizer
from hfcompress.tasks.texts import TextTask


class TokenClassification(Classification, TextTask):
    """One label a word; of a word's tokens the first one counts."""

    auto_class = AutoModelForTokenClassification

    text_column: str | None = Field(
        default=None, description="the column of the words, lists or texts parted by blanks; guessed by default"
    )
    max_length: PositiveInt = Field(default=128, description="tokens a text is cut to")
    name: Literal["token-classification"] = "token-classification"

    def load_processor(self, path: str) -> Any:
        """The tokenizer of a checkpoint, a fast one, which knows the words its tokens came from."""
        tokenizer = load_fast_tokenizer(path, "which word a token came from")
        # A byte-level tokenizer takes a word without a blank before it for the rest of another word.
        if getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", True) is False:
            tokenizer = load_tokenizer(path, add_prefix_space=True)  # for classes that build this part anew
            tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True  # for those that read it from tokenizer.json
        return tokenizer

    @property
    def collator(self) -> Any:
        """Examples to tensors (batch, longest); labels of pads are -100."""
        return DataCollatorForTokenClassification(self.processor)

    @property
    def example_length(self) -> int:
        return self._limit(self.max_length)

    def _used(self, rows: Dataset) -> list[str]:
        text = find_column("text_column", self.text_column, WORDS, rows.column_names, self.dataset)
        return [text, *self._labels_of(rows, [text], TAGS)]

    def _clean(self, rows: Dataset) -> Dataset:
        """`words` and, where there are labels, `tags`: lists of one length, and no empty ones."""
        text, *label = self._used(rows)
        rows = rows.select_columns([text, *label]).rename_columns({text: "words", **dict.fromkeys(label, "tags")})
        for column, name in zip(rows.column_names, (text, *label), strict=True):
            rows = self._parted(rows, column, name)
        if not label:
            return rows.select([i for i, words in enumerate(rows["words"][:]) if words], keep_in_memory=True)
        lists = [tags or [] for tags in rows["tags"][:]]
        for index, (words, tags) in enumerate(zip(rows["words"][:], lists, strict=True)):
            if len(words or ()) != len(tags):
                raise CompressionError(
                    f"dataset {self.dataset!r}: row {index} has {len(words or ())} words and {len(tags)} labels; mend"
                    " it, or name the right columns with text_column and label_column."
                )
        # all at once: -1 hides where it is all there is
        hidden = iter(missing([tag for tags in lists for tag in tags], getattr(rows.features["tags"], "feature", None)))
        told = [[tag for tag in tags if not next(hidden) and tag != IGNORED] for tags in lists]
        return rows.select([index for index, tags in enumerate(told) if tags], keep_in_memory=True)

    def _parted(self, rows: Dataset, column: str, name: str) -> Dataset:
        """The column as lists; texts are parted at blanks."""
        kind = rows.features[column]
        if isinstance(kind, Value) and kind.dtype in ("string", "large_string"):
            return rows.map(part, fn_kwargs={"column": column}, keep_in_memory=True)
        if not hasattr(kind, "feature"):
            field = "text_column" if column == "words" else "label_column"
            raise CompressionError(
                f"dataset {self.dataset!r}: column {name!r} holds one thing a row, not a list with one a word; name the right"
                f" one with {field}."
            )
        if column == "words" and isinstance(kind.feature, Value) and kind.feature.dtype not in ("string", "large_string"):
            return rows.cast_column(column, List(Value("string")))  # words may be numbers
        return rows

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        return (tuple(words) for words in rows["words"][:])

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        self._check_chooses(path)
        order: dict[Any, int] = {}
        if self.labelled:
            kind = train.features["tags"].feature
            hidden = {None, "", IGNORED, *([-1] if isinstance(kind, ClassLabel) else [])}
            values = [tag for rows in (train, held_out) for tags in rows["tags"][:] for tag in tags if tag not in hidden]
            names, known = label_index(kind, values, self.dataset)
            places = self._order(tuple(names), path)
            order = {value: places[index] for value, index in known.items()}
        else:
            self._order((), path)
        processor, length, wanted, labelled = self.processor, self._limit(self.max_length), self._wanted(), self.labelled

        def tokens(rows: dict[str, list]) -> dict[str, list]:
            encoded = processor(rows["words"], is_split_into_words=True, truncation=True, max_length=length)
            kept = {name: values for name, values in encoded.items() if name in wanted}
            if not labelled:
                return kept
            labels = [first_tokens(encoded.word_ids(row), tags, order) for row, tags in enumerate(rows["tags"])]
            return {**kept, "labels": labels}

        self._train = self._encoded(train, self.max_train_samples, tokens)
        self._eval = self._encoded(held_out, self.max_eval_samples, tokens)

    def _asked(self) -> Any:
        if self.labelled:  # a decision a word, whatever its tokens; a text that is cut off earlier has fewer
            return [[label for label in labels if label != IGNORED] for labels in self.eval_dataset["labels"][:]]
        return [self._as_opened(ids).tolist() for ids in self.eval_dataset["input_ids"][:]]

    def _counted(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.where(batch["attention_mask"].bool(), 0, IGNORED)


def part(row: dict[str, Any], column: str) -> dict[str, Any]:
    """The row with the text of that column as a list of words."""
    return {column: (row[column] or "").split()}


def first_tokens(word_ids: list[int | None], tags: list[Any], order: dict[Any, int]) -> list[int]:
    """The label of each token: that of its word for a word's first token, -100 for others and for special tokens."""
    before = [None, *word_ids]
    return [
        IGNORED if word is None or word == last else order.get(tags[word], IGNORED)
        for word, last in zip(word_ids, before, strict=False)
    ]
