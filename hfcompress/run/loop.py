"""The loop: a recipe is a list of steps, a step edits the model in place, a row is measured after each."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from hfcompress.calibration.processes import processes
from hfcompress.checkpoint import artifact
from hfcompress.checkpoint.errors import CompressionError, explained, first_line
from hfcompress.checkpoint.proof import prove
from hfcompress.checkpoint.writing import write_text
from hfcompress.results import hub
from hfcompress.results.layer_plot import Place, cells, is_worth_it, plot_layers, widths
from hfcompress.results.plot import plot
from hfcompress.results.report import Report
from hfcompress.results.saved_files import missing_files
from hfcompress.run.exporting import write_export
from hfcompress.run.inputs import INPUTS, changed_inputs, check_no_adapter, fingerprints, local_inputs
from hfcompress.run.low_memory import check_recipe, compressed
from hfcompress.run.output_folder import (
    check_free,
    check_place,
    clear_leftovers,
    output_folder,
    partial,
    put_in_place,
    reserved,
    room_on_disk,
)
from hfcompress.run.recipe import Recipe
from hfcompress.run.record import (
    Tell,
    add_compiled,
    add_same_dtype,
    controls,
    learns_from_original,
    record,
    record_export,
    record_storage,
    reference_model,
    wants_original,
)
from hfcompress.run.train import Train, transformers_set_seed
from hfcompress.run.write_up import write_up
from hfcompress.tasks import Task

log = logging.getLogger("hfcompress")

SAVING = "saving, and proving it by a load in a fresh process"
AFTERWARDS = ("goal", "push_to", "private", "output_dir")
"""What a recipe asks of a result when it is there: it changes nothing that is computed."""


def compress(
    recipe: Recipe,
    output_dir: str | Path,
    overwrite: bool = False,
    tell: Tell = log.info,
    push_anyway: bool = False,
    low_memory: bool = False,
) -> Report:
    """Run a recipe, leave a proven artifact in `output_dir`, and push it where the recipe says so and its goal was met.

    A run that was killed goes on after its last finished step when it is started again; the artifact is that of a run that
    was not. An interrupted push is made up, and a finished one asked for again with another goal or another `push_to` is judged
    and pushed anew, and not computed. Under several processes all of them train, and the first one measures and writes.
    `push_anyway`: also push what missed the goal. `low_memory`: compress the model while it is read, a layer at a time, which
    steps that need no data can do; the artifact is the same, and the model as it came is not measured.
    """
    if low_memory:
        check_recipe(recipe)
    out, state = output_folder(output_dir), processes()
    check_place(out, local_inputs(recipe))
    for chosen in recipe.export:
        chosen.check_here()
    with reserved(out, state.is_main_process), room_on_disk(out):
        now = fingerprints(recipe)
        if not overwrite and (finished := _finished(out, recipe, now)) is not None:
            changed = _asked_anew(out, recipe)
            which = f"this recipe, with another {' and '.join(changed)}" if changed else "this very recipe"
            tell(f"{out} holds the finished result of {which}; --overwrite runs it again")
            if state.is_main_process:
                clear_leftovers(out, (out / "recipe.yaml").read_text(encoding="utf-8"))
                if changed:
                    write_up(recipe, finished, out)
                _push(recipe, finished, out, push_anyway, tell, again=True)
            return finished
        check_free(out, overwrite)
        recipe.check_here()
        check_no_adapter(recipe)
        if recipe.push_to:
            hub.check_push(recipe.push_to)
        report = (_compress_while_loading if low_memory else _compress)(recipe, out, overwrite, now, tell)
        if state.is_main_process:
            _push(recipe, report, out, push_anyway, tell)
    return report


def _compress(recipe: Recipe, out: Path, overwrite: bool, now: dict[str, str], tell: Tell) -> Report:
    """All that is computed: open, step by step, measure, save, prove."""
    state, task, work = processes(), recipe.task, partial(out)
    tell(f"reading {task.dataset}")
    task.open(recipe.model)
    if recipe.reference == 0 and learns_from_original(recipe) and task.head_is_new(recipe.model):
        raise CompressionError(
            f"distill: the original, {recipe.model}, has no head for this task yet, and a random one teaches noise; "
            f"put a train step first, or name a fine-tuned teacher."
        )
    model, report, before, done = _begin(recipe, task, work, overwrite, now, tell)
    with state.main_process_first():  # the others read what it keeps
        task.write_own(work)
    report.goal = recipe.goal_parts
    for number, step in list(enumerate(recipe.steps, start=1))[done:]:
        if number - 1 == recipe.reference:
            _keep_teacher(recipe, task, model)
        tell(f"step {number} of {len(recipe.steps)}: {step}")
        started = time.monotonic()
        with explained(f"step {number} of {len(recipe.steps)}, {step.key()}"):
            doing = step.seeded(recipe.seed) if isinstance(step, Train) else step
            others = controls(recipe, doing, number, model, task, work, tell)
            started += sum(other["seconds"] for other in others.values())
            doing.run(model, task)
        model.eval()
        record(
            recipe,
            task,
            model,
            report,
            step.label,
            number,
            work,
            time.monotonic() - started,
            others,
            getattr(doing, "curve", None),
        )
    tell(SAVING)
    if state.is_main_process:
        _finish(recipe, task, model, report, out, before)
    state.wait_for_everyone()
    return report


def _compress_while_loading(recipe: Recipe, out: Path, overwrite: bool, now: dict[str, str], tell: Tell) -> Report:
    """The same with little memory: all steps in one, so that there is none to go on after."""
    task, work = recipe.task, partial(out)
    tell(f"reading {task.dataset}")
    task.open(recipe.model)
    if not overwrite:
        _unfinished(recipe, work, now)
    _clear(recipe, work, now)
    tell(f"compressing {recipe.model} while it is read: {', '.join(map(str, recipe.steps))}")
    transformers_set_seed(recipe.seed)
    model, report = compressed(recipe, task)
    report.goal = recipe.goal_parts
    tell(SAVING)
    _finish(recipe, task, model, report, out)
    return report


def _finished(out: Path, recipe: Recipe, now: dict[str, str]) -> Report | None:
    """The report of a finished run of this recipe, whatever its goal and wherever it goes; CompressionError where it has lost
    files or read something else."""
    told, report = out / "recipe.yaml", out / "report.json"
    if not told.is_file() or not report.is_file() or not _same_result(told, recipe):
        return None
    if missing := missing_files(out):
        raise CompressionError(
            f"{out}: the finished result of this recipe there has lost {', '.join(missing[:3])}; pass --overwrite to "
            f"make it anew."
        )
    if changed := changed_inputs(out, now):
        raise CompressionError(
            f"{out}: the finished result there was made from another content of {' and '.join(changed)}; pass --overwrite to "
            f"make it anew, or choose another output_dir."
        )
    found = Report.load(report)
    found.goal = recipe.goal_parts
    return found


def _same_result(told: Path, recipe: Recipe) -> bool:
    """Whether the recipe of a finished run computes what this one does."""
    if told.read_bytes() == recipe.to_yaml().encode():
        return True
    try:
        theirs = Recipe.load(str(told))
    except CompressionError:  # written by hand, or by another version
        return False
    one, other = theirs.to_dict(), recipe.to_dict()
    return all(one.get(key) == other.get(key) for key in {*one, *other} - {*AFTERWARDS})


def _asked_anew(out: Path, recipe: Recipe) -> list[str]:
    """What is asked otherwise of a finished result than when it was made."""
    theirs = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    mine = yaml.safe_load(recipe.to_yaml())
    return [key for key in AFTERWARDS if theirs.get(key) != mine.get(key)]


def _begin(
    recipe: Recipe, task: Task, work: Path, overwrite: bool, now: dict[str, str], tell: Tell
) -> tuple[Any, Report, dict[Place, int], int]:
    """The model as it came and its row; or, after a crash, the model and the rows as they stood; the widths of the original's
    layers; and the steps done."""
    state = processes()
    report = Report(reference=recipe.reference) if overwrite else _unfinished(recipe, work, now)
    done = max(0, len(report.rows) - 1)
    state.wait_for_everyone()
    transformers_set_seed(recipe.seed)
    if done:
        tell(f"going on after step {done}, where an earlier run stopped")
        if state.is_main_process:  # later steps may have been mended
            write_text(work / "recipe.yaml", recipe.to_yaml(), "the recipe")
        with _going_on(work):
            model = first = artifact.load(task, work / f"step-{done}")
            if done >= recipe.reference:
                if done > recipe.reference:
                    first = reference_model(recipe, task, work)
                first.to(state.device)
                if state.is_main_process:
                    task.remember(first)
                    add_same_dtype(recipe, task, first, report, work)
                _keep_teacher(recipe, task, first)
            _restore_tokens(task, work / f"step-{done}")
        return model.to(state.device), report, widths(first), done
    if state.is_main_process:
        _clear(recipe, work, now)
    report = Report(reference=recipe.reference)
    state.wait_for_everyone()
    tell(f"loading {recipe.model}")
    model = artifact.load(task, recipe.model).to(state.device)
    check_no_adapter(recipe, model)
    record(recipe, task, model, report, "as it came", 0, work, 0.0)
    return model, report, widths(model), 0


def _clear(recipe: Recipe, work: Path, now: dict[str, str]) -> None:
    """Begin anew."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_text(work / INPUTS, json.dumps(now, indent=2) + "\n", "what the run reads")
    write_text(work / "recipe.yaml", recipe.to_yaml(), "the recipe")


