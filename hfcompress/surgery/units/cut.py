"""Structured cuts: rows and columns taken out of tensors. No choices are made here: index lists say what to keep."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.integers import set_count
from hfcompress.layers import stands_in
from hfcompress.surgery.units.spans import Span, Units


def check_cuttable(model: nn.Module, units: Units) -> None:
    """Raise before the first cut, so that none is left half done."""
    for span in (*units.inputs, *units.outputs):
        layer = model.get_submodule(span.module)
        if stands_in(layer):
            raise CompressionError(
                f"{span.module}: can't cut a {type(layer).__name__}; only dense layers can be cut; list methods that cut "
                f"before low_rank, adapters and quantize."
            )


def cut(model: nn.Module, units: Units, keep: Tensor) -> None:
    """Cut every unit out whose index is not in `keep`, ascending, (kept,), or (lanes, kept). Equal to silencing them."""
    check_cuttable(model, units)
    for span in (*units.inputs, *units.outputs):
        keep_entries(model, span, span.index(keep, units.count))
    for counter in units.counters:
        set_count(model.get_submodule(counter.module), counter.attribute, counter.worth * keep.shape[-1])


def keep_entries(model: nn.Module, span: Span, index: Tensor) -> None:
    """Keep these entries along an axis of a tensor, in place; the module that owns it counts its features anew.

    `index`: (entries,), or (lanes, entries) for a tensor whose axis 0 are the lanes.
    """
    owner, leaf = model.get_submodule(span.module), span.leaf
    old = getattr(owner, leaf)
    index = index.to(old.device)
    if index.dim() == 1:
        new = old.detach().index_select(span.axis, index)
    else:
        shape = [1] * old.dim()
        shape[0], shape[span.axis] = index.shape
        expanded = [*old.shape]
        expanded[span.axis] = index.shape[1]
        new = old.detach().gather(span.axis, index.reshape(shape).expand(expanded))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
    setattr(owner, leaf, new)
    for key, value in vars(owner).items():
        if key.endswith("cache") and isinstance(value, dict):  # LeViT keeps biases that it computed of the old ones
            value.clear()
    if leaf == "weight":
        for attribute in _sizes_along(owner, span.axis):
            setattr(owner, attribute, index.shape[-1])


def _sizes_along(layer: nn.Module, axis: int) -> tuple[str, ...]:
    """The attributes in which a layer keeps the length of its weight along an axis."""
    if isinstance(layer, Conv1D):
        return ("nx", "nf")[axis : axis + 1]
    if isinstance(layer, nn.Linear):
        return ("out_features", "in_features")[axis : axis + 1]
    if isinstance(layer, nn.Embedding):
        return ("num_embeddings", "embedding_dim")[axis : axis + 1]
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        depthwise = layer.groups == layer.out_channels == layer.in_channels != 1
        return ("out_channels", "in_channels", "groups") if depthwise else ("out_channels", "in_channels")[axis : axis + 1]
    return ()
