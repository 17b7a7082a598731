"""Layers of codes of our own, of 1 to 8 bits, right on every device, and fast where the processor multiplies bytes."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import kernels
from hfcompress.layers.base import Kind, dense_fields, features, is_conv1d
from hfcompress.layers.dense import DenseEmbedding
from hfcompress.layers.packing import packed, rounded, scale_dtype, unpacked, worth
from hfcompress.layers.stored import StoredEmbedding, StoredLinear

BITS = tuple(range(1, 9))


class Codes(nn.Module, Kind):
    """What layers of codes share: `weight` (rows, groups, bytes), with a `scale` and, if not `symmetric`, an `offset` for each
    row and group. The shape of `weight` clashes with the dense one's, so that no load without hfcompress takes it for that.

    A weight is code * scale (+ offset). Scales stay in the dtype they have, whatever the rest of the model is cast to.
    """

    holds_codes = True
    keeps_unpacked = False
    made: ClassVar[tuple[str, ...]] = ("_unpacked",)
    """What was made of the codes, for products here: neither saved nor copied, and made again when it is asked for."""
    _unpacked: Tensor | None
    columns: ClassVar[str]
    """Which of its sizes is that of a row, whose groups share scales."""
    weight: Any
    scale: Tensor
    offset: Tensor | None

    def _allocate(self, rows: int, columns: int, bits: int, group_size: int | None, symmetric: bool, device: Any) -> None:
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.is_small = rows * columns <= kernels.SMALL
        if wrong := mismatch(columns, bits, group_size):
            raise CompressionError(f"{type(self).__name__}: {wrong}.")
        size = group_size or columns
        stored = torch.empty(rows, columns // size, size * bits // 8, dtype=self.stored_dtype, device=device)
        self.weight = nn.Parameter(stored, requires_grad=False)
        for name, is_there in (("scale", True), ("offset", not symmetric)):
            each = torch.empty(rows, columns // size, dtype=scale_dtype(group_size), device=device)
            self.register_buffer(name, each if is_there else None)
        self._forget()

    def _forget(self) -> None:
        self.__dict__.update(dict.fromkeys(self.made))

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 and self.symmetric else torch.uint8

    @property
    def stored(self) -> Tensor:
        """(rows, groups, bytes): the codes as they are kept."""
        return self.weight.data  # type: ignore[no-any-return]

    @stored.setter
    def stored(self, codes: Tensor) -> None:
        self.weight.data = codes

    def set_codes(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> None:
        """(rows, groups, group_size) integers, and (rows, groups) what they are worth; see `packing.rounded`."""
        self.stored = packed(codes, self.bits, self.symmetric).to(self.weight.device).contiguous()
        self.scale = scale.to(self.weight.device, scale_dtype(self.group_size))
        self.offset = None if offset is None else offset.to(self.weight.device, scale_dtype(self.group_size))
        self._forget()

    def codes(self) -> Tensor:
        """(rows, groups, group_size) int8, or uint8"""
        return unpacked(self.stored, self.bits, self.symmetric)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, columns), computed in this dtype"""
        return _worth(self.codes(), self.scale, self.offset, dtype).flatten(1)

    def unpacked_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in this dtype; kept if asked, and where it is so small that unpacking takes as long as what follows. On
        accelerators it is computed in bfloat16, unless an offset would take away most of what that tells."""
        device = self.stored.device.type
        if device != "cpu" and dtype == torch.bfloat16 and self.symmetric:
            return self.dequantised(dtype)
        if device != "cpu" or not (self.keeps_unpacked or self.is_small) or torch.compiler.is_compiling():
            return self.dequantised().to(dtype)
        if self._unpacked is None or self._unpacked.dtype != dtype:
            with torch.inference_mode(False):  # else a later gradient could not pass
                self._unpacked = self.dequantised().to(dtype)
        return self._unpacked

    def fast_form(self) -> None:
        """Whatever has to be unpacked or packed anew for a product here is so once."""
        self.keeps_unpacked = True

    def damage(self) -> str | None:
        if self.stored.dtype != self.stored_dtype:
            return f"its codes are {self.stored.dtype}, not {self.stored_dtype}"
        for name in ("scale", "offset"):
            tensor = getattr(self, name)
            if tensor is not None and not bool(tensor.isfinite().all()):
                return f"{name}, beside its codes, holds infinite values, or values that are no numbers"
        return None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(self.made)}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()
        kept = {name: getattr(self, name) for name in ("scale", "offset")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if now is not None and now.dtype != before.dtype:
                setattr(self, name, before.to(now.device))
        return self

    @classmethod
    def build(cls, **fields: Any) -> nn.Module:
        return cls(**fields).requires_grad_(False)

    @classmethod
    def mistake(cls, fields: dict[str, Any], limits: dict[str, Any]) -> str | None:
        return super().mistake(fields, limits) or mismatch(cls.columns_of(fields), fields["bits"], fields["group_size"])

    @classmethod
    def columns_of(cls, fields: dict[str, Any]) -> int:
        """How many weights a row has."""
        return fields[cls.columns]  # type: ignore[no-any-return]

    def code_bits(self) -> int:
        return self.bits

    def _told(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    @classmethod
    def _allows(cls, key: str, value: Any, columns: int) -> bool:
        if key == "group_size":
            return value is None or (type(value) is int and 0 < value <= columns and columns % value == 0)
        return value in BITS and type(value) is int if key == "bits" else type(value) is bool


class QuantLinear(Codes, nn.Linear):
    """A Linear, or a transposed Conv1D, of codes. `bias` is dense and may be trained; gradients reach the input."""

    type_name = "QuantLinear"
    columns = "in_features"
    names = ("in_features", "out_features", "bias", "bits", "group_size", "symmetric")
    made = ("_prepacked", "_nibbles", "_unpacked")
    _prepacked: kernels.Prepacked | None
    _nibbles: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._allocate(out_features, in_features, bits, group_size, symmetric, device)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None  # type: ignore[assignment]

    @classmethod
    def from_linear(cls, layer: Any, bits: int = 8, group_size: int | None = None, symmetric: bool = True) -> QuantLinear:
        """What takes the place of a Linear or Conv1D, each weight rounded to the nearest code."""
        matrix = layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()
        return cls.from_codes(layer, *rounded(matrix, bits, group_size, symmetric), bits, group_size)

    @classmethod
    def from_codes(
        cls, layer: Any, codes: Tensor, scale: Tensor, offset: Tensor | None, bits: int, group_size: int | None
    ) -> QuantLinear:
        """Of codes (out, groups, group_size) that somebody chose, scale and offset (out, groups)."""
        has_bias = getattr(layer, "bias", None) is not None
        new = cls(
            *features(layer), has_bias, bits, group_size, offset is None, device=layer.weight.device, dtype=layer.weight.dtype
        )
        new.set_codes(codes, scale, offset)
        if has_bias:
            new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return new.requires_grad_(False)

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, Any]) -> bool:
        return type(value) is bool if key == "bias" else cls._allows(key, value, limits["in_features"])

    def fields(self) -> dict[str, Any]:
        return {**dense_fields(self), **self._told()}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of x"""
        bias = self.bias
        if not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
            return self.product(x, bias)
        said = kernels.Product.apply(x, self) if x.requires_grad else self.product(x, None)
        return said if bias is None else said + bias.to(said.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By the kernel that is fastest here; see `kernels`."""
        kept = self._unpacked
        if kept is not None and kept.dtype == x.dtype == torch.float32 and kernels.levels() < kernels.FULL:
            return functional.linear(x, kept, None if bias is None else bias.to(x.dtype))  # integers would gain nothing
        rows = x.numel() // max(x.shape[-1], 1)
        weights = self.in_features * self.out_features
        kernel = kernels.kernel_for(x, rows, weights, self._kernels) if rows and self._kernels else "dense"
        if kernel == "integers":
            if self._prepacked is None:
                self._prepacked = kernels.prepack(self.weight.data[:, 0], self.scale[:, 0])
            return kernels.by_integers(x, self._prepacked, bias)
        if kernel == "bytes":
            return kernels.by_bytes(x, self.weight.data[:, 0], self.scale[:, 0], bias)
        if kernel == "nibbles":
            if self._nibbles is None:
                self._nibbles = kernels.nibbles(self.codes(), self.scale, self.offset)
            return kernels.by_nibbles(x, *self._nibbles, bias)
        bias = None if bias is None else bias.to(x.dtype)
        if (
            x.device.type == "cpu"
            or x.dtype != torch.bfloat16
            or not self._has_one_scale_a_row
            or torch.compiler.is_compiling()
        ):
            return functional.linear(x, self.unpacked_in(x.dtype), bias)
        said = functional.linear(x, self.weight.data[:, 0].to(x.dtype)) * self.scale[:, 0].to(x.dtype)  # fewer bytes to move
        return said if bias is None else said + bias

    @property
    def _has_one_scale_a_row(self) -> bool:
        return self.bits == 8 and self.symmetric and self.group_size is None

    @property
    def _kernels(self) -> tuple[str, ...]:
        """Those that read such codes."""
        if self.bits == 8:
            return ("integers", "bytes") if self._has_one_scale_a_row else ()
        if self.bits > 4 or (self.bits < 4 and not self.symmetric):  # few codes far from the kernel's own zero cancel
            return ()
        fit = (self.group_size or self.in_features) in kernels.GROUPS and self.out_features % kernels.ROWS == 0
        is_worth_it = self.keeps_unpacked or self.weight.device.type == "cpu"  # memory is short on accelerators
        return ("nibbles",) if fit and is_worth_it else ()

    def recoded(self, weight: Tensor) -> QuantLinear:
        """The same layer in nearest codes of another weight (out, in)."""
        new = copy.deepcopy(self)
        new.set_codes(*rounded(weight, self.bits, self.group_size, self.symmetric))
        return new

    def export_form(self) -> nn.Module:
        return StoredLinear(self.codes(), self.scale, self.offset, self.bias)


class QuantEmbedding(Codes, nn.Embedding):
    """An Embedding of codes: the rows that are asked for are unpacked."""

    type_name = "QuantEmbedding"
    columns = "embedding_dim"
    names = ("num_embeddings", "embedding_dim", "padding_idx", "bits", "group_size", "symmetric")
    sizes = ("num_embeddings", "embedding_dim")
    replaces = ("embedding",)
    speaks: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._allocate(num_embeddings, embedding_dim, bits, group_size, symmetric, device)
        # An embedding decides what the model computes in: this tells it, and is cast with the model.
        self.register_buffer("speaks", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @classmethod
    def from_dense(cls, table: Any, bits: int = 8, group_size: int | None = None, symmetric: bool = True) -> QuantEmbedding:
        """What takes the place of an Embedding, each weight rounded to the nearest code."""
        matrix = table.weight.detach()
        size, kind = features(table), {"device": matrix.device, "dtype": matrix.dtype}
        new = cls(*size, table.padding_idx, bits, group_size, symmetric, **kind)
        new.set_codes(*rounded(matrix, bits, group_size, symmetric))
        return new.requires_grad_(False)

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, Any]) -> bool:
        dense = key == "padding_idx"
        return DenseEmbedding.allows(key, value, limits) if dense else cls._allows(key, value, limits["embedding_dim"])

    def fields(self) -> dict[str, Any]:
        return {**DenseEmbedding.fields(self), **self._told()}

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., dim)"""
        if self.is_small:
            return functional.embedding(ids, self.unpacked_in(self.speaks.dtype))
        codes = unpacked(self.weight.data[ids], self.bits, self.symmetric)
        offset = None if self.offset is None else self.offset[ids]
        return _worth(codes, self.scale[ids], offset).flatten(-2).to(self.speaks.dtype)

    def hold_codes(self, as_buffer: bool) -> None:
        """As a parameter, as everybody expects it; or as a buffer for sentence-transformers, which takes the dtype of a model's
        first parameter, often this one, for that of its embeddings."""
        codes = self.weight.data
        del self.weight
        self.register_buffer("weight", codes) if as_buffer else self.register_parameter("weight", nn.Parameter(codes, False))

    def fast_form(self) -> None:
        """The rows that are asked for are few."""

    def export_form(self) -> nn.Module:
        return StoredEmbedding(self.codes(), self.scale, self.offset, self.speaks.dtype)


def mismatch(columns: int, bits: int, group_size: int | None) -> str | None:
    """What keeps rows of so many columns from being codes; the nearest group that would fit is told. None if nothing does."""
    if group_size is not None and columns % group_size:
        possible = [size for size in range(1, columns + 1) if columns % size == 0 and size * bits % 8 == 0]
        near = min(possible or [columns], key=lambda size: abs(size - group_size))
        return f"group_size {group_size} does not divide {columns} columns; the nearest that does is {near}"
    if (group_size or columns) * bits % 8:
        near = min((other for other in BITS if (group_size or columns) * other % 8 == 0), key=lambda other: abs(other - bits))
        return f"{group_size or columns} codes of {bits} bits fill no whole bytes; the nearest bits that do are {near}"
    return None


def _worth(codes: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., groups, group_size) codes of scale and offset (..., groups), computed in this dtype."""
    return worth(codes, scale[..., None], None if offset is None else offset[..., None], dtype)
