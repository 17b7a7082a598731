from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches
from hfcompress.calibration.factoring import matrix_of
from hfcompress.calibration.processes import agreed
from hfcompress.calibration.reconstruct import Undo
from hfcompress.calibration.second_moments import DAMPING
from hfcompress.calibration.sensitivity import output_sensitivity
from hfcompress.calibration.sparse_layers import Read, activity, each_read, sparse_gpt, sparse_layers, wanda
from hfcompress.calibration.sparsity import Pattern, quantiles, shares
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable, in_float32
from hfcompress.surgery.targets import body_linears, matching

log = logging.getLogger("hfcompress")


class PruneWeights(Method):
    """Set single weights to zero, at once or gradually under `train`, whose optimizer does not bring them back.

    Needs: nothing; wanda, sparsegpt and repair need data, labels or not.
    Buys: zeros, for runtimes and files that use them; in PyTorch neither speed nor a smaller file.
    Costs: more with every zero; rising gradually under `train` gives the others time to take over, repair at once.
    Paper: magnitude: Zhu, Gupta 2017 (arXiv 1710.01878), with the cubic schedule; wanda: Sun et al. 2023 (arXiv 2306.11695);
    sparsegpt: Frantar, Alistarh 2023 (arXiv 2301.00774); repair: Meng et al. 2024, ALPS (arXiv 2406.07831)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"values"})
    needs_dense: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True
    lost_in_training: ClassVar[bool] = True
    tag: ClassVar[str] = "pruning"

    sparsity: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the weights to set to zero in every target layer, 0..1."
    )
    pattern: str | None = Field(
        default=None,
        description="Which weights are zero together: 2:4 or another N:M, of every M weights of a row N stay; 16x1 or another "
        "block of outputs x inputs; single weights if absent.",
    )
    scores: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        default="magnitude",
        description="magnitude: of the weight; wanda: of the weight times the norm of its input, in each row; sparsegpt: what "
        "its loss would do to the output, while the others take over.",
    )
    ranking: Literal["layer", "global"] = Field(
        default="layer",
        description="layer: every layer loses the same share; global: all compete, by magnitude, or by what the loss feels of "
        "each if scores look at data.",
    )
    max_sparsity: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Under ranking global: the share that every layer loses at most; half-way from sparsity to all if absent.",
    )
    target_modules: list[str] | None = Field(
        default=None, description="Suffixes of module names; all linear layers of the body if absent."
    )
    ramp: float = Field(default=0.7, gt=0, le=1, description="Under train: the share of the steps over which sparsity rises.")
    repair: bool = Field(
        default=False,
        description="Set to zero at once, and let least squares on the samples have the other weights of each layer take over.",
    )
    samples: int = Field(default=256, ge=1, description="Training examples that wanda, sparsegpt and repair look at.")
    seed: int = Field(default=0, description="Which examples these are.")
    damping: float = Field(
        default=DAMPING, ge=0, description="Of sparsegpt and repair: the ridge, as a share of the mean second moment."
    )

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, given: str | None) -> str | None:
        if given is not None:
            Pattern.parse(given)
        return given

    @model_validator(mode="after")
    def _one_share(self) -> PruneWeights:
        if (self.sparsity is None) == (self._pattern.sparsity is None):
            raise ValueError("give one of sparsity and a pattern N:M, which says how many weights stay")
        return self

    @model_validator(mode="after")
    def _fields_fit(self) -> PruneWeights:
        given = self.model_fields_set
        if not self._reads and (idle := sorted(given & {"samples", "seed", "damping"})):
            raise ValueError(
                f"{', '.join(idle)} belong to scores that look at data, wanda and sparsegpt, and to repair; choose one, or "
                f"leave them out"
            )
        if self._at_once and "ramp" in given:
            raise ValueError(
                "ramp lets zeros come gradually, and scores: sparsegpt and repair set them at once; leave one of the two out"
            )
        if self.ranking == "global" and self.sparsity is None:
            raise ValueError(
                f"pattern {self.pattern} takes the same share of every layer, and ranking: global lets layers lose different "
                f"shares; possible is ranking: layer; leave one of the two out"
            )
        if self.ranking == "layer" and "max_sparsity" in given:
            raise ValueError("max_sparsity bounds what layers lose under ranking: global; set that, or leave it out")
        if self.sparsity is not None and self.max_sparsity is not None and self.sparsity > self.max_sparsity:
            raise ValueError(f"sparsity {self.sparsity} is more than max_sparsity {self.max_sparsity}; set it below")
        return self

    @property
    def label(self) -> str:
        return " ".join(str(part) for part in (self.key(), self.sparsity, self.pattern) if part is not None)

    @property
    def _pattern(self) -> Pattern:
        return Pattern() if self.pattern is None else Pattern.parse(self.pattern)

    @property
    def _at_once(self) -> bool:
        return self.repair or self.scores == "sparsegpt"

    @property
    def _reads(self) -> bool:
        return self._at_once or self.scores != "magnitude"

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_editable(model, "prune_weights")
        names = self._targets(model)
        batches = self._batches(model, task)
        share = self._shares(model, names, batches)
        undo = Undo()
        try:
            if self._at_once:
                yield (tick := _holding(model, self._solved(model, names, share, batches, undo)))
            else:
                yield (tick := self._rising(model, names, share, batches))
            tick(1.0)
        except BaseException:
            undo.undo()
            raise
        undo.forget()

    def _targets(self, model: nn.Module) -> list[str]:
        names = body_linears(model)
        if not names:
            raise CompressionError("prune_weights: no dense linear layer is left; list it before low_rank and quantize.")
        if self.target_modules is not None:
            names = matching(model, self.target_modules, names, "prune_weights")
        for name in names:
            if why := self._pattern.misfit(matrix_of(model.get_submodule(name)).shape):
                raise CompressionError(
                    f"prune_weights: pattern {self.pattern} does not fit {name}: {why}; choose a pattern whose sizes divide "
                    f"them, or name other layers in target_modules."
                )
        return names

    def _batches(self, model: nn.Module, task: Any) -> MakeBatches | None:
        if not self._reads:
            return None
        if task is None or not getattr(task, "has_data", True):
            what = f"scores: {self.scores}" if self.scores != "magnitude" else "repair"
            raise CompressionError(
                f"prune_weights: {what} needs calibration data; give a task or batches, with or without labels, or choose "
                f"scores: magnitude, without repair."
            )
        return lambda: task.batches(model, self.samples, seed=self.seed)

    def _shares(self, model: Any, names: list[str], batches: MakeBatches | None) -> dict[str, float]:
        """The sparsity of each layer."""
        if self.ranking == "layer":
            return dict.fromkeys(names, self.sparsity or self._pattern.sparsity or 0.0)
        curves = self._felt(model, names, batches) if batches else {}
        for name in names:
            if name not in curves:  # a layer that no token comes to is not felt at all
                weight = matrix_of(model.get_submodule(name))
                curves[name] = quantiles(weight.abs() if batches is None else torch.zeros_like(weight))
        sizes = [model.get_submodule(name).weight.numel() for name in names]
        sparsity = self.sparsity or 0.0
        most = (1 + sparsity) / 2 if self.max_sparsity is None else self.max_sparsity
        found = shares([curves[name] for name in names], sizes, sparsity, most)
        return dict(zip(names, agreed(torch.tensor(found, dtype=torch.float64)).tolist(), strict=True))

    def _felt(self, model: Any, names: list[str], batches: MakeBatches) -> dict[str, Tensor]:
        """`quantiles` of what the loss feels of each weight of a layer: of the error that its loss makes in the output, to the
        second order; without a loss, of that as a share of the output."""
        with in_float32(model, (torch.float16,)):  # whose gradients vanish
            felt = output_sensitivity(model, names, batches, "prune_weights: ranking: global")
        if felt is None:
            log.info("prune_weights: the data give no loss; layers are compared by the share of what they say that is lost")
        found: dict[str, Tensor] = {}

        def note(name: str, read: Read | None) -> None:
            if read is not None:
                errors = wanda(matrix_of(model.get_submodule(name)), read).square()
                found[name] = quantiles(errors * felt[name] if felt is not None else errors / errors.sum().clamp_min(1e-30))

        each_read(model, names, batches, "prune_weights", note, writes=False)
        return found

    def _solved(
        self, model: nn.Module, names: list[str], share: dict[str, float], batches: MakeBatches | None, undo: Undo
    ) -> dict[str, Tensor]:
        """Write the zeros of every layer, and what the others become; the masks (out, in), bool, of what stays."""
        masks: dict[str, Tensor] = {}
        pattern = self._pattern

        def solve(name: str, weight: Tensor, read: Read | None) -> tuple[Tensor, Tensor]:
            alive = _standing(weight, share[name])
            if read is not None and self.scores == "sparsegpt":
                solved = sparse_gpt(weight, alive, read, pattern, share[name], self.damping, name)
                if solved is not None:
                    return solved
            by_input = read is not None and self.scores != "magnitude"
            kept = pattern.kept(wanda(weight, read) if by_input else weight.float().abs(), share[name], by_row=by_input)  # type: ignore[arg-type]
            kept &= alive
            return weight * kept, kept

        def write(name: str, values: Tensor, kept: Tensor, shift: Tensor | None) -> None:
            layer: Any = model.get_submodule(name)
            masks[name] = kept
            with undo.noting(layer.weight, layer.bias):
                matrix_of(layer).copy_(values)
                if shift is not None:
                    layer.bias.data += shift.to(layer.bias)

        sparse_layers(model, names, batches, solve, self.repair, write, "prune_weights", self.damping)
        return masks

    def _rising(self, model: Any, names: list[str], share: dict[str, float], batches: MakeBatches | None) -> Tick:
        """Zeros that come with the progress of training, the least of what is left each time; what is zero already stays so."""
        weights = {name: matrix_of(model.get_submodule(name)) for name in names}
        masks = {name: _standing(weight, share[name]) for name, weight in weights.items()}
        norms: dict[str, Tensor] = {}

        def note(name: str, read: Read | None) -> None:
            if read is not None:
                norms[name] = agreed(activity(read).clamp_min(0).sqrt())

        if batches is not None:
            each_read(model, names, batches, "prune_weights", note, writes=False)
        pattern, hold = self._pattern, _holding(model, masks)

        @torch.no_grad()
        def tick(progress: float) -> None:
            left = (1 - min(1.0, progress / self.ramp)) ** 3
            for name, mask in masks.items():
                score = weights[name].detach().to(mask.device).abs()
                if name in norms:
                    score = score.float() * norms[name].to(mask.device)
                wanted = pattern.kept(score.masked_fill_(~mask, -1.0), share[name] * (1 - left), by_row=name in norms)
                mask &= wanted
            hold(progress)  # when nothing can fail any more

        return tick


def _standing(weight: Tensor, share: float) -> Tensor:
    """(out, in), bool: what is not zero yet, in a weight that pruning has been at; everything, in one that is mostly zero by
    itself, as some are when they are new."""
    alive = weight != 0
    return alive if float((~alive).float().mean()) <= share + 1e-6 else torch.ones_like(alive)


def _holding(model: nn.Module, masks: dict[str, Tensor]) -> Tick:
    """A tick that sets what these masks leave out to zero, which a product would leave negative at times."""

    @torch.no_grad()
    def tick(progress: float) -> None:
        for name, mask in masks.items():
            weight = matrix_of(model.get_submodule(name))
            weight.masked_fill_(~mask.to(weight.device), 0.0)

    return tick
