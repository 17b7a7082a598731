"""The rows of a task: those to train on and those to score on, which never meet."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset
from pydantic import Field, PositiveInt

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.checkpoint.fields import Fields
from hfcompress.tasks.data import EVAL_SPLITS, drop_duplicates, read_splits, split_off

log = logging.getLogger("hfcompress")


class Splits(Fields):
    """Where the data are, and which of its rows are for what."""

    unit: ClassVar[str] = "text"
    """What an example is made of, as errors call it; "image" finds class folders of image files."""

    dataset: str = Field(description="Hub id, file, folder of files or of class folders, or package://NAME/path")
    subset: str | None = Field(default=None, description="the subset (configuration) of a Hub data set")
    train_split: str = Field(default="train", description="the split to train on")
    eval_split: str | None = Field(default=None, description="the split to score on; default: validation, test, or split off")
    max_train_samples: PositiveInt | None = Field(default=None, description="train on a seeded choice of so many")
    max_eval_samples: PositiveInt | None = Field(default=None, description="score on a seeded choice of so many")
    eval_share: float = Field(default=0.2, gt=0, lt=1, description="what to split off where there is no split to score on")
    eval_samples: PositiveInt | None = Field(default=None, description="how many examples to split off, instead of eval_share")
    deduplicate: bool | None = Field(
        default=None, description="use each example once; by default for local data, not for the Hub's"
    )
    seed: int = Field(default=0, description="of the split, of the choice of samples and of a new head")

    def _read(self) -> dict[str, Dataset]:
        """The rows as they came: {"train": ..., and "eval" unless it must be split off}, each once if asked."""
        splits, is_local = read_splits(self.dataset, self.subset, self.unit)
        for field, name in (("train_split", self.train_split), ("eval_split", self.eval_split)):
            if name is not None and name not in splits:
                raise CompressionError(f"{field}: dataset {self.dataset!r} has no {name!r}.{did_you_mean(name, splits)}")
        rows = {"train": self._cleaned(splits, self.train_split)}
        used = set(self._used(splits[self.train_split]))
        if self.eval_split:
            if absent := sorted(used - set(splits[self.eval_split].column_names)):
                raise CompressionError(
                    f"eval_split: {self.eval_split!r} of dataset {self.dataset!r} has no {' and no '.join(absent)}, which"
                    f" {self.train_split!r} has; name another split, or leave eval_split out."
                )
            rows["eval"] = self._cleaned(splits, self.eval_split)
        for name in EVAL_SPLITS if not self.eval_split else ():
            if name not in splits or name == self.train_split:
                continue
            # Kaggle's test files have no column of labels, and a benchmark's may hide them: nothing to score on
            part = self._cleaned(splits, name) if used <= set(splits[name].column_names) else ()
            if len(part):
                rows["eval"] = part
                break
            log.info(f"dataset {self.dataset!r}: {name} has no {self.unit} with all of {', '.join(sorted(used))}: not used")
        if self.deduplicate if self.deduplicate is not None else is_local:
            # the examples to score on go first: what is in both is dropped from training
            whole = {split: len(part) for split, part in rows.items()}
            rows = drop_duplicates({split: rows[split] for split in sorted(rows)}, self._keys)
            for split, part in rows.items():
                self._tell_left_out(split, whole[split], len(part), "as duplicates")
        for split, part in rows.items():
            if not len(part):
                raise CompressionError(f"dataset {self.dataset!r}: no {self.unit} for {split} is left; give one that has some.")
        return rows

    def _cleaned(self, splits: Any, name: str) -> Dataset:
        rows = self._clean(splits[name])
        self._tell_left_out(name, len(splits[name]), len(rows), f"for want of a {self.unit} or a label")
        return rows

    def _tell_left_out(self, split: str, before: int, now: int, why: str) -> None:
        if now < before:
            log.info(f"dataset {self.dataset!r}, {split}: {before - now:,} of {before:,} rows left out {why}")

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

    def _used(self, rows: Dataset) -> list[str]:
        """The columns of the rows as they came that the task reads."""
        raise NotImplementedError

    def _clean(self, rows: Dataset) -> Dataset:
        """The columns the task needs, and the rows that have them."""
        raise NotImplementedError

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        """What tells two rows of `_clean` apart."""
        raise NotImplementedError
