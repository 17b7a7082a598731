"""Finds the units of any model by asking autograd what depends on what.

The columns of an output projection that one head fills depend on the rows of query, key and value that make this head, and on
no others; those that a neuron fills depend on its own rows. So one backward pass a column, through one layer, tells which
entries of which tensors belong together, whatever their names and however they are fused. Couplings show as well: a table of
relative positions that several layers read makes one unit of the heads of all. What is found is a guess until `proof` has
tried it: a zero gradient may be an accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.layers import kind_of
from hfcompress.surgery.units.spans import Segment, Span, Units

Pattern = dict[tuple[str, int], Tensor]
"""(tensor, axis) -> which entries along the axis matter, as a mask."""


def read(model: nn.Module, batch: dict[str, Tensor]) -> list[Units]:
    """Candidates for units, in the order in which their outputs run, counters not yet told. `model`: small, float32, random."""
    with torch.inference_mode(False), torch.enable_grad():
        return _read(model, batch)


def _read(model: nn.Module, batch: dict[str, Tensor]) -> list[Units]:
    layers = _layers(model)
    first: dict[Any, str] = {}
    like = {name: first.setdefault(_signature(layer), name) for name, layer in layers.items()}
    watched = {name: layers[name] for name in first.values()}
    readings = _run(model, watched, batch)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and not _follows_weight(model, name)}
    found: dict[str, list[Units]] = {}
    for top in watched:
        inside = [reading for reading in readings if reading.name == top or reading.name.startswith(f"{top}.")]
        found[top] = [units for reading in inside if (units := _units(reading, parameters)) is not None]
    return _coupled([_renamed(units, one, name) for name, one in like.items() for units in found[one]])


def _follows_weight(model: nn.Module, name: str) -> bool:
    """Whether it is the bias of a weight, and so its units are those of the weight's rows. The gradient would not tell: that of
    a key's bias is zero but for rounding, as softmax does not feel what all keys gain alike."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "bias" and isinstance(getattr(model.get_submodule(owner), "weight", None), nn.Parameter)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The members of every outermost list of modules that hold a matrix."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        if isinstance(module, nn.ModuleList) and not inside:
            for number, child in enumerate(module):
                if any(parameter.dim() > 1 for parameter in child.parameters()):
                    layers[f"{name}.{number}"] = child
    return layers


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """What tells sorts of layers apart: modules, shapes, plain attributes; an index that only counts layers does not."""
    modules = tuple(
        (name, type(module).__name__, tuple(sorted((k, v) for k, v in vars(module).items() if _is_plain(k, v))))
        for name, module in layer.named_modules()
    )
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _is_plain(key: str, value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and "idx" not in key and "index" not in key and "layer_id" not in key


@dataclass
class _Reading:
    """What the module of this name read in a forward; of stacked experts, what it answered."""

    name: str
    model: nn.Module
    seen: list[Tensor] = field(default_factory=list)

    @property
    def module(self) -> Any:
        return self.model.get_submodule(self.name)


def _run(model: nn.Module, watched: dict[str, nn.Module], batch: dict[str, Tensor]) -> list[_Reading]:
    """One forward in which every layer starts from a detached input, so that gradients stay within a layer and what other
    parts hand to it on the side."""
    readings: dict[str, _Reading] = {}
    handles: list[Any] = []
    members = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    handles += [child.register_forward_pre_hook(_detach, with_kwargs=True) for child in members if any(child.children())]
    for layer, top in watched.items():
        for inner, module in top.named_modules():
            name = f"{layer}.{inner}" if inner else layer
            reading = _Reading(name, model)
            if _is_reader(module):
                handles.append(module.register_forward_pre_hook(_keep_input(reading)))
            elif any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
                handles.append(module.register_forward_hook(_keep_output(reading)))
            else:
                continue
            readings[name] = reading
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [reading for reading in readings.values() if reading.seen]


def _is_reader(module: nn.Module) -> bool:
    """Whether its weight's columns are features of its input: a Linear of any make, a convolution that is not grouped."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1
    weight, name = getattr(module, "weight", None), type(module).__name__
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and (name.endswith("Linear") or kind_of(module) == "conv1d")


def _detach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first floating tensor is the layer's input; what else it is given may couple layers, and keeps its history."""
    for number, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:number], value.detach(), *args[number + 1 :]), kwargs
    if args:
        return args, kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, key: value.detach()}
    return args, kwargs


