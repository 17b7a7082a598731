"""Low-rank layers: a matrix as the product of two thin ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.layers.base import Kind, dense_fields, features
from hfcompress.layers.dense import DenseEmbedding


class LowRankLinear(nn.Module, Kind):
    """`y = second(first(x))`: an (out, in) matrix as (out, rank) times (rank, in).

    `weight` is an empty marker. It sits under the key of the dense matrix with another shape, so that loading the checkpoint
    without hfcompress fails with a size mismatch instead of leaving the layer random.
    """

    type_name = "LowRankLinear"
    names = ("in_features", "out_features", "bias", "rank")
    weight: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, **where: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, **where)
        self.second = nn.Linear(rank, out_features, bias=bias, **where)
        self.register_buffer("weight", torch.empty(0, **where))

    @classmethod
    def from_dense(cls, old: Any, into: Tensor, out: Tensor) -> LowRankLinear:
        """What takes `old`'s place, a Linear or Conv1D, of the factors `into` (rank, in) and `out` (out, rank)."""
        bias = getattr(old, "bias", None)
        layer = cls(*features(old), len(into), bias is not None, device=into.device, dtype=into.dtype)
        layer.first.weight, layer.second.weight = nn.Parameter(into.contiguous()), nn.Parameter(out.contiguous())
        if bias is not None:
            layer.second.bias = nn.Parameter(bias.detach().clone())
        return layer

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        return cls(**fields)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)"""
        return self.second(self.first(x))

    def fields(self) -> dict[str, Any]:
        return {**dense_fields(self), "rank": self.rank}

    def dequantised(self) -> Tensor:
        return _product(_dense(self.second), _dense(self.first))

    def export_form(self) -> nn.Module:
        return nn.Sequential(_plain(self.first), _plain(self.second))


class LowRankEmbedding(nn.Module, Kind):
    """A (vocabulary, dim) table as (vocabulary, rank) rows, each expanded by a (dim, rank) matrix. `weight` as above."""

    type_name = "LowRankEmbedding"
    names = ("num_embeddings", "embedding_dim", "padding_idx", "rank")
    sizes = ("num_embeddings", "embedding_dim")
    replaces = ("embedding",)
    weight: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None = None, **where: Any
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.table = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx, **where)
        self.expand = nn.Linear(rank, embedding_dim, bias=False, **where)
        self.register_buffer("weight", torch.empty(0, **where))

    @classmethod
    def from_dense(cls, old: Any, into: Tensor, out: Tensor) -> LowRankEmbedding:
        """What takes an embedding's place, of the factors `into` (rank, vocabulary) and `out` (dim, rank)."""
        table = cls(*features(old), len(into), old.padding_idx, device=into.device, dtype=into.dtype)
        table.table.weight, table.expand.weight = nn.Parameter(into.T.contiguous()), nn.Parameter(out.contiguous())
        return table

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        return cls(**fields)

    allows = DenseEmbedding.allows

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., dim)"""
        return self.expand(self.table(ids))

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.names}

    def dequantised(self) -> Tensor:
        return _product(_dense(self.table), _dense(self.expand).T)

    def export_form(self) -> nn.Module:
        return nn.Sequential(self.table, _plain(self.expand))


def _dense(factor: nn.Module) -> Tensor:
    """The weight of a factor, which may be codes by now."""
    from hfcompress.layers import KINDS, kind_of  # the table names the classes of this file

    return KINDS[kind_of(factor) or ""].dequantised(factor)


def _plain(factor: nn.Module) -> nn.Module:
    from hfcompress.layers import KINDS, kind_of

    kind = kind_of(factor)
    return factor if kind is None else KINDS[kind].export_form(factor)  # type: ignore[call-arg, arg-type]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Codes of different kinds stand for weights of different dtypes."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype) @ right.to(dtype)
