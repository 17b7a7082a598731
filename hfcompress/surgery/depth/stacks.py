"""Where the layers of any architecture stand: stacks of modules that run one after another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import kind_of

# What architectures older than transformers' own layer class call theirs: XLNetLayer, SqueezeBertModule, ConvEncoder.
_CALLED_LAYER = re.compile(r"(Layer|Block|Module|ConvEncoder)\w?$")


@dataclass(frozen=True)
class Stack:
    """Layers that run one after another, in any architecture."""

    name: str
    count: int
    repeats: bool = False
    """Whether it is one layer, or a few groups of them, used `count` times over, as in ALBERT."""

    @property
    def side(self) -> str | None:
        """The first of "encoder" and "decoder" in its name, or None: "decoder.bert.encoder.layer" is a decoder's."""
        return next((part for part in self.name.split(".") if part in ("encoder", "decoder")), None)

    def __str__(self) -> str:
        return f"{self.name}, which has {self.count}"


def layer_stacks(model: nn.Module) -> list[Stack]:
    """Every stack of layers, of architectures known by name or not.

    The layers of a stage count, not the stages: these change the width. Convolutions are layers only where nothing else is:
    those before a speech encoder change the length.
    """
    groups = getattr(getattr(model, "config", None), "num_hidden_groups", None)
    if groups:
        return _repeated(model, groups)
    for is_called, holds in (
        (_is_modern, _holds_matrix),
        (_is_called_layer, _holds_matrix),
        (_is_modern, _holds_kernel),
        (_is_called_layer, _holds_kernel),
    ):
        stacks = _stacks(model, is_called, holds)
        if stacks:
            return stacks
    return _side_by_side(model)


def named_stacks(model: nn.Module, wanted: str, asked: str) -> list[Stack]:
    """The stacks that all, encoder, decoder or a stack's own name mean. `asked`: who says so if there is none."""
    stacks = layer_stacks(model)
    if not stacks:
        raise CompressionError(
            f"{asked}: {type(model).__name__} has no stack of layers to choose from; possible are models whose layers stand "
            f"in a list; leave its layers as they are."
        )
    meant = [one for one in stacks if wanted in ("all", one.side, one.name)]
    if not meant:
        raise CompressionError(
            f"{asked}: stack {wanted!r} is none of {type(model).__name__}'s; possible are all, "
            f"{', '.join(dict.fromkeys(name for one in stacks for name in (one.side, one.name) if name))}."
        )
    return meant


def chosen(stack: Stack, layers: list[int], asked: str) -> list[int]:
    """These layers, if the stack has them."""
    if layers[0] < 0 or layers[-1] >= stack.count:
        raise CompressionError(f"{asked}: layers {layers} of {stack}; possible are 0 to {stack.count - 1}.")
    return layers


def spread(stack: Stack, number: int, asked: str) -> list[int]:
    """So many layers, spread evenly from the first to the last; halves round up: 12 layers to 6 keep 0, 2, 4, 7, 9, 11."""
    last = stack.count - 1
    if number > stack.count:
        raise CompressionError(f"{asked}: number {number} of {stack}; possible are 1 to {stack.count}.")
    return [(2 * i * last + number - 1) // (2 * (number - 1)) for i in range(number)] if number > 1 else [0]


def lists(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module that holds its parts by number."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ParameterList) and len(module):
            yield name, module


def _stacks(model: nn.Module, is_called: Callable[[Any], bool], holds: Callable[[Any], bool]) -> list[Stack]:
    stacks: list[Stack] = []
    for name, module in lists(model):
        inside = any(name.startswith(f"{stack.name}.") for stack in stacks)
        layers = [layer for layer in module if is_called(layer) and not _is_stage(layer) and holds(layer)]
        if not inside and len(layers) == len(module) and not _are_stages(layers):
            stacks.append(Stack(name, len(module)))
    return stacks


def _side_by_side(model: nn.Module) -> list[Stack]:
    """XLM keeps the attentions of all layers in one list, their feed-forwards in another: the first list stands for all."""
    found: dict[tuple[str, int], list[str]] = {}
    for name, module in lists(model):
        if len(module) > 1 and len({type(part) for part in module}) == 1:
            found.setdefault((name.rpartition(".")[0], len(module)), []).append(name)
    return [
        Stack(names[0], count)
        for (_, count), names in found.items()
        if len(names) > 1 and any(_holds_matrix(model.get_submodule(name)) for name in names)
    ]


def _repeated(model: Any, groups: int) -> list[Stack]:
    for name, module in lists(model):
        if len(module) == groups:
            return [Stack(name, model.config.num_hidden_layers, repeats=True)]
    return []


def _is_modern(module: Any) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _is_called_layer(module: Any) -> bool:
    return bool(_CALLED_LAYER.search(type(module).__name__))


def _is_stage(module: Any) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) or "Stage" in type(module).__name__


def _are_stages(layers: list[Any]) -> bool:
    """Whether they are of several widths, and each holds layers of its own, as PVTv2's."""
    shapes = [[tuple(tensor.shape) for tensor in layer.parameters()] for layer in layers]
    return any(shape != shapes[0] for shape in shapes) and all(
        _is_modern(layer) and any(all(_is_called_layer(part) for part in inner) for _, inner in lists(layer))
        for layer in layers
    )


def _holds_matrix(module: Any) -> bool:
    return any(isinstance(part, nn.Linear) or kind_of(part) is not None for part in module.modules())


def _holds_kernel(module: Any) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
