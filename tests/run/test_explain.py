"""`hfcompress explain` and docs/REFERENCE.md: everything a recipe may write, from the classes that read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hfcompress import CompressionError
from hfcompress.calibration.scores import SCORES
from hfcompress.distillation.terms import TERMS
from hfcompress.export import FORMATS
from hfcompress.methods import METHODS
from hfcompress.run.cli import app
from hfcompress.run.explain import TOPICS, claim, explain, fields, overview, reference
from hfcompress.tasks import TASKS

EVERYTHING = {key: what for some in TOPICS.values() for key, what in some.items()}


def test_no_two_things_share_a_name() -> None:
    assert len(EVERYTHING) == sum(map(len, TOPICS.values()))
    assert {*METHODS, *TASKS, *TERMS, *SCORES, *FORMATS, "train", "recipe", "goal"} == set(EVERYTHING)


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_is_explained_by_its_card_and_its_fields(name: str) -> None:
    told, what = explain(name, 80), EVERYTHING[name]
    assert max(map(len, told.splitlines())) <= 100
    assert " ".join(claim(what).split()) in " ".join(told.split())
    named = re.findall(r"^  (\w+): .*; (?:required|default .*)$", told, re.M)
    possible = [field.alias or key for key, field in getattr(what, "model_fields", {}).items()]
    assert named == [key for key in possible if not (name in TASKS and key == "name")]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("distill", ("teacher_bits", "8 or 4", "default none")),
        ("distill", ("alpha", "number, at least 0 and at most 1", "default 0.7")),
        ("prune_vocab", ("corpus", "text or list of text", "default none")),
        ("prune_vocab", ("min_count", "integer, more than 0", "default 1")),
        ("prune_experts", ("scores", "usage, magnitude or random", 'default "usage"')),
        ("hidden_mse", ("layers", "last or even or mapping of integer to integer", 'default "last"')),
        ("relations", ("of", "list of query, key or value", 'default ["query", "key", "value"]')),
        ("causal-lm", ("dataset", "text", "required")),
        ("train", ("with", "list of method", "default none")),
        ("recipe", ("control", "true or false", "default false")),
    ],
    ids=str,
)
def test_types_and_defaults_are_in_words(name: str, field: tuple[str, str, str]) -> None:
    assert field in [one[:3] for one in fields(EVERYTHING[name])]


def test_the_command_prints_one_or_all() -> None:
    told = CliRunner().invoke(app, ["explain", "causal_lm"])
    assert told.exit_code == 0 and told.output.startswith("causal-lm (tasks)\n")
    told = CliRunner().invoke(app, ["explain"])
    assert told.exit_code == 0
    assert [line.split()[0] for line in told.output.splitlines() if line.startswith("  ")] == list(EVERYTHING)
    assert max(map(len, overview(80).splitlines())) <= 80


def test_an_unknown_name_has_its_sentence() -> None:
    with pytest.raises(CompressionError) as error:
        explain("prune_head")
    assert str(error.value) == "explain: there is no 'prune_head'. Did you mean 'prune_heads'?"


def test_the_reference_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "REFERENCE.md").read_text(encoding="utf-8")
    assert written == reference(), "run python scripts/reference.py"
