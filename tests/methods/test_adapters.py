"""Adapters: where they start, what merging makes of them, which of them PEFT loads, and what is refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from hfcompress import Adapters, CompressionCallback, CompressionError, PruneNeurons, Quantize, attach, riding
from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.describe import diff
from hfcompress.layers import holds_codes
from hfcompress.layers.bnb_library import quiet_casts
from hfcompress.layers.quantized import QuantLinear
from hfcompress.results.measure import undisturbed
from hfcompress.surgery.lora import adapted
from hfcompress.surgery.modules import HALVES
from tests import fresh
from tests.methods.test_laws import FewBatches, auto, dense_weight, half_step, logits, oriented
from tests.tiny import VISION, tiny_model

FAMILIES = ("bert", "llama", "gpt2", "t5", "vit")
STARTS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_rslora": True, "init_lora_weights": "gaussian"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4", "use_dora": True, "use_rslora": True},
]


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if kind in VISION:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}
    ids = torch.randint(5, 120, (4, 12), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}


def outputs(model: Any, kind: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), undisturbed(model):  # a plain bitsandbytes load repacks 4-bit codes into bfloat16 on some CPUs
        return model(**inputs(kind, model.dtype)).logits.float()


def learn(model: nn.Module) -> None:
    """What a training would have left in the adapters, by chance."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.02
            if "lora_magnitude_vector" in name:
                parameter *= 1.1


def rounding(outputs: torch.Tensor) -> float:
    """What a few layers in float32 may be off by."""
    return 1e-4 * float(outputs.abs().max())


