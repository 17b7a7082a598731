"""The formats that a linear layer can be stored in: what fits, how it is rounded plainly, and the grid its codes lie on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from hfcompress.calibration.grid import Codes, Grid
from hfcompress.calibration.layer_codes import four_bit_grid
from hfcompress.layers import KINDS, features, kind_of
from hfcompress.layers.base import is_conv1d
from hfcompress.layers.bitsandbytes import Linear4bit, Linear8bit, codes_fit
from hfcompress.layers.packing import least_code, scale_dtype
from hfcompress.layers.quantized import QuantLinear, mismatch


class Format(Protocol):
    """One way to store a Linear or Conv1D."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether what a layer reads is rounded to 8 bits too."""

    def holds(self, layer: nn.Module) -> bool:
        """Whether a layer is stored so."""

    def misfit(self, layer: nn.Module) -> str | None:
        """Why a layer of this size can't be stored so; None if it can."""

    def rounded(self, layer: nn.Module) -> nn.Module:
        """What takes its place, each weight rounded to the nearest code."""

    def grid(self, layer: nn.Module) -> Grid | None:
        """What its codes stand for; None where the library alone may choose them."""

    def of_codes(self, layer: nn.Module, found: Codes) -> nn.Module:
        """What takes its place, of codes that were chosen on that grid."""


@dataclass(frozen=True)
class BitsAndBytes4:
    """NF4 or FP4; the arguments are `quantize`'s."""

    quant_type: str
    use_double_quant: bool
    compute_dtype: str | None
    blocksize: int
    bits: ClassVar[int] = 4
    rounds_inputs: ClassVar[bool] = False

    def holds(self, layer: Any) -> bool:
        if kind_of(layer) != "linear_4bit":
            return False
        state = layer.weight.quant_state
        own = (state.quant_type, state.nested, state.blocksize)
        return own == (self.quant_type, self.use_double_quant, self.blocksize)

    @property
    def _fields(self) -> dict[str, Any]:
        names = ("quant_type", "use_double_quant", "compute_dtype")
        return {name: getattr(self, name) for name in names}

    def misfit(self, layer: nn.Module) -> str | None:
        columns = max(64, self.blocksize)
        fits = codes_fit(layer, 4, self.blocksize)
        return None if fits else f"4-bit kernels need ({columns}n, 32m) features, it has {features(layer)}"

    def rounded(self, layer: nn.Module) -> nn.Module:
        return Linear4bit.from_linear(layer, blocksize=self.blocksize, **self._fields)

    def grid(self, layer: nn.Module) -> Grid | None:
        return four_bit_grid(self.quant_type, self.blocksize, self.use_double_quant)

    def of_codes(self, layer: nn.Module, found: Codes) -> nn.Module:
        return Linear4bit.from_codes(layer, found.codes, found.raw_scales, **self._fields)


@dataclass(frozen=True)
class BitsAndBytes8:
    """LLM.int8()."""

    threshold: float
    bits: ClassVar[int] = 8
    rounds_inputs: ClassVar[bool] = True

    def holds(self, layer: nn.Module) -> bool:
        return kind_of(layer) == "linear_8bit"

    def misfit(self, layer: nn.Module) -> str | None:
        return None

    def rounded(self, layer: nn.Module) -> nn.Module:
        return Linear8bit.from_linear(layer, threshold=self.threshold)

    def grid(self, layer: nn.Module) -> Grid | None:
        return None

    def of_codes(self, layer: nn.Module, found: Codes) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class Ours:
    """Codes of a `QuantLinear`. Below eight bits, codes about zero have one value more below it than above, as -8 to 7 of four
    bits, since a scale may be negative; one bit has -1 and 1."""

    bits: int
    group_size: int | None
    symmetric: bool

    @property
    def rounds_inputs(self) -> bool:
        return self.bits == 8

    def holds(self, layer: nn.Module) -> bool:
        own = (self.bits, self.group_size, self.symmetric)
        return isinstance(layer, QuantLinear) and (layer.bits, layer.group_size, layer.symmetric) == own

    def misfit(self, layer: nn.Module) -> str | None:
        return mismatch(features(layer)[0], self.bits, self.group_size)

    def rounded(self, layer: nn.Module) -> nn.Module:
        return QuantLinear.from_linear(layer, self.bits, self.group_size, self.symmetric)

    def grid(self, layer: nn.Module) -> Grid | None:
        values = self._values.float()
        dtype = scale_dtype(self.group_size)
        size = self.group_size or features(layer)[0]
        stored = None if dtype == torch.float32 else _as_kept
        return Grid(values, size, affine=not self.symmetric, signs=self.bits < 8, stored=stored)

    def of_codes(self, layer: nn.Module, found: Codes) -> nn.Module:
        codes = self._values.to(found.codes.device)[found.codes.int()].unflatten(1, (found.scales.shape[1], -1))
        return QuantLinear.from_codes(layer, codes, found.scales, found.offset, self.bits, self.group_size)

    @property
    def _values(self) -> Tensor:
        """(codes,) integers, ascending."""
        if self.symmetric and self.bits == 1:
            return torch.tensor([-1, 1])
        if self.symmetric and self.bits == 8:
            return torch.arange(-127, 128)
        return least_code(self.bits, self.symmetric) + torch.arange(2**self.bits)


def _as_kept(scales: Tensor) -> Tensor:
    """As float16 keeps it."""
    return scales.half().float()


@torch.no_grad()
def harm(layer: Any, stored: Any, slopes: Tensor) -> float:
    """What the loss grows by if a layer is stored so, to second order: half the sum of slopes times the squared error of its
    weight. `slopes` lie as the layer's weight does; see `allocation.squared_slopes`."""
    dense = KINDS[kind_of(layer) or ""].dequantised(layer).float()
    found = KINDS[kind_of(stored) or ""].dequantised(stored).float()
    slopes = slopes.T if is_conv1d(layer) else slopes
    return float((slopes * (dense - found).square()).sum()) / 2


def stored_bytes(layer: nn.Module) -> int:
    """On disk, without the bias."""
    tensors = {key: value for key, value in layer.state_dict().items() if key != "bias" and isinstance(value, Tensor)}
    return sum(value.numel() * value.element_size() for value in tensors.values())
