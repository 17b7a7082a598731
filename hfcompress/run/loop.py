"""The loop: a recipe is a list of steps, a step edits the model in place, a row is measured after each."""

from __future__ import annotations

import logging
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfcompress.calibration.processes import processes
from hfcompress.checkpoint import artifact
from hfcompress.checkpoint.errors import CompressionError, explained
from hfcompress.results import hub
from hfcompress.results.card import write_card
from hfcompress.results.plot import plot
from hfcompress.results.report import Report
from hfcompress.run.recipe import Recipe
from hfcompress.run.record import Tell, add_same_dtype, controls, record, reference_model, wants_original
from hfcompress.run.train import Train, transformers_set_seed
from hfcompress.tasks import Task

log = logging.getLogger("hfcompress")


def compress(recipe: Recipe, output_dir: str | Path, overwrite: bool = False, tell: Tell = log.info) -> Report:
    """Run a recipe, and leave a proven artifact in `output_dir`.

    A run that was killed goes on after its last finished step when it is started again; the artifact is that of a run that
    was not. Under several processes all of them train, and the first one measures and writes.
    """
    out, state = Path(output_dir), processes()
    if _is_done(out, recipe) and not overwrite:
        tell(f"{out} holds the finished result of this very recipe; --overwrite runs it again")
        return Report.load(out / "report.json")
    _check_free(out, overwrite)
    if recipe.push_to:
        hub.check_push(recipe.push_to)
    work = out.with_name(out.name + ".partial")
    task = recipe.task
    tell(f"reading {recipe.task.dataset}")
    task.open(recipe.model)
    if recipe.reference == 0 and wants_original(recipe) and task.head_is_new(recipe.model):
        raise CompressionError(
            f"distill: the original, {recipe.model}, has no head for this task yet, and a random one teaches noise; "
            f"put a train step first, or name a fine-tuned teacher."
        )
    model, report, done = _begin(recipe, task, work, overwrite, tell)
    report.goal = recipe.goal.model_dump(exclude_none=True) if recipe.goal else None
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
        record(recipe, task, model, report, step.label, number, work, time.monotonic() - started, others)
    tell("saving, and proving it by a load in a fresh process")
    if state.is_main_process:
        _finish(recipe, task, model, report, work, out)
    state.wait_for_everyone()
    if recipe.push_to and state.is_main_process:
        tell(f"pushing to {recipe.push_to}")
        tell(hub.push(out, recipe.push_to, private=recipe.private))
    return report


def _begin(recipe: Recipe, task: Task, work: Path, overwrite: bool, tell: Tell) -> tuple[Any, Report, int]:
    """The model as it came and its row; or, after a crash, the model and the rows as they stood; and the steps done."""
    state = processes()
    unfinished, report = work / "recipe.yaml", Report(reference=recipe.reference)
    if unfinished.is_file() and (work / "report.json").is_file() and not overwrite:
        report = Report.load(work / "report.json")
    done = max(0, len(report.rows) - 1)
    if done and not _same_start(Recipe.load(str(unfinished)), recipe, done):
        raise CompressionError(
            f"{work}: an unfinished run of another recipe lies there, {done} steps done; "
            f"finish it, choose another output_dir, or pass --overwrite."
        )
    state.wait_for_everyone()
    transformers_set_seed(recipe.seed)
    if done:
        tell(f"going on after step {done}, where an earlier run stopped")
        model = artifact.load(task, work / f"step-{done}")
        if done >= recipe.reference:
            first = model if done == recipe.reference else reference_model(recipe, task, work)
            first.to(state.device)
            if state.is_main_process:
                task.remember(first)
                add_same_dtype(recipe, task, first, report, work)
            _keep_teacher(recipe, task, first)
        _restore_tokens(task, work / f"step-{done}")
        return model.to(state.device), report, done
    if state.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        unfinished.write_text(recipe.to_yaml(), encoding="utf-8")
    report = Report(reference=recipe.reference)
    state.wait_for_everyone()
    tell(f"loading {recipe.model}")
    model = artifact.load(task, recipe.model).to(state.device)
    record(recipe, task, model, report, "as it came", 0, work, 0.0)
    return model, report, 0


def _restore_tokens(task: Task, snapshot: Path) -> None:
    """The tokenizer as the steps done left it, if they cut it: after the original was scored, which reads the whole one."""
    if (snapshot / "tokenizer_config.json").is_file():
        task.adopt(task.load_processor(str(snapshot)))  # type: ignore[attr-defined]  # only texts have one


def _keep_teacher(recipe: Recipe, task: Task, model: Any) -> None:
    """A copy of the original, if a step will ask for it as its teacher."""
    if wants_original(recipe):
        task.keep_original(model)


def _finish(recipe: Recipe, task: Task, model: Any, report: Report, work: Path, out: Path) -> None:
    """Build the folder whole beside its place, prove it, and only then put it there."""
    whole = work / "artifact"
    shutil.rmtree(whole, ignore_errors=True)
    artifact.save(model, task.processor, whole)
    artifact.prove(model, task.example(2, min(32, task.example_length)), whole)
    (whole / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    report.save(whole / "report.json")
    if find_spec("matplotlib"):
        plot(report, whole / "report.png")
    else:
        log.info("no report.png, for want of matplotlib: pip install 'hfcompress[plots]'")
    write_card(
        whole,
        base_model=recipe.model,
        report=report,
        recipe_text=recipe.to_yaml(),
        task=task,
        tags=[method.tag for method in recipe.methods if method.tag],
        repo_id=recipe.push_to,
    )
    if out.exists():
        shutil.rmtree(out)
    whole.rename(out)
    shutil.rmtree(work)


def _same_start(one: Recipe, other: Recipe, steps: int) -> bool:
    """Whether both recipes do the same up to there: what comes after, and where the result goes, may have been changed."""
    parts = ("model", "task", "seed", "reference", "control")
    same = all(getattr(one, part) == getattr(other, part) for part in parts)
    return same and _plain_steps(one, steps) == _plain_steps(other, steps)


def _plain_steps(recipe: Recipe, steps: int) -> Any:
    return recipe.to_dict()["steps"][:steps]


def _is_done(out: Path, recipe: Recipe) -> bool:
    told = out / "recipe.yaml"
    return told.is_file() and (out / "report.json").is_file() and told.read_text(encoding="utf-8") == recipe.to_yaml()


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise CompressionError(
            f"output_dir {str(out)!r}: something else lies there; choose another output_dir=..., "
            f"or pass --overwrite to replace it."
        )
