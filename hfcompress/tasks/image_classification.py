from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForImageClassification, default_data_collator

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.columns import PICTURES, SINGLE, find_column, missing, name_labels
from hfcompress.tasks.data import choose
from hfcompress.tasks.labels import Classification
from hfcompress.tasks.pretrained import load_image_processor


class ImageClassification(Classification):
    """One label an image."""

    auto_class = AutoModelForImageClassification
    unit: ClassVar[str] = "image"

    image_column: str | None = Field(default=None, description="the column of the images; guessed by default")
    name: Literal["image-classification"] = "image-classification"

    def load_processor(self, path: str) -> Any:
        """The image processor of a checkpoint."""
        return load_image_processor(path)

    @property
    def collator(self) -> Any:
        """Examples to tensors: `pixel_values` (batch, channels, height, width), `labels` (batch)."""
        return default_data_collator

    def _used(self, rows: Dataset) -> list[str]:
        image = find_column("image_column", self.image_column, PICTURES, rows.column_names, self.dataset)
        return [image, *self._labels_of(rows, [image])]

    def _clean(self, rows: Dataset) -> Dataset:
        """`image` and, where there are labels, `label`, without rows that lack one. No image is opened."""
        image, *label = self._used(rows)
        rows = rows.select_columns([image, *label])
        rows = rows.rename_columns({image: "image", **dict.fromkeys(label, "label")})
        try:
            rows = rows.cast_column("image", datasets.Image())
        except Exception as error:  # pyarrow and datasets each have errors of their own here
            raise CompressionError(
                f"dataset {self.dataset!r}: column {image!r} holds neither images nor paths of images; name the right one"
                " with image_column."
            ) from error
        if not label:
            return rows
        hidden = missing(rows["label"][:], rows.features["label"])
        given = [index for index, is_hidden in enumerate(hidden) if not is_hidden]
        return rows.select(given, keep_in_memory=True)

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        for row in rows.cast_column("image", datasets.Image(decode=False)):
            stored = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
            yield hashlib.sha256(stored).digest()

    def _read(self) -> dict[str, Dataset]:
        rows = super()._read()
        self._problem = (None if self.labelled else self._told_by_head()) or SINGLE
        return name_labels(rows, self.dataset) if self.labelled else rows

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        if self.labelled:
            self._check_chooses(path)
        order = self._order(tuple(train.features["label"].names) if self.labelled else (), path)
        for name, rows, most in (("_train", train, self.max_train_samples), ("_eval", held_out, self.max_eval_samples)):
            setattr(self, name, Images(choose(rows, most, self.seed), self.processor, order, self.dataset))

    def _longest_first(self, data: Any) -> np.ndarray:
        return np.arange(len(data))  # all are of one size

    @property
    def example_length(self) -> int:
        return 1  # an image is an image

    def example(self, batch_size: int, length: int | None = None) -> dict[str, Tensor]:
        """The first images to score on, `pixel_values` (batch_size, channels, height, width); `length` plays no part."""
        data = self.eval_dataset
        return {"pixel_values": torch.stack([data[index % len(data)]["pixel_values"] for index in range(batch_size)])}


class Images(torch.utils.data.Dataset):
    """Rows with `image` and maybe `label` as `pixel_values` and maybe `labels`; an image is opened when it is asked for.

    Not a transform of `datasets`: the Trainer takes away columns the model does not know, and `image` is one.
    """

    def __init__(self, rows: Dataset, processor: Any, order: list[int], dataset: str) -> None:
        self._rows, self._processor, self._order, self._dataset = rows, processor, order, dataset

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = self._rows[index]
            image = row["image"].convert("RGB")
        except OSError as error:  # Pillow's word for a broken image, and Python's for a lost file
            raise CompressionError(
                f"dataset {self._dataset!r}: an image can't be read ({error}); mend it, or take it out."
            ) from error
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, **({"labels": self._order[row["label"]]} if "label" in row else {})}
