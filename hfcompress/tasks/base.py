"""What every task does: open the data with a model's tokenizer or image processor, batch it, score models on it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from pydantic import Field, PositiveInt, PrivateAttr, model_serializer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from hfcompress.calibration.progress import progress
from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.checkpoint.fields import Fields
from hfcompress.surgery.modules import copied
from hfcompress.surgery.vocabulary.embeddings import keep_tokens, named_tokens
from hfcompress.tasks.data import EVAL_SPLITS, drop_duplicates, quiet_datasets, read_splits, split_off
from hfcompress.tasks.metrics import higher_is_better, load_metrics
from hfcompress.tasks.pretrained import load_config, load_pretrained

TOKENS = ("predictions", "references")
"""What `predict` gives in tokens where models answer with them."""


class Task(Fields):
    """The data, how to batch it, how to score it, which Auto class.

    `open(path)` once, with the model the work starts from: its tokenizer and its labels are then those of the task.
    """

    auto_class: ClassVar[Any]
    unit: ClassVar[str] = "text"
    """What an example is made of, as errors call it; "image" finds class folders of image files."""
    answers_tokens: ClassVar[bool] = False
    """Whether models answer with tokens of the vocabulary."""

    dataset: str = Field(description="Hub id, file, folder of files or of class folders, or package://NAME/path")
    subset: str | None = Field(None, description="the subset (configuration) of a Hub data set")
    train_split: str = Field("train", description="the split to train on")
    eval_split: str | None = Field(None, description="the split to score on; default: validation, test, or split off")
    max_train_samples: PositiveInt | None = Field(None, description="train on a seeded choice of so many")
    max_eval_samples: PositiveInt | None = Field(None, description="score on a seeded choice of so many")
    eval_share: float = Field(0.2, gt=0, lt=1, description="what to split off where there is no split to score on")
    eval_samples: PositiveInt | None = Field(None, description="how many examples to split off, instead of eval_share")
    eval_batch_size: PositiveInt = Field(32, description="examples a batch when scoring")
    metrics: list[str] = Field(["accuracy", "f1"], min_length=1, description="what to score; the first is the headline")
    deduplicate: bool | None = Field(None, description="use each example once; by default for local data, not for the Hub's")
    seed: int = Field(0, description="of the split, of the choice of samples and of a new head")

    _opened: str | None = PrivateAttr(None)
    _processor: Any = PrivateAttr(None)
    _config: Any = PrivateAttr(None)
    _train: Dataset | None = PrivateAttr(None)
    _eval: Dataset | None = PrivateAttr(None)
    _reference: np.ndarray | None = PrivateAttr(None)
    _reference_columns: dict[str, np.ndarray] | None = PrivateAttr(None)
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
            self._config, self._processor = load_config(model_path), self.load_processor(model_path)
            with quiet_datasets():
                train, held_out = self._split(self._read())
                self._prepare(train, held_out, str(model_path))
            self._opened = str(model_path)
        return self

    def load_model(self, path: str, **kwargs: Any) -> PreTrainedModel:
        """The model of a checkpoint for this task, in eval mode; opens the task with it, if it is not open yet.

        `kwargs` go to `from_pretrained`. GGUF files are dequantised to float32; else the checkpoint's dtype stays.
        """
        if self._opened is None:
            self.open(path)
        config = self._config if self._opened == str(path) and not self.is_adopted else load_config(path)
        head, is_new = self._head(config, path)
        model = load_pretrained(self.auto_class, path, config, is_new, self.seed, **{**head, **kwargs})
        pad = getattr(self.processor, "pad_token_id", None)
        if pad is not None and model.config.pad_token_id is None:  # decoders look for the last token of a padded text by it
            model.config.pad_token_id = pad
        return model

    def head_is_new(self, path: str) -> bool:
        """Whether a model of this checkpoint gets a head with random weights, which has learnt nothing yet."""
        return self._head(load_config(path), path)[1]

    def _read(self) -> dict[str, Dataset]:
        """The rows as they came: {"train": ..., and "eval" unless it must be split off}, each once if asked."""
        splits, is_local = read_splits(self.dataset, self.subset, self.unit)
        for field, name in (("train_split", self.train_split), ("eval_split", self.eval_split)):
            if name is not None and name not in splits:
                raise CompressionError(f"{field}: dataset {self.dataset!r} has no {name!r}.{did_you_mean(name, splits)}")
        other = self.eval_split or next((s for s in EVAL_SPLITS if s in splits and s != self.train_split), None)
        rows = {"train": splits[self.train_split], **({"eval": splits[other]} if other else {})}
        rows = {split: self._clean(part) for split, part in rows.items()}
        if other and not self.eval_split and not len(rows["eval"]):
            del rows["eval"]  # a test split whose labels are hidden is no split to score on
        if self.deduplicate if self.deduplicate is not None else is_local:
            # the examples to score on go first: what is in both is dropped from training
            rows = drop_duplicates({split: rows[split] for split in sorted(rows)}, self._keys)
        for split, part in rows.items():
            if not len(part):
                raise CompressionError(f"dataset {self.dataset!r}: no {self.unit} for {split} is left; give one that has some.")
        return rows

    def _split(self, rows: dict[str, Dataset]) -> tuple[Dataset, Dataset]:
        if "eval" in rows:
            return rows["train"], rows["eval"]
        if len(rows["train"]) < 2:
            raise CompressionError(
                f"dataset {self.dataset!r}: one {self.unit} can't be split into training and scoring; give more, which a .txt "
                f"file parts by empty lines, or name another split as eval_split."
            )
        label = next((c for c, kind in rows["train"].features.items() if isinstance(kind, ClassLabel)), None)
        return split_off(rows["train"], self.eval_share, self.eval_samples, label, self.seed)

    def _clean(self, rows: Dataset) -> Dataset:
        """The columns the task needs, and the rows that have them."""
        raise NotImplementedError

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        """What tells two rows of `_clean` apart."""
        raise NotImplementedError

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        """Set `_train` and `_eval`."""
        raise NotImplementedError

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
        collator, device = self._seeded_collator(seed), next(model.parameters()).device
        yield from self._batched(self.train_dataset, chosen, batch_size, collator, device)

    def _batched(self, data: Any, indices: Any, size: int, collator: Any, device: torch.device) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(indices), size):
            batch = collator([data[int(index)] for index in indices[start : start + size]])
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    @property
    def example_length(self) -> int:
        """Tokens of an `example` if nothing is said."""
        raise NotImplementedError

    def example(self, batch_size: int, length: int | None = None) -> dict[str, Tensor]:
        """The same batch every time, without padding or labels, for latency: what the model's forward needs."""
        raise NotImplementedError

    # ---------------------------------------------------------------- scoring

    @property
    def headline(self) -> str:
        """The metric that matters most: the first."""
        return self.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the headline is better."""
        return higher_is_better(self.headline)

    def score(self, model: nn.Module) -> dict[str, float]:
        """The metrics on the eval data and, once a model is remembered, the `agreement` with it."""
        return self.scored(self.predict(model))

    def remember(self, model: nn.Module) -> dict[str, float]:
        """Score this model as the original: what others are compared with in `agreement`. Returns its scores."""
        columns = self.predict(model)
        self._reference, self._reference_columns = columns["predictions"], columns
        return self.scored(columns)

    @property
    def reference_columns(self) -> dict[str, np.ndarray] | None:
        """What `predict` gave for the model that is remembered, if the questions are still the same."""
        return None if self._reference is None else self._reference_columns

    def scored(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        """The metrics of what `predict` gave."""
        names = [*self.metrics]
        if self._reference is not None and "agreement" not in names:
            names.append("agreement")
        if self._reference is None:
            names = [name for name in names if name != "agreement"]
        if not names:
            raise CompressionError(
                "metrics: agreement is with an original, and none was remembered; call task.remember(original) first,"
                " compare two models, or score something else."
            )
        combined = load_metrics(names)
        combined.add_batch(**columns, originals=self._reference)
        return combined.compute()

    def predict(self, model: nn.Module) -> dict[str, np.ndarray]:
        """In the order of the eval data: `predictions`, `references` a decision; `nll`, `tokens` an example."""
        data, device = self.eval_dataset, next(model.parameters()).device
        order = self._longest_first(data)
        modes = [(module, module.training) for module in model.modules()]
        rows: list[dict[str, np.ndarray]] = []
        model.eval()
        try:
            batches = self._batched(data, order, self.eval_batch_size, self.collator, device)
            total = -(-len(order) // self.eval_batch_size)
            for batch in progress(batches, what="scoring", total=total):
                labels = batch.pop("labels", None)
                labels = self._counted(batch) if labels is None else labels
                with torch.no_grad():
                    logits = model(**batch).logits
                    rows.extend(self._decide(row, label) for row, label in zip(logits, labels, strict=True))
        finally:
            for module, mode in modes:  # not model.train(): some modules may have been frozen in eval mode
                module.training = mode
        back = np.argsort(order)
        columns = {name: np.concatenate([rows[index][name] for index in back]) for name in rows[0]}
        return {
            name: self._as_opened(values) if self.answers_tokens and name in TOKENS else values
            for name, values in columns.items()
        }

    def _longest_first(self, data: Any) -> np.ndarray:
        """An order with little padding, in which memory runs out at the start or not at all."""
        return np.argsort([-len(ids) for ids in data["input_ids"][:]], kind="stable")

    def _counted(self, batch: dict[str, Tensor]) -> Tensor:
        """In place of labels that there are not: 0 for every decision to compare, -100 for what is none."""
        first = next(iter(batch.values()))
        return torch.zeros(len(first), dtype=torch.long, device=first.device)

    def _decide(self, logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        """One example. The log-softmax is in float32, and a row at a time, or a large vocabulary would not fit."""
        known = labels != -100
        logits, labels = logits[known].float(), labels[known]
        total = F.cross_entropy(logits, labels, reduction="sum").double()
        return {
            "predictions": logits.argmax(-1).cpu().numpy(),
            "references": labels.cpu().numpy(),
            # a short text may have nothing to foretell; a mean over nothing would spoil the others'
            "nll": (total / max(1, len(labels))).reshape(1).cpu().numpy(),
            "tokens": np.array([len(labels)]),
        }

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
