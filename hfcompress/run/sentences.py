"""Trainers of sentence-transformers: what they train is a transformers model inside another, on several texts a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method


def check_body(model: Any, body: Any, methods: Iterable[Method]) -> None:
    """What can't be done to the body of a SentenceTransformer, whose loss is made of embeddings outside of it."""
    key = next((method.key() for method in methods if method.replaces_loss), None)
    if isinstance(model, nn.Sequential) and body is not model and key is not None:
        raise CompressionError(
            f"{key}: a {type(model).__name__} is trained on embeddings, and has no loss of its own to replace; give its "
            f"Trainer loss=MSELoss(model) and the teacher's embeddings as labels, and leave {key} out."
        )


def batches_of(loader: Any) -> type[Batches]:
    """How to read a Trainer's batches: those of sentence-transformers hold several texts side by side."""
    columns = getattr(getattr(loader, "collate_fn", None), "valid_label_columns", None)
    return Texts if columns is not None else Batches


class Texts(Batches):
    """Batches of a sentence-transformers Trainer: `anchor_input_ids`, `positive_input_ids`, ..., each a batch for its body."""

    def batches(self, model: nn.Module, samples: int | None, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        main = getattr(model, "main_input_name", "input_ids")
        for batch in super().batches(model, samples, batch_size, seed):
            for column in [key.removesuffix(main) for key in batch if key.endswith(f"_{main}")]:
                yield {key.removeprefix(column): value for key, value in batch.items() if key.startswith(column)}
