"""Every kind of layer: what it says of its weight, and its form of plain operators, compute what the layer computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hfcompress.layers import KINDS, kind_of
from hfcompress.layers.base import PlainLinear
from hfcompress.layers.bitsandbytes import Linear4bit, Linear8bit
from hfcompress.layers.low_rank import LowRankEmbedding, LowRankLinear
from hfcompress.layers.quantized import QuantEmbedding, QuantLinear
from hfcompress.layers.quantized_conv import QuantConv
from hfcompress.layers.stored import StoredEmbedding, StoredLinear

INTO, OUT, ROWS = 64, 96, 50


def dense(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(INTO, OUT, bias)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def conv1d() -> Conv1D:
    torch.manual_seed(0)
    layer = Conv1D(OUT, INTO)
    nn.init.normal_(layer.bias)
    return layer


def factors(rank: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, INTO), torch.randn(OUT, rank)


LAYERS: dict[str, list[Callable[[], Any]]] = {
    "linear": [dense, lambda: dense(False)],
    "conv1d": [conv1d],
    "embedding": [lambda: nn.Embedding(ROWS, OUT, padding_idx=0)],
    "low_rank_linear": [
        lambda: LowRankLinear.from_dense(dense(), *factors()),
        lambda: LowRankLinear.from_dense(conv1d(), *factors()),
    ],
    "low_rank_embedding": [
        lambda: LowRankEmbedding.from_dense(nn.Embedding(ROWS, OUT), torch.randn(8, ROWS), torch.randn(OUT, 8))
    ],
    "linear_4bit": [
        lambda: Linear4bit.from_linear(dense()),
        lambda: Linear4bit.from_linear(dense(False), "fp4", use_double_quant=False),
        lambda: Linear4bit.from_linear(conv1d()),
        lambda: Linear4bit.from_linear(dense(), compute_dtype="bfloat16"),
    ],
    "linear_8bit": [
        lambda: Linear8bit.from_linear(dense()),
        lambda: Linear8bit.from_linear(dense(False), threshold=6.0),
        lambda: Linear8bit.from_linear(conv1d()),
    ],
    "quant_linear": [
        lambda: QuantLinear.from_linear(dense()),
        lambda: QuantLinear.from_linear(dense(False), group_size=16, symmetric=False),
        lambda: QuantLinear.from_linear(conv1d(), bits=4, group_size=32),
        lambda: QuantLinear.from_linear(dense(), bits=4, group_size=8, symmetric=False),
    ],
    "quant_embedding": [
        lambda: QuantEmbedding.from_dense(nn.Embedding(ROWS, OUT, padding_idx=0)),
        lambda: QuantEmbedding.from_dense(nn.Embedding(ROWS, OUT), bits=4, group_size=32, symmetric=False),
    ],
    "quant_conv": [
        lambda: QuantConv.from_dense(nn.Conv1d(INTO, OUT, 3, padding="same", bias=False)),
        lambda: QuantConv.from_dense(nn.Conv1d(INTO, OUT, 2, stride=2, groups=2), bits=4, group_size=32, symmetric=False),
    ],
}
ROWS_OF_LAYERS = [(kind, make) for kind, makes in LAYERS.items() for make in makes]
# In which dtype, and how far off as a share: 8-bit layers round their input to 8 bits, half precision its own way.
EXACT, HALF = 1e-5, 2e-2
ROUNDS = ("linear_8bit", "quant_linear")


def given(kind: str, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    if kind == "quant_conv":
        return torch.randn(3, INTO, 5).to(dtype)
    return torch.randint(0, ROWS, (3, 5)) if "embedding" in kind else torch.randn(3, 5, INTO).to(dtype)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_every_kind_has_a_row() -> None:
    assert set(LAYERS) == set(KINDS)


@pytest.mark.parametrize(("kind", "make"), ROWS_OF_LAYERS, ids=lambda value: value if isinstance(value, str) else "")
def test_dequantised_is_the_weight_that_it_computes_with(kind: str, make: Any) -> None:
    layer, x = make(), given(kind, torch.float32)
    assert kind_of(layer) == kind
    expected = layer(x)
    weight = KINDS[kind].dequantised(layer).float()
    bias = None if getattr(layer, "bias", None) is None else layer.bias.float()  # bitsandbytes casts it to compute_dtype
    if kind == "quant_conv":
        found = functional.conv1d(x, weight, bias, layer.stride, layer.padding, groups=layer.groups)
    else:
        found = functional.embedding(x, weight) if "embedding" in kind else functional.linear(x, weight, bias)
    computes = getattr(layer, "compute_dtype", None)
    assert off(found, expected) < (HALF if kind in ROUNDS or computes == torch.bfloat16 else EXACT)
    assert torch.equal(KINDS[kind].dequantised(layer).float(), weight), "a forward changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "make"), ROWS_OF_LAYERS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_export_form_computes_the_same_with_plain_operators(kind: str, make: Any, dtype: torch.dtype) -> None:
    layer, x = make(), given(kind, dtype)
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if kind == "quant_embedding":  # its codes can't tell what it computes in
        layer.to(dtype)
    expected = layer(x)
    plain = KINDS[kind].export_form(layer)
    assert {type(module) for module in plain.modules()} <= {
        nn.Linear,
        PlainLinear,
        nn.Embedding,
        nn.Sequential,
        Conv1D,
        nn.Conv1d,
        StoredLinear,
        StoredEmbedding,
    }
    assert plain(x).dtype == expected.dtype == dtype
    computes = getattr(layer, "compute_dtype", None)
    assert off(plain(x), expected) < (HALF if kind in ROUNDS or torch.bfloat16 in (dtype, computes) else EXACT)


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_a_4bit_layer_computes_in_the_dtype_of_its_input_unless_told(compute_dtype: str | None) -> None:
    layer: Any = Linear4bit.from_linear(dense(), compute_dtype=compute_dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert layer(given("", dtype)).dtype == dtype
        assert layer.compute_dtype == (torch.bfloat16 if compute_dtype else dtype)
        assert Linear4bit.fields(layer)["compute_dtype"] == compute_dtype, "what ran does not show in what is saved"
    assert Linear4bit.fields(copy.deepcopy(layer))["compute_dtype"] == compute_dtype


STATE = "beside its codes"
DAMAGES: list[tuple[str, Callable[[Any], None], str]] = [
    (
        "absmax",
        lambda s: setattr(s, "absmax", s.absmax[:-1]),
        "absmax, the scales of its codes, are 95 of uint8, not 96 of uint8",
    ),
    (
        "absmax dtype",
        lambda s: setattr(s, "absmax", s.absmax.float()),
        "absmax, the scales of its codes, are 96 of float32, not 96 of uint8",
    ),
    (
        "nested",
        lambda s: setattr(s.state2, "absmax", s.state2.absmax[:0]),
        "nested_absmax, the scales of its scales, are 0 of float32, not 1 of float32",
    ),
    (
        "nan",
        lambda s: s.state2.absmax.fill_(float("nan")),
        "nested_absmax, the scales of its scales, hold infinite values, or values that are no numbers",
    ),
    (
        "nested map",
        lambda s: setattr(s.state2, "code", s.state2.code[:9]),
        "nested_quant_map, the values of its scales, are 9 of float32, not 256 of float32",
    ),
    (
        "map",
        lambda s: setattr(s, "code", s.code[:9]),
        "quant_map, the values of its codes, are 9 of float32, not 16 of float32",
    ),
    (
        "other map",
        lambda s: setattr(s, "code", -s.code),
        "quant_map, the values of its codes, are not those of nf4, which kernels take for granted",
    ),
    (
        "blocksize",
        lambda s: setattr(s, "blocksize", 48),
        f"blocksize = 48 {STATE} is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096",
    ),
    (
        "blocksize 128",
        lambda s: setattr(s, "blocksize", 128),
        "absmax, the scales of its codes, are 96 of uint8, not 48 of uint8",
    ),
    (
        "nested blocksize",
        lambda s: setattr(s.state2, "blocksize", 10**30),
        "nested_blocksize = 1000000000000000000000000000000 is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096",
    ),
    ("shape", lambda s: setattr(s, "shape", torch.Size((OUT, 2 * INTO))), f"shape = (96, 128) {STATE} is not (96, 64)"),
    ("transposed", lambda s: setattr(s, "shape", torch.Size((INTO, OUT))), f"shape = (64, 96) {STATE} is not (96, 64)"),
    (
        "dtype",
        lambda s: setattr(s, "dtype", torch.int8),
        f"dtype = torch.int8 {STATE} is not one of float32, bfloat16, float16",
    ),
    ("a function", lambda s: setattr(s, "dtype", torch.load), "is not one of float32, bfloat16, float16"),
    ("type", lambda s: setattr(s, "quant_type", "fp4"), f"quant_type = 'fp4' {STATE} is not nf4 or fp4"),
    (
        "offset",
        lambda s: setattr(s, "offset", torch.tensor(float("inf"))),
        "nested_offset hold infinite values, or values that are no numbers",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "says"), DAMAGES, ids=[name for name, *_ in DAMAGES])
def test_what_stands_beside_4bit_codes_is_checked(name: str, spoil: Any, says: str) -> None:
    layer: Any = Linear4bit.from_linear(dense())
    assert Linear4bit.damage(layer) is None
    spoil(layer.weight.quant_state)
    found = Linear4bit.damage(layer) or ""
    assert found.endswith(says) if name == "a function" else found == says


def test_codes_themselves_and_8bit_scales_are_checked() -> None:
    four: Any = Linear4bit.from_linear(dense())
    four.weight.data = four.weight.data[:-1]
    assert Linear4bit.damage(four) == "its codes are 3071 of uint8, not 3072 of uint8"
    four.weight.quant_state = None
    assert Linear4bit.damage(four) == "the scales of its codes are missing"
    eight: Any = Linear8bit.from_linear(dense())
    assert Linear8bit.damage(eight) is None
    eight(given("", torch.float32))
    assert Linear8bit.damage(eight) is None, "a forward moves the scales"
    eight.state.SCB = eight.state.SCB[:-1]
    assert Linear8bit.damage(eight) == "SCB, the scales of its codes, are 95 of float32, not 96 of float32"
    eight.state.SCB = None
    assert Linear8bit.damage(eight) == "SCB, the scales of its codes, is missing"


def test_a_padding_row_lies_within_the_table() -> None:
    fields = {"num_embeddings": 5, "embedding_dim": 8, "padding_idx": 7}
    limits = {"num_embeddings": 50, "embedding_dim": 8, "rank": 8}
    assert KINDS["embedding"].mistake(fields, limits) == "padding_idx = 7 is not allowed"
    assert KINDS["low_rank_embedding"].mistake({**fields, "rank": 2}, limits) == "padding_idx = 7 is not allowed"
    assert KINDS["embedding"].mistake({**fields, "padding_idx": 4}, limits) is None
