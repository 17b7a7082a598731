"""What prune_heads and prune_neurons share: score the units, choose, let the pruned fade, cut them out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches
from hfcompress.calibration.reconstruct import Undo, fold_constants, repair
from hfcompress.calibration.score_file import SUFFIX, check_place, save_scores, saved_scores
from hfcompress.calibration.scores import SCORES, score
from hfcompress.calibration.second_moments import DAMPING
from hfcompress.calibration.selection import Target, chosen
from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.methods.base import Method, Tick, every_method
from hfcompress.surgery.modules import check_editable, in_float32, is_gated
from hfcompress.surgery.units.cut import check_cuttable, cut
from hfcompress.surgery.units.fading import Fading
from hfcompress.surgery.units.spans import Units, queries
from hfcompress.surgery.units.uniform import check_even
from hfcompress.surgery.units.verify import units_of


class UnitPruning(Method):
    """Fields of a method that cuts equal units; `kind` says which."""

    kind: ClassVar[str]
    edits: ClassVar[frozenset[str]] = frozenset({"units"})
    needs_dense: ClassVar[bool] = True
    needs_units: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True
    fades: ClassVar[bool] = True
    writes: ClassVar[frozenset[str]] = frozenset({"save_scores"})
    tag: ClassVar[str] = "pruning"

    ratio: float | None = Field(default=None, gt=0, lt=1, description="Share of the units to cut, 0..1.")
    keep: dict[int, list[int]] | None = Field(
        default=None,
        min_length=1,
        description="Instead of a ratio: the units to keep, by the layer's number, {0: [0, 2, 5]}; other layers keep all. "
        "Heads are query heads, and whole groups where several share a key and value.",
    )
    scores: str = Field(
        default="gradient",
        description="; ".join(f"{name}: {one.says}" for name, one in SCORES.items()) + "; or a file that save_scores wrote.",
    )
    save_scores: str | None = Field(default=None, description="A .safetensors file to keep the scores in, for other ratios.")
    ranking: Literal["layer", "global"] = Field(
        default="layer", description="layer: every layer loses the same share; global: all layers compete."
    )
    round_to: int = Field(default=1, ge=1, description="Keep a multiple of this many units in every layer.")
    min_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="Under ranking global: the share that every layer loses at least."
    )
    max_ratio: float = Field(
        default=1.0, gt=0, le=1, description="Under ranking global: the share that every layer loses at most."
    )
    even: bool = Field(
        default=False,
        description="Every layer keeps the same number, one that transformers' own config can tell: the result loads without "
        "hfcompress.",
    )
    samples: int = Field(default=256, ge=1, description="Training examples that scores look at.")
    seed: int = Field(default=0, description="Which examples these are; what random scores draw.")
    iterations: int = Field(
        default=1,
        ge=1,
        description="Cut in so many equal parts, and score what is left again after each; under train, while it fades.",
    )
    warmup: float = Field(
        default=0.0, ge=0, lt=1, description="Under train: the share of the steps before pruned units begin to fade."
    )
    fade: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Under train: the share of the steps by which they are gone (cubic); the rest cools down.",
    )

    repair: bool = Field(
        default=False,
        description="Cut at once, and let least squares on the samples have what is left of the output projections take over "
        "what was cut.",
    )
    damping: float = Field(default=DAMPING, ge=0, description="Of repair: the ridge, as a share of the mean second moment.")

    @field_validator("scores")
    @classmethod
    def _check_scores(cls, given: str) -> str:
        if given not in SCORES and not given.endswith(SUFFIX):
            known = ", ".join(SCORES)
            raise ValueError(f"unknown score; possible are {known}, or a {SUFFIX} file.{did_you_mean(given, SCORES)}")
        return given

    @field_validator("save_scores")
    @classmethod
    def _check_file(cls, given: str | None) -> str | None:
        if given is not None and not given.endswith(SUFFIX):
            raise ValueError(f"scores are kept in a {SUFFIX} file; give such a name")
        return given

    @model_validator(mode="after")
    def _check_one_choice(self) -> UnitPruning:
        if (self.ratio is None) == (self.keep is None):
            raise ValueError("give one of ratio and keep")
        idle = self.model_fields_set & {"scores", "save_scores", "ranking", "round_to", "min_ratio", "max_ratio", "iterations"}
        if self.keep is not None and idle:
            raise ValueError(
                f"keep says which {self.kind} stay, and {', '.join(sorted(idle))} would choose them; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _check_together(self) -> UnitPruning:
        if self.ratio is None:
            return self
        if not self.min_ratio <= self.ratio <= self.max_ratio:
            raise ValueError(
                f"min_ratio {self.min_ratio} and max_ratio {self.max_ratio} leave no layer to lose the ratio {self.ratio}; "
                f"possible are min_ratio up to the ratio and max_ratio from it; set them around it"
            )
        if self.ranking == "layer" and (self.min_ratio > 0 or self.max_ratio < 1):
            raise ValueError(
                "under ranking: layer every layer loses the same share, and min_ratio and max_ratio have nothing to bound; "
                "leave them out, or set ranking: global"
            )
        if self.even and self.ranking == "global":
            raise ValueError(
                "even keeps the same number in every layer, and ranking: global lets layers lose different shares; possible is "
                "ranking: layer; leave one of the two out"
            )
        if self.iterations > 1 and self.scores.endswith(SUFFIX):
            raise ValueError(
                f"iterations score again what is left, and {self.scores} can't; possible are {', '.join(SCORES)}; name one of "
                f"them, or leave iterations out"
            )
        if self.warmup >= self.fade:
            raise ValueError(
                f"warmup {self.warmup} is not before fade {self.fade}, the share of the steps by which units are gone; "
                f"possible is a warmup from 0 to below fade; lower warmup or raise fade"
            )
        return self

    @property
    def repairs(self) -> bool:
        return self.repair

    @property
    def wants_labels(self) -> bool:
        return self.scores in SCORES and SCORES[self.scores].needs_labels

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_editable(model, self.key())
        all_units = units_of(model, self.kind, without_units())
        for units in all_units:
            check_cuttable(model, units)
        self._check_no_gates(model, all_units)
        batches = self._batches(model, task)
        if self.repair and batches is None:
            raise CompressionError(
                f"{self.key()}: repair needs calibration data; give a task or batches, with or without labels, or leave repair "
                f"out."
            )
        named = self._named(all_units)
        self._check_cuts(model, all_units, named)
        if self.save_scores is not None:
            check_place(self.save_scores, self.key())
        values = self._scored(model, all_units, batches) if named is None else []
        if self.save_scores is not None:
            save_scores(self.save_scores, model, all_units, values, score=self.scores, samples=self.samples, seed=self.seed)
        fading, undo, part = Fading(model, all_units), Undo(), 1

        def choose() -> None:
            fading.prune(named or chosen(all_units, values, self._target(part), fading.staying))
            if not self.repair:  # which takes the means over anyway
                fading.silence(fold_constants(model, all_units, fading.pruned, undo))

        def reach(wanted: int) -> None:
            nonlocal part, values
            while part < wanted:
                fading.show(0.0)
                values, part = self._scored(model, all_units, batches), part + 1
                choose()

        def tick(progress: float) -> None:
            done = min(1.0, max(0.0, progress - self.warmup) / (self.fade - self.warmup)) * self.iterations
            reach(min(int(done) + 1, self.iterations))
            fading.show((part - done) ** 3)

        try:
            choose()
            if self.repair:
                reach(self.iterations)
                fading.silence(fading.pruned)
                repair(model, all_units, fading.kept, batches, self.damping, undo)
            yield tick
            for units, keep in zip(all_units, fading.kept, strict=True):
                if keep.shape[-1] < units.count:
                    cut(model, units, keep)
        except BaseException:
            undo.undo()
            raise
        finally:
            fading.remove()

    def _batches(self, model: nn.Module, task: Any) -> MakeBatches | None:
        if task is None or not getattr(task, "has_data", True):
            return None
        return lambda: task.batches(model, self.samples, seed=self.seed)

    def _scored(self, model: nn.Module, all_units: list[Units], batches: MakeBatches | None) -> list[Tensor]:
        if self.scores.endswith(SUFFIX):
            return saved_scores(self.scores, model, all_units)
        if SCORES[self.scores].needs_data and batches is None:
            with_labels = " with labels" if self.wants_labels else ""
            raise CompressionError(
                f"scores: {self.scores} needs calibration data; give a task or batches{with_labels}, or choose scores: "
                f"magnitude."
            )
        with in_float32(model, (torch.float16,)):  # whose gradients vanish
            return score(self.scores, model, all_units, batches, self.seed)

    def _target(self, part: int) -> Target:
        """What is gone after so many of the iterations."""
        share = part / self.iterations
        return Target(
            self.key(), (self.ratio or 0) * share, self.ranking, self.round_to, self.min_ratio * share, self.max_ratio
        )

    def _check_no_gates(self, model: nn.Module, all_units: list[Units]) -> None:
        """Nobody tells a Trainer's callback that its training was interrupted: gates stay on as long as the Trainer lives."""
        for name in (span.module for units in all_units for span in units.outputs):
            if is_gated(model.get_submodule(name)):
                raise CompressionError(
                    f"{self.key()}: {name} still has the gates of another training of this model, which goes on or was "
                    f"interrupted; delete its Trainer, or load the model anew."
                )

    def _named(self, all_units: list[Units]) -> list[Tensor] | None:
        """What `keep` names, a tensor of units for every layer."""
        if self.keep is None:
            return None
        kept = [torch.arange(units.count) for units in all_units]
        for layer, wanted in self.keep.items():
            if not 0 <= layer < len(all_units):
                raise CompressionError(
                    f"{self.key()}: keep: there is no layer {layer}; possible are 0 to {len(all_units) - 1}, as the model runs."
                )
            kept[layer] = whole(all_units[layer], wanted, self.key())
        return kept

    def _check_cuts(self, model: nn.Module, all_units: list[Units], named: list[Tensor] | None) -> None:
        """Before anything is scored: whatever the scores will say, so many units stay."""
        any_scores = [torch.ones(units.shape) for units in all_units]
        counts = [keep.shape[-1] for keep in named or chosen(all_units, any_scores, self._target(self.iterations))]
        if named and counts == [units.count for units in all_units]:
            raise CompressionError(f"{self.key()}: keep names all {self.kind}, so nothing is cut; name fewer.")
        if all(count == units.count for count, units in zip(counts, all_units, strict=True)):
            raise CompressionError(
                f"{self.key()}: ratio {self.ratio} of {all_units[0].count} {self.kind} a layer, rounded to {self.round_to}, "
                f"cuts nothing; raise ratio or lower round_to."
            )
        if self.even:
            check_even(model, all_units, counts, self.key())


