from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable
from hfcompress.surgery.targets import body_linears, matching


class PruneWeights(Method):
    """Set single weights to zero by magnitude, at once or gradually under `train`; the zeros survive the optimizer.

    Needs: nothing.
    Buys: zeros, for runtimes that use them; in PyTorch neither speed nor a smaller file.
    Costs: more with every zero; rising gradually under `train` gives the others time to take over.
    Paper: Zhu, Gupta 2017, To prune, or not to prune (arXiv 1710.01878): the cubic schedule
    """

    edits: ClassVar[frozenset[str]] = frozenset({"values"})
    needs_dense: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True
    tag: ClassVar[str] = "pruning"

    sparsity: float = Field(gt=0, lt=1, description="Share of the weights to set to zero in every target layer, 0..1.")
    target_modules: list[str] | None = Field(
        default=None, description="Suffixes of module names; all linear layers of the body if absent."
    )
    ramp: float = Field(default=0.7, gt=0, le=1, description="Under train: the share of the steps over which sparsity rises.")

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_editable(model, "prune_weights")
        names = body_linears(model)
        if not names:
            raise CompressionError("prune_weights: no dense linear layer is left; list it before low_rank and quantize.")
        if self.target_modules is not None:
            names = matching(model, self.target_modules, names, "prune_weights")
        weights: list[Any] = [model.get_submodule(name).weight for name in names]
        alive = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]

        @torch.no_grad()
        def tick(progress: float) -> None:
            left = (1 - min(1.0, progress / self.ramp)) ** 3
            for weight, mask in zip(weights, alive, strict=True):
                _shrink(mask, weight, self.sparsity * (1 - left))
            for weight, mask in zip(weights, alive, strict=True):  # when nothing can fail any more
                weight *= mask.to(weight.device)

        yield tick
        tick(1.0)


def _shrink(mask: Tensor, weight: Any, sparsity: float) -> None:
    """Drop the smallest weights that are still alive from the mask, until `sparsity` of all are out of it."""
    more = int(weight.numel() * sparsity) - int((~mask).sum())
    if more > 0:
        size = weight.detach().to(mask.device).abs().masked_fill(~mask, torch.inf).flatten()
        mask.view(-1)[size.topk(more, largest=False).indices] = False
