"""Low memory: a model compressed while it is read, a layer at a time, so that it is never whole in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfcompress.calibration.processes import processes
from hfcompress.checkpoint.errors import CompressionError, explained
from hfcompress.checkpoint.streaming import Streaming, give_back
from hfcompress.checkpoint.structure import kept_in_float32
from hfcompress.methods import METHODS, Method
from hfcompress.methods.base import leave_loadable
from hfcompress.results.measure import Row, measure, weigh
from hfcompress.results.report import Report
from hfcompress.run.recipe import Recipe
from hfcompress.tasks import Task
from hfcompress.tasks.pretrained import load_config, locate, open_model, place_for

NOT_MEASURED = "neither timed nor scored, as with low memory the model as it came is never whole in memory"
BY_ITSELF = "timed by itself, as with low memory the reference is never whole in memory"


def compress_while_loading(path: str | Path, *steps: Method, task: Any = None, device: Any = None, **kwargs: Any) -> Any:
    """The model of a checkpoint, compressed while it is read: at no time more of it is in memory than what it becomes, and a
    layer.

    `steps`: `Cast`, and `Quantize` with `calibrate` false or scales and without a target, in this order or the other. The
    tensors are those that the same steps make of the loaded model. `task`, `device`, `kwargs`: as for `open_model`. Raises
    `CompressionError`.
    """
    check_steps(steps, "low memory")
    return _loaded(path, steps, task, device, kwargs)[0]


def check_steps(steps: Sequence[Any], where: str) -> None:
    """CompressionError for the first step that needs the whole model, or finds codes where it needs weights."""
    possible = [key for key, method in METHODS.items() if method.layer_edits is not Method.layer_edits]
    coded = False
    for number, step in enumerate(steps):
        if not getattr(step, "by_layer", False):
            raise CompressionError(
                f"{where}: steps.{number}, {step}, needs the whole model; possible are {' and '.join(possible)}, without data "
                f"to choose by (calibrate: false or scales, no target); do without low memory, or take it out."
            )
        if coded and step.needs_dense:
            raise CompressionError(f"{where}: steps.{number}, {step}, finds codes where it needs weights; quantize once.")
        coded |= "codes" in step.edits


def check_recipe(recipe: Recipe) -> None:
    """CompressionError where a recipe, or this run of it, needs the whole model."""
    check_steps(recipe.steps, "--low-memory")
    if compared := [part for part in recipe.goal_parts if part != "smaller"]:
        raise CompressionError(
            f"--low-memory: goal.{compared[0]} compares with the model as it came, which is never whole in memory; possible is "
            f"smaller; take {' and '.join(compared)} out, or run without --low-memory."
        )
    if recipe.export:
        raise CompressionError(
            "--low-memory: an export is traced with the whole model in memory; take export out, or run without --low-memory."
        )
    if processes().num_processes > 1:
        raise CompressionError(
            f"--low-memory: {processes().num_processes} processes were started, and one reads the model; start it without "
            f"torchrun or accelerate launch."
        )


def compressed(recipe: Recipe, task: Task) -> tuple[Any, Report]:
    """The model that a recipe makes, and the report: of the model as it came only what can be told without it."""
    if task.headline == "agreement":
        raise CompressionError(
            "--low-memory: agreement is with the model as it came, which is never whole in memory; give labelled data with "
            "other metrics, or run without --low-memory."
        )
    started, report = time.monotonic(), Report()
    model, edits = _loaded(recipe.model, recipe.steps, task, None, {})
    seconds = time.monotonic() - started
    report.add(
        Row(
            step="as it came",
            **edits.size,
            latency_ms={},
            score={},
            headline=task.headline,
            higher_is_better=bool(task.higher_is_better),
            notes=(NOT_MEASURED,),
        )
    )
    row = measure(model, task, " + ".join(step.label for step in recipe.steps), seconds=seconds)
    report.add(replace(row, notes=(*row.notes, BY_ITSELF)))
    return model, report


def _loaded(path: str | Path, steps: Sequence[Any], task: Any, device: Any, kwargs: dict[str, Any]) -> tuple[Any, _Edits]:
    if locate(str(path))[1]:
        raise CompressionError(
            f"model {str(path)!r}: a GGUF file is unpacked whole when it is loaded; do without low memory, or name a folder "
            f"with safetensors."
        )
    edits = _Edits(steps, place_for(device))
    # A checkpoint that a quantizer reads already, ours for example, is mapped and not copied: it is edited when it is there.
    if getattr(load_config(str(path)), "quantization_config", None) is None:
        kwargs = {**kwargs, "quantization_config": Streaming(edits.begin, edits.edit)}
    model = open_model(path, task, device, **kwargs)
    edits.finish(model)
    return model, edits


class _Edits:
    """What steps do to one model, to each layer one after the other."""

    def __init__(self, steps: Sequence[Any], device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._model: Any = None
        self._done: dict[str, None] = {}
        self.size: dict[str, Any] = {}

    def begin(self, model: Any) -> list[str]:
        """Choose, of a model whose weights need not be there: the layers to edit as they are read."""
        self._model, self.size = model, _size(model)
        self._each = []
        for number, step in enumerate(self._steps, start=1):
            with explained(self._place(number)):
                self._each.append(step.layer_edits(model))
        waiting = {name for one in self._each for name in one.waiting}
        self._names = [name for name in dict.fromkeys(name for one in self._each for name in one.names) if name not in waiting]
        return self._names

    def edit(self, name: str) -> None:
        """Edit a layer that was read, where it will lie."""
        self._model.get_submodule(name).to(self._device)
        for number, one in enumerate(self._each, start=1):
            with explained(self._place(number)):
                one.edit(name)
        self._done[name] = None

    @torch.no_grad()
    def finish(self, model: Any) -> None:
        """Edit what is left in the whole model, and have its config tell."""
        if self._model is None:
            self.begin(model)
        for name in (name for name in self._names if name not in self._done):
            before: nn.Parameter = model.get_submodule(name).weight
            self.edit(name)
            give_back(before)
        for number, one in enumerate(self._each, start=1):
            with explained(self._place(number)):
                one.rest(self._done)
        leave_loadable(model, self._steps)

    def _place(self, number: int) -> str:
        return f"step {number} of {len(self._steps)}, {self._steps[number - 1].key()}"


def _size(model: Any) -> dict[str, Any]:
    """What `weigh` tells, of a model on the meta device, where nothing is in float32 yet that will be."""
    count = weigh(model)
    kept = sum(
        parameter.numel() * (4 - parameter.element_size())
        for name, parameter in model.named_parameters()
        if kept_in_float32(model, name, parameter.dtype)
    )
    return {
        "parameters": count["parameters"],
        "megabytes": (count["bytes"] + kept) / 1e6,
        "stored_elements": count["stored_elements"],
    }
