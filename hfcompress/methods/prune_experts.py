from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hfcompress.calibration.batches import calibration
from hfcompress.calibration.expert_usage import usage
from hfcompress.calibration.processes import agreed
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.experts import Mixtures, keep_experts, magnitude, mixtures
from hfcompress.surgery.modules import check_editable


class PruneExperts(Method):
    """Cut whole experts out of mixture-of-experts layers, those that the router needs least.

    Needs: a mixture of experts whose config counts them; calibration data for usage.
    Buys: memory: most parameters of such a model are experts. The result is a plain transformers model.
    Costs: what rare experts know; and no time saved, as every token still goes to as many experts as before.
    Paper: Muzio, Sun, He 2024, SEER-MoE (arXiv 2404.05089); Lu et al. 2024, Not All Experts are Equal (arXiv 2402.14800)
    """

    # It replaces the very parameters that an optimizer would hold.
    edits: ClassVar[frozenset[str]] = frozenset({"layers"})
    adds_parameters: ClassVar[bool] = True
    tag: ClassVar[str] = "pruning"

    ratio: float | None = Field(default=None, gt=0, lt=1, description="Share of the experts to cut in every layer, 0..1.")
    number: int | None = Field(default=None, ge=1, description="How many experts to keep in every layer.")
    scores: Literal["usage", "magnitude", "random"] = Field(
        default="usage",
        description="usage: the routing weight an expert receives on training data; magnitude: the L2 norm; random: by seed.",
    )
    samples: int = Field(default=64, ge=1, description="Training examples that usage looks at.")
    seed: int = Field(default=0, ge=0, description="Of random scores.")

    @model_validator(mode="after")
    def _one_choice(self) -> PruneExperts:
        if (self.ratio is None) == (self.number is None):
            raise ValueError("give one of ratio and number")
        return self

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_editable(model, self.key())
        experts = mixtures(model, self.key())
        number = self._count(model, experts)
        keep_experts(model, experts, [_best(scores, number, experts.groups) for scores in self._scored(model, experts, task)])
        yield None

    def _count(self, model: nn.Module, experts: Mixtures) -> int:
        """How many experts of each layer stay."""
        count, least = experts.count, experts.chosen
        number = self.number if self.number is not None else round(count * (1 - (self.ratio or 0)))
        if number >= count:
            raise CompressionError(f"{self} cuts nothing of {type(model).__name__}'s {count} experts a layer; keep fewer.")
        if number < least:
            raise CompressionError(
                f"{self} keeps {number} of {type(model).__name__}'s {count} experts a layer, and every token goes to {least}; "
                f"possible are {least} to {count - 1}; keep more."
            )
        if experts.groups > 1 and (number % experts.groups or number < 2 * experts.groups):
            raise CompressionError(
                f"{self} keeps {number} of {type(model).__name__}'s {count} experts a layer, which stand in {experts.groups} "
                f"groups of the same size; possible are multiples of {experts.groups} from {2 * experts.groups} on; "
                f"give number."
            )
        return number

    def _scored(self, model: nn.Module, experts: Mixtures, task: Any) -> list[Tensor]:
        if self.scores == "magnitude":
            return [agreed(scores) for scores in magnitude(model, experts)]
        if self.scores == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return [torch.rand(experts.count, generator=generator) for _ in experts.layers]
        batches = calibration(model, task, self.samples, f"{self.key()}: usage", "magnitude")
        return [agreed(scores) for scores in usage(model, experts, batches, self.key())]


def _best(scores: Tensor, number: int, groups: int) -> Tensor:
    """Ascending indices of the highest scores, as many in each group."""
    apart = scores.unflatten(0, (groups, -1))
    starts = torch.arange(groups)[:, None] * apart.shape[1]
    return (apart.topk(number // groups, dim=1).indices + starts).flatten().sort().values
