"""The loop: a recipe is a list of steps, a step edits the model in place, a row is measured after each."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfcompress.calibration.processes import processes
from hfcompress.checkpoint import artifact
from hfcompress.checkpoint.errors import CompressionError, explained
from hfcompress.results import hub
from hfcompress.results.card import write_card
from hfcompress.results.plot import plot
from hfcompress.results.report import Report, measure
from hfcompress.run.recipe import Recipe
from hfcompress.run.train import Train, transformers_set_seed
from hfcompress.tasks import Task
from hfcompress.tasks.metrics import gain

log = logging.getLogger("hfcompress")
Tell = Callable[[str], None]


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
    _check_no_adapter(recipe.model)
    if recipe.push_to:
        hub.check_push(recipe.push_to)
    work = out.with_name(out.name + ".partial")
    task = recipe.task
    tell(f"reading {recipe.task.dataset}")
    task.open(recipe.model)
    if recipe.reference == 0 and _wants_original(recipe) and task.head_is_new(recipe.model):
        raise CompressionError(
            f"distill: the original, {recipe.model}, has no head for this task yet, and a random one teaches noise; "
            f"put a train step first, or name a fine-tuned teacher."
        )
    model, report, done = _begin(recipe, task, work, overwrite, tell)
    for number, step in list(enumerate(recipe.steps, start=1))[done:]:
        if number - 1 == recipe.reference:
            _keep_teacher(recipe, task, model)
        tell(f"step {number} of {len(recipe.steps)}: {step}")
        started = time.monotonic()
        with explained(f"step {number} of {len(recipe.steps)}, {step.key()}"):
            doing = step.seeded(recipe.seed) if isinstance(step, Train) else step
            without = _control(doing, model, task, tell) if recipe.control else None
            started += without["seconds"] if without else 0
            doing.run(model, task)
        model.eval()
        _record(recipe, task, model, report, step.label, number, work, time.monotonic() - started, without)
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
            first = model if done == recipe.reference else _reference(recipe, task, work)
            first.to(state.device)
            if state.is_main_process:
                task.remember(first)
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
    _check_no_adapter(recipe.model, model)
    _record(recipe, task, model, report, "as it came", 0, work, 0.0)
    return model, report, 0


def _restore_tokens(task: Task, snapshot: Path) -> None:
    """The tokenizer as the steps done left it, if they cut it: after the original was scored, which reads the whole one."""
    if (snapshot / "tokenizer_config.json").is_file():
        task.adopt(task.load_processor(str(snapshot)))  # type: ignore[attr-defined]  # only texts have one


def _reference(recipe: Recipe, task: Task, work: Path) -> Any:
    """The model before its first compressing step, from an earlier run's snapshot."""
    return artifact.load(task, work / f"step-{recipe.reference}") if recipe.reference else artifact.load(task, recipe.model)


def _keep_teacher(recipe: Recipe, task: Task, model: Any) -> None:
    """A copy of the original, if a step will ask for it as its teacher."""
    if _wants_original(recipe):
        task.keep_original(model)


def _wants_original(recipe: Recipe) -> bool:
    return any(rider.wants_original for step in recipe.steps if isinstance(step, Train) for rider in step.riders)


def _control(step: Any, model: Any, task: Task, tell: Tell) -> dict[str, Any] | None:
    """What a copy of the model becomes when it is trained the same way without its teacher."""
    plain = step.without_teacher if isinstance(step, Train) else None
    if plain is None:
        return None
    tell(f"control: {plain}")
    started, student = time.monotonic(), copy.deepcopy(model)
    plain.run(student, task)
    columns = task.predict(student.eval()) if processes().is_main_process else {}
    return {"columns": columns, "seconds": time.monotonic() - started}


def _record(
    recipe: Recipe,
    task: Task,
    model: Any,
    report: Report,
    step: str,
    number: int,
    work: Path,
    seconds: float,
    without: dict[str, Any] | None = None,
) -> None:
    """Measure a row and leave a snapshot to go on from."""
    state = processes()
    if state.is_main_process:
        score: Any = task.remember if number == recipe.reference else task.score
        control = None
        if without is not None:
            columns = task.predict(model)
            better = gain(task.headline, columns, without["columns"])
            control = {"score": task.scored(without["columns"]), "seconds": without["seconds"]}
            control |= {**better._asdict(), "interval": list(better.interval)} if better else {"better": None}
            score = lambda _: task.scored(columns)  # noqa: E731 (one model is scored once)
        beside = task.kept_original if number > recipe.reference else None
        report.add(measure(model, task, step, seconds=seconds, score=score, beside=beside, control=control))
        if number:
            artifact.save(model, task.processor if task.is_adopted else None, work / f"step-{number}")
        report.save(work / "report.json")
        for old in work.glob("step-*"):
            if old.name not in (f"step-{number}", f"step-{recipe.reference}"):
                shutil.rmtree(old)
    state.wait_for_everyone()


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


def _check_no_adapter(path: str, model: Any = None) -> None:
    """Steps would work on the weights beneath an adapter of PEFT's, and the result could not be told from them."""
    ours = (Path(path) / artifact.ADAPTER).is_dir()  # beside the model, as a step that keeps one leaves it
    if (Path(path) / "adapter_config.json").is_file() or (getattr(model, "peft_config", None) and not ours):
        raise CompressionError(
            f"model {path!r}: it holds an adapter, and steps would work on the weights beneath it; merge it first, with PEFT's "
            f"merge_and_unload(), and save the result in a folder of its own."
        )


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise CompressionError(
            f"output_dir {str(out)!r}: something else lies there; choose another output_dir=..., "
            f"or pass --overwrite to replace it."
        )