@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_start_at_the_model_and_merging_changes_nothing(kind: str, start: dict[str, Any]) -> None:
    model = tiny_model(kind)
    before = outputs(model, kind)
    with riding(model, [Adapters(r=3, **start)], None):
        if str(start.get("init_lora_weights")).startswith("pissa"):
            torch.testing.assert_close(outputs(model, kind), before, atol=rounding(before), rtol=0)
        else:
            assert torch.equal(outputs(model, kind), before)
        learn(model)
        moved = outputs(model, kind)
        assert (moved - before).abs().max() > 10 * rounding(moved), "or the law says nothing"
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(outputs(model, kind), moved, atol=rounding(moved), rtol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("start", [{"use_dora": True}, {"init_lora_weights": "pissa", "use_rslora": True}], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_in_half_precision_every_weight_is_a_rounding_away(kind: str, start: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(kind).to(dtype)
    before = {name: dense_weight(module).clone() for name, module in model.named_modules() if hasattr(module, "weight")}
    eps, wanted, limits = torch.finfo(dtype).eps, {}, {}
    with riding(model, [Adapters(r=3, **start)], None), torch.no_grad():
        for name, layer in adapted(model).items():
            rest = dense_weight(layer.get_base_layer()).float()
            assert ((effective(layer) - before[name]).abs() <= eps * rest.abs() + 1e-6).all(), name
        learn(model)
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert trained == {torch.float32}, "most updates are below what half precision can tell of a number"
        for name, layer in adapted(model).items():
            wanted[name] = effective(layer)
            # the update is rounded, the sum, and DoRA's norm of it: half an eps each
            update = oriented(layer.get_delta_weight("default"), layer).abs()
            limits[name] = 2 * eps * (update + wanted[name].abs()) + torch.finfo(dtype).tiny
        assert outputs(model, kind).isfinite().all()
    for name, weight in wanted.items():
        merged = dense_weight(model.get_submodule(name))
        assert merged.dtype == dtype
        assert ((merged - weight).abs() <= limits[name]).all(), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("start", [{"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_merged_codes_are_within_half_a_step(kind: str, start: dict[str, Any], bits: int) -> None:
    model = tiny_model(kind)
    Quantize(bits).run(model, None)
    before = outputs(model, kind)
    with riding(model, [Adapters(r=4, **start)], None), torch.no_grad():
        assert torch.equal(outputs(model, kind), before)
        learn(model)
        wanted = {name: effective(layer) for name, layer in adapted(model).items()}
    assert any(holds_codes(model.get_submodule(name)) for name in wanted)
    for name, weight in wanted.items():
        layer = model.get_submodule(name)
        limit = half_step(weight, layer) if holds_codes(layer) else torch.full_like(weight, 1e-5)
        assert ((dense_weight(layer) - weight).abs() <= limit).all(), name


def effective(layer: Any) -> torch.Tensor:
    """(out, in): the weight that a layer and its adapter compute with, by the formulas of the papers."""
    base = dense_weight(layer.get_base_layer()).float()
    weight = base + oriented(layer.get_delta_weight("default"), layer)
    if "default" not in layer.lora_magnitude_vector:
        return weight
    return weight * (layer.lora_magnitude_vector["default"].weight / weight.norm(dim=1))[:, None]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_merging_into_dense_layers_is_exact_and_gives_a_plain_model(kind: str, dora: bool, tmp_path: Path) -> None:
    model = tiny_model(kind)
    Quantize(4).run(model, None)
    with riding(model, [Adapters(r=4, merge="dense", use_dora=dora)], None):
        learn(model)
        moved = outputs(model, kind)
    torch.testing.assert_close(outputs(model, kind), moved, atol=rounding(moved), rtol=0)
    assert not any(holds_codes(module) for module in model.modules())
    assert diff(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    save(model, None, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again, kind), outputs(model, kind))


def test_a_model_loaded_in_low_bits_is_a_plain_one_once_it_is_dense(tmp_path: Path) -> None:
    model = tiny_model("llama")
    Quantize(4).run(model, None)
    save(model, None, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with riding(loaded, [Adapters(r=4, merge="dense")], None):
        learn(loaded)
    loaded.to(torch.bfloat16)
    Trainer(model=loaded, args=arguments(tmp_path))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_loftq_is_the_best_that_the_rank_allows(bits: int, dora: bool) -> None:
    model = tiny_model("gpt2")
    original = copy.deepcopy(model)
    Quantize(bits).run(model, None)
    method = Adapters(r=4, init_lora_weights="loftq", use_dora=dora, use_rslora=True, lora_alpha=3)
    with torch.no_grad(), riding(model, [method], Batches(None, original=original)):
        for name, layer in adapted(model).items():
            weight, codes = dense_weight(original.get_submodule(name)), dense_weight(layer.get_base_layer())
            left = torch.linalg.svdvals(weight - codes)[4:].square().sum().sqrt()  # Eckart and Young's
            torch.testing.assert_close((weight - effective(layer)).norm(), left, rtol=1e-3, atol=1e-6)
            assert (weight - effective(layer)).norm() < (weight - codes).norm()


def test_loftq_of_full_rank_is_the_original() -> None:
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    before = outputs(model, "llama")
    Quantize(4).run(model, None)
    names = ["q_proj", "o_proj"]
    for name, module in model.named_modules():
        if holds_codes(module) and not name.endswith(tuple(names)):
            model.set_submodule(name, copy.deepcopy(original.get_submodule(name)))
    rounded = outputs(model, "llama")
    method = Adapters(r=64, init_lora_weights="loftq", target_modules=names, merge="dense")
    with riding(model, [method], Batches(None, original=original)):
        torch.testing.assert_close(outputs(model, "llama"), before, atol=rounding(before), rtol=0)
    torch.testing.assert_close(outputs(model, "llama"), before, atol=rounding(before), rtol=0)
    assert (rounded - before).abs().max() > 10 * rounding(before)


# ---------------------------------------------------------------- kept


@pytest.mark.parametrize("start", [{}, *STARTS], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_kept_adapter_loads_on_the_model_as_it_came(kind: str, start: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "base")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with riding(model, [Adapters(r=4, merge=False, **start)], None):
        learn(model)
        moved = outputs(model, kind)
    kept = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    torch.testing.assert_close(outputs(model, kind), moved, atol=rounding(moved), rtol=0)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded, kind), outputs(model, kind), atol=1e-6, rtol=1e-6)


LOADS = """
import os, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
assert "hfcompress" not in sys.modules
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
torch.save(model(torch.load(sys.argv[3])).logits.detach(), sys.argv[4])
os._exit(0)  # what native libraries do when the interpreter ends is not what is tested, and may hang on a busy machine
"""


@pytest.mark.parametrize("ours", [True, False])
def test_qlora_by_the_callback_is_kept_for_plain_peft(ours: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    if ours:
        model = tiny_model("llama")
        Quantize(4).run(model, None)
        save(model, None, base)
        model = AutoModelForCausalLM.from_pretrained(base)
    else:
        tiny_model("llama").save_pretrained(tmp_path / "dense")
        asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=asked)
        model.save_pretrained(base)
    ids = inputs("llama")["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    callback = CompressionCallback(Adapters(r=4, merge=False, use_dora=True), model=model)
    trainer = Trainer(model=model, args=arguments(tmp_path, 3), train_dataset=rows, callbacks=[callback])
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    torch.save(ids, tmp_path / "ids")
    made = [str(tmp_path / name) for name in ("base", "adapter", "ids", "logits")]
    fresh.run([sys.executable, "-c", LOADS, *made], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits").float(), outputs(model, "llama"), atol=1e-5, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(outputs(plain, "llama"), outputs(model, "llama"), atol=1e-4), "it learnt"


def test_the_callback_merges_into_a_model_that_was_loaded_in_low_bits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    Quantize(4).run(model, None)
    save(model, None, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = [{"input_ids": row, "labels": row} for row in inputs("llama")["input_ids"]]
    callback = CompressionCallback(Adapters(r=4), model=model)
    trainer = Trainer(model=model, args=arguments(tmp_path, 2), train_dataset=rows)
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_model(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert any(holds_codes(module) for module in again.modules())
    torch.testing.assert_close(outputs(again, "llama"), outputs(model, "llama"))


def test_attach_adapts_codes_that_were_made_in_memory(tmp_path: Path) -> None:
    model = tiny_model("llama")
    Quantize(8).run(model, None)
    rows = [{"input_ids": row, "labels": row} for row in inputs("llama")["input_ids"]]
    trainer = attach(Trainer(model=model, args=arguments(tmp_path, 2), train_dataset=rows), Adapters(r=4, merge=False))
    with quiet_casts():
        trainer.train()
    assert any(parameter.abs().max() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def arguments(folder: Path, epochs: int = 1) -> TrainingArguments:
    given: dict[str, Any] = {"num_train_epochs": epochs, "learning_rate": 0.05, "per_device_train_batch_size": 2}
    return TrainingArguments(
        output_dir=str(folder / "work"), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **given
    )


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_an_error_puts_back_what_pissa_split(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), riding(model, [Adapters(r=4, init_lora_weights="pissa")], None):
        assert not torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, before["model.layers.0.mlp.up_proj.weight"])
        raise RuntimeError("stop")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert set(before) == set(model.state_dict())


@pytest.mark.parametrize("merge", [True, "dense"])
def test_what_is_no_number_is_not_merged(merge: bool | str) -> None:
    model = tiny_model("llama")
    Quantize(4).run(model, None)
    before = outputs(model, "llama")
    expected = "adapters: NaNs detected in the merged weights.*; nothing was merged: train with a lower learning rate"
    with pytest.raises(CompressionError, match=expected), riding(model, [Adapters(r=4, merge=merge)], None), torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B["default"].weight.fill_(float("nan"))
    assert torch.equal(outputs(model, "llama"), before)


def refusal(method: Adapters, model: Any, original: Any = None) -> str:
    keys = set(model.state_dict())
    with pytest.raises(CompressionError) as error, riding(model, [method], Batches(None, original=original)):
        pass
    assert set(model.state_dict()) == keys
    return str(error.value)


def test_what_can_not_be_is_told() -> None:
    dense, low = tiny_model("llama"), tiny_model("llama")
    Quantize(4).run(low, None)
    loftq, query = Adapters(r=4, init_lora_weights="loftq"), "model.layers.0.self_attn.q_proj"
    assert refusal(Adapters(merge="dense"), dense) == (
        "adapters: merge: dense makes dense layers of codes, and no adapted layer holds codes; set merge: true."
    )
    assert refusal(Adapters(r=4, init_lora_weights="pissa"), low) == (
        f"adapters: init_lora_weights: pissa splits dense linear weights, and {query} holds codes; choose loftq or true for "
        f"codes, or name other target_modules."
    )
    assert refusal(Adapters(r=65, init_lora_weights="pissa"), dense) == (
        f"adapters: r = 65: init_lora_weights: pissa takes singular values, and {query} has 64; set r to 64 or less."
    )
    assert "pissa splits dense linear weights, and model.embed_tokens is an Embedding" in refusal(
        Adapters(r=4, init_lora_weights="pissa", target_modules=["embed_tokens"]), dense
    )
    assert refusal(loftq, dense, dense) == (
        "adapters: init_lora_weights: loftq starts from the error of codes, and no adapted layer holds codes; quantize in a "
        "step before, or choose pissa or true."
    )
    told = f"adapters: init_lora_weights: loftq compares the codes of {query} with the original's weight, and the original "
    assert refusal(loftq, low) == (
        f"{told}holds codes there too; list quantize in a step before, in one recipe, or set init_lora_weights: true."
    )
    assert f"{told}has no such layer" in refusal(loftq, low, tiny_model("bert"))
    assert "are further from the original's weight than zeros are" in refusal(loftq, low, tiny_model("llama", seed=1))


def test_loftq_wants_the_layers_that_were_coded() -> None:
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    PruneNeurons(0.5, scores="magnitude").run(model, None)
    Quantize(4).run(model, None)
    assert refusal(Adapters(r=4, init_lora_weights="loftq"), model, original) == (
        "adapters: init_lora_weights: loftq: model.layers.0.mlp.gate_proj has (64, 64) features and the original's Linear "
        "(64, 128), so it is another layer since; cut in a recipe of its own before, or set init_lora_weights: true."
    )


def test_codes_that_bitsandbytes_repacked_are_refused() -> None:
    model = tiny_model("llama")
    Quantize(4).run(model, None)
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(CompressionError) as error, riding(model, [Adapters(r=4)], None):
        pass
    assert str(error.value) == (
        "adapters: bitsandbytes repacked the codes of model.layers.0.mlp.up_proj for inference at the model's first forward, "
        "and gradients and merging would be wrong; load the model again, and train before anything else runs it."
    )


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"init_lora_weights": "pisa"}, "possible are true, gaussian, pissa, pissa_niter_N with N rounds, and loftq"),
        ({"init_lora_weights": False}, "possible are true, gaussian, pissa"),
        ({"init_lora_weights": "pissa_niter_0"}, "possible are true, gaussian, pissa"),
        ({"merge": "codes"}, "possible are true, false and dense"),
        ({"merge": 1}, "possible are true, false and dense"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Adapters(**fields)


@pytest.mark.parametrize("merge", [True, "dense", False])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_adapters_stand_on_codes_of_our_own(kind: str, merge: Any, tmp_path: Path) -> None:
    """The identity before training; a gradient reaches each; merged weights are coded anew, off by half a step at most."""
    model = tiny_model(kind)
    Quantize(engine="hfcompress", bits=8).run(model, None)
    before = logits(model, kind)
    with riding(model, [Adapters(r=4, merge=merge)], None):
        assert torch.equal(logits(model, kind), before)
        model.train()
        model(**FewBatches(kind).batch()).loss.backward()
        ups = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
        assert ups and all(up.grad is not None and up.grad.abs().max() > 0 for up in ups)
        with torch.no_grad():
            for up in ups:
                up.normal_(std=0.02)
        model.eval()
        healed = logits(model, kind)
    ours = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert bool(ours) != (merge == "dense")
    off = (logits(model, kind) - healed).norm() / (healed - healed.mean()).norm()
    assert off < (0.05 if merge else 1e-6)
    if merge:
        assert not any("lora" in name for name, _ in model.named_parameters())
        save(model, None, tmp_path)
        assert torch.equal(logits(auto(kind).from_pretrained(tmp_path), kind), logits(model, kind))


def test_dora_is_refused_on_codes_that_peft_can_not_read() -> None:
    model = tiny_model("bert")
    Quantize(engine="hfcompress").run(model, None)
    with (
        pytest.raises(CompressionError, match=r"use_dora: PEFT can't read the codes of bert\.encoder.*engine: bitsandbytes\.$"),
        riding(model, [Adapters(use_dora=True)], None),
    ):
        pass
