"""Recipes: YAML to frozen objects and back without loss, strict both ways, all mistakes at once."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, InstanceOf, SerializeAsAny, ValidationError

from hfcompress.checkpoint.errors import CompressionError, did_you_mean, shown
from hfcompress.checkpoint.fields import Fields, Named
from hfcompress.export import FORMATS, Format
from hfcompress.methods import METHODS, Method, Step
from hfcompress.methods.riding import check_together
from hfcompress.run.overrides import apply_override
from hfcompress.run.reading import read_named, sentences, validated, words_only
from hfcompress.run.safe_yaml import MOST_BYTES, read_yaml
from hfcompress.run.train import Train
from hfcompress.tasks import TASKS, Task

MOST_MISTAKES = 40
"""So many are shown at once."""
STEPS: dict[str, type[Step]] = {Train.key(): Train, **METHODS}


class Goal(Fields):
    """What the result must reach, against the model before its first compressing step."""

    max_drop: float | None = Field(
        default=None, ge=0, description="Most the score may fall, on every text scored: 0.01 is one point of accuracy."
    )
    smaller: float | None = Field(default=None, gt=0, description="Times smaller on disk.")
    faster: float | None = Field(default=None, gt=0, description="Times faster, at batch 1 and at batch 8, timed in turns.")


class Recipe(Fields):
    """A model, a task and a list of steps."""

    model: str = Field(min_length=1, description="A Hub id, a folder, a .gguf file, or package://NAME/path.")
    task: SerializeAsAny[InstanceOf[Task]] = Field(
        description="The data, how they are batched and scored; its name decides which head the model has."
    )
    steps: tuple[SerializeAsAny[InstanceOf[Step]], ...] = Field(
        min_length=1, description="What is done to the model, in this order: methods, and train with methods that ride along."
    )
    goal: Goal | None = Field(
        default=None, description="What the last row must reach, or nothing is pushed and the exit code is 3."
    )
    seed: int = Field(default=42, ge=0, description="Of data order and dropout, where a train step has no seed of its own.")
    output_dir: str | None = Field(default=None, description="Where the artifact goes; out/RECIPE if absent.")
    export: tuple[SerializeAsAny[InstanceOf[Format]], ...] = Field(
        default=(),
        description="Formats that the result is exported to, measured and put beside it: openvino, onnx, executorch, gguf.",
    )
    storage: Literal["packed"] | None = Field(
        default=None,
        description="packed: the weights are entropy coded without loss, and decoded by hfcompress when they are loaded.",
    )
    push_to: str | None = Field(default=None, description="OWNER/NAME on the Hub.")
    control: bool = Field(
        default=False,
        description="Also train without the teacher, and the uncompressed model on data that it has not seen, to compare.",
    )
    private: bool = Field(default=False, description="Whether a repository made by push_to is private.")

    @property
    def reference(self) -> int:
        """The row everything is compared with: the model before its first compressing step."""
        for number, step in enumerate(self.steps):
            if not isinstance(step, Train) or step.riders:
                return number
        return 0

    @property
    def goal_parts(self) -> dict[str, float | None]:
        """The parts of the goal that were asked for, as reports judge them."""
        return self.goal.model_dump(exclude_none=True) if self.goal else {}

    @property
    def methods(self) -> tuple[Method, ...]:
        """Every method, those that ride along with training included."""
        each = (step.riders if isinstance(step, Train) else (step,) for step in self.steps)
        return tuple(one for several in each for one in several if isinstance(one, Method))

    def check_here(self) -> None:
        """CompressionError with what this machine can't do of a recipe that is right in itself, a line a step."""
        mistakes = []
        for number, step in enumerate(self.steps):
            try:
                if isinstance(step, Train):
                    step.check_here()
            except CompressionError as error:
                mistakes.append(f"steps.{number}: {error}")
        if mistakes:
            raise CompressionError("\n".join(mistakes))

    @property
    def ending_dtype(self) -> str | None:
        """The floating dtype that the result computes in, where a step decides that."""
        return next((method.computes_in for method in reversed(self.methods) if method.computes_in), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is at its default. `Recipe.from_dict(recipe.to_dict()) == recipe`."""
        plain = self.model_dump(mode="json", exclude_defaults=True, exclude={"task", "steps", "export"})
        task = self.task.model_dump(mode="json", exclude_defaults=True)  # its name stays
        head = {"model": plain.pop("model"), "task": task, "steps": [_named_to_plain(step) for step in self.steps]}
        exports = {"export": [_named_to_plain(one) for one in self.export]} if self.export else {}
        return {**head, **plain, **exports}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, raw: Any, where: str = "recipe") -> Recipe:
        """CompressionError with all mistakes, a line each."""
        if not isinstance(raw, dict):
            raise CompressionError(f"{where}: a recipe is a mapping with model, task and steps, not {type(raw).__name__}.")
        mistakes: list[str] = []
        raw = words_only(raw, "recipe", cls, mistakes)
        if isinstance(raw.get("goal"), dict):
            raw["goal"] = words_only(raw["goal"], "goal", Goal, mistakes)
        if isinstance(raw.get("steps"), list):
            raw["steps"] = tuple(
                _read_step(step, f"steps.{number}", STEPS, mistakes) for number, step in enumerate(raw["steps"])
            )
            mistakes += _order_mistakes(raw["steps"])
            if raw.get("control") is True and not _has_control(raw["steps"]):
                mistakes.append("control: no train step has a teacher to do without; add distill under with, or omit control.")
        if raw.get("export") is not None:
            listed = raw["export"] if isinstance(raw["export"], list | tuple) else [raw["export"]]
            raw["export"] = tuple(read_named(one, f"export.{number}", FORMATS, mistakes) for number, one in enumerate(listed))
            mistakes += _export_mistakes(raw["export"])
        if isinstance(raw.get("task"), dict):
            raw["task"] = _read_task(raw["task"], mistakes)
            mistakes += _label_mistakes(raw["task"], raw.get("steps"), raw.get("control") is True)
        elif "task" in raw and not isinstance(raw["task"], Task):
            mistakes.append(
                f"task: it must be a mapping, as in {{name: causal-lm, dataset: my.txt}}, not {shown(raw['task'])}."
            )
            raw["task"] = None
        raw = (
            {key: value for key, value in raw.items() if key not in ("task", "steps", "export") or _is_whole(value)}
            if mistakes
            else raw
        )
        try:
            recipe = cls(**raw)
        except ValidationError as error:
            told = {line.partition(":")[0].partition(".")[0] for line in mistakes}
            mistakes += [m for m in sentences(error, "", cls) if m.partition(":")[0] not in told]
        if mistakes:
            more = [f"and {len(mistakes) - MOST_MISTAKES} more mistakes."] if len(mistakes) > MOST_MISTAKES else []
            raise CompressionError("\n".join(f"{where}: {mistake}" for mistake in mistakes[:MOST_MISTAKES] + more))
        return recipe

    @classmethod
    def load(cls, name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """A YAML file, or a recipe that ships with hfcompress by its name; `overrides` as `steps.1.train.epochs=2`."""
        path = find_recipe(name_or_path)
        with path.open("rb") as file:
            raw = read_yaml(file.read(MOST_BYTES + 1), shown(str(path), 200)[1:-1])
        for override in overrides:
            apply_override(raw, override, cls.model_fields)
        return cls.from_dict(raw, path.name)


def task_from(raw: Any) -> Task:
    """A task from plain data; CompressionError with all mistakes."""
    mistakes: list[str] = []
    task = _read_task(raw if isinstance(raw, dict) else {"name": raw}, mistakes)
    if task is None:
        raise CompressionError("\n".join(mistakes))
    return task


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    inside = Path(str(resources.files("hfcompress"))) / "recipes"
    folder = inside if inside.is_dir() else inside.parent.parent / "recipes"  # a checkout keeps them beside the package
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    shipped = shipped_recipes()
    path = Path(name_or_path)
    if os.path.isfile(path):  # unlike Path.is_file it takes a name that is too long for a name that is not there
        return path
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise CompressionError(
        f"recipe {shown(name_or_path)}: there is no such file and no shipped recipe of that name."
        + did_you_mean(path.stem, shipped)
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Task) or (isinstance(value, tuple) and all(isinstance(one, Named) for one in value))


def _read_step(raw: Any, where: str, table: dict[str, Any], mistakes: list[str]) -> Step | None:
    """As `read_named`, and what rides along with training."""
    key = next(iter(raw), None) if isinstance(raw, dict) and len(raw) == 1 else None
    if key == Train.key() and key in table and isinstance(raw[key], dict) and "with" in raw[key]:
        before, given = len(mistakes), raw[key]["with"]
        riders = tuple(
            _read_step(rider, f"{where}.{key}.with.{number}", METHODS, mistakes)
            for number, rider in enumerate(given if isinstance(given, list) else [given])
        )
        if len(mistakes) > before:  # the rest of it is looked at all the same
            read_named({key: {name: value for name, value in raw[key].items() if name != "with"}}, where, table, mistakes)
            return None
        raw = {key: {**raw[key], "with": riders}}
    return read_named(raw, where, table, mistakes)  # type: ignore[no-any-return]


def _read_task(raw: dict[str, Any], mistakes: list[str]) -> Task | None:
    name = raw.get("name")
    if not isinstance(name, str) or name not in TASKS:
        mistakes.append(f"task: unknown task name {shown(name)}.{did_you_mean(str(name), TASKS)}")
        return None
    return validated(TASKS[name], {key: value for key, value in raw.items() if key != "name"}, "task", mistakes)


def _has_control(steps: tuple[Step | None, ...]) -> bool:
    """Whether there is anything to train beside: a model without its teacher; or the model as it came, if it is not trained
    before it is compressed."""
    trained = [step for step in steps if isinstance(step, Train)]
    return any(step.without_teacher for step in trained) or (bool(trained) and steps[0] not in trained)


def _export_mistakes(exports: tuple[Format | None, ...]) -> list[str]:
    """Two that would go into one folder."""
    places = [None if one is None else one.place for one in exports]
    return [
        f"export.{number}: {place} is asked for by export.{places.index(place)} already, and has one folder; leave one out, or "
        f"write the other with: hfcompress export ... --output."
        for number, place in enumerate(places)
        if place is not None and places.index(place) < number
    ]


def _order_mistakes(steps: tuple[Step | None, ...]) -> list[str]:
    """What no order of data can mend: training or cutting codes, riders without a train."""
    mistakes, quantised, adapted, coder = [], None, None, ""
    fragile: dict[str, int] = {}
    for number, step in enumerate(steps):
        riders = step.riders if isinstance(step, Train) else ()
        if isinstance(step, Method) and step.needs_training:
            mistakes.append(
                f"steps.{number}: {step.key()} does nothing without training; list it under `with:` of a train step."
            )
        riders = tuple(rider for rider in riders if rider is not None)
        both = (step, *riders) if isinstance(step, Method) else riders
        try:
            check_together(riders)
        except CompressionError as error:
            mistakes.append(f"steps.{number}: {error}")
        if adapted is not None and any(method.edits - {"dtype", "loss"} for method in both):
            mistakes.append(
                f"steps.{number}: the adapter of steps.{adapted} is kept, and only cast may follow it; set merge: true there."
            )
        if (
            isinstance(step, Train)
            and (step.model_extra or {}).get("load_best_model_at_end")
            and any(rider.scheduled for rider in riders)
        ):
            mistakes.append(
                f"steps.{number}: load_best_model_at_end would bring back what pruning has not finished with; take it out."
            )
        if any(rider.keeps_adapter for rider in riders):
            adapted = number
        if isinstance(step, Train):
            mistakes += _undone(number, riders, fragile)
        fragile |= {method.key(): number for method in both if method.lost_in_training}
        if quantised is not None and step is not None:
            if isinstance(step, Train) and not any(rider.chooses_trained for rider in riders):
                helpers = " or ".join(key for key, method in METHODS.items() if method.chooses_trained)
                mistakes.append(
                    f"steps.{number}: train comes after {coder} (steps.{quantised}), and codes can't be trained; "
                    f"train first, or add {helpers} under with."
                )
            elif isinstance(step, Method) and step.needs_dense:
                mistakes.append(
                    f"steps.{number}: {step.key()} comes after {coder} (steps.{quantised}), and codes can't be cut; "
                    f"list it before {coder}."
                )
        if quantised is None and (coders := [method.key() for method in both if "codes" in method.edits]):
            quantised, coder = number, coders[0]
    return mistakes


def _undone(number: int, riders: tuple[Method, ...], fragile: dict[str, int]) -> list[str]:
    """What steps before did, and a training would undo: it reaches every weight, or an adapter is merged into all."""
    spared = any(one.keeps_adapter or (one.chooses_trained and "adapter" not in one.edits) for one in riders)
    return [
        f"steps.{number}: train would undo {key} (steps.{before}), as nothing holds its zeros; list {key} under with of this "
        f"train too."
        for key, before in fragile.items()
        if not spared and not any(rider.key() == key for rider in riders)
    ]


def _label_mistakes(task: Task | None, steps: Any, control: bool) -> list[str]:
    """What needs labels, where the data has none."""
    if task is None or (task.learns_alone and getattr(task, "labelled", True)) or not isinstance(steps, tuple):
        return []
    why, remedy, instead = "task.labelled is false", "{alpha: 1}", "set alpha: 1, or leave the term task out"
    if not task.learns_alone:
        why, remedy, instead = f"{task.name} has none", "{terms: [embedding]}", "give it terms: [embedding]"  # type: ignore[attr-defined]
    mistakes = [f"control: without its teacher a model has no labels to learn from, as {why}; omit control."] if control else []
    for number, step in enumerate(steps):
        riders = step.riders if isinstance(step, Train) else ()
        if isinstance(step, Train) and not any(rider.replaces_loss for rider in riders):
            mistakes.append(
                f"steps.{number}: train has no labels to learn from, as {why}; learn from a teacher:"
                f" with: [{{distill: {remedy}}}]."
            )
        if learner := next((rider.key() for rider in riders if rider.learns_labels), None):
            mistakes.append(f"steps.{number}: {learner} also learns from labels, and {why}; {instead}.")
        for one in (step, *riders):
            if isinstance(one, Method) and one.wants_labels:
                mistakes.append(
                    f"steps.{number}: scores: {one.scores} of {one.key()} needs labels, and {why};"  # type: ignore[attr-defined]
                    " choose scores: activation or magnitude."
                )
    return mistakes


def _named_to_plain(one: Named) -> Any:
    fields = one.model_dump(mode="json", exclude_defaults=True, exclude={"riders"})
    if isinstance(one, Train) and one.riders:
        fields["with"] = [_named_to_plain(rider) for rider in one.riders]
    return {one.key(): fields} if fields else one.key()
