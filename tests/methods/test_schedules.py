"""When units go: at once, in parts, or fading while the model trains; and cuts that need no import to load."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from hfcompress import CompressionCallback
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods import LowRank, PruneHeads, PruneNeurons, riding
from hfcompress.surgery.units.verify import units_of
from tests import fresh
from tests.calibration.test_scores import given, mixtral, ragged
from tests.methods.test_corners import Given, arguments
from tests.tiny import tiny_model


def read(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the last output projection of neurons reads: (tokens, neurons)."""
    seen: list[Tensor] = []
    layer = model.get_submodule(units_of(tiny_model("bert"), "neurons")[0].output)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("warmup", "fade"), [(0.0, 0.3), (0.2, 0.7), (0.5, 1.0)])
def test_units_fade_along_a_cubic_between_warmup_and_cooldown(warmup: float, fade: float) -> None:
    model, batch = tiny_model("bert"), ragged(False)
    whole = read(model, batch)
    with riding(model, [PruneNeurons(0.5, scores="l1", warmup=warmup, fade=fade)], [batch]) as tick:
        for progress in torch.linspace(0, 1, 21).tolist():
            tick(progress)
            left = (1 - min(1.0, max(0.0, progress - warmup) / (fade - warmup))) ** 3  # Zhu, Gupta 2017, equation 1
            now = read(model, batch)
            shares = (now / whole).median(dim=0).values
            assert ((shares - 1).abs() < 1e-5).sum() == 64 or left > 1 - 1e-5
            assert ((shares - left).abs() < 1e-5).sum() >= 64
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 64


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_parts_of_a_cut_go_one_after_another(iterations: int) -> None:
    model, batch = tiny_model("bert"), ragged(False)
    method = PruneNeurons(0.75, iterations=iterations, round_to=1, fade=0.6, samples=6)
    with riding(model, [method], [batch]) as tick:
        for part in range(1, iterations + 1):
            tick(0.6 * part / iterations - 1e-9)
            gone = (read(model, batch).abs().max(dim=0).values < 1e-6).sum()
            assert gone == round(128 * 0.75 * part / iterations)
        before = read(model, batch)
        tick(0.8)
        torch.testing.assert_close(
            read(model, batch), before, atol=1e-6, rtol=0, msg="the rest of the training has the cut in place"
        )
        tick(1.0)
    assert [units.count for units in units_of(model, "neurons")] == [32, 32]


def test_a_trainer_cuts_in_parts(tmp_path: Path) -> None:
    model, batch = tiny_model("bert"), ragged(False)
    callback = CompressionCallback(PruneHeads(0.5, iterations=2, warmup=0.25, fade=0.75), PruneNeurons(0.5, repair=True))
    Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=Given(batch), callbacks=[callback]).train()
    assert [units.count for kind in ("heads", "neurons") for units in units_of(model, kind)] == [2, 2, 64, 64]
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------- even

EVEN = {
    "bert": (PruneNeurons(0.5, even=True, scores="l1"), "AutoModelForSequenceClassification"),
    "gpt2": (PruneNeurons(0.25, even=True, scores="l1"), "AutoModelForCausalLM"),
    "llama": (PruneNeurons(0.4, even=True, scores="l1"), "AutoModelForCausalLM"),
    "qwen3": (PruneHeads(0.5, even=True, scores="l1"), "AutoModelForCausalLM"),
    "t5": (PruneNeurons(0.5, even=True, scores="l1"), "AutoModelForSeq2SeqLM"),
    "bart": (PruneNeurons(0.3, even=True, scores="l1"), "AutoModelForSeq2SeqLM"),
    "vit": (PruneHeads(0.5, even=True, scores="l1"), "AutoModelForImageClassification"),
    "mixtral": (PruneNeurons(0.34, even=True, scores="l1"), "AutoModelForCausalLM"),
}
LOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
root = sys.argv[1]
for kind, auto in json.loads(sys.argv[2]).items():
    more = {"experts_implementation": "eager"} if kind == "mixtral" else {}
    model = getattr(transformers, auto).from_pretrained(f"{root}/{kind}", **more).eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(f"{root}/{kind}.batch")).logits}, f"{root}/{kind}.answer")
