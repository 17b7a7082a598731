"""What the loop writes down: a row a step, measured beside the reference, and what training would have made of other models."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfcompress.calibration.processes import processes
from hfcompress.checkpoint import artifact
from hfcompress.checkpoint.checksums import read_json
from hfcompress.checkpoint.errors import CompressionError, first_line
from hfcompress.checkpoint.structure import PACKED
from hfcompress.export import Format
from hfcompress.export.served import Served
from hfcompress.results.measure import Curve, fast_dtype, has_codes, measure, settings_of
from hfcompress.results.report import Report
from hfcompress.results.timing import device_of, room_for
from hfcompress.run.recipe import Recipe
from hfcompress.run.train import Train
from hfcompress.tasks import Task
from hfcompress.tasks.metrics import gain

Tell = Callable[[str], None]
log = logging.getLogger("hfcompress")

NO_ROOM = "timed by itself, for want of memory for the reference, so its times can't be compared"
TRAINING = frozenset({"loss", "adapter"})
"""What a method edits that changes how a model is trained, not what it is afterwards."""


def wants_original(recipe: Recipe) -> bool:
    return any(rider.wants_original for step in recipe.steps if isinstance(step, Train) for rider in step.riders)


def learns_from_original(recipe: Recipe) -> bool:
    """Whether what the original says is learnt, and not just its weights compared."""
    riders = [rider for step in recipe.steps if isinstance(step, Train) for rider in step.riders]
    return any(rider.wants_original and rider.has_teacher for rider in riders)


def reference_model(recipe: Recipe, task: Task, work: Path, **kwargs: Any) -> Any:
    """The model before its first compressing step, as it came or from its snapshot; `kwargs` go to `from_pretrained`."""
    path = work / f"step-{recipe.reference}" if recipe.reference else recipe.model
    return artifact.load(task, path, **kwargs).to(processes().device)


def record(
    recipe: Recipe,
    task: Task,
    model: Any,
    report: Report,
    step: str,
    number: int,
    work: Path,
    seconds: float,
    others: Mapping[str, dict[str, Any]] | None = None,
    curve: Curve | None = None,
) -> None:
    """Measure a row and leave a snapshot to go on from. `others`: see `controls`."""
    state = processes()
    if state.is_main_process:
        columns: dict[str, Any] = {}
        beside, notes = None, ()  # type: Any, tuple[str, ...]

        def score(one: Any) -> dict[str, float]:
            if number == recipe.reference:
                return task.remember(one)
            columns.update(task.predict(one))
            return task.scored(columns)

        if number > recipe.reference:
            beside = _beside(recipe, task, model, report, work)
            notes = () if beside is not None else (NO_ROOM,)
        row = measure(model, task, step, seconds=seconds, score=score, beside=beside)
        gains = _gains(task, row.score, columns) if number > recipe.reference else {}
        told: dict[str, Any] = {name: _told(task, columns, other) for name, other in (others or {}).items()}
        report.add(replace(row, gains=gains, notes=(*row.notes, *notes), curve=curve or [], **told))
        del beside
        if number:
            artifact.save(model, task.processor if task.is_adopted else None, work / f"step-{number}", packed=False)
        if number == recipe.reference:
            add_same_dtype(recipe, task, model, report, work)
        report.save(work / "report.json")
        for old in work.glob("step-*"):
            if old.name not in (f"step-{number}", f"step-{recipe.reference}"):
                shutil.rmtree(old)
    state.wait_for_everyone()


def packed_megabytes(folder: Path) -> float | None:
    """What packed weights take on disk, in 1e6 bytes; None of a folder that holds others."""
    config = folder / "config.json"
    stored = read_json(config).get("quantization_config") if config.is_file() else None
    if not isinstance(stored, dict) or stored.get("storage") != PACKED:
        return None
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors")) / 1e6


def record_storage(recipe: Recipe, report: Report, folder: Path) -> None:
    """The last row once more, as its weights lie packed on disk: bit for bit the same model in fewer bytes."""
    size = packed_megabytes(folder)
    if recipe.storage is not None and size is not None:
        name, last = f"storage {recipe.storage}", report.rows[-1]
        alone: dict[str, Any] = {"seconds": None, "notes": (), "control": None, "uncompressed": None, "curve": []}
        report.add(replace(last, step=name, megabytes=size, **alone))


def record_export(recipe: Recipe, task: Task, folder: Path, chosen: Format, report: Report, work: Path) -> None:
    """Measure an export beside the reference in PyTorch, as another row; of formats whose runtime gives no logits, none."""
    if not chosen.answers:
        return
    served, columns = Served(folder), {}  # type: Any, dict[str, Any]

    def score(one: Any) -> dict[str, float]:
        columns.update(task.predict(one))
        return task.scored(columns)

    reference = reference_model(recipe, task, work).to("cpu")
    row = measure(served, task, f"export {chosen.place}", score=score, beside=reference)
    report.add(replace(row, gains=_gains(task, row.score, columns)))


def add_compiled(recipe: Recipe, task: Task, report: Report, work: Path) -> None:
    """Measure what plain PyTorch offers where an export is served: the reference by torch.compile, in bfloat16 where the
    processor multiplies it, scored as it is. Nothing where nothing can be compiled, as for want of a C++ compiler."""
    reference = reference_model(recipe, task, work).to("cpu")
    if has_codes(reference):
        return
    dtype = fast_dtype()
    other = reference_model(recipe, task, work, dtype=getattr(torch, dtype)).to("cpu").eval()
    columns = task.predict(other)
    other.compile()
    try:
        with torch._inductor.config.patch(freezing=True):
            row = measure(other, task, f"… compiled, {dtype}", score=lambda _: task.scored(columns), beside=reference)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        log.warning("export: the reference can't be compiled here (%s), so that row is missing", first_line(error))
        return
    report.compiled = replace(row, gains=_gains(task, row.score, columns), peak_memory_megabytes=None)


def _beside(recipe: Recipe, task: Task, model: Any, report: Report, work: Path) -> Any | None:
    """The reference, to be timed in turns with the model; None if there is no memory for it."""
    if wants_original(recipe) and task.kept_original is not None:
        return task.kept_original
    fits = room_for(report.rows[recipe.reference].megabytes, device_of(model))
    return reference_model(recipe, task, work) if fits else None


def add_same_dtype(recipe: Recipe, task: Task, reference: Any, report: Report, work: Path) -> None:
    """Measure the reference in the dtype that the result will compute in, if that is another one, unless it was measured."""
    dtype, now = recipe.ending_dtype, settings_of(reference, task)["dtype"]
    known = report.same_dtype.settings["dtype"] if report.same_dtype else now
    if dtype in (None, now) or has_codes(reference):
        report.same_dtype = None
    elif dtype != known and room_for(report.rows[recipe.reference].megabytes, device_of(reference)):
        found: dict[str, Any] = {}

        def score(one: Any) -> dict[str, float]:
            found.update(task.predict(one))
            return task.scored(found)

        other = reference_model(recipe, task, work, dtype=getattr(torch, str(dtype)))
        row = measure(other, task, f"… in {dtype}", score=score, beside=reference)
        report.same_dtype = replace(row, gains=_gains(task, row.score, found))


def _gains(task: Task, score: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each metric against the reference's, example by example."""
    then = task.reference_columns
    if then is None or (task.is_adopted and task.answers_tokens):  # to choose among fewer tokens is another question
        return {}
    found = {metric: _better(metric, columns, then) for metric in score if metric != "agreement"}
    return {metric: told for metric, told in found.items() if told["better"] is not None}


