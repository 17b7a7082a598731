"""No forward makes tensors on the CPU for a model that lies elsewhere: seen on the meta device, where such a sum raises. And
what bitsandbytes' codes need to be right on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress import Cast, LowRank, Quantize
from hfcompress.checkpoint.artifact import save
from hfcompress.layers.bitsandbytes import Linear8bit
from hfcompress.layers.bnb_hooks import needs_us
from tests.gpu.place import KINDS, Few
from tests.gpu.place import logits as answers
from tests.gpu.test_layers import LINEAR, built, linear
from tests.tiny import tiny_model

WHOLE = [
    LowRank(rank=4),
    Quantize(8, engine="hfcompress", embeddings=8),
    Quantize(4, engine="hfcompress", group_size=16, symmetric=False, embeddings=4),
    Quantize(8, engine="hfcompress"),
    Quantize(8, engine="hfcompress", convolutions=8),
]
FIT = [
    (kind, method)
    for kind in KINDS
    for method in WHOLE
    if not isinstance(method, Quantize) or not (method.embeddings if kind == "vit" else method.convolutions)
]


def test_such_a_sum_raises() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device="meta") + torch.zeros(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_a_layer_computes_where_it_lies(name: str, dtype: torch.dtype) -> None:
    layer = built(LINEAR[name]).to("meta", dtype)
    x = torch.zeros(3, 128, device="meta", dtype=dtype, requires_grad=True)
    said = layer(x)
    said.sum().backward()
    assert x.grad is not None and {said.device.type, x.grad.device.type} == {"meta"} and said.dtype == dtype


@pytest.mark.parametrize(("kind", "method"), FIT, ids=str)
def test_a_model_computes_where_it_lies(kind: str, method: Any) -> None:
    model = tiny_model(kind, attn_implementation="eager")
    method.run(model, None)
    model = model.to("meta")
    batch = {name: one.to("meta") for name, one in Few(kind).batch().items() if name not in ("labels", "attention_mask")}
    batch.update({"decoder_input_ids": batch["input_ids"]} if kind == "t5" else {})
    assert model(**batch).logits.device.type == "meta"


def test_what_bitsandbytes_holds_of_its_codes_follows_them() -> None:
    """It takes codes and scales to itself at the first forward, and a model that is moved moves its weights alone."""
    layer, x = Linear8bit.from_linear(linear()), torch.randn(5, 128)
    expected, codes = layer(x), Linear8bit.dequantised(layer)
    layer.state.CB = layer.state.CB.to("meta")
    assert torch.equal(layer(x), expected)
    layer.weight.data = layer.weight.data.clone()
    layer.state.CB.zero_()
    assert torch.equal(layer(x), expected) and torch.equal(Linear8bit.dequantised(layer), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_lie_apart_are_given_to_bitsandbytes_side_by_side_in_float16(dtype: torch.dtype) -> None:
    layer, first = Linear8bit.from_linear(linear().to(dtype)), torch.randn(4, 3, 128).to(dtype)[:, 0]
    assert not first.is_contiguous()
    seen: list[bool] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    assert torch.allclose(layer(first), layer(first.contiguous()), atol=1e-2)
    assert needs_us(layer) is (dtype == torch.float16) and seen == [dtype == torch.float16, True]
    assert not needs_us(Linear8bit.from_linear(linear().to(dtype)))


@pytest.mark.parametrize(("dtype", "who"), [("bfloat16", "bitsandbytes"), ("float16", "hfcompress")])
def test_where_plain_bitsandbytes_would_be_wrong_its_checkpoint_needs_us(dtype: str, who: str, tmp_path: Path) -> None:
    model = tiny_model("bert")  # its pooler is given first tokens
    Cast(dtype=dtype).run(model, None)
    Quantize(8).run(model, None)
    answers(model, "bert")
    save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == who
