"""Every kind of layer on the GPU: the numbers of a CPU, gradients, copies, moves there and back, torch.compile."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hfcompress import fast
from hfcompress.layers import KINDS, kernels, kind_of
from hfcompress.layers.bitsandbytes import Linear4bit, Linear8bit
from hfcompress.layers.low_rank import LowRankEmbedding, LowRankLinear
from hfcompress.layers.quantized import QuantEmbedding, QuantLinear
from hfcompress.layers.quantized_conv import QuantConv
from tests.gpu.place import DEVICE

INTO, OUT = 128, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of one product, as a share of its norm."""


def linear() -> nn.Linear:
    return nn.Linear(INTO, OUT)


def codes(bits: int, group: int | None = None, symmetric: bool = True) -> Callable[[], nn.Module]:
    return lambda: QuantLinear.from_linear(linear(), bits, group, symmetric)


LINEAR: dict[str, Callable[[], Any]] = {
    "low rank": lambda: LowRankLinear.from_dense(linear(), torch.randn(8, INTO) / 11, torch.randn(OUT, 8) / 3),
    "8 bits": codes(8),
    "8 bits in groups": codes(8, 32),
    "8 bits with offsets": codes(8, None, False),
    "4 bits": codes(4),
    "4 bits in groups": codes(4, 32),
    "4 bits with offsets": codes(4, 64, False),
}
BITSANDBYTES: dict[str, Callable[[Any], Any]] = {
    "int8": Linear8bit.from_linear,
    "int8 with outliers": lambda layer: Linear8bit.from_linear(layer, 6.0),
    "nf4": Linear4bit.from_linear,
    "fp4": lambda layer: Linear4bit.from_linear(layer, "fp4", use_double_quant=False),
}


def built(make: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(0)
    return make(*args).requires_grad_(False)


def given(rows: int, dtype: torch.dtype, device: torch.device = DEVICE) -> torch.Tensor:
    return torch.randn(rows, INTO, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def dequantised(layer: Any) -> torch.Tensor:
    return KINDS[kind_of(layer) or ""].dequantised(layer)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.cpu().double() - expected.cpu().double()).norm() / expected.double().norm().clamp_min(1e-12))


@pytest.mark.parametrize("rows", [1, 4, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_products_and_gradients_are_those_of_the_dense_layer(name: str, dtype: torch.dtype, rows: int) -> None:
    layer = built(LINEAR[name])
    dense, x = copy.deepcopy(layer.export_form()).double(), given(rows, dtype)
    wanted = x.detach().cpu().double().requires_grad_()
    dense(wanted).square().sum().backward()
    layer, x = layer.to(DEVICE, dtype), x.requires_grad_()
    found = layer(x)
    assert found.dtype == dtype and found.device == x.device
    found.float().square().sum().backward()
    allowed = 4 * ROUNDING[dtype]  # the weight, the input of each product and its output are rounded
    assert off(found, dense(wanted).detach()) < allowed
    assert x.grad is not None and wanted.grad is not None and off(x.grad, wanted.grad) < 2 * allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_layers_of_bitsandbytes_there_and_back(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = linear().to(DEVICE, dtype)
    layer = built(BITSANDBYTES[name], dense)
    assert layer.weight.device == DEVICE
    x = given(33, dtype)
    found = layer(x)
    assert off(found, dense(x)) < (0.03 if "int8" in name else 0.15)
    there = nn.Sequential(copy.deepcopy(layer)).to("cpu")  # as a model is moved, its layers with it
    assert off(there(x.cpu()), found.float()) < 0.03
    assert off(dequantised(there[0]), dequantised(layer).float()) < 1e-6
    again = there.to(DEVICE)
    assert off(dequantised(again[0]), dequantised(layer).float()) < 1e-6
    assert torch.equal(again[0].weight.data, layer.weight.data)
    assert torch.equal(again(x), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*LINEAR, *BITSANDBYTES])
def test_rows_that_lie_apart(name: str, dtype: torch.dtype) -> None:
    layer = built(LINEAR[name]) if name in LINEAR else built(BITSANDBYTES[name], linear().to(DEVICE, dtype))
    layer, x = layer.to(DEVICE, dtype), given(24, dtype).reshape(8, 3, INTO)
    for rows in (x[:, 0], x[:3, 1], x.transpose(0, 1)):
        assert off(layer(rows), layer(rows.contiguous()).float()) < ROUNDING[dtype]


@pytest.mark.parametrize("name", LINEAR)
def test_copies_pickles_and_moves_compute_the_same(name: str) -> None:
    layer, x = built(LINEAR[name]).to(DEVICE), given(4, torch.float32)
    expected, file = layer(x), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False), copy.deepcopy(layer).to("cpu").to(DEVICE)):
        assert torch.equal(other(x), expected)
        assert {tensor.device for tensor in (*other.parameters(), *other.buffers())} == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*LINEAR, *BITSANDBYTES])
def test_compiled_they_compute_the_same(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = built(LINEAR[name]) if name in LINEAR else built(BITSANDBYTES[name], linear().to(DEVICE, dtype))
    layer = layer.to(DEVICE, dtype)
    for rows in (1, 33):
        x = given(rows, dtype)
        with torch.no_grad():
            assert off(torch.compile(layer)(x), layer(x).float()) < 4 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_tables_and_convolutions(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ids, sound = torch.randint(0, 50, (2, 7)), torch.randn(2, 8, 24)
    table = nn.Embedding(50, 64, padding_idx=0)
    tables = [
        QuantEmbedding.from_dense(table, bits),
        QuantEmbedding.from_dense(table, bits, 32, False),
        LowRankEmbedding.from_dense(table, torch.randn(8, 50), torch.randn(64, 8)),
    ]
    for one in tables:
        wanted = one(ids)
        found = one.to(DEVICE, dtype)(ids.to(DEVICE))
        assert found.dtype == dtype and off(found, wanted.detach()) < 2 * ROUNDING[dtype]
    stem = QuantConv.from_dense(nn.Conv1d(8, 16, 4, stride=2, padding=1), bits)
    wanted = stem(sound)
    found = stem.to(DEVICE, dtype)(sound.to(DEVICE, dtype))
    # cuDNN multiplies float32 convolutions in TF32
    assert found.dtype == dtype and off(found, wanted.detach()) < max(4 * ROUNDING[dtype], 2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_a_fast_model_computes_the_same_and_keeps_to_its_device(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(built(LINEAR[name])).to(DEVICE, dtype)
    expected = {rows: model(given(rows, dtype)) for rows in (1, 8, 9)}
    fast(model)
    for rows, wanted in expected.items():
        found = model(given(rows, dtype))
        assert found.device == DEVICE and off(found, wanted.float()) < 2 * ROUNDING[dtype], rows


def test_which_kernels_are_asked_for_there() -> None:
    every, half = ["integers", "bytes", "nibbles"], given(8, torch.bfloat16)
    if DEVICE.type == "cuda":
        reads = torch.cuda.get_device_capability()[0] >= 8
        assert kernels.unpacks_on_cuda() == reads
        assert kernels.kernel_for(half, 8, 2**30, every) == ("nibbles" if reads else "dense")
        assert kernels.kernel_for(half, 9, 2**30, every) == kernels.kernel_for(half.float(), 1, 2**30, every) == "dense"
        layer = built(LINEAR["4 bits in groups"]).to(DEVICE)
        assert layer._kernels == (), "twice the memory, until it is asked for"
        layer.fast_form()
        assert layer._kernels == ("nibbles",)
