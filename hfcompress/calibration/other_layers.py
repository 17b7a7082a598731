"""Codes for what is no linear layer of the body: embeddings, input and output, and convolutions."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers.quantized import QuantEmbedding, QuantLinear, mismatch
from hfcompress.layers.quantized_conv import QuantConv, group_within
from hfcompress.surgery.targets import codable_convolutions, codable_tables

log = logging.getLogger("hfcompress")


def coded_tables(model: nn.Module, bits: int, group_size: int | None, symmetric: bool) -> dict[str, nn.Module]:
    """What takes the places of embeddings. Those that share a weight go on sharing their codes: one tensor in memory and on
    disk, which is tied again when it is loaded."""
    found: dict[str, Any] = {}
    for names in codable_tables(model):
        first: Any = model.get_submodule(names[0])
        columns = first.weight.shape[1]
        if all(wrongs := [mismatch(columns, bits, group) for group in (group_size, None)]):
            log.info("quantize: embeddings: %s left dense: %s", names[0], wrongs[-1])
            continue
        for name in names:
            old: Any = model.get_submodule(name)
            group = None if mismatch(old.weight.shape[1], bits, group_size) else group_size
            of_dense = QuantEmbedding.from_dense if isinstance(old, nn.Embedding) else QuantLinear.from_linear
            found[name] = of_dense(old, bits, group, symmetric)
            found[name].weight = found[names[0]].weight
    if not found:
        raise CompressionError(
            "quantize: embeddings: the model has no dense table that can become codes; leave embeddings out."
        )
    return found


def coded_convolutions(
    model: nn.Module, skipped: Collection[str], bits: int, group_size: int | None, symmetric: bool
) -> dict[str, nn.Module]:
    """What takes the places of convolutions, in groups of at most this size that divide their rows; a line tells which are left
    dense."""
    names, left = codable_convolutions(model)
    found: dict[str, nn.Module] = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        columns = layer.weight[0].numel()
        group = group_within(columns, bits, group_size)
        if name in skipped:
            continue
        if mismatch(columns, bits, group):
            left.setdefault("of rows that fill no whole bytes", []).append(name)
        else:
            found[name] = QuantConv.from_dense(layer, bits, group, symmetric)
    told = "; ".join(f"{len(ones)} {why} ({ones[0]}{', ...' * (len(ones) > 1)})" for why, ones in left.items())
    if not found:
        raise CompressionError(
            f"quantize: convolutions: the model has no dense convolution that can become codes{told and f', but {told}'}; "
            f"leave convolutions out."
        )
    if told:
        log.info("quantize: convolutions left dense: %s", told)
    return found
