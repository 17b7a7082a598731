from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from typing import Any, Literal

import torch
from datasets import Dataset, Translation
from pydantic import Field, PositiveInt, PrivateAttr
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.tasks.columns import as_texts, find_column
from hfcompress.tasks.texts import TextTask

SOURCES = ("document", "article", "dialogue", "source", "text", "input", "content", "question")
TARGETS = ("summary", "highlights", "target", "output", "answer", "title")
TRANSLATION = "translation"


class Seq2SeqLM(TextTask):
    """A text made of another: a summary, a translation, an answer. Scored token by token, given the true ones before."""

    auto_class = AutoModelForSeq2SeqLM
    answers_tokens = True
    token_columns = ("input_ids", "labels")

    text_column: str | None = Field(default=None, description="the column of the source texts; guessed by default")
    target_column: str | None = Field(default=None, description="the column of the texts to make; guessed by default")
    source_lang: str | None = Field(default=None, description="the language to translate from, in a `translation` column")
    target_lang: str | None = Field(default=None, description="the language to translate into")
    source_prefix: str = Field(default="", description='put before every source text, as T5 wants it: "summarize: "')
    max_source_length: PositiveInt = Field(default=512, description="tokens a source text is cut to")
    max_target_length: PositiveInt = Field(default=128, description="tokens a target text is cut to")
    eval_batch_size: PositiveInt = Field(default=8, description="examples a batch when scoring; logits are large")
    metrics: list[str] = Field(
        default=["perplexity", "accuracy"],
        min_length=1,
        description="what to score on target tokens; the first is the headline",
    )
    name: Literal["seq2seq-lm"] = "seq2seq-lm"

    _shifter: Any = PrivateAttr(None)

    @property
    def collator(self) -> Any:
        """Examples to tensors: inputs (batch, longest source), labels (batch, longest target) with -100 for pads, and
        `decoder_input_ids`, the labels moved on by one, as the model itself does it."""
        return DataCollatorForSeq2Seq(self.processor, model=self._ready(self._shifter))

    @property
    def example_length(self) -> int:
        return self._limit(min(128, self.max_source_length))

    def _texts(self, rows: Dataset) -> list[str]:
        return ["source", "target"]

    def _used(self, rows: Dataset) -> list[str]:
        if TRANSLATION in rows.column_names and self.text_column is None and self.target_column is None:
            return [TRANSLATION]
        if asked := next((field for field in ("source_lang", "target_lang") if getattr(self, field)), None):
            raise CompressionError(
                f"{asked}: dataset {self.dataset!r} has no column {TRANSLATION!r} with languages in it; name its columns"
                " with text_column and target_column instead."
            )
        there, known = rows.column_names, {self.target_column or ""}
        text = find_column("text_column", self.text_column, SOURCES, there, self.dataset, known)
        return [text, find_column("target_column", self.target_column, TARGETS, there, self.dataset, [text])]

    def _clean(self, rows: Dataset) -> Dataset:
        """`source` and `target`, without rows that lack one."""
        used = self._used(rows)
        if used == [TRANSLATION]:
            source, target = self._languages(rows)
            pairs = [(row[source], row[target]) for row in rows[TRANSLATION][:]]
        else:
            text, target = used
            rows = as_texts(as_texts(rows, [text], "text_column", self.dataset), [target], "target_column", self.dataset)
            pairs = list(zip(rows[text][:], rows[target][:], strict=True))
        pairs = [pair for pair in pairs if all(isinstance(part, str) and part.strip() for part in pair)]
        return Dataset.from_dict({"source": [one for one, _ in pairs], "target": [other for _, other in pairs]})

    def _languages(self, rows: Dataset) -> tuple[str, str]:
        kind: Any = rows.features[TRANSLATION]
        known = list(kind.languages if isinstance(kind, Translation) else kind)
        for field in ("source_lang", "target_lang"):
            asked = getattr(self, field)
            if asked is None:
                raise CompressionError(
                    f"dataset {self.dataset!r}: its texts are in {' and '.join(known)}; name both source_lang and target_lang."
                )
            if asked not in known:
                raise CompressionError(f"{field}: dataset {self.dataset!r} has no {asked!r}.{did_you_mean(asked, known)}")
        return str(self.source_lang), str(self.target_lang)

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        return rows["source"][:]

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        if type(self._config) not in self.auto_class._model_mapping:
            raise CompressionError(
                f"model {str(path)!r}: a {self._config.model_type} model has no head for Seq2SeqLM; choose another model or"
                " task."
            )
        self._shifter = self._without_weights()
        processor, prefix = self.processor, self.source_prefix
        longest, target_longest = self._limit(self.max_source_length), min(self.max_target_length, self._most())

        def tokens(rows: dict[str, list]) -> dict[str, list]:
            encoded = processor([prefix + text for text in rows["source"]], truncation=True, max_length=longest)
            targets = processor(text_target=rows["target"], truncation=True, max_length=target_longest)
            kept = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            return {**kept, "labels": targets["input_ids"]}

        self._train = self._encoded(train, self.max_train_samples, tokens)
        self._eval = self._encoded(held_out, self.max_eval_samples, tokens)

    def _without_weights(self) -> Any:
        """The model without its weights: each kind moves labels on in its own way, and its config is all it needs."""
        config = copy.deepcopy(self._config)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            return self.auto_class.from_config(config)

    def example(self, batch_size: int, length: int | None = None) -> dict[str, Tensor]:
        """Also `decoder_input_ids` (batch_size, length), no longer than max_target_length."""
        length = length or self.example_length
        targets = self._first("labels", batch_size, min(length, self.max_target_length, self._most()))
        moved_on = self._shifter.prepare_decoder_input_ids_from_labels(labels=targets)
        return {**super().example(batch_size, length), "decoder_input_ids": moved_on}
