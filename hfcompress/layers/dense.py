"""The dense layers of torch and transformers, in other sizes than the config describes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers.base import Kind, dense_fields


class DenseLinear(Kind):
    """`torch.nn.Linear`."""

    type_name = "Linear"
    names = ("in_features", "out_features", "bias")
    replaces = ("linear",)
    stands_in = False
    fields = staticmethod(dense_fields)  # type: ignore[assignment]

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        return nn.Linear(**fields)

    @staticmethod
    def dequantised(layer: Any) -> Tensor:  # type: ignore[override]
        return layer.weight.detach()


class DenseConv1D(DenseLinear):
    """GPT-2's `transformers.pytorch_utils.Conv1D`: a Linear whose weight is (in, out), always with a bias."""

    type_name = "Conv1D"
    replaces = ("conv1d",)

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        if not fields["bias"]:
            raise CompressionError("structure: a conv1d has bias: false, and transformers' Conv1D always has one.")
        from transformers.pytorch_utils import Conv1D

        return Conv1D(fields["out_features"], fields["in_features"])

    @staticmethod
    def dequantised(layer: Any) -> Tensor:  # type: ignore[override]
        return layer.weight.detach().T


class DenseEmbedding(Kind):
    """`torch.nn.Embedding`."""

    type_name = "Embedding"
    names = ("num_embeddings", "embedding_dim", "padding_idx")
    sizes = ("num_embeddings", "embedding_dim")
    replaces = ("embedding",)
    stands_in = False

    @staticmethod
    def fields(layer: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: getattr(layer, name) for name in DenseEmbedding.names}

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        return nn.Embedding(**fields)

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, Any]) -> bool:
        return key == "padding_idx" and (value is None or (type(value) is int and 0 <= value < limits["num_embeddings"]))

    @staticmethod
    def dequantised(layer: Any) -> Tensor:  # type: ignore[override]
        return layer.weight.detach()
