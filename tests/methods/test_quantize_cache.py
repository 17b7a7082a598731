"""The cache of generation in few bits: chosen, saved, reloaded, measured; and what can't have one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, QuantizedCache, cache_utils

from hfcompress import Cast, CompressionError, PruneHeads, Quantize, QuantizeCache
from hfcompress.checkpoint.artifact import save
from hfcompress.results.kv_cache import cache_costs
from hfcompress.results.load_snippet import load_code
from tests.tiny import tiny_model

DECODERS = ("llama", "qwen3", "gpt2")


def text(tokens: int = 40) -> torch.Tensor:
    return torch.randint(5, 120, (2, tokens), generator=torch.Generator().manual_seed(3))


class Grouped(cache_utils.QuantizedLayer):
    """What quanto does, for tests without it: whole numbers between the least and the largest of each group."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[Any, ...]:
        groups = tensor.reshape(-1, self.q_group_size)
        least, step = groups.amin(1, keepdim=True), (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True))
        step = (step / (2**self.nbits - 1)).clamp(min=1e-8)
        codes = ((groups - least) / step).round().to(torch.uint8)
        each = 8 // self.nbits
        packed = sum(codes[:, place::each] << (self.nbits * place) for place in range(each))
        return packed, least.half(), step.half(), tensor.shape, tensor.dtype

    def _dequantize(self, stored: tuple[Any, ...]) -> torch.Tensor:
        packed, least, step, shape, dtype = stored
        each = 8 // self.nbits
        codes = torch.stack([(packed >> (self.nbits * place)) & (2**self.nbits - 1) for place in range(each)], dim=-1)
        return (codes.flatten(1) * step.float() + least.float()).reshape(shape).to(dtype)


