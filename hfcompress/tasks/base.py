"""What every task does: open the data with a model's tokenizer or image processor, batch it, score models on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, PositiveInt, PrivateAttr, model_serializer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.modules import copied
from hfcompress.surgery.vocabulary.embeddings import keep_tokens, named_tokens
from hfcompress.tasks.data import quiet_datasets
from hfcompress.tasks.metrics import METRICS, Table, check_metrics, higher_is_better, load_metrics
from hfcompress.tasks.pretrained import load_config, open_model
from hfcompress.tasks.scoring import answers, decide_one, device_of, in_order, rows_of
from hfcompress.tasks.splits import Splits

TOKENS = ("predictions", "references")
"""What `predict` gives in tokens where models answer with them."""


class Task(Splits):
    """The data, how to batch it, how to score it, which Auto class.

    `open(path)` once, with the model the work starts from: its tokenizer and its labels are then those of the task.
    """

    auto_class: ClassVar[Any]
    learns_alone: ClassVar[bool] = True
    """Whether a model can learn from the data without a teacher."""
    answers_tokens: ClassVar[bool] = False
    """Whether models answer with tokens of the vocabulary."""

    eval_batch_size: PositiveInt = Field(default=32, description="examples a batch when scoring")
    metrics: list[str] = Field(default=["accuracy", "f1"], min_length=1, description="what to score; the first is the headline")

    _opened: str | None = PrivateAttr(None)
    _processor: Any = PrivateAttr(None)
    _config: Any = PrivateAttr(None)
    _train: Dataset | None = PrivateAttr(None)
    _eval: Dataset | None = PrivateAttr(None)
    _reference: dict[str, np.ndarray] | None = PrivateAttr(None)
    _trusts_metrics: bool = PrivateAttr(False)
    _original: nn.Module | None = PrivateAttr(None)
    _retold: nn.Module | None = PrivateAttr(None)
    _kept: list[int] | None = PrivateAttr(None)
    _kept_then: list[int] | None = PrivateAttr(None)
    _is_other: bool = PrivateAttr(False)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.model_dump() == other.model_dump()  # whether opened or not

    @model_serializer(mode="wrap")
    def _name_first(self, fields: Any) -> dict[str, Any]:
        """The name stays even where defaults are left out: a recipe can't be read back without it."""
        return {"name": type(self).model_fields["name"].default, **fields(self)}

    # ---------------------------------------------------------------- opening

    def load_processor(self, path: str) -> Any:
        """The tokenizer or image processor of a checkpoint (folder, Hub id, .gguf file, package:// address)."""
        raise NotImplementedError

    def open(self, model_path: str) -> Task:
        """Tokenizer, data, splits, tokens; the same path again costs nothing. Returns itself; `CompressionError`s."""
        if self._opened != str(model_path) or self.is_adopted:
            self._opened = self._train = self._eval = self._reference = None  # no mixture if something fails below
            self._original = None if self.is_adopted else self._original  # it reads other tokens
            self._kept = self._kept_then = self._retold = None
            self._is_other = False
            self.check_metrics()
            self._config, self._processor = load_config(model_path), self.load_processor(model_path)
            with quiet_datasets():
                train, held_out = self._split(self._read())
                self._prepare(train, held_out, str(model_path))
            self._check_tokens(str(model_path))
            check_metrics(self.scored_by, self._table(), self._trusts_metrics)
            self._opened = str(model_path)
        return self

    def load_model(self, path: str, **kwargs: Any) -> PreTrainedModel:
        """The model of a checkpoint for this task, in eval mode; opens the task with it, if it is not open yet.

        `kwargs` (`device`, `dtype`, `device_map`, ...): see `open_model`.
        """
        if self._opened is None:
            self.open(path)
        config = self._config if self._opened == str(path) and not self.is_adopted else load_config(path)
        head, is_new = self._head(config, path)
        model = open_model(path, self.auto_class, config=config, new_head=is_new, seed=self.seed, **{**head, **kwargs})
        pad = getattr(self.processor, "pad_token_id", None)
        if pad is not None and model.config.pad_token_id is None:  # decoders look for the last token of a padded text by it
            model.config.pad_token_id = pad
        return model

    def head_is_new(self, path: str) -> bool:
        """Whether a model of this checkpoint gets a head with random weights, which has learnt nothing yet."""
        return self._head(load_config(path), path)[1]

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        """Set `_train` and `_eval`."""
        raise NotImplementedError

    def _check_tokens(self, path: str) -> None:
        """CompressionError where the examples hold what the model can't read."""

    def _head(self, config: PreTrainedConfig, path: str) -> tuple[dict[str, Any], bool]:
        """What `from_pretrained` must be told about the head, and whether the head is new."""
        return {}, False

    # ---------------------------------------------------------------- data

    @property
    def processor(self) -> Any:
        """The tokenizer or image processor of the model the task was opened with."""
        return self._ready(self._processor)

    @property
    def train_dataset(self) -> Any:
        """Inputs to train on, and their `labels` where there are any."""
        return self._ready(self._train)

    @property
    def eval_dataset(self) -> Any:
        """Inputs and `labels` to score on; disjoint from the training data where the task made the split."""
        return self._ready(self._eval)

    def write_own(self, folder: Path | None) -> None:
        """Have at hand what of the training data takes long to make; kept in `folder` for a run that goes on."""

    @property
    def collator(self) -> Any:
        """Examples to a batch of tensors."""
        raise NotImplementedError

    def _seeded_collator(self, seed: int) -> Any:
        """The collator; where it draws at random, one that draws the same again."""
        return self.collator

    def _ready(self, thing: Any) -> Any:
        if thing is None:
            raise CompressionError("the task has no data yet: call task.open(model_path) or task.load_model(path) first.")
        return thing

    def batches(self, model: nn.Module, samples: int | None, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """A seeded choice of training examples, in batches with their labels, on the model's device.

        `samples=None`: every training example once, in the order of the data.
        """
        count = len(self.train_dataset)
        chosen = np.arange(count) if samples is None else np.random.default_rng(seed).permutation(count)[:samples]
        collator, device = self._seeded_collator(seed), device_of(model)
        yield from rows_of(self.train_dataset, chosen, batch_size, collator, device)

    @property
    def example_length(self) -> int:
        """Tokens of an `example` if nothing is said."""
        raise NotImplementedError

    def example(self, batch_size: int, length: int | None = None) -> dict[str, Tensor]:
        """The same batch every time, without padding or labels, for latency: what the model's forward needs."""
        raise NotImplementedError

    # ---------------------------------------------------------------- scoring

    @property
    def scored_by(self) -> list[str]:
        """The metrics; the first is the headline."""
        return list(self.metrics)

    @property
    def headline(self) -> str:
        """The metric that matters most: the first."""
        return self.scored_by[0]

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the headline is better."""
        return higher_is_better(self.headline)

    def trust_metrics(self) -> Task:
        """Allow metrics that are not built in, whose code comes from the Hub and runs here. Returns itself."""
        self._trusts_metrics = True
        return self

    def check_metrics(self) -> None:
        """CompressionError where a metric is neither built in nor trusted: a recipe may have come from anywhere."""
        check_metrics(self.metrics, trusted=self._trusts_metrics)

    def _table(self) -> Table:
        """The built-in metrics that fit what models tell in this task."""
        return METRICS

    def score(self, model: nn.Module) -> dict[str, float]:
        """The metrics on the eval data and, once a model is remembered, the `agreement` with it."""
        return self.scored(self.predict(model))

    def remember(self, model: nn.Module) -> dict[str, float]:
        """Score this model as the original: what others are compared with in `agreement`. Returns its scores."""
        columns = self.predict(model)
        self._reference = {**columns, "originals": columns["predictions"]}
        return self.scored(columns)

    @property
    def reference_columns(self) -> dict[str, np.ndarray] | None:
        """What `predict` gave for the model that was remembered, for paired comparisons; None if none was, or if the questions
        have changed since."""
        return self._reference

    def scored(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        """The metrics of what `predict` gave."""
        names = self.scored_by
        if self._reference is not None and "agreement" not in names:
            names = [*names, "agreement"]
        if self._reference is None:
            names = [name for name in names if name != "agreement"]
        if not names:
            raise CompressionError(
                "metrics: agreement is with an original, and none was remembered; call task.remember(original) first,"
                " compare two models, or score something else."
            )
        combined = load_metrics(names, self._table(), self._trusts_metrics)
        combined.add_batch(**{**columns, "originals": None if self._reference is None else self._reference["predictions"]})
        return combined.compute()

    def predict(self, model: nn.Module) -> dict[str, np.ndarray]:
        """In the order of the eval data: `predictions`, `references` a decision; `nll`, `tokens` an example; and `originals`,
        the predictions of the model that was remembered, if there is one."""
        columns = self._predict(model, self.eval_dataset)
        if self._reference is not None:
            columns["originals"] = self._reference["predictions"]
        return columns

    def _predict(self, model: nn.Module, data: Any) -> dict[str, np.ndarray]:
        order = self._longest_first(data)
        batches = rows_of(data, order, self.eval_batch_size, self.collator, device_of(model))
        rows = answers(model, batches, -(-len(order) // self.eval_batch_size), self._counted, self._said, self._decide)
        return {
            name: self._as_opened(values) if self.answers_tokens and name in TOKENS else values
            for name, values in in_order(rows, order).items()
        }

    def _longest_first(self, data: Any) -> np.ndarray:
        """An order with little padding, in which memory runs out at the start or not at all."""
        return np.argsort([-len(ids) for ids in data["input_ids"][:]], kind="stable")

    def _counted(self, batch: dict[str, Tensor]) -> Tensor:
        """In place of labels that there are not: 0 for every decision to compare, -100 for what is none."""
        first = next(iter(batch.values()))
        return torch.zeros(len(first), dtype=torch.long, device=first.device)

    def _said(self, output: Any) -> Tensor:
        """The logits of a model's output, an example a row."""
        return output.logits  # type: ignore[no-any-return]

    def _decide(self, logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        """What an example's logits say, and what is right."""
        return decide_one(logits, labels)

    # ---------------------------------------------------------------- the original

    @property
    def original(self) -> nn.Module | None:
        """The model as it came, if it was kept; distillation learns from it. It reads and writes the tokens of the task."""
        if self._original is None or self._kept == self._kept_then:
            return self._original
        if self._retold is None:
            told, then = self._kept or [], {token: index for index, token in enumerate(self._kept_then or ())}
            self._retold = copied(self._original)
            kept = {then[token] for token in told} if then else set(told)
            keep_tokens(self._retold, sorted(kept | named_tokens(self._retold)))
        return self._retold

    @property
    def kept_original(self) -> nn.Module | None:
        """The original with all tokens it had when it was kept: what sizes and times are compared with."""
        return self._original

    def keep_original(self, model: nn.Module) -> None:
        """Keep a frozen copy of the model in eval mode, since steps edit in place."""
        self._original, self._retold, self._kept_then = copied(model), None, self._kept

    # ---------------------------------------------------------------- fewer tokens

    def reads_as(self, path: str) -> bool:
        """Whether a checkpoint's tokenizer has the tokens of the one there is."""
        one, other = self.processor, self.load_processor(path)
        return not hasattr(one, "get_vocab") or one.get_vocab() == other.get_vocab()

    @property
    def is_adopted(self) -> bool:
        """Whether the tokenizer is another than that of the model the task was opened with."""
        return self._kept is not None

    def _asked(self) -> Any:
        """What tells the questions behind `predictions`; tokens as in the tokenizer the task was opened with."""
        return len(self.eval_dataset)

    def _as_opened(self, ids: Any) -> np.ndarray:
        """Ids of tokens in the tokenizer that the task was opened with; what is negative is no token."""
        ids = np.asarray(ids)
        return ids if self._kept is None else np.where(ids < 0, ids, np.asarray(self._kept)[ids.clip(0)])
