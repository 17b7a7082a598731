"""Artifacts that earlier versions saved load as they did then: `saved/` was written by 0.1.0, with the logits it gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hfcompress  # noqa: F401

SAVED = sorted(path.parent for path in Path(__file__).parent.glob("saved/*/config.json"))


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_an_artifact_of_an_earlier_version_loads_as_it_did(folder: Path) -> None:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    for module in model.modules():  # a plain bitsandbytes load repacks 4-bit codes into bfloat16 on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    told = load_file(folder / "expected.safetensors")
    inputs = {key.removeprefix("inputs."): value for key, value in told.items() if key.startswith("inputs.")}
    with torch.no_grad():
        found = model(**inputs).logits.float()
    assert found.shape == told["logits"].shape
    assert torch.allclose(found, told["logits"], atol=1e-4, rtol=1e-4), float((found - told["logits"]).abs().max())


def test_every_kind_of_layer_is_among_them() -> None:
    kinds: set[str] = set()
    for folder in SAVED:
        told = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
        kinds |= {edit["kind"] for edit in told.get("modules", {}).values()} | {told.get("quant_method", "plain")}
    expected = {"linear", "conv1d", "counts", "low_rank_linear", "low_rank_embedding", "linear_4bit", "linear_8bit"}
    assert kinds >= expected | {"plain", "bitsandbytes"}