assert "hfcompress" not in sys.modules
"""


def test_even_cuts_load_without_hfcompress(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected = {}
    for kind, (method, _) in EVEN.items():
        model, batch = given(kind)
        if kind == "vit":
            PruneNeurons(0.5, even=True, scores="l1").run(model, None)
        method.run(model, None)
        if kind not in ("t5", "bart"):
            del batch["labels"]
        save(model, None, tmp_path / kind)
        assert "quantization_config" not in json.loads((tmp_path / kind / "config.json").read_text())
        save_file({key: value.contiguous() for key, value in batch.items()}, tmp_path / f"{kind}.batch")
        with torch.no_grad():
            expected[kind] = model(**batch).logits
    autos = json.dumps({kind: auto for kind, (_, auto) in EVEN.items()})
    done = fresh.run([sys.executable, "-c", LOAD, str(tmp_path), autos])
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, logits in expected.items():
        assert torch.equal(load_file(tmp_path / f"{kind}.answer")["logits"], logits), kind


def test_uneven_where_even_is_not_asked_for_still_needs_the_import(tmp_path: Path) -> None:
    model = mixtral()
    units = units_of(model, "neurons")[0]
    with torch.no_grad():  # not all layers lose the same
        model.get_parameter(units.outputs[0].tensor).mul_(0.1)
    PruneNeurons(0.5, scores="l1", ranking="global").run(model, None)
    counts = [units.count for units in units_of(model, "neurons")]
    assert len(set(counts)) == 2
    save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hfcompress"


def test_even_says_what_the_config_can_tell() -> None:
    with pytest.raises(
        CompressionError, match="BertConfig can't tell 2 heads a layer of 4; its fields have no number for fewer"
    ):
        PruneHeads(0.5, even=True, scores="l1").run(tiny_model("bert"), None)
    with pytest.raises(
        CompressionError,
        match=r"LlamaConfig can't tell 3 heads a layer of 4; possible are 1 \(ratio 0.75\), 2 \(ratio 0.50\) of 4; choose such",
    ):
        PruneHeads(0.25, even=True, scores="l1").run(tiny_model("llama", num_key_value_heads=4), None)
    with pytest.raises(ValueError, match="even keeps the same number in every layer, and ranking: global"):
        PruneNeurons(0.5, even=True, ranking="global")


def test_even_looks_at_the_cut_alone() -> None:
    model = tiny_model("bert")
    LowRank(rank=4, target_modules=["query"]).run(model, None)
    PruneNeurons(0.5, even=True, scores="l1").run(model, None)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 64


# ---------------------------------------------------------------- the bench


def test_the_bench_goes_on_where_it_was_stopped_and_tells_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import bench_prune

    monkeypatch.setattr(bench_prune, "DOCS", tmp_path)
    file = tmp_path / "deep" / "cells.json"
    asked: list[float] = []

    def measured() -> dict[str, Any]:
        asked.append(1)
        return {"cut": 0.5 + 0.1 * len(asked), "trained": 0.9, "seconds": 3.0}

    for _ in range(2):
        kept = bench_prune.Kept(file)
        for score in ("random", "fisher"):
            kept.once(f"scores/{score}/False/1", measured)
    assert len(asked) == 2
    kept.once("scores/whole", lambda: {"accuracy": 0.97})
    kept.once("smol/whole", lambda: {"perplexity": 20.0})
    kept.once("smol/fisher/True/32", lambda: {"perplexity": 25.0, "tokens": 16384, "minutes": 4.0})
    kept.once("layers/influence", lambda: {"perplexity": 30.0, "layers": 20, "tokens": 0, "minutes": 1.0})
    times = {"min": 150.0, "median": 160.0}
    kept.once(
        "speed",
        lambda: {"batch": 8, "parameters": {"whole": 2e7, "cut": 1e7}, "whole": times, "cut": {"min": 75.0, "median": 80}},
    )
    bench_prune.write(kept.cells)
    page = (tmp_path / "pruning.md").read_text()
    assert "| fisher | 1 / 0 | 0.7000 |  | 0.9000 |  | 3 |" in page and "| times faster | 2.00 | 2.00 |" in page
    assert "| fisher | yes | 25.00 | 16,384 | 4.0 |" in page and "| influence | 20 | 30.00 | 0 | 1.0 |" in page
    assert "keep +0.1000 more accuracy than chance" in page
