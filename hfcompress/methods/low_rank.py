from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches
from hfcompress.calibration.factoring import Found, Then, by_outputs, by_weights, matrix_of
from hfcompress.calibration.processes import agreed
from hfcompress.calibration.ranks import Curve, pays_up_to, ranks_within
from hfcompress.calibration.second_moments import DAMPING
from hfcompress.calibration.sensitivity import output_sensitivity
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import features, kind_of
from hfcompress.layers.low_rank import LowRankEmbedding, LowRankLinear
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable, in_float32, is_gated, swap
from hfcompress.surgery.targets import body_linears, check_unshared, matching, sharing

log = logging.getLogger("hfcompress")


class LowRank(Method):
    """Replace matrices by two thin factors, those nearest to the weights or to what the layers say, so that training can heal.

    Needs: nothing; `whiten` needs data, labels or not; training after it, or around it, heals.
    Buys: parameters of the chosen layers; time only where the rank is well below half of the smaller side.
    Costs: what lies in the dropped singular values (Eckart, Young 1936): of weights far more than of what they say.
    Paper: Denton et al. 2014 (arXiv 1404.0736); embeddings: Lan et al. 2019, ALBERT (arXiv 1909.11942); whiten: Wang et al.
    2024, SVD-LLM (arXiv 2403.07378)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"factors"})
    needs_dense: ClassVar[bool] = True
    adds_parameters: ClassVar[bool] = True
    tag: ClassVar[str] = "low-rank"

    rank: int | None = Field(default=None, ge=1, description="The same rank for every layer.")
    ratio: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Parameters that stay, as a share of each layer's own; of all, under ranking global.",
    )
    energy: float | None = Field(default=None, gt=0, lt=1, description="Share of the squared singular values that stays.")
    target_modules: list[str] | None = Field(
        default=None, description="Suffixes of names of linear layers or embeddings; all linear layers of the body if absent."
    )
    whiten: bool = Field(
        default=False,
        description="Choose the factors that change least of what a layer says on the samples, each layer once those before it "
        "are factored; embeddings: the rows of frequent tokens count more.",
    )
    ranking: Literal["layer", "global"] = Field(
        default="layer",
        description="layer: every layer keeps the same share; global: all compete for one budget, the ratio of all their "
        "parameters, and some stay dense; with whiten, by what the loss feels of their errors if there are labels.",
    )
    repair: bool = Field(
        default=False,
        description="With whiten: aim at what each layer said in the model as it came, of the inputs that it reads now.",
    )
    round_to: int = Field(
        default=1, ge=1, description="Ranks that ratio and energy choose are multiples of it; 4-bit codes want 64."
    )
    samples: int = Field(default=256, ge=1, description="Of whiten: training examples that are looked at.")
    seed: int = Field(default=0, description="Of whiten: which examples these are.")
    damping: float = Field(default=DAMPING, ge=0, description="Of whiten: the ridge, as a share of the mean second moment.")

    @model_validator(mode="after")
    def _one_measure(self) -> LowRank:
        if sum(value is not None for value in (self.rank, self.ratio, self.energy)) != 1:
            raise ValueError("give exactly one of rank, ratio and energy")
        return self

    @model_validator(mode="after")
    def _fields_fit(self) -> LowRank:
        idle = self.model_fields_set & {"samples", "seed", "damping"} | ({"repair"} if self.repair else set())
        if not self.whiten and idle:
            raise ValueError(
                f"{', '.join(sorted(idle))} belong to whiten: true, which looks at data; set it, or leave them out"
            )
        if self.ranking == "global" and self.ratio is None:
            raise ValueError(
                "ranking: global shares one budget among the layers, which ratio gives; give ratio, or set ranking: layer"
            )
        if self.rank is not None and self.round_to > 1:
            raise ValueError(
                "round_to rounds the ranks that ratio and energy choose, and rank names one; leave one of the two out"
            )
        return self

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_editable(model, "low_rank")
        names = self._targets(model)
        for name in names:
            self._check_no_gates(model, name)
        batches = self._batches(model, task)
        ranks = self._shared(model, names, batches) if self.ranking == "global" else dict[str, int | None]()
        before = {name: model.get_submodule(name) for name in names}

        def factor(name: str, found: Found) -> None:
            rank = ranks[name] if name in ranks else self._rank(found.components.energies, features(before[name]))
            self._factor(model, name, found, rank)

        self._each(model, [name for name in names if ranks.get(name, 0) is not None], batches, factor)
        if all(model.get_submodule(name) is layer for name, layer in before.items()):
            raise CompressionError("low_rank: no layer would shrink at this rank; lower rank, ratio or energy.")
        yield None

    def _targets(self, model: Any) -> list[str]:
        linears = body_linears(model)
        if self.target_modules is None:
            if not linears:
                raise CompressionError("low_rank: no dense linear layer is left; list it before quantize.")
            return linears
        tables = [name for name, module in model.named_modules() if type(module) is nn.Embedding]
        tied = [name for name in sharing(model) if kind_of(model.get_submodule(name)) in ("linear", "conv1d", "embedding")]
        chosen = matching(model, self.target_modules, list(dict.fromkeys([*linears, *tables, *tied])), "low_rank")
        check_unshared(model, chosen, "low_rank")
        return chosen

    def _check_no_gates(self, model: nn.Module, name: str) -> None:
        if is_gated(model.get_submodule(name)):
            raise CompressionError(
                f"low_rank: {name} reads units that fade in this training, and would be cut as factors; do low_rank in a step "
                f"after, or take {name.rpartition('.')[2]} out of target_modules."
            )

    def _batches(self, model: nn.Module, task: Any) -> MakeBatches | None:
        if not self.whiten:
            return None
        if task is None or not getattr(task, "has_data", True):
            raise CompressionError(
                "low_rank: whiten needs calibration data; give a task or batches, with or without labels, or leave whiten out."
            )
        return lambda: task.batches(model, self.samples, seed=self.seed)

    def _each(self, model: nn.Module, names: list[str], batches: MakeBatches | None, then: Then, writes: bool = True) -> None:
        if batches is None:
            by_weights(model, names, then)
        else:
            by_outputs(model, names, batches, then, self.damping, writes, pairs=writes and self.repair)

    def _shared(self, model: nn.Module, names: list[str], batches: MakeBatches | None) -> dict[str, int | None]:
        """The rank of each layer under one budget, None for one that stays dense."""
        curves: dict[str, Curve] = {}
        felt = None
        if batches is not None:
            with in_float32(model, (torch.float16,)):  # whose gradients vanish
                felt = output_sensitivity(model, names, batches, "low_rank: whiten")
            if felt is None:
                log.info("low_rank: the data give no loss; layers are compared by the share of what they say that stays")

        def note(name: str, found: Found) -> None:
            shape = features(model.get_submodule(name))
            curves[name] = Curve.of(shape, agreed(found.components.energies), None if felt is None else felt[name])

        self._each(model, names, batches, note, writes=False)
        total = sum(curve.dense for curve in curves.values())
        least = sum(min(curve.cost * self.round_to, curve.dense) for curve in curves.values()) / total
        if (self.ratio or 0) < least:
            raise CompressionError(
                f"low_rank: ratio {self.ratio} is less than factors of rank {self.round_to} in every layer have; possible are "
                f"ratios from {least:.4f}; raise ratio or lower round_to."
            )
        return dict(zip(curves, ranks_within(list(curves.values()), self.ratio or 0, self.round_to), strict=True))

    def _factor(self, model: nn.Module, name: str, found: Found, rank: int | None) -> None:
        old: Any = model.get_submodule(name)
        shape = features(old)
        if rank is None or rank > pays_up_to(shape):
            log.info("low_rank: %s left alone: rank %s of %s would not shrink it", name, rank, shape)
            return
        into, out = (agreed(factor).to(old.weight).contiguous() for factor in found.components.factors(rank))
        kind = LowRankEmbedding if isinstance(old, nn.Embedding) else LowRankLinear
        new: Any = kind.from_dense(old, into, out)
        if found.mean_before is not None and found.mean_now is not None:
            said = matrix_of(old).double() @ found.mean_before.double() - out.double() @ (
                into.double() @ found.mean_now.double()
            )
            new.second.bias.data += agreed(said).to(old.weight)
        swap(model, name, new.requires_grad_(old.weight.requires_grad))

    def _rank(self, energies: Tensor, shape: tuple[int, int]) -> int:
        if self.rank is not None:
            return min(self.rank, len(energies))
        if self.ratio is not None:
            found = int(self.ratio * shape[0] * shape[1] / sum(shape))
            return max(1, found // self.round_to) * self.round_to
        kept = energies.cumsum(0) / energies.sum()
        found = min(len(energies), int((kept < (self.energy or 0)).sum()) + 1)
        return -(-found // self.round_to) * self.round_to
