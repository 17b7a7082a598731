from __future__ import annotations

from typing import Any, Literal

import numpy as np
from datasets import Dataset
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import AutoModelForCausalLM, default_data_collator

from hfcompress.tasks.columns import TEXTS
from hfcompress.tasks.data import choose
from hfcompress.tasks.language_model import LanguageModel


class CausalLM(LanguageModel):
    """The next token; the texts are laid end to end and cut into blocks."""

    auto_class = AutoModelForCausalLM
    writes = True

    block_size: int = Field(default=512, ge=2, description="tokens a block")
    eval_batch_size: PositiveInt = Field(default=4, description="blocks a batch when scoring; logits are large")
    metrics: list[str] = Field(default=["perplexity"], min_length=1, description="what to score; the first is the headline")
    name: Literal["causal-lm"] = "causal-lm"

    @property
    def collator(self) -> Any:
        """Blocks of one length to tensors (batch, block_size)."""
        return default_data_collator

    @property
    def example_length(self) -> int:
        return self._limit(128)

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        second = self._second(*self._texts(train))
        self._train = self._blended(train, [held_out, *([] if second is None else [second])], self._labelled)
        self._eval = self._labelled(held_out, self.max_eval_samples)
        self._also = None if second is None else self._labelled(second, self.max_eval_samples)

    def _labelled(self, rows: Dataset, most: int | None) -> Dataset:
        # a blank line between texts, not eos: that ends a turn in chat models, which no text here does
        return choose(_examples(self._packed(rows, self._limit(self.block_size), "\n\n")), most, self.seed)

    def _own(self, count: int) -> Dataset:
        ids = self._own_tokens(count, self._limit(self.block_size))
        if not self.is_adopted:
            return _examples(list(ids))
        texts = self.load_processor(str(self._opened)).batch_decode(ids)
        return self._labelled(Dataset.from_dict({self.text_column or TEXTS[0]: texts}), count)

    def _decide(self, logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        return super()._decide(logits[:-1], labels[1:])  # position i foretells token i + 1


def _examples(blocks: list[np.ndarray]) -> Dataset:
    """Blocks without padding, all of whose tokens are to be foretold."""
    return Dataset.from_dict(
        {"input_ids": blocks, "attention_mask": [np.ones_like(block) for block in blocks], "labels": blocks}
    )
