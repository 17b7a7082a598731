"""Codes coded again: what comes out is what coding the dense model of these codes gives, and nothing tells of the first ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import hfcompress.checkpoint.quantizer  # noqa: F401
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import KINDS, holds_codes, kind_of
from hfcompress.methods import Adapters, Cast, Quantize, riding
from tests.calibration.test_reconstruct import batches
from tests.tiny import tiny_model

OURS: dict[str, Any] = {"engine": "hfcompress"}
TWICE = "quantize: no dense linear layer is left in the model; it is quantised already."
STEPS = [
    (Quantize(8, **OURS), Quantize(4, **OURS)),
    (Quantize(8, **OURS, group_size=16, symmetric=False), Quantize(4)),
    (Quantize(8), Quantize(4, use_double_quant=False)),
    (Quantize(8), Quantize(4, **OURS, symmetric=False, calibrate="scales")),
    (Quantize(8, **OURS), Quantize(4, calibrate="feedback", samples=16)),
    (Quantize(4), Quantize(4, **OURS, calibrate="diagonal", samples=16)),
    (Quantize(4, quant_type="fp4"), Quantize(4, calibrate="diagonal", samples=16)),
]


def dense(kind: str, dtype: Any = None, layers: int = 1) -> Any:
    model = tiny_model(kind, layers=layers)
    if dtype is not None:
        Cast(dtype).run(model, None)
    return model


def dense_of(model: Any, kind: str, dtype: Any = None) -> Any:
    """The model as it was, with the weights that the codes stand for."""
    made = dense(kind, dtype)
    for name, weight in weights(model).items():
        layer: Any = made.get_submodule(name)
        layer.weight.data = (weight.T if isinstance(layer, Conv1D) else weight).to(made.dtype).contiguous()
    return made


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What the codes of each layer stand for."""
    coded = {name: one for name, one in model.named_modules() if holds_codes(one)}
    return {name: KINDS[kind_of(one) or ""].dequantised(one) for name, one in coded.items()}


def load(kind: str, folder: Path) -> Any:
    auto: Any = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    for module in model.modules():  # a plain bitsandbytes load repacks 4-bit codes into bfloat16 on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def kinds(model: nn.Module) -> Counter[Any]:
    return Counter(kind_of(module) for module in model.modules() if holds_codes(module))


@torch.no_grad()
def check_reload(model: Any, kind: str, folder: Path) -> None:
    """Exact, twice, and the config tells of the last codes alone."""
    batch = batches(kind)[0]
    expected = model.eval()(**batch).logits
    for place in ("again", "and again"):
        save(model, None, folder / place)
        told = json.loads((folder / place / "config.json").read_text())["quantization_config"]
        if told["quant_method"] == "hfcompress":
            assert Counter(edit["kind"] for edit in told["modules"].values()) == kinds(model)
        else:
            assert told["load_in_4bit"] and "load_in_8bit" not in told and set(kinds(model)) == {"linear_4bit"}
        model = load(kind, folder / place)
        assert torch.equal(model(**batch).logits, expected)


# A Conv1D adds its products up in another order than a Linear: what data decide of GPT-2 may differ in a code.
ROWS = [
    (kind, *step) for kind in ("bert", "gpt2") for step in STEPS if kind == "bert" or step[1].calibrate in (False, "scales")
]


@pytest.mark.parametrize(("kind", "first", "then"), ROWS, ids=str)
def test_it_is_coding_the_dense_model_of_the_codes(kind: str, first: Quantize, then: Quantize, tmp_path: Path) -> None:
    model, data = dense(kind), batches(kind)
    first.run(model, None)
    save(model, None, tmp_path / "first")
    for one in (model, load(kind, tmp_path / "first")):
        other, before = dense_of(one, kind), weights(one)
        then.run(one, data)
        then.run(other, data)
        found, expected = weights(one), weights(other)
        assert kinds(one) == kinds(other) and found.keys() == expected.keys() == before.keys()
        for name, weight in found.items():
            assert torch.equal(weight, expected[name]) and not torch.equal(weight, before[name]), name
    check_reload(one, kind, tmp_path)


@pytest.mark.parametrize("then", [Quantize(4, **OURS), Quantize(4, compute_dtype="bfloat16")], ids=str)
def test_half_precision(then: Quantize) -> None:
    model = dense("bert", "bfloat16")
    Quantize(8, **OURS).run(model, None)
    other = dense_of(model, "bert", "bfloat16")
    for one in (model, other):
        then.run(one, None)
    assert all(torch.equal(weight, weights(other)[name]) for name, weight in weights(model).items())
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}


