"""What language models share: a second text, of another source than the one they are trained and scored on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.columns import TEXTS, as_texts, filled, find_column
from hfcompress.tasks.data import EVAL_SPLITS, read_splits, resolve_address
from hfcompress.tasks.metrics import METRICS, PerplexityAlso, Table
from hfcompress.tasks.texts import TextTask


class LanguageModel(TextTask):
    """Foretells tokens of plain text. One that was healed on one text may have forgotten others: `also` shows it."""

    answers_tokens = True

    also: str | None = Field(
        None, description="a second text of another source, any address of a dataset, to score on as perplexity_also"
    )

    _also: Dataset | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _two_texts(self) -> LanguageModel:
        if self.also is not None and self.also.rstrip("/") == self.dataset.rstrip("/"):
            raise ValueError("also is the same text as dataset, and would show the same; name a text of another source")
        if self.also is None and PerplexityAlso.name in self.metrics:
            raise ValueError(f"{PerplexityAlso.name} is of a second text, and there is none; name one with also")
        return self

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
        places = [Path(resolve_address(address)).expanduser() for address in (self.also, self.dataset)]
        if all(place.exists() for place in places) and places[0].samefile(places[1]):
            raise CompressionError(f"also: {self.also!r} is where dataset is; name a text of another source.")
        splits = read_splits(self.also)[0]
        rows = splits[next((name for name in (*EVAL_SPLITS, "train") if name in splits), next(iter(splits)))]
        known = self.text_column if self.text_column in rows.column_names else None
        text = find_column("text_column", known, TEXTS, rows.column_names, self.also)
        rows = as_texts(rows.select_columns([text]), [text], "text_column", self.also)
        rows = rows.select([i for i, value in enumerate(rows[text][:]) if filled(value)], keep_in_memory=True)
        if not len(rows):
            raise CompressionError(f"also: no text is left of {self.also!r}; give one that has some.")
        return rows if text == column else rows.rename_column(text, column)

    def _examples_to_check(self) -> list[Any]:
        return [*super()._examples_to_check(), *([] if self._also is None else [self._also])]

    def predict(self, model: nn.Module) -> dict[str, np.ndarray]:
        """See `Task.predict`; with a second text also `nll_also` and `tokens_also`, one for each of its examples."""
        columns = super().predict(model)
        if self._also is not None:
            second = self._predict(model, self._also)
            columns |= {"nll_also": second["nll"], "tokens_also": second["tokens"]}
        return columns
