"""What decoders alone have, on the GPU: experts, whose products are other kernels there, and a cache in few bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, QuantizedCache

from hfcompress import Cast, LowRank, PruneExperts, PruneHeads, Quantize, QuantizeCache
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.describe import diff
from hfcompress.checkpoint.proof import difference
from hfcompress.methods import Method
from hfcompress.results.kv_cache import cache_costs
from hfcompress.tasks.pretrained import open_model
from tests.gpu.place import DEVICE, Few, made, on
from tests.surgery import test_experts as experts

MIXTURES = ["mixtral", "gpt_oss", "deepseek_v3"]
METHODS: list[Method] = [
    PruneExperts(0.5, samples=16),
    PruneExperts(number=4, scores="magnitude"),
    LowRank(ratio=0.5, whiten=True, samples=16),
    Quantize(8),
    Quantize(8, engine="hfcompress"),
    Quantize(4, engine="hfcompress", calibrate=True, group_size=8, samples=16),
]


class Words:
    """Random tokens, where the model is."""

    original = None

    def batches(self, model: Any, samples: int, batch_size: int = 4, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(-(-samples // batch_size)):
            yield on(model, experts.batch(seed + number, batch_size))


def mixture(kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    model = experts.made(kind).to(device)
    if dtype != torch.float32:
        Cast(dtype=str(dtype).removeprefix("torch.")).run(model, None)
    return model


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**on(model, experts.batch(99))).logits.float().cpu()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_chosen_and_compute_as_on_a_cpu(kind: str, method: Method) -> None:
    here, there = mixture(kind, DEVICE), mixture(kind, torch.device("cpu"))
    for model in (here, there):
        method.run(model, Words())
    assert diff(here) == diff(there)
    assert {tensor.device for tensor in (*here.parameters(), *here.buffers())} == {DEVICE}
    # codes: a weight between two may fall to either side, and bitsandbytes computes in half precision on a GPU
    assert difference(answer(here), answer(there)) < (3e-2 if isinstance(method, Quantize) else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", MIXTURES)
def test_what_is_left_of_a_mixture_reloads_exactly(kind: str, method: Method, dtype: torch.dtype, tmp_path: Path) -> None:
    model = mixture(kind, DEVICE, dtype)
    method.run(model, Words())
    expected = answer(model)
    assert expected.isfinite().all()
    save(model, None, tmp_path)
    off = difference(answer(open_model(tmp_path, AutoModelForCausalLM, DEVICE)), expected)
    assert off == 0 or (DEVICE.type == "cpu" and off < 1e-6)  # there a file in memory is aligned otherwise: the last bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_in_few_bits_generates_the_same_after_a_reload(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made("llama", dtype).eval()
    PruneHeads(0.5, ranking="global", scores="magnitude").run(model, None)
    ids = Few("llama").batch(seed=3, size=2, length=40)["input_ids"].to(DEVICE)
    plain = cache_costs(model, ids, prompt=20)
    QuantizeCache().run(model, None)
    costs = cache_costs(model, ids, prompt=20)
    size = torch.finfo(dtype).bits // 8
    assert costs.bytes_per_token == pytest.approx(plain.bytes_per_token / size, rel=0.01), "a byte a number"
    assert costs.perplexity == pytest.approx(plain.perplexity, rel=0.02)
    save(model, None, tmp_path)
    again = open_model(tmp_path, AutoModelForCausalLM, DEVICE)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    expected, found = (one.generate(ids[:, :9], **asked) for one in (model, again))
    assert isinstance(found.past_key_values, QuantizedCache)
    assert torch.equal(found.sequences, expected.sequences)
