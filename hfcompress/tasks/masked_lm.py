from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from pydantic import Field, PositiveInt
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
)

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.data import choose
from hfcompress.tasks.language_model import LanguageModel


class MaskedLM(LanguageModel):
    """The tokens behind a mask: drawn anew at every step of training, and once for all when scoring."""

    auto_class = AutoModelForMaskedLM

    max_length: PositiveInt = Field(default=128, description="tokens an example is cut to")
    line_by_line: bool = Field(
        default=True, description="each text is an example; false: they are laid end to end and cut into blocks of max_length"
    )
    mlm_probability: float = Field(default=0.15, gt=0, lt=1, description="share of the tokens to foretell")
    eval_batch_size: PositiveInt = Field(default=8, description="examples a batch when scoring; logits are large")
    metrics: list[str] = Field(
        default=["perplexity", "accuracy"],
        min_length=1,
        description="what to score on masked tokens; the first is the headline",
    )
    name: Literal["masked-lm"] = "masked-lm"

    @property
    def collator(self) -> Any:
        """Examples to tensors (batch, longest); see `Masking`."""
        return Masking(self.processor, self.mlm_probability)

    def _seeded_collator(self, seed: int) -> Any:
        return Masking(self.processor, self.mlm_probability, seed)

    @property
    def example_length(self) -> int:
        return self._limit(self.max_length)

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        if self.processor.mask_token is None:
            raise CompressionError(
                f"model {str(path)!r}: its tokenizer has no mask token, so nothing can be masked; choose a checkpoint"
                " trained for MaskedLM, or the task causal-lm."
            )
        second = self._second(*self._texts(train))
        self._train = self._blended(train, [held_out, *([] if second is None else [second])], self._examples)
        self._eval = self._masked(self._examples(held_out, self.max_eval_samples))
        self._also = None if second is None else self._masked(self._examples(second, self.max_eval_samples))

    def _examples(self, rows: Dataset, most: int | None) -> Dataset:
        """`input_ids` and `attention_mask`, no labels: these come with the masks."""
        processor, length = self.processor, self._limit(self.max_length)
        if not self.line_by_line:
            blocks = self._packed(rows, length)
            masks = [np.ones_like(block) for block in blocks]
            return choose(Dataset.from_dict({"input_ids": blocks, "attention_mask": masks}), most, self.seed)
        (text,) = self._texts(rows)

        def tokens(rows: dict[str, list]) -> dict[str, list]:
            encoded = processor(rows[text], truncation=True, max_length=length)
            return {name: encoded[name] for name in ("input_ids", "attention_mask")}

        return self._encoded(rows, most, tokens)

    def _masked(self, rows: Dataset) -> Dataset:
        """The same masks every time, so that two models are asked the same."""
        draw = Masking(self.processor, self.mlm_probability, self.seed)
        masked: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            batch = draw([row])  # one at a time: what is drawn doesn't hang on who is padded beside whom
            for name, values in masked.items():
                values.append(batch[name][0].tolist())
        if not any(label != -100 for labels in masked["labels"] for label in labels):
            raise CompressionError(
                f"dataset {self.dataset!r}: none of the few tokens to score on was masked; raise mlm_probability, or give"
                " more or longer texts."
            )
        return Dataset.from_dict(masked)


class Masking:
    """Examples to a batch: without labels they are masked, with a new draw each time; with labels they were already.

    `seed`: the draws are the same again for a new object, and PyTorch's own generator is left alone.
    """

    def __init__(self, processor: PreTrainedTokenizerBase, probability: float, seed: int | None = None) -> None:
        self._mask = DataCollatorForLanguageModeling(processor, mlm_probability=probability, seed=seed)
        self._pad = DataCollatorForTokenClassification(processor)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        return self._pad(examples) if "labels" in examples[0] else self._mask(examples)
