"""Second moments (the Hessian of layer-wise least squares) of what projections read, padding excluded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import told
from hfcompress.calibration.expert_inputs import alive, lanes_read
from hfcompress.surgery.units.spans import Span, Units, channel_axis

DAMPING = 0.01
"""The ridge, as a share of the mean of the diagonal of the second moments: SparseGPT's (arXiv 2301.00774)."""


@dataclass
class Moments:
    """Of what one projection reads, x (columns,), over all tokens, padding excluded; float64.

    Sums are about the mean of the first tokens, as columns that hardly vary would else drown in their own square.
    """

    tokens: int = 0
    origin: Any = 0.0
    total: Any = 0.0
    total_square: Any = 0.0

    def add(self, x: Tensor) -> None:
        """`x`: (tokens, columns); no tokens make zeros."""
        x = x if x.dtype == torch.float64 else x.float()
        if not isinstance(self.total_square, Tensor):
            self.origin = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
            self.total = torch.zeros_like(self.origin, dtype=torch.float64)
            self.total_square = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        elif not self.tokens:
            self.origin = x.mean(0) if len(x) else self.origin
        self.tokens += len(x)
        x = x - self.origin
        self.total += x.sum(0)
        self.total_square += x.T @ x

    @property
    def mean(self) -> Any:
        """(columns,)"""
        return self.origin + self.total / max(self.tokens, 1)

    def square(self, about_mean: bool) -> Any:
        """(columns, columns): mean x x^T, about the means where a bias can take these over."""
        off, found = self.total / max(self.tokens, 1), self.total_square / max(self.tokens, 1)
        found.addr_(off, off, alpha=-1)
        return found if about_mean else found.addr_(self.mean, self.mean)


@dataclass(frozen=True)
class Projection:
    """A weight and what it multiplies: a Linear's, a convolution's of one position, or those of experts, stacked on axis 0."""

    module: str
    axis: int
    """Of the weight: its columns, which it reads."""
    leaf: str = "weight"
    lanes: int = 1
    """How many experts there are, each with a weight of its own."""

    @classmethod
    def of(cls, units: Units, span: Span) -> Projection:
        return cls(span.module, span.axis, span.leaf, units.lanes)

    def weights(self, model: nn.Module) -> list[tuple[Any, Tensor]]:
        """For each lane: its bias or None, and its weight, columns last, which shares its memory: what is written into it is
        the model's."""
        module = model.get_submodule(self.module)
        weight = getattr(module, self.leaf).data.movedim(self.axis, -1)
        return [(None, lane) for lane in weight] if self.lanes > 1 else [(getattr(module, "bias", None), weight)]

    def unreadable(self, model: nn.Module) -> str:
        """Why moments can't tell what it does with its columns; empty where they can."""
        module = model.get_submodule(self.module)
        if isinstance(module, nn.Conv1d | nn.Conv2d) and max(module.kernel_size) > 1:
            return "it reads several positions at once"
        return ""

    def rows(
        self, model: nn.Module, batch: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], past_gates: bool
    ) -> list[Tensor]:
        """(tokens, columns) that each lane reads when its module is given these arguments, padding excluded."""
        module = model.get_submodule(self.module)
        if self.lanes == 1:
            return [told(model, batch, self.module, args[0].movedim(channel_axis(module), -1))]
        args = tuple(self._tokens(model, batch, one) for one in args)
        kwargs = {key: self._tokens(model, batch, one) for key, one in kwargs.items()}
        rows = lanes_read(module, self.leaf, self.axis, self.lanes, args, kwargs)
        if past_gates:
            open_columns = alive(module, self.leaf, self.axis, self.lanes)
            rows = [some * stays.to(some) for some, stays in zip(rows, open_columns, strict=True)]
        return rows

    def _tokens(self, model: Any, batch: dict[str, Tensor], value: Any) -> Any:
        """What experts are given, without padding: (tokens, ...) of states, choices and weights, or that for each in turn."""
        if not isinstance(value, Tensor) or value.dim() != 2:
            return value
        mask = batch.get("attention_mask")
        each = self.lanes if mask is not None and mask.dim() == 2 and len(value) == self.lanes * mask.numel() else 1
        return torch.cat([told(model, batch, self.module, part) for part in value.chunk(each)])
