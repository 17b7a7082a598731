"""How much a layer does: what it changes in the hidden states, and what the loss would be without it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfcompress.calibration.batches import MakeBatches, evaluating, given, mean_loss, told
from hfcompress.calibration.processes import agreed
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.depth.stacks import Stack


def block_influence(model: nn.Module, stack: Stack, batches: MakeBatches, asked: str) -> Tensor:
    """1 minus the mean cosine of a layer's input and output, over tokens that are no padding. (count,).

    Men et al. 2024, ShortGPT (arXiv 2403.03853), equation 1.
    """
    return 1 - _cosines(model, stack, batches, 1, asked)


def angular(model: nn.Module, stack: Stack, batches: MakeBatches, size: int, asked: str) -> Tensor:
    """Angular distance, 0..1, between the input of each block of `size` layers and its output. (count - size + 1,).

    Gromov et al. 2024 (arXiv 2403.17887), equation 6, with the mean over all tokens for their last one: encoders have no last.
    """
    return _cosines(model, stack, batches, size, asked).clamp(-1, 1).acos() / torch.pi


def loss_without(model: nn.Module, stack: Stack, batches: MakeBatches, skipped: list[int], asked: str) -> float:
    """The mean loss over labels with these layers skipped."""
    handles = [skip(model.get_submodule(stack.name)[index]) for index in skipped]  # type: ignore[index]
    try:
        found = mean_loss(model, batches, f"{asked}: a score", f"{asked}: scores: loss", "block_influence")
    finally:
        for handle in handles:
            handle.remove()
    if found is None or not math.isfinite(found):
        raise CompressionError(
            f"{asked}: loss is not finite on the calibration data, or no batch has a label; load the model in float32, or "
            f"choose scores: block_influence."
        )
    return agreed(torch.tensor(found)).item()


def skip(layer: nn.Module) -> RemovableHandle:
    """Make the identity of a layer: what it is given first is what it returns first, in its own format."""

    def identity(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = _first((*args, *kwargs.values()))
        if type(output) in (list, tuple):
            return type(output)((given, *output[1:]))
        if isinstance(output, Tensor):
            return given
        raise CompressionError(
            f"{type(layer).__name__} returns a {type(output).__name__}, and what it would return if skipped is not known; "
            f"possible are layers that return a tensor or a tuple; choose scores: position."
        )

    return layer.register_forward_hook(identity, with_kwargs=True)


def _cosines(model: nn.Module, stack: Stack, batches: MakeBatches, size: int, asked: str) -> Tensor:
    """Mean cosine of the hidden states before layer i and before layer i + size, over tokens. (count - size + 1,).

    No more than `size` + 1 states are held at a time.
    """
    totals, seen = torch.zeros(stack.count - size + 1), 0.0
    layers: Any = model.get_submodule(stack.name)
    states: dict[int, Tensor] = {}
    reached: set[int] = set()
    shapes: set[torch.Size] = set()
    now: dict[str, Any] = {}

    def note(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        conv = any(parameter.dim() == 4 for parameter in layer.parameters())
        for place, state in ((index, _first((*args, *kwargs.values()))), (index + 1, _first(output))):
            state = state.detach().movedim(1, -1) if conv and state.dim() == 4 else state.detach()
            shapes.add(state.shape)
            if place in reached:
                continue
            reached.add(place)
            states[place] = nn.functional.normalize(told(model, now["batch"], stack.name, state).float(), dim=-1)
            before = states.pop(place - size, None)
            if before is not None and before.shape == states[place].shape:
                totals[place - size] += float((before.to(state.device) * states[place]).sum())

    handles = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, output, index=index: note(index, layer, args, kwargs, output),  # type: ignore[misc]
            with_kwargs=True,
        )
        for index, layer in enumerate(layers)
    ]
    try:
        with evaluating(model), torch.no_grad():
            for batch in given(batches, f"{asked}: a score"):
                for kept in (states, reached, shapes):
                    kept.clear()
                now["batch"] = batch
                model(**batch)
                if len(reached) <= stack.count or len(shapes) > 1:
                    raise CompressionError(
                        f"{asked}: the hidden states between the layers of {stack.name} can't be followed; possible are layers "
                        f"that are called one by one and keep the shape; choose scores: position."
                    )
                seen += len(next(iter(states.values())))
    finally:
        for handle in handles:
            handle.remove()
    return agreed(totals / seen)


def _first(values: Any) -> Tensor:
    """The first tensor of a number of values: a layer's hidden states come first, in and out."""
    if isinstance(values, Tensor):
        return values
    return next(value for value in (values.values() if isinstance(values, dict) else values) if isinstance(value, Tensor))
