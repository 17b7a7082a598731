"""Where the laws of this folder are run, and random models of the four families there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hfcompress.methods import Cast, Method, PruneVocab, Quantize, Student
from hfcompress.results.measure import undisturbed
from tests.methods import test_laws as laws
from tests.tiny import MADE_FOR, TASKS, VISION, tiny_model

KINDS = ("llama", "bert", "t5", "vit")


def found() -> torch.device | None:
    """The accelerator. `HFCOMPRESS_GPU=cpu` runs the tests of this folder on a CPU, to try the tests themselves."""
    asked = os.environ.get("HFCOMPRESS_GPU")
    if asked:
        return torch.device(asked)
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


DEVICE = found() or torch.device("cpu")


class Few(laws.FewBatches):
    """Labelled random batches for each family; `batches` puts them where the model is, as tasks do."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind

    def batch(self, seed: int = 0, size: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.kind in VISION:
            pixels = torch.randn(size, 3, 16, 16, generator=generator)
            return {"pixel_values": pixels, "labels": torch.randint(0, 3, (size,), generator=generator)}
        batch = super().batch(seed, size, length)
        return {**batch, "labels": batch["input_ids"]} if self.kind == "t5" else batch

    def batches(self, model: nn.Module, samples: int, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        for batch in super().batches(model, samples, batch_size, seed):
            yield on(model, batch)


def on(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch where the model is, images in its dtype."""
    return {name: one.to(model.device, model.dtype if one.is_floating_point() else None) for name, one in batch.items()}


def made(kind: str, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE, **config: Any) -> Any:
    """In half precision as a load makes it: angles of rotary positions stay in float32, where `model.to(dtype)` rounds them."""
    model = tiny_model(kind, **config).to(device)
    if dtype != torch.float32:
        Cast(dtype=str(dtype).removeprefix("torch.")).run(model, None)
    return model


def logits(model: Any, kind: str) -> torch.Tensor:
    """Of a batch that no method saw, in float32 on the CPU."""
    batch = on(model, Few(kind).batch(seed=99))
    batch.update({"decoder_input_ids": batch["input_ids"]} if kind == "t5" else {})
    batch.pop("labels")
    with torch.no_grad(), undisturbed(model):
        return model(**batch).logits.float().cpu()


def auto(kind: str) -> Any:
    return TASKS[MADE_FOR[kind]]


def rows(kind: str) -> list[Method]:
    """The ways to use methods on this family that are a step of their own."""

    def fits(method: Method) -> bool:
        if isinstance(method, Student) and method.architecture:  # a GPT-2
            return kind not in ("t5", "vit")
        reads_words = isinstance(method, PruneVocab) or (isinstance(method, Quantize) and method.embeddings)
        return kind not in VISION or not reads_words

    return list(filter(fits, laws.ROWS))