def without_units() -> str:
    """The methods that work where units can't be proven, as errors advise them."""
    *others, last = (method.key() for method in every_method() if not method.needs_units)
    return f"{', '.join(others)} and {last} need no units"


def whole(units: Units, wanted: list[int], asked: str) -> Tensor:
    """Units that consist of these heads or neurons, ascending; CompressionError where they would break a group."""
    group = queries(units) if units.kind == "heads" else 1
    count = units.count * group
    if units.lanes > 1:
        raise CompressionError(f"{asked}: keep: each expert of {units.name} has {units.kind} of its own; give ratio instead.")
    if not wanted or not all(0 <= one < count for one in wanted) or len(set(wanted)) < len(wanted):
        raise CompressionError(
            f"{asked}: keep: {wanted} of {units.name}, which has {count} {units.kind}; possible are some of 0 to {count - 1}, "
            f"each once."
        )
    groups = sorted({one // group for one in wanted})
    if len(wanted) < len(groups) * group:
        broken = next(one for one in groups if not {one * group + i for i in range(group)} <= set(wanted))
        raise CompressionError(
            f"{asked}: keep: {sorted(wanted)} of {units.name} breaks a group: heads {broken * group} to "
            f"{broken * group + group - 1} share a key and value; possible are whole groups of {group}; keep all of them or "
            f"none."
        )
    return torch.tensor(groups)
