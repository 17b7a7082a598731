"""Convolutions of 8- or 4-bit codes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfcompress.layers.packing import rounded
from hfcompress.layers.quantized import Codes, mismatch

DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: tuple[Any, ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
_SHAPED = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
"""What nothing changes of a convolution."""


class QuantConv(Codes):
    """A Conv1d, Conv2d or Conv3d of codes: a row is all weights of an output channel. `bias` is dense.

    The codes are in `packed`, (out, groups of columns, bytes), and `weight` is a single zero: vision models ask it for the
    dtype to cast pixels to, which codes can't tell. Its shape clashes with the dense one's.
    """

    type_name = "QuantConv"
    names = ("in_channels", "out_channels", "groups", *_SHAPED, "bias", "bits", "group_size", "symmetric")
    sizes = ("in_channels", "out_channels")
    replaces = tuple(one.__name__ for one in DENSE)
    packed: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: str | Sequence[int],
        dilation: Sequence[int],
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)
        self.padding, self.padding_mode = padding if isinstance(padding, str) else tuple(padding), padding_mode
        self._allocate(out_channels, prod(self._row), bits, group_size, symmetric, device)
        self.register_buffer("packed", self.weight.data)
        self.weight = nn.Parameter(torch.zeros(1, device=device, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_dense(cls, layer: Any, bits: int = 8, group_size: int | None = None, symmetric: bool = True) -> QuantConv:
        """What takes the place of a convolution, each weight rounded to the nearest code."""
        weight = layer.weight.detach()
        new = cls(
            **_told(layer), bits=bits, group_size=group_size, symmetric=symmetric, device=weight.device, dtype=weight.dtype
        )
        new.set_codes(*rounded(weight.flatten(1), bits, group_size, symmetric))
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone())
        return new.requires_grad_(False)

    @property
    def stored(self) -> Tensor:
        return self.packed

    @stored.setter
    def stored(self, codes: Tensor) -> None:
        self.packed = codes

    @property
    def _row(self) -> tuple[int, ...]:
        return (self.in_channels // self.groups, *self.kernel_size)

    @classmethod
    def limits(cls, old: nn.Module) -> dict[str, Any]:
        """Sizes and groups at most, and the rest as it is in the layer: it was neither moved nor stretched."""
        return super().limits(old) | {key: value for key, value in _told(old).items() if key in (*_SHAPED, "groups")}

    @classmethod
    def allows(cls, key: str, value: Any, limits: dict[str, Any]) -> bool:
        if key in _SHAPED:
            return repr(value) == repr(limits[key])
        if key == "group_size":  # whether it divides a row is seen where the whole row is known
            return value is None or (type(value) is int and value > 0)
        return type(value) is bool if key == "bias" else cls._allows(key, value, 0)

    @classmethod
    def mistake(cls, fields: dict[str, Any], limits: dict[str, Any]) -> str | None:
        groups, channels = fields.get("groups"), [fields.get(size) for size in cls.sizes]
        if type(groups) is int and groups > 0 and any(type(one) is int and one % groups for one in channels):
            return f"groups = {groups} does not divide its channels"
        return super().mistake(fields, limits)

    @classmethod
    def columns_of(cls, fields: dict[str, Any]) -> int:
        return fields["in_channels"] // fields["groups"] * prod(fields["kernel_size"])  # type: ignore[no-any-return]

    def fields(self) -> dict[str, Any]:
        return {**_told(self), **self._told()}

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in / groups, *kernel), computed in this dtype"""
        return super().dequantised(dtype).unflatten(1, self._row)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, *positions) to (batch, out, *positions), in the dtype of x"""
        weight, bias = self.unpacked_in(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._around, mode=self.padding_mode), 0
        convolve = _CONVOLVE[len(self.kernel_size) - 1]
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[no-any-return]

    @property
    def _around(self) -> list[int]:
        """What is put before and after each axis, the last axis first; 'same' puts the odd one after."""
        total = [step * (size - 1) for step, size in zip(self.dilation, self.kernel_size, strict=True)]
        if isinstance(self.padding, str):
            pairs = [(one // 2, one - one // 2) if self.padding == "same" else (0, 0) for one in total]
        else:
            pairs = [(one, one) for one in self.padding]
        return [side for pair in reversed(pairs) for side in pair]

    def export_form(self) -> nn.Module:
        told: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in _told(self).items()}
        layer = DENSE[len(self.kernel_size) - 1](**told, device="meta")
        layer.weight = nn.Parameter(self.dequantised().to(self.weight.dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.fields().items())


def group_within(columns: int, bits: int, group_size: int | None) -> int | None:
    """The largest group of at most so many columns that rows of this length have; None, a scale a row, where none has eight."""
    sizes = [size for size in range(8, min(group_size or 0, columns) + 1) if mismatch(columns, bits, size) is None]
    return max(sizes, default=None)


def _told(layer: Any) -> dict[str, Any]:
    """A convolution in plain JSON values, whatever its weight is stored in."""
    told = {key: getattr(layer, key) for key in ("in_channels", "out_channels", "groups", *_SHAPED)}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}
    return {**plain, "bias": layer.bias is not None}