def _better(metric: str, columns: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`better`, `interval` and `examples` as in `gain`; `better` None where these can't be told."""
    found = gain(metric, columns, other) if np.array_equal(columns["tokens"], other["tokens"]) else None
    if found is None or not all(map(math.isfinite, (found.better, *found.interval))):
        return {"better": None}
    return {**found._asdict(), "interval": list(found.interval)}


def _told(task: Task, columns: Mapping[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What a row says of another model."""
    score = task.scored(other["columns"])
    return {"score": score, "seconds": other["seconds"], **_better(task.headline, columns, other["columns"])}


def controls(
    recipe: Recipe, step: Any, number: int, model: Any, task: Task, work: Path, tell: Tell
) -> dict[str, dict[str, Any]]:
    """What training makes of other models: of a copy without its teacher (`control`), of the reference (`uncompressed`).

    Each with the `columns` of its predictions and the `seconds` it took.
    """
    found: dict[str, dict[str, Any]] = {}
    if not recipe.control or not isinstance(step, Train):
        return found
    if (plain := step.without_teacher) is not None:
        tell(f"control: {plain}")
        found["control"] = _trained(copy.deepcopy(model), [plain], task)
    # A tokenizer with fewer tokens can't be read by the whole model.
    if (alike := _alike(recipe, number)) and not task.is_adopted:
        tell(f"control: the uncompressed model, {' + '.join(map(str, alike))}")
        try:
            found["uncompressed"] = _trained(reference_model(recipe, task, work), alike, task)
        except CompressionError as error:
            tell(f"control: the uncompressed model can't be trained alike: {error}")
    return found


def _alike(recipe: Recipe, number: int) -> list[Train]:
    """All training up to this step without what compresses, if the reference has not seen the data; else nothing to do."""
    steps = recipe.steps[:number]
    methods = [method for step in steps for method in (step.riders if isinstance(step, Train) else (step,))]
    if recipe.reference or not any(method.edits - TRAINING for method in methods):  # type: ignore[attr-defined]
        return []
    return [
        step.model_copy(update={"riders": tuple(r for r in step.riders if r.edits <= TRAINING)}).seeded(recipe.seed)
        for step in steps
        if isinstance(step, Train)
    ]


def _trained(model: Any, steps: list[Train], task: Task) -> dict[str, Any]:
    started = time.monotonic()
    for step in steps:
        step.run(model, task)
    columns = task.predict(model.eval()) if processes().is_main_process else {}
    return {"columns": columns, "seconds": time.monotonic() - started}
