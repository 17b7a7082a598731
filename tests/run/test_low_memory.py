"""Compressed while it is read: the same tensors as the usual way makes, in less memory; what can't be done so is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import hfcompress.run.loop as loop
from hfcompress import CompressionError, Recipe, compress, compress_while_loading
from hfcompress.checkpoint.artifact import save
from hfcompress.methods import Cast, LowRank, PruneHeads, Quantize
from hfcompress.results.report import Report
from hfcompress.tasks.pretrained import open_model
from tests.tiny import tiny_checkpoint, tiny_model, tiny_texts

OURS: Any = {"engine": "hfcompress"}
FOUR: Any = {"bits": 4, "calibrate": "scales"}
STEPS: dict[str, tuple[Any, ...]] = {
    "bnb 8": (Quantize(),),
    "bnb 4": (Quantize(**FOUR), Cast(dtype="float16")),
    "ours 8": (Quantize(**OURS, embeddings=8), Cast()),
    "ours 4": (Cast(), Quantize(**OURS, **FOUR, embeddings=4)),
    "to and fro": (Cast(), Quantize(bits=4, bits_pattern={"0.*": 16}), Cast(dtype="float32")),
    "cast": (Cast(),),
}


def saved(model: Any, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    save(model, None, folder)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return tensors, json.loads((folder / "config.json").read_text())


def is_same(source: Path, steps: tuple[Any, ...], place: Path, **opened: Any) -> bool:
    """Whether both ways write the same tensors, bit for bit, and the same config, and leave the same to be trained."""
    usual = open_model(source, **opened)
    for step in steps:
        step.run(usual, None)
    streamed = compress_while_loading(source, *steps, **opened)
    (tensors, config), (expected, told) = saved(streamed, place / "streamed"), saved(usual, place / "usual")
    assert {name: p.requires_grad for name, p in streamed.named_parameters()} == {
        name: p.requires_grad for name, p in usual.named_parameters()
    }
    return (
        config == told
        and vars(streamed).keys() == vars(usual).keys()
        and tensors.keys() == expected.keys()
        and all(
            tensors[name].dtype == one.dtype and torch.equal(tensors[name].view(torch.uint8), one.view(torch.uint8))
            for name, one in expected.items()
            if one.dim()
        )
    )


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        ("bert", "bnb 8"),
        ("bert", "ours 4"),
        ("llama", "bnb 4"),
        ("llama", "ours 8"),
        ("gpt2", "ours 8"),
        ("gpt2", "to and fro"),
        ("t5", "ours 4"),
        ("t5", "to and fro"),
        ("bart", "cast"),
    ],
)
def test_it_is_what_the_usual_way_makes(kind: str, which: str, tmp_path: Path) -> None:
    """Fused and transposed layers, biases, tied embeddings, weights that their owner initialises; one file or several."""
    model = tiny_model(kind)
    model.to(torch.bfloat16 if which == "bnb 4" else torch.float32)
    model.save_pretrained(tmp_path / "it", max_shard_size="100KB" if which.startswith("ours") else "5GB")
    assert is_same(tmp_path / "it", STEPS[which], tmp_path)


def test_a_pickle_a_head_that_is_new_and_a_dtype_that_the_file_has_not(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.dtype = torch.float16
    model.config.save_pretrained(tmp_path / "it")
    torch.save(model.bert.state_dict(), tmp_path / "it" / "pytorch_model.bin")
    opened = {"task": AutoModelForSequenceClassification, "new_head": True, "seed": 3}
    assert is_same(tmp_path / "it", STEPS["bnb 8"], tmp_path, **opened)


@pytest.mark.parametrize("which", ["ours 4", "to and fro"])
def test_a_tie_of_the_config_that_the_file_parts(which: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "it")
    file = tmp_path / "it" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    assert is_same(tmp_path / "it", STEPS[which], tmp_path)


@pytest.mark.parametrize("method", [PruneHeads(ratio=0.5, scores="magnitude"), LowRank(rank=4)])
def test_a_model_of_ours_that_was_cut_or_factored(method: Any, tmp_path: Path) -> None:
    model = tiny_model("bert")
    method.run(model, None)
    save(model, None, tmp_path / "it")
    assert is_same(tmp_path / "it", STEPS["ours 8"], tmp_path)


PROGRAM = """
import sys
from pathlib import Path
import torch
from hfcompress import Cast, Quantize, compress_while_loading
from hfcompress.tasks.pretrained import open_model
def now(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)) * 1024
def peak(make):
    Path("/proc/self/clear_refs").write_text("5")
    before = now("VmRSS")
    make()
    return now("VmHWM") - before
step = Quantize(engine="hfcompress", bits=4)
def usual():
    step.run(open_model(sys.argv[1]), None)
compress_while_loading(sys.argv[2], step)
step.run(open_model(sys.argv[2]), None)  # what either imports is there now
print(peak(lambda: compress_while_loading(sys.argv[1], step)), peak(usual))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is told by Linux")
def test_the_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "layers": 6}
    model = tiny_model("llama", **sizes)
    bytes_ = sum(parameter.numel() for parameter in model.parameters()) * 4
    model.save_pretrained(tmp_path / "large", max_shard_size="15MB")
    tiny_model("llama").save_pretrained(tmp_path / "small")
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "large"), str(tmp_path / "small")], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr[-800:]
    streamed, usual = map(int, told.stdout.split())
    assert streamed < 0.6 * bytes_ < bytes_ < usual, "codes, scales, and a few copies of a layer"


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_texts(folder / "texts", each=12)
    tiny_checkpoint(folder / "bert", "bert")
    return folder


