"""What prune_heads and prune_neurons share: score the units, gate the doomed, cut them out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hfcompress import scores
from hfcompress.anatomy import Units
from hfcompress.errors import CompressionError
from hfcompress.methods.base import NO_DATA, Method, Tick
from hfcompress.proof import shaped, units_of
from hfcompress.surgery import check_cuttable, check_no_adapter, cut, gate


class UnitPruning(Method):
    """Fields of a method that cuts equal units; `kind` says which."""

    kind: ClassVar[str]
    fades: ClassVar[bool] = True

    ratio: float = Field(gt=0, lt=1, description="Share of the units to cut, 0..1.")
    scores: Literal["gradient", "magnitude"] = Field(
        "gradient", description="gradient: how much the loss would notice, on training data; magnitude: the L2 norm."
    )
    ranking: Literal["layer", "global"] = Field(
        "layer", description="layer: every layer loses the same share; global: all layers compete."
    )
    round_to: int = Field(1, ge=1, description="Keep a multiple of this many units in every layer.")
    samples: int = Field(256, ge=1, description="Training examples that gradient scores look at.")
    fade: float = Field(
        0.3, gt=0, le=1, description="Under train: the share of the steps over which doomed units fade out (cubic)."
    )

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_no_adapter(model, self.key())
        all_units = units_of(model, self.kind)
        for units in all_units:
            check_cuttable(model, units)
        kept = self._choose(model, all_units, task)
        gates = [torch.ones(units.shape) for units in all_units]
        handles = [gate(model, units, partial(shaped, values, units)) for units, values in zip(all_units, gates, strict=True)]

        def tick(progress: float) -> None:
            left = (1 - min(1.0, progress / self.fade)) ** 3
            for values, keep in zip(gates, kept, strict=True):
                values.fill_(left)
                values.scatter_(-1, keep, 1.0)

        try:
            yield tick
        finally:
            for handle in handles:
                handle.remove()
        for units, keep in zip(all_units, kept, strict=True):
            if keep.shape[-1] < units.count:
                cut(model, units, keep)

    def _choose(self, model: nn.Module, all_units: list[Units], task: Any) -> list[Tensor]:
        if task is None and self.scores == "gradient":
            raise CompressionError(NO_DATA)
        batches = (lambda: task.batches(model, self.samples)) if task is not None else None
        kept = scores.RANKINGS[self.ranking](scores.SCORES[self.scores](model, all_units, batches), self.ratio, self.round_to)
        if all(keep.shape[-1] == units.count for keep, units in zip(kept, all_units, strict=True)):
            raise CompressionError(
                f"{self.key()}: ratio {self.ratio} of {all_units[0].count} {self.kind} a layer, rounded to {self.round_to}, "
                f"cuts nothing; raise ratio or lower round_to."
            )
        return kept