def _keep_input(reading: _Reading) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].requires_grad:
            reading.seen.append(args[0])

    return keep


def _keep_output(reading: _Reading) -> Callable[..., None]:
    def keep(_: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad:
            reading.seen.append(first)

    return keep


def _units(reading: _Reading, parameters: dict[str, nn.Parameter]) -> Units | None:
    if _is_reader(reading.module):
        axis = 0 if kind_of(reading.module) == "conv1d" else 1
        channel = 1 if isinstance(reading.module, nn.Conv1d | nn.Conv2d) else -1
        width = reading.module.weight.shape[axis]

        def columns(start: int, size: int) -> Tensor:
            return sum((_mixed(x.narrow(channel, start, size)) for x in reading.seen), torch.zeros(()))

        return _partitioned(reading, f"{reading.name}.weight", axis, width, columns, parameters)
    return next(_of_experts(reading, parameters), None)


def _of_experts(reading: _Reading, parameters: dict[str, nn.Parameter]) -> Iterator[Units]:
    """What experts compute in between is never seen from outside: but the gradient of a matrix that is applied to it is.

    The output is linear in the matrix that is applied last, and in that one alone.
    """
    answer = sum((_mixed(output) for output in reading.seen), torch.zeros(()))
    own = {name: p for name, p in parameters.items() if name.rpartition(".")[0] == reading.name}
    for name, matrix in own.items():
        if matrix.dim() != 3:
            continue
        (slope,) = torch.autograd.grad(answer, [matrix], create_graph=True, allow_unused=True)
        if slope is None or not slope.requires_grad or _depends(_mixed(slope), matrix):
            continue
        others = {other: p for other, p in own.items() if p is not matrix}
        for axis in (1, 2):

            def columns(start: int, size: int, slope: Tensor = slope, axis: int = axis) -> Tensor:
                return _mixed(slope.narrow(axis, start, size))

            units = _partitioned(reading, name, axis, matrix.shape[axis], columns, others)
            if units is not None:
                yield replace(units, lanes=matrix.shape[0])


def _depends(signal: Tensor, parameter: nn.Parameter) -> bool:
    (slope,) = torch.autograd.grad(signal, [parameter], retain_graph=True, allow_unused=True)
    return slope is not None and bool(slope.any())


def _mixed(x: Tensor) -> Tensor:
    """A sum with weights that no two entries share, so that nothing cancels by symmetry."""
    return (x * torch.linspace(0.5, 1.5, x.numel(), device=x.device).reshape(x.shape).cos()).sum()


def _partitioned(
    reading: _Reading,
    tensor: str,
    axis: int,
    width: int,
    columns: Callable[[int, int], Tensor],
    parameters: dict[str, nn.Parameter],
) -> Units | None:
    """Units, if the columns fall into equal blocks that depend on entries of their own.

    The smallest blocks that leave nothing shared which larger ones would not: a value's feature belongs to one column, but
    queries and keys to a head, and under grouped queries the keys to several.
    """
    others = {name: p for name, p in parameters.items() if name != tensor}
    if not others:
        return None

    def pattern(start: int, size: int) -> Pattern:
        signal = columns(start, size)
        return _pattern(signal, others) if signal.requires_grad else {}

    if not any(others[name].dim() > 1 for name, _ in pattern(0, 1)):
        return None
    owned, size, most = {}, 0, 0
    for block in (block for block in range(1, width // 2 + 1) if width % block == 0):
        first, second = pattern(0, block), pattern(block, block)
        mine = {key: spans for key in first if (spans := _owned(first[key], second.get(key), width // block)) is not None}
        entries = sum(segment.size * width // block for spans in mine.values() for segment in spans if not segment.is_shared)
        if entries > most:
            owned, size, most = mine, block, entries
        if len(mine) == len(first) and not any(segment.is_shared for spans in mine.values() for segment in spans):
            break
    if not any(others[name].dim() > 1 for name, _ in owned):
        return None
    if not _predicts(owned, pattern(width - size, size), width // size):
        return None
    inputs = tuple(Span(name, along, segments) for (name, along), segments in owned.items())
    inputs += tuple(other for span in inputs for other in _beside(reading.model, span))
    if len({span.tensor for span in inputs}) < len(inputs):  # block-diagonal: an entry would belong to two units
        return None
    output = Span(tensor, axis, (Segment(size),))
    name = _around([span.module for span in (*inputs, output)])
    return Units(name, "heads" if size > 1 else "neurons", width // size, inputs, (output,))


def _around(modules: list[str]) -> str:
    """The module that holds them all."""
    parts = zip(*(module.split(".") for module in modules), strict=False)
    return ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts))


def _beside(model: nn.Module, span: Span) -> Iterator[Span]:
    """What a module holds for each row of its weight: a bias, the statistics of a batch norm."""
    module = model.get_submodule(span.module)
    if span.tensor.endswith(".weight") and span.axis == (1 if kind_of(module) == "conv1d" else 0):
        for leaf in ("bias", "running_mean", "running_var"):
            if isinstance(getattr(module, leaf, None), Tensor):
                yield replace(span, tensor=f"{span.module}.{leaf}", axis=0)


def _pattern(signal: Tensor, parameters: dict[str, nn.Parameter]) -> Pattern:
    """Where the gradient is not zero, for the axes along which it is zero somewhere."""
    slopes = torch.autograd.grad(signal, list(parameters.values()), retain_graph=True, allow_unused=True)
    found: Pattern = {}
    for (name, _), slope in zip(parameters.items(), slopes, strict=True):
        if slope is None:
            continue
        felt = slope != 0
        for axis in range(slope.dim()):
            mask = felt.movedim(axis, 0).flatten(1).any(1) if slope.dim() > 1 else felt
            if mask.any() and not mask.all():
                found[name, axis] = mask
    return found


def _owned(first: Tensor, second: Tensor | None, count: int) -> tuple[Segment, ...] | None:
    """The segments in which units 0 and 1 own entries side by side; None where they share all, or own none."""
    if second is None:
        return None
    ours, theirs = _runs(first & ~second), _runs(second & ~first)
    if not ours or len(ours) != len(theirs):
        return None
    segments: list[Segment] = []
    end = 0
    for (start, size), other in zip(ours, theirs, strict=True):
        if other != (start + size, size) or start < end:
            return None
        segments += [Segment(start - end, True)] if start > end else []
        segments.append(Segment(size))
        end = start + size * count
    if end > len(first):
        return None
    return (*segments, Segment(len(first) - end, True)) if end < len(first) else tuple(segments)


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """(start, length) of every stretch of ones."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def _predicts(owned: dict[tuple[str, int], tuple[Segment, ...]], last: Pattern, count: int) -> bool:
    """Whether the last unit owns what the first two let expect."""
    for (name, axis), segments in owned.items():
        mask = last.get((name, axis))
        if mask is None:
            return False
        expected = torch.zeros_like(mask)
        expected[Span(name, axis, segments).index(torch.tensor([count - 1]), count)] = True
        shared = Span(name, axis, segments).index(torch.tensor([], dtype=torch.long), count)
        expected[shared] = mask[shared]
        if not torch.equal(mask, expected):
            return False
    return True


def _renamed(units: Units, old: str, new: str) -> Units:
    def name(text: str) -> str:
        return new + text[len(old) :] if text == old or text.startswith(f"{old}.") else text

    def spans(some: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple(replace(span, tensor=name(span.tensor)) for span in some)

    return replace(units, name=name(units.name), inputs=spans(units.inputs), outputs=spans(units.outputs))


def _coupled(found: list[Units]) -> list[Units]:
    """Units that own entries of the same tensor are one: heads of layers that share a table, neurons that two outputs read."""
    merged: list[Units] = []
    for units in found:
        mine = {(span.tensor, span.axis) for span in units.inputs}
        for number, other in enumerate(merged):
            if mine & {(span.tensor, span.axis) for span in other.inputs} and units.count == other.count:
                inputs = tuple(dict.fromkeys((*other.inputs, *units.inputs)))
                merged[number] = replace(other, inputs=inputs, outputs=tuple(dict.fromkeys((*other.outputs, *units.outputs))))
                break
        else:
            merged.append(units)
    return merged
