"""Recipes: there and back without loss, every mistake with its sentence, all at once."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods import METHODS, Distill, Method, PruneHeads
from hfcompress.run.recipe import Recipe, shipped_recipes, task_from
from hfcompress.run.schema import schema
from hfcompress.run.train import Train
from tests.methods.test_laws import METHOD_ROWS

FINE: dict[str, Any] = {
    "model": "me/my-bert",
    "task": {"name": "text-classification", "dataset": "glue/sst2"},
    "steps": [{"prune_heads": {"ratio": 0.5}}, "cast"],
}


def read(**change: Any) -> Recipe:
    return Recipe.from_dict({**FINE, **change}, "my.yaml")


def mistakes(**change: Any) -> list[str]:
    with pytest.raises(CompressionError) as error:
        read(**change)
    return str(error.value).splitlines()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_goes_there_and_back(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())).to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_opens_with_what_it_buys_and_the_command(name: str) -> None:
    head = [line for line in shipped_recipes()[name].read_text().splitlines() if line.startswith("#")]
    for word in ("Buys:", "Costs:", f"Run:   hfcompress run {name}", "Needs:"):
        assert any(line.startswith(f"# {word}") for line in head), word
    for line in head:
        if line.startswith("# Run:"):
            _, run, *words = shlex.split(line.partition("Run:")[2])
            assert run == "run" and Recipe.load(words[0], words[1:])


@pytest.mark.parametrize("method", [method for methods in METHOD_ROWS.values() for method in methods], ids=str)
def test_every_method_survives_the_round_trip(method: Method) -> None:
    plain: Any = {method.key(): method.model_dump(mode="json", exclude_defaults=True)}
    steps = [{"train": {"epochs": 2.0, "learning_rate": "1e-4", "with": [plain]}}] if method.needs_training else [plain]
    recipe = read(steps=steps)
    (step,) = recipe.steps
    assert method in (step, *getattr(step, "riders", ()))
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    if method.needs_training:
        assert recipe.to_dict()["steps"] == [{"train": {"epochs": 2.0, "learning_rate": 1e-4, "with": [plain]}}]


def test_all_mistakes_are_shown_at_once_with_a_did_you_mean() -> None:
    found = mistakes(
        modle="x",
        steps=[
            {"prune_head": {"ratio": 0.3}},
            {"prune_weights": {"sparsty": 0.3}},
            {"prune_neurons": {"ratio": 1.5}},
            {"train": {"learning_rat": 1e-4, "with": [{"distil": {}}]}},
            {"train": {"learning_rat": 1e-4}},
            {"low_rank": {}},
            3,
        ],
        task={"name": "text-clasification", "dataset": "glue/sst2"},
        goal={"smaler": 2},
    )
    assert found == [
        "my.yaml: steps.0: unknown method 'prune_head'. Did you mean 'prune_heads'?",
        "my.yaml: steps.1.prune_weights.sparsity: this key is missing; it is Share of the weights to set to zero in every target "
        "layer, 0..1.",
        "my.yaml: steps.1.prune_weights: unknown key 'sparsty'. Did you mean 'sparsity'?",
        "my.yaml: steps.2.prune_neurons.ratio = 1.5: input should be less than 1.",
        "my.yaml: steps.3.train.with.0: unknown method 'distil'. Did you mean 'distill'?",
        "my.yaml: steps.3.train: unknown key 'learning_rat'. Did you mean 'learning_rate'?",
        "my.yaml: steps.4.train: unknown key 'learning_rat'. Did you mean 'learning_rate'?",
        "my.yaml: steps.5.low_rank: give exactly one of rank, ratio and energy.",
        "my.yaml: steps.6: a step is one name with its fields, as in `- prune_heads: {ratio: 0.3}`, not 3.",
        "my.yaml: task: unknown task name 'text-clasification'. Did you mean 'text-classification'?",
        "my.yaml: goal: unknown key 'smaler'. Did you mean 'smaller'?",
        "my.yaml: recipe: unknown key 'modle'. Did you mean 'model'?",
    ]


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (
            [{"quantize": {"bits": 8}}, {"train": {}}],
            "steps.1: train comes after quantize (steps.0), and codes can't be trained; train first, or add adapters under with.",
        ),
        (
            [{"quantize": {"bits": 8}}, {"prune_heads": {"ratio": 0.5}}],
            "steps.1: prune_heads comes after quantize (steps.0), and codes can't be cut; list it before quantize.",
        ),
        (
            [{"distill": {}}],
            "steps.0: distill does nothing without training; list it under `with:` of a train step.",
        ),
        (
            [{"train": {"learning_rate": "fast"}}],
            "steps.0.train: learning_rate = 'fast': Input should be a valid number, unable to parse string as a number.",
        ),
        ([{"train": {"num_train_epochs": 3}}], "steps.0.train: num_train_epochs is called epochs here; write epochs."),
        (
            [{"quantize": {"bits": 8, "quant_type": "nf4"}}],
            "steps.0.quantize: quant_type belong to bits: 4; remove them or set bits: 4.",
        ),
        ([{"quantize": {"bits": 3}}], "steps.0.quantize.bits = 3: input should be 8 or 4."),
        ([{"prune_heads": {"ratio": 0}}], "steps.0.prune_heads.ratio = 0: input should be greater than 0."),
        ([{"prune_heads": [0.5]}], "steps.0.prune_heads: its fields must be a mapping, as in {ratio: 0.3}, not [0.5]."),
        (
            [{"student": {"every": 2, "layers": [1]}}],
            "steps.0.student: every and layers are several ways to choose layers; give one of them.",
        ),
        ([], "steps = (): tuple should have at least 1 item after validation, not 0."),
    ],
)
def test_a_mistake_in_the_steps_has_its_sentence(steps: Any, sentence: str) -> None:
    assert mistakes(steps=steps) == [f"my.yaml: {sentence}"]


def test_training_codes_through_adapters_is_fine() -> None:
    recipe = read(steps=[{"quantize": {"bits": 4}}, {"train": {"with": [{"adapters": {}}]}}])
    assert recipe.reference == 0


def test_a_missing_part_of_the_recipe_has_its_sentence() -> None:
    with pytest.raises(CompressionError, match=r"my.yaml: task: this key is missing"):
        Recipe.from_dict({"model": "x", "steps": ["cast"]}, "my.yaml")
    with pytest.raises(CompressionError, match="a recipe is a mapping with model, task and steps, not list"):
        Recipe.from_dict([], "my.yaml")
    with pytest.raises(CompressionError, match=r"recipe 'quickstrt': there is no such file .* Did you mean 'quickstart'\?"):
        Recipe.load("quickstrt")


def test_broken_yaml_has_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: [")
    with pytest.raises(CompressionError, match=r"a.yaml: not valid YAML: .* mend that line."):
        Recipe.load(str(tmp_path / "a.yaml"))


def test_overrides_by_path(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({**FINE, "steps": [{"prune_heads": {"ratio": 0.5}}, "cast", {"train": {"epochs": 1}}]}))
    overrides = ["model=you/yours", "steps.0.prune_heads.ratio=0.25", "steps.1.cast.dtype=float16", "steps.2.train.epochs=2"]
    recipe = Recipe.load(str(file), [*overrides, "goal.smaller=2", "push_to=me/x", "task.max_train_samples=10"])
    assert recipe.model == "you/yours"
    assert recipe.steps[0] == PruneHeads(0.25)
    assert recipe.to_dict()["steps"][1:] == [{"cast": {"dtype": "float16"}}, {"train": {"epochs": 2.0}}]
    assert (recipe.goal.smaller, recipe.push_to, recipe.task.max_train_samples) == (2, "me/x", 10)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps.9.train.epochs=2", "override 'steps.9.train.epochs=2': '9' is no position in that list; possible are 0 to 1."),
        ("model", "override 'model': it must read key=value, as in steps.1.train.epochs=2 or model=me/my-bert."),
        ("stepps.0=1", "override 'stepps.0=1': the recipe has no 'stepps' there. Did you mean 'steps'?"),
        ("model.x=1", "override 'model.x=1': 'x' is inside a value, not a mapping; shorten the path."),
        (
            "steps.0.prune_head.ratio=1",
            "override 'steps.0.prune_head.ratio=1': the recipe has no 'prune_head' there. Did you mean 'prune_heads'?",
        ),
    ],
)
def test_a_wrong_override_has_its_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(FINE))
    with pytest.raises(CompressionError) as error:
        Recipe.load(str(tmp_path / "a.yaml"), [override])
    assert str(error.value) == sentence


def test_the_reference_is_the_model_before_the_first_compressing_step() -> None:
    assert read().reference == 0
    assert Recipe.load("quickstart").reference == 1
    assert read(steps=[{"train": {}}, {"train": {"with": ["distill"]}}, "cast"]).reference == 1


def test_a_step_by_position_equals_one_by_name() -> None:
    assert PruneHeads(0.3) == PruneHeads(ratio=0.3)
    assert Distill("original", 3.0).temperature == 3.0
    assert Train(epochs=2).label == "train"


def test_a_task_alone_can_be_read() -> None:
    assert task_from({"name": "causal-lm", "dataset": "wikitext/wikitext-2-raw-v1"}).name == "causal-lm"
    with pytest.raises(CompressionError, match="unknown task name 'x'"):
        task_from("x")


def test_the_schema_knows_every_step_and_task() -> None:
    told = schema()
    text = json.dumps(told)
    steps = {key for one in told["properties"]["steps"]["items"]["oneOf"] for key in one.get("properties", {})}
    assert steps == {"train", *METHODS}
    assert "per_device_train_batch_size" in text and "block_size" in text
    for name in METHODS:
        for field in METHODS[name].model_fields.values():
            assert json.dumps(field.description)[1:-1] in text
