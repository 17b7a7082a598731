"""No forward makes tensors on the CPU for a model that lies elsewhere: seen on the meta device, where such a sum raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfcompress import LowRank, Quantize
from tests.gpu.place import KINDS, Few
from tests.gpu.test_layers import LINEAR, built
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
