"""Whether an export says what PyTorch says, at sizes that it was not traced with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.proof import difference
from hfcompress.export.base import Source
from hfcompress.export.graphs import writes

SIZES = ((1, 5), (3, 11), (9, 60))
"""Examples and tokens of the batches that are compared."""
ALLOWED = 1e-3
"""Of the spread of the logits, where nothing was rounded on purpose."""
WRITTEN = 12
"""Tokens that are written for comparison."""


@torch.no_grad()
def agreement(source: Source, served: Any, is_exact: bool = True) -> dict[str, Any]:
    """`off`, the largest difference of logits as a share of their spread; for models that write, `same_tokens`, the share of
    tokens that both write. CompressionError where an export that should be `is_exact` differs, or can't take a size."""
    worst = 0.0
    for size, length in SIZES:
        batch, real = _padded(source, size, length)
        expected = _said(source.model(**batch))
        try:
            found = _said(served(**batch))
        except Exception as error:  # the runtimes' own
            raise CompressionError(
                f"export: the graph does not take {size} examples{f' of {length} tokens' if source.has_length else ''} "
                f"({type(error).__name__}); this is a fault of the exporter, please report it with the model's class, "
                f"{type(source.model).__name__}."
            ) from error
        if real is not None and expected.dim() == 3 and real.shape == expected.shape[:2] == found.shape[:2]:
            found, expected = found[real], expected[real]  # what is said of pads is noise
        worst = max(worst, difference(found, expected))
    if is_exact and not worst <= ALLOWED:
        raise CompressionError(
            f"export: the graph computes other logits than PyTorch (off by {worst:.2g} of their spread, allowed {ALLOWED:g}); "
            f"this is a fault of the exporter, please report it with the model's class, {type(source.model).__name__}."
        )
    found_tokens = _same_tokens(source, served) if source.model.can_generate() else {}
    return {"off": worst, **found_tokens}


def _said(output: Any) -> Tensor:
    """Its logits; of one with several, as of the start and the end of an answer, the first."""
    return output.logits if getattr(output, "logits", None) is not None else output[0]  # type: ignore[no-any-return]


def _padded(source: Source, size: int, length: int) -> tuple[dict[str, Any], Tensor | None]:
    """A batch whose first text is shorter by two tokens, and which tokens are no pads; pads come first where a model writes."""
    batch = dict(source.example(size, length if source.has_length else None))
    mask = batch.get("attention_mask")
    if mask is None or size == 1 or mask.dim() != 2:
        return batch, None if mask is None else mask.bool()
    mask = mask.clone()
    mask[0, : 2 if writes(source.model) else 0] = 0
    mask[0, length if writes(source.model) else length - 2 :] = 0
    return batch | {"attention_mask": mask}, mask.bool()


def _same_tokens(source: Source, served: Any) -> dict[str, Any]:
    model = source.model
    batch = dict(source.example(2, 9 if source.has_length else None))
    batch = {name: value for name, value in batch.items() if name in (model.main_input_name, "attention_mask")}
    plainly: Any = GenerationMixin.generate  # Whisper's own way leaves out the token that it begins with
    expected = plainly(model, **batch, do_sample=False, num_beams=1, max_new_tokens=WRITTEN)
    found = served.generate(**batch, max_new_tokens=WRITTEN)
    begin = batch["input_ids"].shape[1] if writes(model) else 1
    shorter, longer = sorted((found.shape[1] - begin, expected.shape[1] - begin))
    same = (found[:, begin : begin + shorter] == expected[:, begin : begin + shorter]).sum()
    return {"same_tokens": float(same) / (len(found) * longer)}  # one that ended earlier wrote others
