"""Runs a model over calibration data as it will be used: in eval mode, and without counting padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hfcompress.errors import CompressionError

Batches = Callable[[], Iterable[dict[str, Tensor]]]
"""Makes the same batches every time that it is called."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards in the mode it was in: not all of them need be in the same."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def given(batches: Batches | None, what: str) -> Iterator[dict[str, Tensor]]:
    """The batches; a CompressionError where there are none."""
    seen = False
    for batch in batches() if batches is not None else ():
        seen = True
        yield batch
    if not seen:
        why = "the task gave no batch; check its data set" if batches is not None else "there is none; give a task or batches"
        raise CompressionError(f"{what} needs calibration data, and {why}.")


def examples(model: Any, batch: dict[str, Tensor]) -> int:
    """How many examples a batch holds."""
    main = batch.get(getattr(model, "main_input_name", "input_ids"))
    return len(main if isinstance(main, Tensor) else next(value for value in batch.values() if value.dim()))


def singles(model: Any, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The examples of a batch, each a batch of its own."""
    count = examples(model, batch)
    for row in range(count):
        yield {key: value[row : row + 1] if value.dim() and len(value) == count else value for key, value in batch.items()}


def told(model: Any, batch: dict[str, Tensor], module: str, x: Tensor) -> Tensor:
    """(rows, features): the rows of x (..., features), which a module reads or says, that are no padding.

    The module's name tells whose padding: the decoder's, of an encoder-decoder, or that of the input. All rows are told where
    no mask fits (batch, tokens, ...) or all tokens of the batch in one line: images, windows, sounds whose frames were merged.
    """
    side = next((part for part in module.split(".") if part in ("encoder", "decoder")), None)
    mask, rows = batch.get("attention_mask"), x.shape[:-1]
    if model.config.is_encoder_decoder and side == "decoder":
        labels, mask = batch.get("labels"), batch.get("decoder_attention_mask")
        if mask is None and labels is not None and labels.dim() == 2:
            mask = labels != -100
    if mask is None or mask.dim() != 2:
        return x.flatten(0, -2)
    mask = mask.bool().to(x.device)
    if tuple(rows[:2]) == tuple(mask.shape):
        return x[mask].flatten(0, -2)
    return x[mask.flatten()] if tuple(rows) == (mask.numel(),) else x.flatten(0, -2)
