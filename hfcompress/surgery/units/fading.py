"""Gates on units while it is not yet decided, or not yet done, which of them are cut."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from hfcompress.surgery.units.gates import Removable, folded_when_saved, gate, shaped
from hfcompress.surgery.units.spans import Units


class Fading:
    """Units that stay are open, pruned ones fade together, silent ones are shut."""

    def __init__(self, model: nn.Module, all_units: list[Units]) -> None:
        self._gates = [torch.ones(units.shape) for units in all_units]
        self.kept = [torch.arange(units.count).expand(units.shape) for units in all_units]
        self.silent = [torch.zeros(units.shape, dtype=torch.bool) for units in all_units]
        each = [(units, partial(shaped, values, units)) for units, values in zip(all_units, self._gates, strict=True)]
        self._handles = Removable(put(model, *one) for put in (gate, folded_when_saved) for one in each)

    @property
    def staying(self) -> list[Tensor]:
        """Bool, of the shape of the units: those that are not pruned."""
        return [torch.zeros_like(silent).scatter_(-1, keep, True) for silent, keep in zip(self.silent, self.kept, strict=True)]

    def prune(self, kept: list[Tensor]) -> None:
        """All but these; what was pruned before is silent now."""
        for silent, stays in zip(self.silent, self.staying, strict=True):
            silent |= ~stays
        self.kept = kept

    @property
    def pruned(self) -> list[Tensor]:
        """Bool, of the shape of the units: those that fade now."""
        return [~stays & ~silent for stays, silent in zip(self.staying, self.silent, strict=True)]

    def silence(self, some: list[Tensor]) -> None:
        """Shut these at once."""
        for silent, new in zip(self.silent, some, strict=True):
            silent |= new
        self.show(1.0)

    def show(self, left: float) -> None:
        """What is left of the pruned, 1 to 0."""
        for values, silent, stays in zip(self._gates, self.silent, self.staying, strict=True):
            values.copy_(torch.where(stays, 1.0, torch.where(silent, 0.0, left)))

    def remove(self) -> None:
        self._handles.remove()
