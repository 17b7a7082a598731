"""Recipes: there and back without loss, every mistake with its sentence, all at once."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods import METHODS, Distill, Method, PruneHeads
from hfcompress.run.recipe import Recipe, shipped_recipes, task_from
from hfcompress.run.safe_yaml import read_yaml
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


def test_a_missing_key_is_told_with_what_it_is() -> None:
    (found,) = mistakes(task={"name": "text-classification"})
    assert found.startswith("my.yaml: task.dataset: this key is missing; it is Hub id, file, folder of files")


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
            "steps.1: train comes after quantize (steps.0), and codes can't be trained; train first, or add adapters or heal under "
            "with.",
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
        ([{"quantize": {"bits": 9}}], "steps.0.quantize.bits = 9: input should be 8, 7, 6, 5, 4, 3, 2 or 1."),
        (
            [{"quantize": {"bits": 2, "engine": "hfcompress", "embeddings": 1}}],
            "steps.0.quantize.embeddings = 1: input should be 8, 7, 6, 5, 4, 3 or 2.",
        ),
        (
            [{"train": {"with": [{"quantize_aware": {"embeddings": 1}}]}}],
            "steps.0.train.with.0.quantize_aware.embeddings = 1: input should be greater than or equal to 2.",
        ),
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


@pytest.mark.parametrize("rider", ["adapters", "heal"])
def test_training_codes_through_what_chooses_is_fine(rider: str) -> None:
    recipe = read(steps=[{"quantize": {"bits": 4}}, {"train": {"with": [{rider: {}}]}}])
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


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
DEEP = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "line 5, column 5: more than 10000 values here, aliases counted"),
        (MERGED, "line 5, column 14: more than 10000 values here, aliases counted"),
        (DEEP, "line 40, column 6: more than 40 levels, aliases counted"),
        ("[" * 1000, "line 1, column 41: more than 40 levels"),
        ("a: &a [*a]", "line 1, column 4: more than 10000 values here, aliases counted"),
        ("a: !!int x", "line 1, column 4: the tag 'tag:yaml.org,2002:int' can't be read; write the plain value"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "line 1, column 4: the tag 'tag:yaml.org,2002:p…os.system' can't be read; write the plain value",
        ),
        ("true: 1", "line 1, column 1: the key 'true' is neither a word nor a whole number; put it in quotes if it is meant"),
        (
            "? [a]\n: 1",
            "line 1, column 3: the key a list or mapping is neither a word nor a whole number; put it in quotes if it is meant",
        ),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands twice in one mapping"),
        (f"a: {'9' * 5000}", "line 1, column 4: '9999999999999999999…999999999' is no number"),
        (f"a: 0x{'f' * 100}", "line 1, column 4: '0xfffffffffffffffff…fffffffff' is a number of more than 64 bits"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream but found another document"),
    ],
)
def test_yaml_that_no_recipe_needs_has_its_sentence(text: str, problem: str) -> None:
    with pytest.raises(CompressionError) as error:
        read_yaml(text, "my.yaml")
    assert str(error.value) == f"my.yaml: not valid YAML: {problem}; mend that line."


def test_yaml_that_recipes_may_hold() -> None:
    text = "a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: *a\nday: 2024-13-45\nkeep: {0: [1]}\nself: ~\n"
    plain = read_yaml(text, "my.yaml")
    assert plain == {
        "a": {"x": 1, "y": [2]}, "b": {"x": 3, "y": [2]}, "c": {"x": 1, "y": [2]},
        "day": "2024-13-45", "keep": {0: [1]}, "self": None,
    }  # fmt: skip
    assert plain["a"] is not plain["c"] and plain["a"]["y"] is not plain["b"]["y"], "an override must not change both"
    with pytest.raises(
        CompressionError, match=r"^my.yaml: it is 200001 bytes long, and recipes have 200000 at most; shorten it.$"
    ):
        read_yaml("#" * 200_001, "my.yaml")


def test_keys_that_are_no_fields_have_their_sentence() -> None:
    assert mistakes(self=1) == [
        "my.yaml: recipe: unknown key 'self'. Possible: control, export, goal, model, output_dir, private, push_to, seed, steps, storage, task."
    ]
    assert mistakes(goal={3: 1}) == ["my.yaml: goal: unknown key 3. Possible: faster, max_drop, smaller."]
    assert mistakes(steps=[{"cast": {0: 1}}]) == ["my.yaml: steps.0.cast: unknown key 0. Possible: dtype."]
    assert mistakes(steps=[{1: 2}])[0].startswith("my.yaml: steps.0: unknown method 1. Possible: adapters, cast,")
    assert mistakes(task=["x"]) == ["my.yaml: task: it must be a mapping, as in {name: causal-lm, dataset: my.txt}, not ['x']."]
    assert mistakes(task={"name": ["x"]})[0].startswith("my.yaml: task: unknown task name ['x']. Possible: causal-lm,")
    with pytest.raises(CompressionError) as error:
        Recipe.from_dict({**FINE, 1: 2}, "my.yaml")
    assert str(error.value).startswith("my.yaml: recipe: unknown key 1. Possible: control,")


def test_a_message_repeats_little_of_what_was_written() -> None:
    long = "x\x1b[31m" * 10_000
    for change in ({"steps": [long]}, {long: 1}, {"goal": {long: 1}}, {"steps": [{"cast": {long: long}}]}, {"seed": long}):
        told = "\n".join(mistakes(**change))
        assert len(told) < 1000 and "\x1b" not in told
    told = mistakes(steps=[{"cast": {"dtype": 3}}] * 5000)
    assert len(told) == 41 and told[-1] == "my.yaml: and 4960 more mistakes."


def test_numbers_that_are_none_are_refused() -> None:
    for number in (float("nan"), float("inf")):
        assert mistakes(goal={"max_drop": number}) == [f"my.yaml: goal.max_drop = {number}: input should be a finite number."]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"optim": "adamw_toch"}, "optim = 'adamw_toch': there is no such choice. Did you mean 'adamw_torch'?"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type = 'cosin': there is no such choice. Did you mean 'cosine'?"),
        (
            {"eval_strategy": "sometimes"},
            "eval_strategy = 'sometimes': there is no such choice. Possible: epoch, no, steps.",
        ),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size = 0: it must be 1 or greater."),
        ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps = -2: it must be 1 or greater."),
        ({"learning_rate": -1e-3}, "learning_rate = -0.001: it must be greater than 0."),
        ({"learning_rate": 0}, "learning_rate = 0.0: it must be greater than 0."),
        ({"learning_rate": float("nan")}, "learning_rate = nan: it must be a finite number."),
        ({"weight_decay": -1}, "weight_decay = -1.0: it must be 0 or greater."),
        ({"label_smoothing_factor": 1}, "label_smoothing_factor = 1.0: it must be from 0 to below 1."),
        ({"max_steps": 0}, "max_steps = 0: it must be 1 or greater."),
    ],
)
def test_training_values_are_checked_with_the_recipe(fields: dict[str, Any], sentence: str) -> None:
    assert mistakes(steps=[{"train": fields}]) == [f"my.yaml: steps.0.train: {sentence}"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without an accelerator")
def test_what_this_machine_cannot_train_is_found_without_running(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [{"train": {"use_cpu": False}}, "cast", {"train": {"report_to": "nothing"}}, {"train": {"max_steps": -1}}]
    chosen = read(steps=[*steps, {"train": {"lr_scheduler_type": "cosine_with_min_lr"}}])
    with pytest.raises(CompressionError) as error:
        chosen.check_here()
    told = str(error.value).splitlines()
    assert told[0] == ("steps.0: train: use_cpu: false asks for an accelerator, and none is visible here; leave use_cpu out.")
    assert told[1].startswith("steps.2: train: nothing is not supported, only ")
    assert told[2] == (
        "steps.4: train: One of min_lr or min_lr_rate should be set through the `lr_scheduler_kwargs`; change that argument, or "
        "mend it on this machine."
    )
    assert len(told) == 3
    for name in shipped_recipes():
        Recipe.load(name).check_here()


def test_altered_recipes_are_valid_or_refused() -> None:
    """A hundred of the thousands of scripts/fuzz_recipes.py."""
    spec = importlib.util.spec_from_file_location("fuzz_recipes", Path(__file__).parents[2] / "scripts" / "fuzz_recipes.py")
    assert spec and spec.loader
    spec.loader.exec_module(fuzz := importlib.util.module_from_spec(spec))
    found, faults = fuzz.fuzz(100, seed=20)
    assert not faults, faults[0]
    assert found["valid"] > 3 and found["refused"] > 30, "both kinds come"


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
        ("steps.²=1", "override 'steps.²=1': '²' is no position in that list; possible are 0 to 1."),
        (
            f"steps.{'9' * 5000}=1",
            f"override 'steps.{'9' * 33}…{'9' * 19}': '{'9' * 39}…{'9' * 19}' is no position in that list; possible are 0 to 1.",
        ),
        (f"a{'.a' * 50}=1", f"override 'a{'.a' * 19}…a{'.a' * 8}=1': its path has more than 40 parts; shorten it."),
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
