"""Runs a model over calibration data as it will be used: in eval mode, and without counting padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hfcompress.calibration.processes import processes
from hfcompress.calibration.progress import progress
from hfcompress.checkpoint.errors import CompressionError

MakeBatches = Callable[[], Iterable[dict[str, Tensor]]]
"""Makes the same batches every time that it is called."""
AT_ONCE = 2**31
"""Bytes of gradients that are held at a time: of more weights, the data are gone through again."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Every module in eval mode, answers by name and without states that nobody asked for; afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    plain = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
    config = getattr(model, "config", None)
    kept = {key: value for key, value in vars(config or object()).items() if key.removeprefix("_") in plain}
    model.eval()
    try:
        for field, value in plain.items():
            if hasattr(config, field):
                setattr(config, field, value)
        yield
    finally:
        if config is not None:
            vars(config).update(kept)  # past a setter that refuses attentions of kernels which have none
        for module, mode in modes:
            module.training = mode


def given(batches: MakeBatches | None, what: str) -> Iterator[dict[str, Tensor]]:
    """The batches; a CompressionError where there are none."""
    seen = False
    for batch in progress(batches() if batches is not None else (), what="calibrating", shown=processes().is_main_process):
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

    The module's name tells whose padding: the decoder's, of an encoder-decoder, or that of the input, which the decoder reads
    too where it is given nothing else, as in a classifier. x is (batch, tokens, ...), or (tokens, batch, ...), or all tokens of
    the batch in one line. All rows are told where no mask fits: images, windows, sounds whose frames were merged, the tokens
    that one expert was sent, texts that the model itself pads.
    """
    side = next((part for part in module.split(".") if part in ("encoder", "decoder")), None)
    mask, rows = batch.get("attention_mask"), tuple(x.shape[:-1])
    if model.config.is_encoder_decoder and side == "decoder":
        labels, answers = batch.get("labels"), batch.get("decoder_attention_mask")
        if answers is None and labels is not None and labels.dim() == 2 and not labels.is_floating_point():
            answers = labels != -100
        mask = mask if answers is None and "decoder_input_ids" not in batch else answers
    if mask is None or mask.dim() < 2:
        return x.flatten(0, -2)
    mask = mask.bool().flatten(0, -2).to(x.device)  # the choices of multiple choice are texts as well
    for order in (mask, mask.T):
        if rows[:2] == tuple(order.shape):
            return x[order].flatten(0, -2)
    return x[mask.flatten()] if rows == (mask.numel(),) else x.flatten(0, -2)


def labelled(model: Any, batch: dict[str, Tensor], output: Any) -> Tensor | None:
    """(examples,): how many labels of each the loss is a mean over; None where that is not known."""
    labels, logits = batch.get("labels"), getattr(output, "logits", None)
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or len(labels) != len(logits):
        return None
    if labels.is_floating_point() or (logits.dim() == 2 and labels.numel() == len(labels)):
        return torch.ones(len(labels)) if labels.is_floating_point() else (labels.reshape(-1) != -100).float()
    if labels.dim() == 2 and labels.shape == logits.shape[:2]:
        known = labels != -100
        return (known[:, 1:] if foretells_next(model) else known).sum(1).float()
    return None


def loss_of(output: Any, where: str, instead: str) -> Tensor:
    """The loss; a CompressionError where the model gave none."""
    loss = getattr(output, "loss", None)
    if loss is None:
        raise CompressionError(
            f"{where} needs a loss, and the model gave none: the batches hold no labels, or the model no head; add labels, or "
            f"choose scores: {instead}."
        )
    return loss


@torch.no_grad()
def mean_loss(model: Any, batches: MakeBatches | None, what: str, where: str, instead: str) -> float | None:
    """The mean loss over labels; None where no batch has one."""
    total, seen = 0.0, 0.0
    with evaluating(model):
        for batch in given(batches, what):
            output = model(**batch)
            known = labelled(model, batch, output)
            worth = examples(model, batch) if known is None else float(known.sum())
            if worth:  # else a mean over nothing
                total += worth * loss_of(output, where, instead).item()
                seen += worth
    return total / seen if seen else None


def in_parts(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights in parts of `AT_ONCE` bytes at the most in float32, or of one weight."""
    part: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if part and 4 * sum(one.numel() for one in (*part.values(), weight)) > AT_ONCE:
            yield part
            part = {}
        part[name] = weight
    yield part


NO_DATA = "scores: gradient needs calibration data; give a task or batches with labels, or choose scores: magnitude."


class Batches:
    """What methods need of a Task, from a data loader: labelled batches, and whose tokens they are."""

    def __init__(
        self, loader: Any = None, original: nn.Module | None = None, processor: Any = None, is_resumed: bool = False
    ) -> None:
        if isinstance(loader, Mapping):
            raise CompressionError("a single batch was given where several are wanted; give a list of batches, as in [batch].")
        self._loader, self.original, self.processor, self.is_resumed = loader, original, processor, is_resumed
        self._read: list[Any] = []

    @property
    def has_data(self) -> bool:
        return self._loader is not None

    def batches(self, model: nn.Module, samples: int | None, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """About `samples` examples by chance, or every one in its order for None, on the model's device."""
        if self._loader is None:
            raise CompressionError(NO_DATA)
        device, seen = next(model.parameters()).device, 0
        for batch in self._plain(batch_size, None if samples is None else seed):
            yield {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            seen += len(next(iter(batch.values())))
            if samples is not None and seen >= samples:
                return

    def _plain(self, batch_size: int, seed: int | None) -> Iterable[Any]:
        # A fresh loader over the same data: leaving the Trainer's own in the middle would upset accelerate's bookkeeping.
        if isinstance(self._loader, Iterator):
            return self._again()
        if not hasattr(getattr(self._loader, "dataset", None), "__getitem__"):  # streamed data
            return self._loader
        return DataLoader(
            self._loader.dataset,
            batch_size=batch_size,
            shuffle=seed is not None,
            collate_fn=self._loader.collate_fn,
            generator=torch.Generator().manual_seed(seed or 0),
        )

    def _again(self) -> Iterator[Any]:
        """What can be read once, from its beginning: what was read is kept."""
        yield from list(self._read)
        for batch in self._loader:
            self._read.append(batch)
            yield batch


def calibration(model: nn.Module, task: Any, samples: int, who: str, instead: str) -> Callable[[], Iterator[dict[str, Tensor]]]:
    """A function that gives the same batches at every call. `who` needs them, and what to choose instead if there are none."""

    def batches() -> Iterator[dict[str, Tensor]]:
        if task is None or (isinstance(task, Batches) and not task.has_data):
            raise CompressionError(
                f"{who} needs calibration data; give a task or batches, as in run(model, batches) before a Trainer is built or "
                f"attach(trainer, ...) after, or choose scores: {instead}."
            )
        yield from task.batches(model, samples)

    return batches


def foretells_next(model: Any) -> bool:
    """Whether labels are compared with the position before them, as the Trainer tells it too."""
    if model.config.is_encoder_decoder:
        return False
    name = type(model).__name__
    by_loss = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return by_loss or (name.endswith("LMHeadModel") and not name.endswith("WithLMHeadModel"))
