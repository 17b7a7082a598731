"""What every kind of layer tells of itself: its fields in plain JSON values, and an empty layer built again from them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfcompress.checkpoint.errors import shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Kind:
    """One kind of layer, named in the table `KINDS`. The class of a layer of ours is its own kind; a layer of torch's,
    transformers' or bitsandbytes' has one beside it. All are asked alike: `KINDS["linear_4bit"].fields(layer)`.
    """

    type_name: ClassVar[str]
    """Of the class of its layers."""
    names: ClassVar[tuple[str, ...]]
    """The keys of `fields`, all of them required."""
    sizes: ClassVar[tuple[str, str]] = ("in_features", "out_features")
    """Those among `names` that are bounded by the dense layer's."""
    replaces: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    """The kinds that it may stand in for, and classes of torch that need no kind."""
    holds_codes: ClassVar[bool] = False
    """Whether the weight is stored as codes of few bits, which can be neither trained nor cut."""
    is_ours: ClassVar[bool] = True
    """Whether its tensors are read and computed with by this package alone, not by bitsandbytes."""
    stands_in: ClassVar[bool] = True
    """Whether it is another layer than the architecture's own."""

    def fields(self: Any) -> dict[str, Any]:
        """The layer in plain JSON values."""
        raise NotImplementedError

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        """An empty layer of these fields, on whatever device torch is set to."""
        raise NotImplementedError

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, Any]) -> bool:
        """Whether a field that is no size may have this value, which comes from a file and is not trusted."""
        return key == "bias" and type(value) is bool

    @classmethod
    def limits(cls, old: nn.Module) -> dict[str, Any]:
        """What the fields may be where it stands in for this layer: the most of each size, and of `rank`."""
        most = dict(zip(cls.sizes, features(old), strict=True))
        return most | {"rank": min(most.values())}

    @classmethod
    def mistake(cls, fields: dict[str, Any], limits: dict[str, Any]) -> str | None:
        """What is wrong with fields that a checkpoint names; None if nothing is."""
        own = {size: value for size in cls.sizes if type(value := fields.get(size)) is int}
        for key, value in fields.items():
            if key not in cls.names:
                return f"{shown(key)} is not allowed: {cls.type_name} has {', '.join(cls.names)}"
            if type(limits.get(key)) is int:
                if type(value) is not int or not 0 < value <= limits[key]:
                    return f"{key} = {shown(value)} is not an integer from 1 to {limits[key]}"
            elif not cls.allows(key, value, limits | own):
                return f"{key} = {shown(value)} is not allowed"
        missing = sorted(set(cls.names) - set(fields))
        return f"{', '.join(missing)} missing" if missing else None

    def damage(self: Any) -> str | None:
        """What is wrong with the tensors that a checkpoint gave it beside its parameters; None if nothing is. No kernel may
        read them before: those of bitsandbytes trust sizes, and read past the end."""
        return None

    def prepare(self: Any) -> None:
        """Make a layer of codes ready to compute, as it must be once it is loaded: codes can't be trained."""
        self.requires_grad_(False)

    def dequantised(self: Any) -> Tensor:
        """The dense weight it computes with: (out, in), (rows, columns) of a table, or as a convolution has it."""
        raise NotImplementedError

    def code_bits(self: Any) -> int:
        """Bits a weight of its codes."""
        raise NotImplementedError

    def export_form(self: Any) -> nn.Module:
        """A module of plain operators that computes the same, for exporters."""
        return self

    def fast_form(self: Any) -> nn.Module | None:
        """What may take its place for inference alone, where that is faster here and takes more memory; None if nothing is, or
        if nothing has to be put in its place."""
        return None


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of anything that maps features: Linear, Conv1D (whose weight is (in, out)) or a stand-in, channels of a
    convolution; (rows, columns) of a table."""
    if is_conv1d(module):
        return module.nx, module.nf  # type: ignore[return-value]
    if hasattr(module, "num_embeddings"):
        return module.num_embeddings, module.embedding_dim  # type: ignore[return-value]
    if hasattr(module, "in_channels"):
        return module.in_channels, module.out_channels  # type: ignore[return-value]
    return module.in_features, module.out_features  # type: ignore[return-value]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D; asked by name, as whoever loads other layers need not import it."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def dense_fields(module: Any) -> dict[str, Any]:
    """The fields that every linear kind has."""
    into, out = features(module)
    return {"in_features": into, "out_features": out, "bias": getattr(module, "bias", None) is not None}


class PlainLinear(nn.Linear):
    """A Linear that computes in the dtype of its input, as layers of codes do, whatever its weight is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)"""
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear of this weight (out, in), which shares its memory."""
    layer = PlainLinear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