def recipe(place: Path, *steps: Any, **more: Any) -> Recipe:
    task = {"name": "text-classification", "max_length": 32, "dataset": str(place / "texts"), **more.pop("task", {})}
    return Recipe.from_dict({"model": str(place / "bert"), "task": task, "steps": list(steps), **more})


def test_a_run_makes_the_same_and_says_what_was_not_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"quantize": {"bits": 8, "engine": "hfcompress", "embeddings": 8}}, {"cast": {"dtype": "bfloat16"}}
    asked = recipe(place, *steps, goal={"smaller": 2})
    out = place / "low"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop, "put_in_place", killed)
        compress(asked, out, low_memory=True)
    assert not out.exists(), "nothing that could be taken for a result"
    report = compress(asked, out, low_memory=True)
    compress(asked, place / "usual")
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (out / name).read_bytes() == (place / "usual" / name).read_bytes(), name
    usual, told = Report.load(place / "usual" / "report.json"), Report.load(out / "report.json")
    assert [row.step for row in told.rows] == ["as it came", "quantize 8 + cast bfloat16"]
    assert told.rows[0].megabytes == usual.rows[0].megabytes and told.rows[0].parameters == usual.rows[0].parameters
    assert told.rows[0].score == {} and told.rows[0].latency_ms == {} and not told.faster
    assert told.rows[-1].score["accuracy"] == usual.rows[-1].score["accuracy"]
    assert not report.check_goal({"smaller": 2}) and "accuracy" in told.verdict() and "–" not in told.verdict()
    assert "neither timed nor scored, as with low memory" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("steps", "more", "sentence"),
    [
        (
            [{"prune_heads": {"ratio": 0.5}}],
            {},
            "--low-memory: steps.0, prune_heads (ratio: 0.5), needs the whole model; possible are quantize and cast, without "
            "data to choose by (calibrate: false or scales, no target); do without low memory, or take it out.",
        ),
        (
            ["cast", {"quantize": {"bits": 4, "calibrate": "feedback"}}],
            {},
            "--low-memory: steps.1, quantize (bits: 4, calibrate: feedback), needs the whole model; possible are quantize and "
            "cast, without data to choose by (calibrate: false or scales, no target); do without low memory, or take it out.",
        ),
        (
            [{"quantize": {"target_bits": 6}}],
            {},
            "--low-memory: steps.0, quantize (target_bits: 6.0), needs the whole model; possible are quantize and cast, "
            "without data to choose by (calibrate: false or scales, no target); do without low memory, or take it out.",
        ),
        (
            ["quantize"],
            {"goal": {"smaller": 2, "max_drop": 0.1}},
            "--low-memory: goal.max_drop compares with the model as it came, which is never whole in memory; possible is "
            "smaller; take max_drop out, or run without --low-memory.",
        ),
        (
            ["quantize"],
            {"export": ["openvino"]},
            "--low-memory: an export is traced with the whole model in memory; take export out, or run without --low-memory.",
        ),
        (
            ["quantize"],
            {"task": {"metrics": ["agreement"]}},
            "--low-memory: agreement is with the model as it came, which is never whole in memory; give labelled data with "
            "other metrics, or run without --low-memory.",
        ),
    ],
)
def test_what_needs_the_whole_model_is_refused(place: Path, steps: Any, more: Any, sentence: str) -> None:
    with pytest.raises(CompressionError) as told:
        compress(recipe(place, *steps, **more), place / "refused", low_memory=True)
    assert str(told.value) == sentence


def test_what_python_may_not_ask_for(tmp_path: Path) -> None:
    (tmp_path / "it.gguf").touch()
    with pytest.raises(CompressionError) as told:
        compress_while_loading(tmp_path / "it.gguf", Quantize())
    assert str(told.value) == (
        f"model {str(tmp_path / 'it.gguf')!r}: a GGUF file is unpacked whole when it is loaded; do without low memory, or "
        f"name a folder with safetensors."
    )
    with pytest.raises(CompressionError) as told:
        compress_while_loading(tmp_path, Quantize(), Quantize(bits=4))
    assert str(told.value) == "low memory: steps.1, quantize (bits: 4), finds codes where it needs weights; quantize once."


def test_what_is_wrong_with_a_layer_is_told_as_ever(tmp_path: Path) -> None:
    model = tiny_model("bert")
    layer: Any = model.get_submodule("bert.encoder.layer.1.output.dense")
    layer.weight.data[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "it")
    with pytest.raises(CompressionError) as told:
        compress_while_loading(tmp_path / "it", Quantize(**FOUR))
    assert str(told.value) == (
        "step 1 of 1, quantize: quantize: calibrate: scales: the weight of bert.encoder.layer.1.output.dense holds infinite "
        "values, or values that are no numbers; load the model again, or name bert.encoder.layer.1.output.dense in skip_modules."
    )
    file = tmp_path / "it" / "model.safetensors"
    tensors = load_file(file)
    dropped = tensors.pop("bert.encoder.layer.1.output.dense.bias")
    for change in ({}, {"bert.encoder.layer.1.output.dense.bias": dropped[1:].clone()}):
        save_file({**tensors, **change}, file, {"format": "pt"})
        said = []
        for load in (open_model, lambda path: compress_while_loading(path, Quantize())):
            with pytest.raises(CompressionError) as told:
                load(tmp_path / "it")
            said.append(str(told.value))
        assert said[0] == said[1]