def test_only_what_gets_fewer_bits_is_coded_again(tmp_path: Path) -> None:
    model = dense("bert", layers=2)
    Quantize(8, **OURS, skip_modules=["key"]).run(model, None)
    before = {name: module for name, module in model.named_modules() if holds_codes(module)}
    Quantize(8, **OURS, bits_pattern={"query": 4, r".*layer\.1\..*": 16}).run(model, None)
    for name, module in model.named_modules():
        if name.endswith("query") and "layer.0" in name:
            assert module.bits == 4
        elif name.endswith("key"):  # was dense
            assert getattr(module, "bits", 16) == (16 if "layer.1" in name else 8)
        elif name in before:
            assert module is before[name] and module.bits == 8
    check_reload(model, "bert", tmp_path)


def test_one_layer_at_a_time_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a model whose codes fit fits while it is coded again."""
    model = dense("bert")
    Quantize(8, **OURS).run(model, None)
    alive, most = [0], [0]

    class Counted(nn.Linear):
        def __del__(self) -> None:
            alive[0] -= 1

    def counted(weight: Tensor, bias: Any) -> nn.Linear:
        layer = Counted(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = bias
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return layer

    monkeypatch.setattr("hfcompress.layers.dense_linear", counted)
    Quantize(4, **OURS).run(model, None)
    assert most[0] == 1 and alive[0] == 0
    Quantize(4, calibrate=True, samples=16).run(model, batches("bert"))
    assert most[0] <= 2 and alive[0] == 0, "what codes are chosen of, and what they take the place of"


def test_a_loaded_model_forgets_what_it_was_loaded_as(tmp_path: Path) -> None:
    model = dense("bert")
    Quantize(8).run(model, None)
    save(model, None, tmp_path)
    again = load("bert", tmp_path)
    assert again.is_loaded_in_8bit and again.hf_quantizer is not None
    Quantize(4).run(again, None)
    assert not getattr(again, "is_loaded_in_8bit", False) and getattr(again, "hf_quantizer", None) is None
    assert again.config.quantization_config["load_in_4bit"]


def test_an_error_leaves_the_codes_as_they_were() -> None:
    model, data = dense("bert"), batches("bert")
    Quantize(8, **OURS).run(model, None)
    before, modules = weights(model), dict(model.named_modules())
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.0.attention.output.LayerNorm").bias[0] = torch.inf
    with pytest.raises(CompressionError, match=r"what bert\.encoder\.layer\.0\.intermediate\.dense reads .* is infinite"):
        Quantize(4, **OURS, calibrate=True).run(model, data)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


SAME: list[tuple[Quantize, Quantize]] = [
    (Quantize(8, **OURS), Quantize(8, **OURS)),
    (Quantize(8), Quantize(8)),
    (Quantize(4), Quantize(8)),
    (Quantize(4), Quantize(4, **OURS)),
    (Quantize(4), Quantize(4, **OURS, calibrate="scales")),
    (Quantize(4), Quantize(4, calibrate=True)),
    (Quantize(4, **OURS), Quantize(8, **OURS, target_modules=["query"])),
    (Quantize(8, **OURS), Quantize(**OURS, target_bits=5)),
]


@pytest.mark.parametrize(("first", "then"), SAME, ids=str)
def test_asking_for_the_same_again_is_one_sentence(first: Quantize, then: Quantize) -> None:
    model = dense("bert")
    first.run(model, None)
    with pytest.raises(CompressionError) as error:
        then.run(model, batches("bert"))
    assert str(error.value) == TWICE


def test_the_other_mistakes_have_their_sentences() -> None:
    model = dense("bert")
    Quantize(8, **OURS, target_modules=["query"]).run(model, None)
    with pytest.raises(CompressionError) as error:
        Quantize(8, **OURS, target_modules=["query"]).run(model, None)
    assert str(error.value) == (
        "quantize: the chosen layers are codes of as few bits already; ask for fewer, calibrate them on data in another format, "
        "or choose other target_modules."
    )
    with riding(model, [Adapters(r=2, merge=False)], None):
        pass
    with pytest.raises(CompressionError) as error:
        Quantize(4, **OURS).run(model, None)
    assert str(error.value) == "quantize: the model carries an adapter; merge it first, or list quantize before adapters."
    model = dense("bert")
    Quantize(4).run(model, None)
    name = "bert.encoder.layer.0.attention.self.query"
    model.get_submodule(name).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(CompressionError) as error:
        Quantize(4, **OURS, calibrate=True).run(model, batches("bert"))
    assert str(error.value) == (
        f"quantize: bitsandbytes repacked the codes of {name} for inference at the model's first forward, and nothing else can "
        f"read them; load the model again, and quantize before anything else runs it."
    )
