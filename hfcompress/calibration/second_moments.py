"""Second moments (the Hessian of layer-wise least squares) of what projections read, padding excluded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import told
from hfcompress.calibration.expert_inputs import alive, lanes_read
from hfcompress.surgery.units.spans import Span, Units, channel_axis

DAMPING = 0.01
"""The ridge, as a share of the mean of the diagonal of the second moments: SparseGPT's (arXiv 2301.00774)."""


PANEL = 1024
"""Columns that are summed at a time, and tokens: what a sum needs beside the sums themselves is small."""


@dataclass
class Moments:
    """Of what one projection reads, x (columns,), over all tokens, padding excluded; float64.

    Sums are about the mean of the first tokens, as columns that hardly vary would else drown in their own square. Of the
    squares, which are symmetric, the upper triangle is kept: panel p is (columns up to its last, its own columns).
    """

    tokens: int = 0
    origin: Any = 0.0
    total: Any = 0.0
    panels: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """`x`: (tokens, columns); no tokens make zeros."""
        for rows in x.split(PANEL):
            self._add(rows if x.dtype == torch.float64 else rows.float())

    def _add(self, x: Tensor) -> None:
        if not isinstance(self.total, Tensor):
            self.total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            ends = [min(start + PANEL, x.shape[1]) for start in range(0, x.shape[1], PANEL)]
            self.panels = [self.total.new_zeros(end, end - start) for start, end in zip([0, *ends], ends, strict=False)]
        if not self.tokens:
            self.origin = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        self.tokens += len(x)
        x = x - self.origin
        self.total += x.sum(0)
        for panel in self.panels:
            upper = x[:, : len(panel)]
            panel += upper.T @ upper[:, -panel.shape[1] :]

    @property
    def mean(self) -> Any:
        """(columns,)"""
        return self.origin + self.total / max(self.tokens, 1)

    def square(self, about_mean: bool) -> Tensor:
        """(columns, columns): mean x x^T, about the means where a bias can take these over."""
        every = torch.arange(len(self.total), device=self.total.device)
        return self.block(every, every, about_mean)

    def block(self, rows: Tensor, columns: Tensor, about_mean: bool, last: bool = False) -> Tensor:
        """(rows, columns): these entries of `square`. `last`: the sums are not needed any more, and give their memory back
        one by one."""
        found = self.total.new_zeros(len(rows), len(columns))
        for number, panel in enumerate(self.panels):
            end, width = panel.shape
            start = end - width
            down, across = (rows < end).nonzero(), ((columns >= start) & (columns < end)).nonzero().flatten()
            found[down, across] = panel[rows[down], columns[across] - start]
            down, across = ((rows >= start) & (rows < end)).nonzero(), (columns < start).nonzero().flatten()
            found[down, across] = panel[columns[across], rows[down] - start]
            if last:
                self.panels[number] = panel.new_zeros(0, 0)
        off = self.total / max(self.tokens, 1)
        found.div_(max(self.tokens, 1)).addr_(off[rows], off[columns], alpha=-1)
        return found if about_mean else found.addr_(self.mean[rows].to(found), self.mean[columns].to(found))

    def mean_square(self, weight: Tensor) -> Tensor:
        """mean |W x|^2, for W (out, columns) in float64."""
        found, off = self.total.new_zeros(()), self.total / max(self.tokens, 1)
        for panel in self.panels:
            end, width = panel.shape
            start = end - width
            own = weight[:, start:end]
            found += 2 * (own * (weight[:, :start] @ panel[:start])).sum() + (own * (own @ panel[start:])).sum()
        return found / max(self.tokens, 1) - (weight @ off).square().sum() + (weight @ self.mean.double()).square().sum()


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
