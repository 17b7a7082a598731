from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import kind_of
from hfcompress.layers.low_rank import LowRankEmbedding, LowRankLinear
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable, is_gated, swap
from hfcompress.surgery.targets import body_linears, check_unshared, matching, sharing

log = logging.getLogger("hfcompress")


class LowRank(Method):
    """Replace matrices by two thin factors from their singular value decomposition, so that training can heal them.

    Needs: nothing; training after it, or around it, heals.
    Buys: parameters of the chosen layers; time only where the rank is well below half of the smaller side.
    Costs: what lies in the dropped singular values (Eckart, Young 1936).
    Paper: Denton et al. 2014 (arXiv 1404.0736); embeddings: Lan et al. 2019, ALBERT (arXiv 1909.11942)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"factors"})
    needs_dense: ClassVar[bool] = True
    adds_parameters: ClassVar[bool] = True
    tag: ClassVar[str] = "low-rank"

    rank: int | None = Field(None, ge=1, description="The same rank for every layer.")
    ratio: float | None = Field(None, gt=0, lt=1, description="Parameters that stay, as a share of each layer's own.")
    energy: float | None = Field(None, gt=0, lt=1, description="Share of the squared singular values that stays.")
    target_modules: list[str] | None = Field(
        None, description="Suffixes of names of linear layers or embeddings; all linear layers of the body if absent."
    )

    @model_validator(mode="after")
    def _one_measure(self) -> LowRank:
        if sum(value is not None for value in (self.rank, self.ratio, self.energy)) != 1:
            raise ValueError("give exactly one of rank, ratio and energy")
        return self

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_editable(model, "low_rank")
        factored = [name for name in self._targets(model) if self._factor(model, name)]
        if not factored:
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

    def _factor(self, model: nn.Module, name: str) -> bool:
        old: Any = model.get_submodule(name)
        if is_gated(old):
            raise CompressionError(
                f"low_rank: {name} reads units that fade in this training, and would be cut as factors; do low_rank in a step "
                f"after, or take {name.rpartition('.')[2]} out of target_modules."
            )
        matrix = old.weight.detach()
        if isinstance(old, nn.Embedding | Conv1D):
            matrix = matrix.T  # (out, in), as a Linear holds it
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        rank = self._rank(values, matrix.shape)
        if rank * sum(matrix.shape) >= matrix.numel():
            log.info("low_rank: %s left alone: rank %d of %s would not shrink it", name, rank, tuple(matrix.shape))
            return False
        # The root of each singular value on either side, so that both factors learn at the same pace.
        root = values[:rank].sqrt()
        into, out = right[:rank] * root[:, None], left[:, :rank] * root
        kind = LowRankEmbedding if isinstance(old, nn.Embedding) else LowRankLinear
        new = kind.from_dense(old, into.to(matrix.dtype), out.to(matrix.dtype))
        swap(model, name, new.requires_grad_(old.weight.requires_grad))
        return True

    def _rank(self, values: Tensor, shape: torch.Size) -> int:
        if self.rank is not None:
            return min(self.rank, len(values))
        if self.ratio is not None:
            return max(1, int(self.ratio * shape.numel() / sum(shape)))
        energy = values.square().cumsum(0) / values.square().sum()
        return min(len(values), int((energy < (self.energy or 0)).sum()) + 1)