def _unfinished(recipe: Recipe, work: Path, now: dict[str, str]) -> Report:
    """What an earlier run of the same beginning has measured; empty if there was none that finished a step."""
    told, rows = work / "recipe.yaml", work / "report.json"
    if not told.is_file() or not rows.is_file():
        return Report(reference=recipe.reference)
    with _going_on(work):
        report, theirs = Report.load(rows), Recipe.load(str(told))
    if (done := len(report.rows) - 1) < 1:
        return Report(reference=recipe.reference)
    if not _same_start(theirs, recipe, done):
        raise CompressionError(
            f"{work}: an unfinished run of another recipe lies there, {done} steps done; "
            f"finish it, choose another output_dir, or pass --overwrite."
        )
    if changed := changed_inputs(work, now):
        raise CompressionError(
            f"{work}: the unfinished run there began with another content of {' and '.join(changed)}; put that back, or pass "
            f"--overwrite to begin anew."
        )
    return report


@contextmanager
def _going_on(work: Path) -> Iterator[None]:
    """Whatever is wrong with what a killed run left behind, there is a way out."""
    try:
        yield
    except (CompressionError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressionError(
            f"{work}: the unfinished run there is damaged ({first_line(error)}); pass --overwrite to begin anew, or remove "
            f"that folder."
        ) from error


def _restore_tokens(task: Task, snapshot: Path) -> None:
    """The tokenizer as the steps done left it, if they cut it: after the original was scored, which reads the whole one."""
    if (snapshot / "tokenizer_config.json").is_file():
        task.adopt(task.load_processor(str(snapshot)))  # type: ignore[attr-defined]  # only texts have one


def _keep_teacher(recipe: Recipe, task: Task, model: Any) -> None:
    """A copy of the original, if a step will ask for it: a teacher, or what codes are compared with."""
    if wants_original(recipe):
        task.keep_original(model)


def _finish(recipe: Recipe, task: Task, model: Any, report: Report, out: Path, before: dict[Place, int] | None = None) -> None:
    """Build the folder whole beside its place, prove it, and only then put it there. `before`: the original's `widths`."""
    work = partial(out)
    whole = work / "artifact"
    shutil.rmtree(whole, ignore_errors=True)
    artifact.save(model, task.processor, whole, packed=recipe.storage is not None)
    prove(model, task.example(2, min(32, task.example_length)), whole)
    record_storage(recipe, report, whole)
    if any(chosen.answers for chosen in recipe.export):
        add_compiled(recipe, task, report, work)
    for chosen in recipe.export:
        with explained(f"export to {chosen.place}"):
            write_export(str(whole), chosen, task, whole / chosen.place)
        record_export(recipe, task, whole / chosen.place, chosen, report, work)
    if (work / INPUTS).is_file():
        shutil.copyfile(work / INPUTS, whole / INPUTS)
    if find_spec("matplotlib"):
        plot(report, whole / "report.png")
        if is_worth_it(model):
            plot_layers(model, whole / "layers.png")
    else:
        log.info("no report.png, for want of matplotlib: pip install matplotlib")
    write_up(recipe, report, whole, cells(model), before)
    put_in_place(whole, out)


def _push(recipe: Recipe, report: Report, out: Path, anyway: bool, tell: Tell, again: bool = False) -> None:
    """Push what met its goal; `again`: unless an earlier run of the same command did."""
    if not recipe.push_to:
        return
    if not anyway and (missed := report.check_goal(recipe.goal_parts)):
        tell(
            f"not pushed to {recipe.push_to}, as the goal was missed ({' '.join(missed)[:-1]}); "
            f"--push-anyway pushes it all the same"
        )
        return
    if again and hub.is_pushed(out, recipe.push_to):
        tell(f"{recipe.push_to} holds it already")
        return
    tell(f"pushing to {recipe.push_to}")
    tell(hub.push(out, recipe.push_to, private=recipe.private))


def _same_start(one: Recipe, other: Recipe, steps: int) -> bool:
    """Whether both recipes do the same up to there: what comes after, and where the result goes, may have been changed."""
    parts = ("model", "task", "seed", "reference", "control")
    same = all(getattr(one, part) == getattr(other, part) for part in parts)
    return same and one.to_dict()["steps"][:steps] == other.to_dict()["steps"][:steps]
