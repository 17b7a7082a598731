"""Recipes, the command line, low memory and models spread over devices, on the GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hfcompress import CompressionError, LowRank, PruneHeads, PruneLayers, PruneNeurons, Quantize, compress
from hfcompress.calibration.layerwise import layerwise
from hfcompress.calibration.second_moments import Projection
from hfcompress.run.cli import app
from hfcompress.run.doctor import accelerators
from hfcompress.tasks.pretrained import open_model
from tests.gpu.place import DEVICE, Few, auto, logits, made
from tests.run.test_low_memory import STEPS, is_same
from tests.run.test_run import recipe
from tests.tiny import tiny_checkpoint, tiny_images, tiny_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("place")
    tiny_texts(folder / "texts")
    tiny_images(folder / "images")
    for kind in ("bert", "llama", "vit"):
        tiny_checkpoint(folder / kind, kind, layers=4)
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """The recipe of tests/run/test_run.py: fine-tuning, cut heads, neurons fading under a teacher, 8 bits."""
    compress(recipe(place), place / "done")
    return place / "done"


def test_a_recipe_runs_there_and_its_proof_too(done: Path) -> None:
    told = json.loads((done / "report.json").read_text())
    assert {row["settings"]["device"] for row in told["rows"]} == {DEVICE.type}
    assert told["rows"][0]["score"]["accuracy"] < 0.6 < told["rows"][-1]["score"]["accuracy"]
    if DEVICE.type == "cuda":
        assert told["machine"]["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_other_tasks_run_there(place: Path, kind: str) -> None:
    steps: list[Any] = [
        {"prune_heads": {"ratio": 0.5, "ranking": "global", "samples": 16, "repair": True}},
        {"train": {"max_steps": 4, "per_device_train_batch_size": 8, "with": ["distill"]}},
        {"quantize": {"bits": 4, "calibrate": True, "samples": 16}},
    ]
    task = {"name": "image-classification", "dataset": str(place / "images")}
    asked = recipe(place, kind, steps=steps, **({"task": task} if kind == "vit" else {}))
    report = compress(asked, place / f"done-{kind}", overwrite=True)
    assert len(report.rows) == 4 and report.rows[-1].megabytes < 0.6 * report.rows[0].megabytes


def test_eval_and_compare_measure_both_there(place: Path, done: Path) -> None:
    task = ["--task", f"{{name: text-classification, dataset: '{place / 'texts'}', max_length: 32}}"]
    for command in (["eval", str(done)], ["compare", str(place / "bert"), str(done)]):
        found = CliRunner().invoke(app, [*command, *task])
        assert found.exit_code == 0, found.output
        assert "accuracy" in found.output


@pytest.mark.parametrize("which", STEPS)
def test_low_memory_makes_the_same_tensors(which: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "llama", "llama")
    assert is_same(tmp_path / "llama", STEPS[which], tmp_path, device=DEVICE)


SPLIT = {"model.embed_tokens": DEVICE, "model.layers.0": DEVICE, "model.layers.1": "cpu"}
SPLIT |= {"model.norm": "cpu", "model.rotary_emb": DEVICE, "lm_head": "cpu"}


def test_a_model_spread_by_itself_is_the_same(tmp_path: Path) -> None:
    model = made("llama")
    model.save_pretrained(tmp_path)
    spread = open_model(tmp_path, auto("llama"), device_map="auto")
    torch.testing.assert_close(logits(spread, "llama"), logits(model, "llama"), atol=1e-5, rtol=1e-4)


METHODS = [
    PruneNeurons(0.5, scores="magnitude"),
    PruneHeads(0.5, scores="fisher", samples=8),
    PruneHeads(0.5, scores="taylor", samples=8),
    PruneNeurons(0.5, scores="activation", samples=8, repair=True),
    PruneNeurons(0.5, scores="obs", samples=8),
    PruneLayers(number=1),
    LowRank(ratio=0.5, whiten=True, samples=8),
    Quantize(4, engine="hfcompress", calibrate=True, samples=8),
    Quantize(8, engine="hfcompress"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_in_part_on_the_cpu_is_compressed_as_a_whole_one_or_refused(method: Any, tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    if DEVICE.type == "cpu":
        pytest.skip("one device is no two")
    whole = open_model(tmp_path, auto("llama"), DEVICE)
    spread = open_model(tmp_path, auto("llama"), device_map=dict(SPLIT))
    method.run(whole, Few("llama"))
    try:
        method.run(spread, Few("llama"))
    except CompressionError as error:
        assert "memory" in str(error) or "device" in str(error), error
        return
    # what is on the CPU is moved to the GPU for its forward, and stays where it was
    assert {p.device.type for p in spread.parameters() if not p.is_meta} <= {"cpu", DEVICE.type}
    torch.testing.assert_close(logits(spread, "llama"), logits(whole, "llama"), atol=2e-3, rtol=2e-2)


def test_states_off_loaded_to_the_cpu_give_the_same_moments() -> None:
    """The walk keeps hidden states where the model is, or on the CPU."""
    model = made("llama")
    targets = [Projection(name, 1) for name, _ in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    found: list[dict[Projection, Any]] = [{}, {}]
    for offload, moments in zip((False, True), found, strict=True):
        data = list(Few("llama").batches(model, 16))
        layerwise(model, targets, lambda data=data: data, "a test", moments.__setitem__, offload=offload, writes=False)
    assert set(found[0]) == set(found[1]) == set(targets)
    for target, (one,) in found[0].items():
        assert one.tokens and torch.equal(one.square(False), found[1][target][0].square(False))


def test_the_doctor_tells_of_the_gpu() -> None:
    if DEVICE.type == "cuda":
        problems: list[str] = []
        assert torch.cuda.get_device_name() in str(accelerators(problems))
        assert problems == []
