"""Calibrated codes in models: never worse than plain ones on their own samples, stored bit for bit, loaded by anybody."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import hfcompress.checkpoint.quantizer  # noqa: F401
from hfcompress.calibration.codes import choose_codes
from hfcompress.calibration.layer_codes import CodedLayer, calibrated_codes, four_bit_grid
from hfcompress.calibration.second_moments import Projection
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import holds_codes
from hfcompress.layers.bitsandbytes import Linear4bit, codebook, scales_read
from hfcompress.methods import Cast, Quantize
from hfcompress.surgery.modules import copied, swap
from hfcompress.surgery.targets import codable
from tests import fresh
from tests.calibration.test_reconstruct import batches
from tests.run.test_recipe import mistakes
from tests.tiny import tiny_model

KINDS = ("bert", "llama", "gpt2", "t5", "bart", "vit")
STAGES: tuple[Any, ...] = ("scales", "diagonal", "feedback", "rounding")


def dense(model: Any, name: str) -> Tensor:
    """(out, in), float32, of a dense layer."""
    module = model.get_submodule(name)
    return Projection(name, 0 if isinstance(module, Conv1D) else 1).weights(model)[0][1].float()


def low_bit(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((name, module) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit")


def moments_read(model: Any, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """sum x x^T of what every low-bit layer reads, by whole forwards of the model as it is in the end: what comes to a layer
    depends on those before it alone."""
    found: dict[str, Any] = {}

    def see(target: Projection, _: nn.Module, args: Any, kwargs: Any) -> None:
        for rows in target.rows(model, batch, args, kwargs, False):
            found[target.module] = found.get(target.module, 0.0) + rows.double().T @ rows.double()

    handles = [
        module.register_forward_pre_hook(partial(see, Projection(name, 1)), with_kwargs=True) for name, module in low_bit(model)
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("stage", ["diagonal", "feedback", "rounding"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_is_worse_than_plain_on_its_own_samples(kind: str, stage: Any) -> None:
    model, data = tiny_model(kind), batches(kind)
    before = copied(model)
    Quantize(4, calibrate=stage, use_double_quant=stage != "diagonal").run(model, data)
    square = moments_read(model, data)
    assert set(square) == {name for name, _ in low_bit(model)} == set(codable(before, 4))
    gains = []
    for name, layer in low_bit(model):
        plain = Linear4bit.dequantised(Quantize(4, use_double_quant=stage != "diagonal").quantized(before.get_submodule(name)))
        weight = dense(before, name)
        errors = [
            float((((weight - one).double() @ square[name]) * (weight - one)).sum())
            for one in (plain, Linear4bit.dequantised(layer))
        ]
        assert errors[1] <= errors[0] * (1 + 1e-4), name
        gains.append(errors[1] / errors[0])
    assert sum(gains) / len(gains) < (0.95 if stage == "diagonal" else 0.8), "and most are much better"


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_model_says_more_of_what_it_said(kind: str) -> None:
    """Of batches that it was not calibrated on, too."""
    data = batches(kind, count=40)
    fresh, original = batches(kind, count=48)[40:], tiny_model(kind)
    off = {}
    for calibrate in (False, "feedback"):
        model = tiny_model(kind)
        Quantize(4, calibrate=calibrate, **({"samples": 320} if calibrate else {})).run(model, data)
        with torch.no_grad():
            off[calibrate] = sum(float((model(**one).logits - original(**one).logits).square().sum()) for one in fresh)
    assert off["feedback"] < 0.85 * off[False]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_chosen_codes_are_stored_bit_for_bit(blocksize: int, quant_type: str, nested: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = codebook(quant_type)
    assert len(values) == {"nf4": 16, "fp4": 15}[quant_type] and (values.diff() > 0).all()
    for layer in (nn.Linear(256, 96), Conv1D(96, 256), nn.Linear(256, 96, bias=False).bfloat16()):
        codes = torch.randint(0, len(values), (96, 256), generator=generator, dtype=torch.uint8)
        scales = torch.randn(96, 256 // blocksize, generator=generator)  # of either sign
        made: Any = Linear4bit.from_codes(layer, codes, scales, quant_type=quant_type, use_double_quant=nested)
        read = scales_read(scales) if nested else scales
        expected = (values[codes.long()].unflatten(1, (-1, blocksize)) * read[..., None]).flatten(1)
        assert torch.equal(Linear4bit.dequantised(made), expected.to(layer.weight.dtype))
        assert Linear4bit.damage(made) is None and made.weight.quant_state.blocksize == blocksize
        assert (made.weight.quant_state.state2 is not None) == nested
        x = torch.randn(3, 256, generator=generator).to(layer.weight.dtype)
        bias = 0.0 if made.bias is None else made.bias
        torch.testing.assert_close(made(x), x @ Linear4bit.dequantised(made).T + bias, rtol=1e-2, atol=1e-2)


def test_plain_codes_are_those_of_bitsandbytes() -> None:
    """What calibration is measured against."""
    layer = nn.Linear(256, 96)
    for quant_type in ("nf4", "fp4"):
        for nested in (True, False):
            grid = four_bit_grid(quant_type, 64, nested)
            found = choose_codes(layer.weight.detach(), grid, "plain")
            theirs = Linear4bit.dequantised(Linear4bit.from_linear(layer, quant_type, nested))
            assert (found.dequantised(grid) == theirs).float().mean() > 0.9999
            torch.testing.assert_close(found.dequantised(grid), theirs, rtol=1e-5, atol=float(theirs.abs().max()) / 8)


METHODS = [
    Quantize(4, calibrate="scales"),
    Quantize(4, calibrate="scales", use_double_quant=False),
    Quantize(4, calibrate="feedback", use_double_quant=False, quant_type="fp4"),
    Quantize(4, calibrate=True, blocksize=32),
    Quantize(4, blocksize=32),
]
AUTO = {"bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_reload_is_exact_twice_and_needs_nobody(kind: str, method: Quantize, tmp_path: Path) -> None:
    model, data = tiny_model(kind), batches(kind)
    method.run(model, data)
    scales = torch.cat([layer.weight.quant_state.absmax.flatten() for _, layer in low_bit(model)])
    assert method.use_double_quant or method.quant_type == "fp4" or bool((scales < 0).any()), "signs are put to use"
    auto: Any = AUTO.get(kind, AutoModelForCausalLM)
    with torch.no_grad():
        expected = model(**data[0]).logits
        save(model, None, tmp_path / "once")
        once = auto.from_pretrained(tmp_path / "once").eval()
        assert once.config.quantization_config.quant_method == "bitsandbytes"
        assert {layer.weight.quant_state.blocksize for _, layer in low_bit(once)} == {method.blocksize}
        for _, layer in low_bit(once):  # a plain load repacks codes into bfloat16 on some CPUs
            layer.support_avx512bf16_for_cpu = False
        assert torch.equal(once(**data[0]).logits, expected)
        save(once, None, tmp_path / "twice")
        twice = auto.from_pretrained(tmp_path / "twice").eval()
        for _, layer in low_bit(twice):
            layer.support_avx512bf16_for_cpu = False
        assert torch.equal(twice(**data[0]).logits, expected)


def test_a_process_without_hfcompress_loads_the_same(tmp_path: Path) -> None:
    model, data = tiny_model("llama"), batches("llama")
    Quantize(4, calibrate=True, use_double_quant=False).run(model, data)
    with torch.no_grad():
        expected = model(**data[0]).logits
    save(model, None, tmp_path)
    torch.save(data[0], tmp_path / "batch.pt")
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "for module in model.modules():\n"
        "    module.support_avx512bf16_for_cpu = False\n"
        "with torch.no_grad():\n"
        "    torch.save(model(**torch.load(sys.argv[1] + '/batch.pt')).logits, sys.argv[1] + '/logits.pt')\n"
        "assert 'hfcompress' not in sys.modules\n"
    )
    fresh.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_half_precision_are_calibrated(dtype: Any) -> None:
    model, data = tiny_model("bert"), batches("bert")
    Cast(dtype).run(model, None)
    before = copied(model)
    Quantize(4, calibrate=True, compute_dtype=dtype).run(model, data)
    for name, layer in low_bit(model):
        assert Linear4bit.dequantised(layer).dtype == before.dtype
        assert layer.bias.dtype == before.dtype
        assert 0 < float((Linear4bit.dequantised(layer).float() - dense(before, name)).square().mean()) < 0.1


def test_calibration_leaves_biases_as_they_were() -> None:
    """bitsandbytes casts a bias, in place, to the dtype that a layer computes in."""
    model, before = tiny_model("bert"), tiny_model("bert")
    Quantize(4, calibrate=True, compute_dtype="bfloat16").run(model, batches("bert"))
    for name, layer in low_bit(model):
        assert torch.equal(layer.bias, before.get_submodule(name).bias)


def test_a_layer_that_nothing_comes_to_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny_model("bert"), batches("bert", count=1, size=2)
    idle = "bert.encoder.layer.1.output.dense"
    inner = model.get_submodule("bert.encoder.layer.1").output
    inner.forward = lambda hidden, residual: inner.LayerNorm(residual)
    told: list[CodedLayer] = []
    grid = four_bit_grid("nf4", 64, True)

    def put(name: str, found: Any) -> None:
        swap(model, name, Linear4bit.from_codes(model.get_submodule(name), found.codes, found.raw_scales))

    with caplog.at_level(logging.INFO, logger="hfcompress"):
        told = calibrated_codes(model, codable(model, 4), lambda _: grid, lambda: data, "feedback", put)
    assert f"calibrate: no token of the calibration data comes to {idle}; its scales are chosen without." in caplog.text
    assert next(one.tokens for one in told if one.name == idle) == 0 < told[0].tokens
    assert "bert.encoder.layer.0.attention.self.query reads 64 columns and saw" in caplog.text, "and the text is too short"
    assert "if rounded plainly" in caplog.text


def test_the_mistakes_have_their_sentences() -> None:
    model, data = tiny_model("bert"), batches("bert")
    names = {name for name, _ in model.named_modules()}
    with pytest.raises(CompressionError) as error:
        Quantize(4, calibrate=True).run(model, None)
    assert str(error.value) == (
        "quantize: calibrate: feedback needs calibration data; give a task or batches, with or without labels, or choose "
        "calibrate: scales."
    )
    with pytest.raises(
        CompressionError, match="quantize: calibrate: diagonal needs calibration data, and the task gave no batch"
    ):
        Quantize(4, calibrate="diagonal").run(model, [])
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.0.output.LayerNorm").bias[3] = torch.inf
    with pytest.raises(CompressionError) as error:
        Quantize(4, calibrate=True).run(model, data)
    assert str(error.value) == (
        "quantize: calibrate: feedback: what bert.encoder.layer.1.attention.self.query reads on the calibration data is infinite "
        "or no number; load the model in float32 or bfloat16, or choose calibrate: scales, which reads no data."
    )
    assert not list(low_bit(model)) and {name for name, _ in model.named_modules()} == names, "it is as it was"
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.0.output.dense").weight[0, 0] = torch.nan
    with pytest.raises(CompressionError) as error:
        Quantize(4, calibrate="scales").run(model, None)
    assert str(error.value) == (
        "quantize: calibrate: scales: the weight of bert.encoder.layer.0.output.dense holds infinite values, or values that are "
        "no numbers; load the model again, or name bert.encoder.layer.0.output.dense in skip_modules."
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"bits": 8, "calibrate": True},
            ": calibrate chooses codes of 4 bits, and those of 8 bits are bitsandbytes' own, a scale for a whole row; remove "
            "calibrate or set bits: 4.",
        ),
        (
            {"bits": 4, "samples": 8, "calibrate": "scales"},
            ": samples belong to calibrate: diagonal, feedback or rounding; set one of these, or remove what belongs to it.",
        ),
        ({"bits": 4, "blocksize": 48}, ".blocksize = 48: input should be 32, 64, 128, 256, 512, 1024, 2048 or 4096."),
        ({"bits": 8, "blocksize": 64}, ": blocksize belong to bits: 4; remove them or set bits: 4."),
        (
            {"bits": 4, "calibrate": "gptq"},
            ".calibrate = 'gptq': input should be 'scales', 'diagonal', 'feedback', 'rounding', True or False.",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], sentence: str) -> None:
    assert mistakes(steps=[{"quantize": fields}]) == [f"my.yaml: steps.0.quantize{sentence}"]


def test_a_block_larger_than_a_row_fits_no_layer() -> None:
    with pytest.raises(CompressionError, match="4 bits need in_features in multiples of 256 and out_features of 32"):
        Quantize(4, blocksize=256).run(tiny_model("bert"), None)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"group_size": 32}, ": group_size belong to engine: hfcompress; remove them or set engine: hfcompress."),
        (
            {"engine": "hfcompress", "bits": 4, "quant_type": "fp4"},
            ": quant_type belong to engine: bitsandbytes; remove them or set engine: bitsandbytes.",
        ),
        ({"engine": "hfcompress", "bits": 0}, ".bits = 0: input should be 8, 7, 6, 5, 4, 3, 2 or 1."),
        ({"engine": "hfcompres"}, ".engine = 'hfcompres': input should be 'bitsandbytes' or 'hfcompress'."),
        ({"bits": 4, "target_bits": 5}, ": bits and target_bits decide the same; leave one of them."),
        ({"embeddings": 1}, ".embeddings = 1: input should be 8, 7, 6, 5, 4, 3 or 2."),
    ],
)
def test_engines_and_targets_that_do_not_go_together(fields: dict[str, Any], sentence: str) -> None:
    assert mistakes(steps=[{"quantize": fields}]) == [f"my.yaml: steps.0.quantize{sentence}"]


def test_groups_patterns_and_tables_that_fit_nothing() -> None:
    model = tiny_model("bert")
    with pytest.raises(CompressionError) as error:
        Quantize(4, engine="hfcompress", group_size=48).run(model, None)
    assert str(error.value) == (
        "quantize: bert.encoder.layer.0.attention.self.query: group_size 48 does not divide 64 columns; the nearest that does is "
        "32; choose that, or leave the layer out by skip_modules."
    )
    with pytest.raises(CompressionError, match=r"bits_pattern: 'qeury' matches no chosen layer\. Did you mean 'query'\?"):
        Quantize(bits_pattern={"qeury": 8}).run(model, None)
    with pytest.raises(CompressionError, match=r"bits_pattern: '\(' is no regular expression"):
        Quantize(bits_pattern={"(": 8}).run(model, None)
    with pytest.raises(CompressionError, match="embeddings: the model has no dense table that can become codes"):
        Quantize(engine="hfcompress", embeddings=8).run(tiny_model("vit"), None)
    assert not any(holds_codes(module) for module in model.modules())


def test_bits_differ_by_pattern_and_tied_tables_share_their_codes(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    pattern: dict[str, Any] = {"c_proj": 4, r".*h\.1\.mlp\..*": 16}
    Quantize(engine="hfcompress", embeddings=8, bits_pattern=pattern).run(model, None)
    bits = {
        name: getattr(module, "bits", 16)
        for name, module in model.named_modules()
        if name.endswith(("c_proj", "c_attn", "c_fc"))
    }
    assert {bits[name] for name in bits if "h.1.mlp" in name} == {16}
    assert {bits[name] for name in bits if name.endswith("c_proj") and "h.1.mlp" not in name} == {4}
    assert {bits[name] for name in bits if name.endswith(("c_attn", "h.0.mlp.c_fc"))} == {8}
    assert model.lm_head.weight is model.transformer.wte.weight
    save(model, None, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(again.lm_head.dequantised(), again.transformer.wte.dequantised())


def test_a_cast_leaves_scales_and_goes_with_tables_of_codes() -> None:
    model: Any = tiny_model("bert")
    Quantize(engine="hfcompress", embeddings=8).run(model, None)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("scale")}
    Cast().run(model, None)
    assert before and all(torch.equal(model.get_buffer(name), scale) for name, scale in before.items())
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.dtype == torch.bfloat16
