"""What the tasks with labels share: they fit a head that is there, and make one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from pydantic import Field, PrivateAttr, model_validator
from transformers import PreTrainedConfig

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.base import Task
from hfcompress.tasks.data import LABELS, find_column
from hfcompress.tasks.pretrained import fit_labels, has_head, head_labels


class Classification(Task):
    """A task whose model chooses one of several labels, for an example or a token."""

    label_column: str | None = Field(None, description="the column of the labels; guessed by default")
    labelled: bool = Field(
        True, description="false: the data has no labels; the model is scored by its agreement with the original"
    )

    _labels: tuple[str, ...] | None = PrivateAttr(None)

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

    @property
    def _kind(self) -> str:
        return self.auto_class.__name__.removeprefix("AutoModelFor")

    def _order(self, names: tuple[str, ...], path: str) -> list[int]:
        """For each of the data's labels its place in the head; from here on `labels` are those of the head."""
        if has_head(self._config, self._kind):
            if not self.labelled:
                names = head_labels(self._config)
            order, self._labels = self._fit(names, self._config, path)
            return order
        if not self.labelled:
            raise CompressionError(
                f"model {str(path)!r}: it has no head for {self._kind}, and labelled: false gives none to learn;"
                " choose a checkpoint that was trained for this task, or give labelled data."
            )
        self._labels = names
        return list(range(len(names)))

    def _head(self, config: PreTrainedConfig, path: str) -> tuple[dict[str, Any], bool]:
        if not has_head(config, self._kind):
            id2label = dict(enumerate(self.labels))
            label2id = {name: index for index, name in id2label.items()}
            return {"num_labels": len(id2label), "id2label": id2label, "label2id": label2id}, True
        order, _ = self._fit(self.labels, config, path)
        if order != list(range(len(order))):
            raise CompressionError(
                f"model {str(path)!r}: its labels ({', '.join(head_labels(config))}) are in another order than those"
                f" the task was opened with ({', '.join(self.labels)}); open a task of its own for it."
            )
        return {}, False

    def _fit(self, names: tuple[str, ...], config: PreTrainedConfig, path: str) -> tuple[list[int], tuple[str, ...]]:
        fit = fit_labels(names, config)
        if fit is None:
            raise CompressionError(
                f"model {str(path)!r}: its head has the labels {', '.join(head_labels(config))}, and dataset"
                f" {self.dataset!r} has {', '.join(names)}; choose data with these labels, or a checkpoint without a"
                " classification head."
            )
        return fit
