"""What the tasks with labels share: they fit a head that is there, and make one that is not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.base import Task
from hfcompress.tasks.columns import LABELS, MULTI, SINGLE, VALUE, find_column
from hfcompress.tasks.metrics import LABELS_METRICS, METRICS, VALUE_METRICS, Table, below_chance
from hfcompress.tasks.pretrained import Fit, fit_labels, has_head, head_labels
from hfcompress.tasks.scoring import decide_each, decide_value

log = logging.getLogger("hfcompress")

TABLES: dict[str, Table] = {SINGLE: METRICS, MULTI: LABELS_METRICS, VALUE: VALUE_METRICS}
DEFAULTS = {MULTI: ["f1_micro", "f1_macro"], VALUE: ["pearson", "spearman"]}
"""What is scored if nothing is said, where the head doesn't choose one label."""


class Classification(Task):
    """A task whose model chooses one of several labels, for an example or a token; or, where the head is made for that, tells
    of each label whether it holds, or a number."""

    label_column: str | None = Field(default=None, description="the column of the labels; guessed by default")
    labelled: bool = Field(
        default=True, description="false: the data has no labels; the model is scored by its agreement with the original"
    )

    _labels: tuple[str, ...] | None = PrivateAttr(None)
    _problem: str = PrivateAttr(SINGLE)

    @model_validator(mode="before")
    @classmethod
    def _agreeing(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("labelled") is False:
            return {"metrics": ["agreement"], **given}
        return given

    @model_validator(mode="after")
    def _judged_without_labels(self) -> Classification:
        asked = [name for name in self.metrics if name != "agreement"]
        if not self.labelled and asked:
            raise ValueError(f"{asked[0]} needs labels, and labelled is false; leave metrics out, or give labelled data")
        if not self.labelled and self.label_column:
            raise ValueError("label_column names labels, and labelled is false; leave one of the two out")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of the logits."""
        return self._ready(self._labels)

    def _labels_of(self, rows: Dataset, others: Sequence[str], guesses: Sequence[str] = LABELS) -> list[str]:
        """The column of the labels, which is none of the others; nothing where there are no labels."""
        if not self.labelled:
            return []
        return [find_column("label_column", self.label_column, guesses, rows.column_names, self.dataset, others)]

    # ---------------------------------------------------------------- the head

    @property
    def _kind(self) -> str:
        return self.auto_class.__name__.removeprefix("AutoModelFor")

    def _told_by_head(self, config: PreTrainedConfig | None = None) -> str | None:
        """What the head of a checkpoint tells, by default of the one the task is opened with, in the words of transformers'
        `problem_type`; None if it is new or silent."""
        config = config or self._config
        if not has_head(config, self._kind):
            return None
        # one logit is a number: of one label there is nothing to choose
        return config.problem_type or (VALUE if config.num_labels == 1 else None)

    def _check_chooses(self, path: str) -> None:
        """CompressionError where the head of the checkpoint does something else than to choose one of several labels."""
        if (told := self._told_by_head()) not in (None, SINGLE):
            raise CompressionError(
                f"model {str(path)!r}: its head tells {'a number' if told == VALUE else 'of each label whether it holds'}"
                f" (problem_type {told}), where {type(self).model_fields['name'].default} chooses one of several labels; choose"
                " another checkpoint."
            )

    def _order(self, names: tuple[str, ...], path: str) -> list[int]:
        """For each of the data's labels its place in the head; from here on `labels` are those of the head."""
        if has_head(self._config, self._kind):
            if self.labelled and (self._problem == VALUE) != (self._config.num_labels == 1):
                raise CompressionError(
                    f"model {str(path)!r}: its head has {self._config.num_labels} outputs, which is not {self._problem}; choose"
                    " another checkpoint, or set problem_type."
                )
            if not self.labelled or self._problem == VALUE:
                names = head_labels(self._config)
            found = self._fit(names, self._config, path)
            if found.is_guess:
                pairs = [f"{place} is {name!r}" for place, name in sorted(zip(found.order, names, strict=True))]
                log.warning(
                    f"dataset {self.dataset!r}: no name tells which label the model means by which of its outputs, so this is"
                    f" guessed: {', '.join(pairs[:8])}{', ...' if len(pairs) > 8 else ''}; if that is wrong, put the names into"
                    " id2label of the model's config.json."
                )
            self._labels = found.labels
            return found.order
        if not self.labelled:
            raise CompressionError(
                f"model {str(path)!r}: it has no head for {self._kind}, and labelled: false gives none to learn;"
                " choose a checkpoint that was trained for this task, or give labelled data."
            )
        if self._problem == VALUE:
            names = ("LABEL_0",)
        elif self._problem == SINGLE and len(names) < 2:
            raise CompressionError(
                f"dataset {self.dataset!r}: {names[0]} is its only label, so there is nothing to choose; give data with more"
                " labels, or name the right column with label_column."
            )
        self._labels = names
        return list(range(len(names)))

    def _head(self, config: PreTrainedConfig, path: str) -> tuple[dict[str, Any], bool]:
        told = {} if self._problem == SINGLE else {"problem_type": self._problem}
        if not has_head(config, self._kind):
            id2label = dict(enumerate(self.labels))
            label2id = {name: index for index, name in id2label.items()}
            return {"num_labels": len(id2label), "id2label": id2label, "label2id": label2id, **told}, True
        asked = getattr(self, "problem_type", None)
        if not asked and (other := self._told_by_head(config)) not in (None, self._problem):
            raise CompressionError(
                f"model {str(path)!r}: its head is for {other}, and the task was opened for {self._problem}; open a task of its"
                " own for it, or set problem_type."
            )
        order = self._fit(self.labels, config, path).order
        if order != list(range(len(order))):
            raise CompressionError(
                f"model {str(path)!r}: its labels ({', '.join(head_labels(config))}) are in another order than those"
                f" the task was opened with ({', '.join(self.labels)}); open a task of its own for it."
            )
        return told, False

    def _fit(self, names: tuple[str, ...], config: PreTrainedConfig, path: str) -> Fit:
        fit = fit_labels(names, config)
        if fit is None:
            raise CompressionError(
                f"model {str(path)!r}: its head has the labels {', '.join(head_labels(config))}, and dataset"
                f" {self.dataset!r} has {', '.join(names)}; choose data with these labels, or a checkpoint without a"
                " classification head."
            )
        return fit

    # ---------------------------------------------------------------- scoring

    @property
    def scored_by(self) -> list[str]:
        """The metrics: those asked for, or those that fit what the head tells."""
        if self.labelled and self._problem != SINGLE and "metrics" not in self.model_fields_set:
            return DEFAULTS[self._problem]
        return super().scored_by

    def _table(self) -> Table:
        return TABLES[self._problem]

    def remember(self, model: nn.Module) -> dict[str, float]:
        """See `Task.remember`. CompressionError where the original scores so far below chance that its labels must stand in
        another order than the data's: everything after would be trained and judged by wrong answers."""
        scores = super().remember(model)
        told = self.reference_columns
        if self.labelled and self._problem == SINGLE and told and has_head(self._config, self._kind):
            chance = below_chance(told["predictions"], told["references"])
            if chance is not None:
                right = float(np.mean(told["predictions"] == told["references"]))
                raise CompressionError(
                    f"model {self._opened!r}: it is right in {right:.3f} of {len(told['references'])} cases of dataset"
                    f" {self.dataset!r}, where chance would be in {chance:.3f}, so its labels must stand in another order than"
                    f" the data's; correct id2label in its config.json ({', '.join(self.labels)}), or the labels of the data."
                )
        return scores

    def _counted(self, batch: dict[str, Tensor]) -> Tensor:
        counted = super()._counted(batch)
        return counted if self._problem == SINGLE else counted[:, None].expand(-1, len(self.labels))

    def _decide(self, logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        decide = {MULTI: decide_each, VALUE: decide_value}.get(self._problem)
        return decide(logits, labels) if decide else super()._decide(logits, labels)