@pytest.fixture
def quanto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", Grouped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DECODERS)
def test_it_is_in_the_generation_config_and_reloads(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(kind)
    Cast(dtype=str(dtype).removeprefix("torch.")).run(
        model, None
    )  # as a load casts: angles of rotary positions stay in float32
    logits = model(text()).logits
    QuantizeCache().run(model, None)
    assert torch.equal(model(text()).logits, logits), "weights stay as they are"
    assert model.training is False
    made = model.generate(text(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    save(model, None, tmp_path)
    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert (told["cache_implementation"], told["cache_config"]) == ("quantized", {"backend": "fp8"})
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert load_code(tmp_path, "x")[1] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same = again.generate(text(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert isinstance(same.past_key_values, QuantizedCache)
    assert torch.equal(made.sequences, same.sequences)


def test_the_result_needs_no_import(tmp_path: Path) -> None:
    model = tiny_model("llama")
    QuantizeCache().run(model, None)
    save(model, None, tmp_path)
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "made = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4, return_dict_in_generate=True)\n"
        "print(type(made.past_key_values).__name__, 'hfcompress' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["QuantizedCache", "False"]


def test_beside_cut_heads_and_codes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    PruneHeads(0.5, ranking="global", scores="magnitude").run(model, None)
    Quantize(8).run(model, None)
    QuantizeCache().run(model, None)
    save(model, None, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    made = again.generate(text(), max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(made.past_key_values, QuantizedCache)


@pytest.mark.parametrize("kind", DECODERS)
def test_fewer_bits_hold_fewer_bytes_and_further_logits(kind: str, quanto: None) -> None:
    model = tiny_model(kind)
    heads = 4 if kind == "gpt2" else 2
    size = 32 if kind == "qwen3" else 16
    plain = cache_costs(model, text(), prompt=20)
    with torch.no_grad():  # the same text at once, without a cache
        logits = model(text()).logits[:, 19:-1]
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text()[:, 20:].flatten()).exp()
    assert plain.bytes_per_token == 2 * model.config.num_hidden_layers * heads * size * 4
    assert plain.perplexity == pytest.approx(float(whole), rel=1e-4)
    costs = {}
    for bits in (8, 4, 2):
        groups = {} if bits == 8 else {"q_group_size": 16, "residual_length": 1}
        QuantizeCache(bits=bits, **groups).run(model, None)
        costs[bits] = cache_costs(model, text(), prompt=20)
    held = [plain.bytes_per_token, *(costs[bits].bytes_per_token for bits in (8, 4, 2))]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    assert held[1] == pytest.approx(held[0] / 4, rel=0.01), "8 bits of 32, and a scale a layer"
    # a group of 16 has two scales of 16 bits beside its codes
    assert held[2] == pytest.approx(held[0] * (4 + 2) / 32, rel=0.05)
    assert held[3] == pytest.approx(held[0] * (2 + 2) / 32, rel=0.05)
    off = [abs(costs[bits].perplexity / plain.perplexity - 1) for bits in (8, 4, 2)]
    assert 0 < off[0] < 0.02 and off[2] > 0


def test_the_latest_tokens_are_kept_as_they_are(quanto: None) -> None:
    model = tiny_model("llama")
    plain = cache_costs(model, text(), prompt=1)
    QuantizeCache(bits=4, q_group_size=16, residual_length=128).run(model, None)
    costs = cache_costs(model, text(), prompt=1)
    assert 0.9 * plain.bytes_per_token < costs.bytes_per_token < 1.1 * plain.bytes_per_token


def test_what_quanto_needs_is_listed(quanto: None, tmp_path: Path) -> None:
    model = tiny_model("llama")
    QuantizeCache(bits=4, q_group_size=16).run(model, None)
    save(model, None, tmp_path)
    assert load_code(tmp_path, "x")[1] == ["optimum-quanto"]


def refusal(method: QuantizeCache, model: Any) -> str:
    before = model.generation_config.to_dict() if model.can_generate() else None
    with pytest.raises(CompressionError) as error:
        method.run(model, None)
    assert before is None or model.generation_config.to_dict() == before
    return str(error.value)


def test_what_can_not_have_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    method = QuantizeCache()
    for kind in ("bert", "t5"):
        model = tiny_model(kind)
        assert refusal(method, model) == (
            f"quantize_cache: {type(model).__name__} is no decoder that generates, and transformers quantises the caches of these "
            f"alone; leave it out."
        )
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    unused = tiny_model("llama")
    unused.generation_config.use_cache = False
    for model, told in (
        (tiny_model("mistral", sliding_window=8), "only supported for models with only full attention layers"),
        (mamba, "only supported for models with only full attention layers"),
        (unused, "its generate uses no such cache"),
    ):
        said = refusal(method, model)
        assert said.startswith(f"quantize_cache: {type(model).__name__} can't generate with a cache of 8 bits (")
        assert told in said
        assert said.endswith(
            "); possible are decoders that cache (use_cache) and whose layers all attend to the whole context; leave it out."
        )
    monkeypatch.setattr(cache_utils, "is_optimum_quanto_available", lambda: False)
    said = refusal(QuantizeCache(bits=4), tiny_model("llama"))
    assert said.startswith("quantize_cache: backend quanto can't be used here (You need to install optimum-quanto")
    assert said.endswith(
        "pip install optimum-quanto, here and wherever the model generates, or choose bits: 8, which needs nothing."
    )
    monkeypatch.setattr(cache_utils, "is_hqq_available", lambda: False)
    assert "pip install hqq, here" in refusal(QuantizeCache(bits=2, backend="hqq"), tiny_model("llama"))
    with pytest.raises(
        CompressionError, match="cache_costs: prompt = 39: of 40 tokens it must leave two or more to score; give 1 to 38"
    ):
        cache_costs(unused, text(), prompt=39)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"bits": 8, "backend": "quanto"}, "backend quanto has no 8 bits; possible are fp8 and hqq"),
        ({"bits": 4, "backend": "fp8"}, "backend fp8 has no 4 bits; possible are quanto and hqq"),
        ({"residual_length": 32}, "residual_length belong to backends quanto and hqq; remove them, or choose one"),
    ],
)
def test_fields_fit(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        QuantizeCache(**fields)
