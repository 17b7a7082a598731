"""What language models share: a mixture of texts to train on, and a second text to score on, of another source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, concatenate_datasets
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks import own_text
from hfcompress.tasks.data import EVAL_SPLITS, choose
from hfcompress.tasks.metric_classes import PerplexityAlso
from hfcompress.tasks.metrics import METRICS, Table
from hfcompress.tasks.mixture import DATA, OWN, rows_of, same_place, shares, without
from hfcompress.tasks.texts import TextTask

Encode = Callable[[Dataset, int | None], Dataset]
"""Texts to at most so many examples."""


class LanguageModel(TextTask):
    """Foretells tokens of plain text. One that was healed on one text may have forgotten others: `also` shows it, and a
    `mixture` with text of the model's own is against it."""

    answers_tokens = True
    writes: ClassVar[bool] = False
    """Whether its models write text, token after token."""

    also: str | None = Field(
        default=None, description="a second text of another source, any address of a dataset, to score on as perplexity_also"
    )
    mixture: list[str] = Field(
        default=[DATA],
        min_length=1,
        description="what to calibrate and train on, in equal shares: data, the train split; own, text that the model samples "
        "itself before any step; any address of a dataset. max_train_samples counts in all; listed twice is two shares",
    )

    _also: Dataset | None = PrivateAttr(None)
    _owed: int = PrivateAttr(0)
    _written: tuple[dict[str, Any], np.ndarray] | None = PrivateAttr(None)
    _folder: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _texts_differ(self) -> LanguageModel:
        if self.also is not None and self.also.rstrip("/") == self.dataset.rstrip("/"):
            raise ValueError("also is the same text as dataset, and would show the same; name a text of another source")
        if self.also is None and PerplexityAlso.name in self.metrics:
            raise ValueError(f"{PerplexityAlso.name} is of a second text, and there is none; name one with also")
        if OWN in self.mixture and not self.writes:
            raise ValueError(
                "mixture: own is text that a model writes token after token, which models of this task can't; possible are "
                "data and addresses; or take the task causal-lm"
            )
        if self.mixture.count(OWN) == len(self.mixture) and self.max_train_samples is None:
            raise ValueError("mixture: own text has no end; say with max_train_samples how many blocks are wanted")
        for address in self._addresses:
            self._check_unscored(address, lambda one, other: one.rstrip("/") == other.rstrip("/"), ValueError)
        return self

    @property
    def _addresses(self) -> list[str]:
        return [one for one in dict.fromkeys(self.mixture) if one not in (DATA, OWN)]

    def _check_unscored(self, address: str, same: Callable[[str, str], bool], kind: type[ValueError]) -> None:
        if self.also is not None and same(address, self.also):
            raise kind(
                f"mixture: {address!r} is also, which is scored, and a text that was trained on shows nothing; take it out of"
                " one of the two"
            )
        if same(address, self.dataset):
            raise kind(f"mixture: {address!r} is dataset, a part of which is scored; write {DATA} for its train split")

    # ---------------------------------------------------------------- what is trained on

    def _blended(self, train: Dataset, scored: list[Dataset], encode: Encode) -> Dataset:
        """The examples to train on. Of text that the model is to write itself only the number is noted: it is written when it
        is asked for, as this takes a while."""
        self._owed = 0
        if self.mixture == [DATA]:
            return encode(train, self.max_train_samples)
        (column,) = self._texts(train)
        parts = {DATA: encode(train, self.max_train_samples)} if DATA in self.mixture else {}
        for address in self._addresses:
            self._check_unscored(address, same_place, CompressionError)
            rows = rows_of(address, ("train",), self.text_column, column, "mixture")
            parts[address] = encode(without(rows, column, scored, address), self.max_train_samples)
        counts = shares(self.mixture, {source: len(part) for source, part in parts.items()}, self.max_train_samples)
        self._owed = counts.get(OWN, 0)
        if not parts:
            return encode(train, 1).select([])
        return _joined([choose(part, counts[source], self.seed) for source, part in parts.items()])

    @property
    def train_dataset(self) -> Any:
        """See `Task.train_dataset`; text of the model's own is written when this is first asked for."""
        if self._train is not None and self._owed:
            self._train, self._owed = _joined([self._train, self._own(self._owed)]), 0
        return super().train_dataset

    def write_own(self, folder: Path | None) -> None:
        """Have the model's own text written, where there is to be any, or read what `folder` keeps of it: a run that goes on
        must find the same."""
        self._folder = folder
        len(self.train_dataset)
        if folder is not None and self._written is not None and own_text.read(folder, self._written[0]) is None:
            own_text.keep(folder, *self._written)

    def _own(self, count: int) -> Dataset:
        """So many examples of what the model the task was opened with writes, by itself, as it came."""
        raise NotImplementedError

    def _own_tokens(self, count: int, length: int) -> np.ndarray:
        """(count, length) in the tokens of the tokenizer that the task was opened with."""
        plan = {"model": self._opened, "seed": self.seed, "count": count, "length": length}
        if self._written is None or self._written[0] != plan:
            ids = own_text.read(self._folder, plan) if self._folder is not None else None
            if ids is None:
                path = str(self._opened)
                ids = own_text.sampled(self.load_model(path), self.load_processor(path), count, length, self.seed)
            self._written = plan, ids
        return self._written[1]

    # ---------------------------------------------------------------- a second text

    @property
    def scored_by(self) -> list[str]:
        """The metrics; with a second text, that one's perplexity too."""
        names = super().scored_by
        return names if self.also is None or PerplexityAlso.name in names else [*names, PerplexityAlso.name]

    def _table(self) -> Table:
        return METRICS if self.also is None else {**METRICS, PerplexityAlso.name: PerplexityAlso}

    def _second(self, column: str) -> Dataset | None:
        """The rows of the second text, under the name of the first one's column: those to score on, if it has splits."""
        if self.also is None:
            return None
        if same_place(self.also, self.dataset):
            raise CompressionError(f"also: {self.also!r} is where dataset is; name a text of another source.")
        return rows_of(self.also, (*EVAL_SPLITS, "train"), self.text_column, column, "also")

    def _examples_to_check(self) -> list[Any]:
        return [*super()._examples_to_check(), *([] if self._also is None else [self._also])]

    def predict(self, model: nn.Module) -> dict[str, np.ndarray]:
        """See `Task.predict`; with a second text also `nll_also` and `tokens_also`, one for each of its examples."""
        columns = super().predict(model)
        if self._also is not None:
            second = self._predict(model, self._also)
            columns |= {"nll_also": second["nll"], "tokens_also": second["tokens"]}
        return columns


def _joined(parts: list[Dataset]) -> Dataset:
    parts = [part for part in parts if len(part)]
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
