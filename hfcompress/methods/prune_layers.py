from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hfcompress.calibration.batches import calibration
from hfcompress.calibration.layer_scores import angular, block_influence, loss_without
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.depth.drop import keep_layers
from hfcompress.surgery.depth.stacks import Stack, chosen, named_stacks
from hfcompress.surgery.depth.trials import permitted, rehearse
from hfcompress.surgery.modules import check_editable


class PruneLayers(Method):
    """Cut whole layers out, those that change the hidden states, or the loss, least.

    Needs: any architecture with a stack of layers; calibration data, except for position.
    Buys: parameters and time in proportion, at any batch and length; the result is a plain transformers model.
    Costs: more a layer than the same share of heads and neurons; training with a teacher afterwards heals.
    Paper: Men et al. 2024, ShortGPT (arXiv 2403.03853): block_influence; Gromov et al. 2024 (arXiv 2403.17887): angular and
    position; Song et al. 2024, SLEB (arXiv 2402.09025): loss
    """

    # It cuts before training, so that training heals: an optimizer must not hold what is cut.
    edits: ClassVar[frozenset[str]] = frozenset({"layers"})
    adds_parameters: ClassVar[bool] = True
    tag: ClassVar[str] = "pruning"

    ratio: float | None = Field(default=None, gt=0, lt=1, description="Share of the layers to cut, 0..1.")
    number: int | None = Field(default=None, ge=1, description="How many layers to keep.")
    layers: list[int] | None = Field(default=None, min_length=1, description="The layers to keep, counted from 0, ascending.")
    scores: Literal["block_influence", "angular", "loss", "position"] = Field(
        default="block_influence",
        description="Which layers go. block_influence: those whose output is most like their input; angular: the run of layers "
        "that turns the hidden states least; loss: one after another, each time the one without which the loss is least; "
        "position: the last ones but one.",
    )
    stack: str = Field(
        default="all",
        description="Which layers are meant: all, encoder, decoder, or a stack by its name, as model.text_model.layers.",
    )
    samples: int = Field(default=64, ge=1, description="Training examples that the scores look at.")

    @model_validator(mode="after")
    def _one_choice(self) -> PruneLayers:
        chosen = [name for name in ("ratio", "number", "layers") if getattr(self, name) is not None]
        if len(chosen) != 1:
            said = f"{' and '.join(chosen)} are several ways to choose layers" if chosen else "nothing says how many layers go"
            raise ValueError(f"{said}; give one of ratio, number and layers")
        if self.layers is not None and self.layers != sorted(set(self.layers)):
            raise ValueError("layers must ascend without repeats")
        if self.layers is not None and self.model_fields_set & {"scores", "samples"}:
            raise ValueError("scores and samples are for choosing layers, and layers tells them; take scores and samples out")
        return self

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_editable(model, self.key())
        cuts = {stack.name: self._kept(model, stack, task) for stack in self._stacks(model)}
        rehearse(model, cuts, self.key())
        keep_layers(model, cuts, self.key())
        yield None

    def _stacks(self, model: nn.Module) -> list[Stack]:
        """The stacks that lose layers."""
        stacks = named_stacks(model, self.stack, self.key())
        counts = {stack: self._count(stack) for stack in stacks}
        if all(counts[stack] >= stack.count for stack in stacks):
            raise CompressionError(f"{self} cuts nothing of {' and of '.join(map(str, stacks))}; keep fewer.")
        return [stack for stack in stacks if counts[stack] < stack.count]

    def _count(self, stack: Stack) -> int:
        """How many layers of it stay."""
        if self.layers is not None:
            return len(chosen(stack, self.layers, self.key()))
        if self.number is not None:
            if self.number > stack.count:
                raise CompressionError(f"{self.key()}: number {self.number} of {stack}; possible are 1 to {stack.count}.")
            return self.number
        left = round(stack.count * (1 - (self.ratio or 0)))
        if not left:
            raise CompressionError(f"{self.key()}: ratio {self.ratio} of {stack}, leaves nothing; lower ratio, or give number.")
        return left

    def _kept(self, model: nn.Module, stack: Stack, task: Any) -> list[int]:
        """Ascending indices of the layers to keep, which the config can describe."""
        if self.layers is not None:
            return self.layers
        number = self._count(stack)
        scores = (
            self._positions(stack) if self.scores == "position" or stack.repeats else self._scored(model, stack, number, task)
        )
        return permitted(model, stack, scores, number, self.key())

    def _scored(self, model: nn.Module, stack: Stack, number: int, task: Any) -> Tensor:
        batches = calibration(model, task, self.samples, f"{self.key()}: {self.scores}", "position")
        if self.scores == "block_influence":
            return block_influence(model, stack, batches, self.key())
        if self.scores == "angular":
            size = stack.count - number
            return _runs(angular(model, stack, batches, size, self.key()), stack.count)
        skipped: list[int] = []
        while len(skipped) < stack.count - number:
            left = [index for index in range(stack.count) if index not in skipped]
            losses = [loss_without(model, stack, batches, [*skipped, index], self.key()) for index in left]
            skipped.append(left[int(torch.tensor(losses).argmin())])
        return torch.tensor([float(skipped.index(i)) if i in skipped else float(stack.count) for i in range(stack.count)])

    @staticmethod
    def _positions(stack: Stack) -> Tensor:
        """The deepest layers go first, the very last stays: Gromov et al. 2024, section 4.4."""
        scores = torch.arange(stack.count, 0, -1).float()
        scores[-1] = stack.count + 1
        return scores


def _runs(distances: Tensor, count: int) -> Tensor:
    """Scores by which the layers of the nearest run go, all together."""
    start, size = int(distances.argmin()), count - len(distances) + 1
    scores = torch.ones(count)
    scores[start : start + size] = 0
    return scores
