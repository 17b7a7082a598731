"""Layers of 8- and 4-bit codes of our own: every kernel says the same, and nothing that only this machine can read is kept."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import KINDS, kernels
from hfcompress.layers.packing import packed, rounded, unpacked
from hfcompress.layers.quantized import QuantEmbedding, QuantLinear
from hfcompress.layers.quantized_conv import QuantConv

INTO, OUT = 96, 48


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INTO, OUT, bias).to(dtype)


def given(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*size, INTO).to(dtype)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def nothing_remembered() -> Any:
    kernels.forget_rows()
    yield
    kernels.forget_rows()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_codes_come_back_from_their_bytes(bits: int, signed: bool) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, (5, 3, 16), dtype=torch.int16)
    if signed and bits == 1:
        codes = 2 * codes + 1  # -1 and 1
    stored = packed(codes, bits, signed)
    assert stored.element_size() * stored[0, 0].numel() == 16 * bits // 8
    assert torch.equal(unpacked(stored, bits, signed).to(torch.int16), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_are_zero_tiny_or_equal_are_kept(bits: int, symmetric: bool) -> None:
    matrix = torch.stack([torch.zeros(8), torch.full((8,), 1e-3), torch.full((8,), -2.0), torch.linspace(-1, 1, 8)])
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data = matrix
    for group in (None, 4):
        found = QuantLinear.from_linear(layer, bits, group, symmetric).dequantised()
        assert found.isfinite().all()
        torch.testing.assert_close(found[:3], matrix[:3], rtol=2e-3, atol=1e-7)


def test_integers_add_up_exactly_with_codes_at_their_ends() -> None:
    """Without VNNI, oneDNN is off by a tenth there if inputs use all of 8 bits: how many levels they have is found out."""
    if not kernels.levels():
        assert kernels.kernel_for(given(9), 9, 2**30, ["integers"]) == "dense"
        return
    torch.manual_seed(0)
    for rows in (1, 5, 300):
        weight = (torch.randint(0, 2, (64, 256)) * 2 - 1) * 127
        x = (torch.randint(0, 2, (rows, 256)) * 2 - 1).float()
        found = kernels.by_integers(x, kernels.prepack(weight.to(torch.int8), torch.ones(64)), None)
        rounded = kernels.rounded_rows(x)
        meant = rounded.codes * rounded.each + rounded.low
        assert int(rounded.codes.max()) == kernels.levels() and int(rounded.codes.min()) == 0
        torch.testing.assert_close(found, meant @ weight.float().T, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("codes", [(8, None, True), (4, 32, True), (4, 32, False)], ids=str)
def test_every_kernel_says_what_the_dense_product_says(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, codes: tuple[Any, ...]
) -> None:
    layer = QuantLinear.from_linear(linear(dtype, bias), *codes)
    unpacking = ["nibbles" if codes[0] == 4 else "bytes"] if kernels.unpacks() else []
    kinds = ["dense", *unpacking, *(["integers"] if codes[0] == 8 and kernels.levels() else [])]
    for size in ((), (1,), (2, 3), (2, 150)):
        x = given(*size, dtype=dtype)
        expected = functional.linear(x.double(), layer.dequantised().double(), layer.bias.double() if bias else None).to(dtype)
        for kind in kinds:
            monkeypatch.setattr(kernels, "kernel_for", lambda *_, kind=kind: kind)
            allowed = {"dense": 1e-6, "integers": 0.02 if kernels.levels() < kernels.FULL else 0.01}.get(kind, 1e-2)
            assert off(layer(x), expected) < max(allowed, 4 * torch.finfo(dtype).eps), (kind, size)


@pytest.mark.parametrize("count", [127, kernels.FULL])
def test_rows_are_rounded_to_half_a_step_from_end_to_end(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(kernels, "levels", lambda: count)
    torch.manual_seed(0)
    rows = torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None] + torch.linspace(-30, 30, 9)[:, None]
    rows[0], rows[1], rows[2, 5:] = 0.0, -7.5, 7e-5  # nothing, one value, tiny values
    found = kernels.rounded_rows(rows)
    assert found.codes.shape == rows.shape and found.codes.dtype == torch.uint8 and int(found.codes.max()) <= count
    said = found.codes * found.each + found.low
    width = (rows.amax(-1) - rows.amin(-1)) / count
    assert bool(((said - rows).abs().amax(-1) <= 0.51 * width + 1e-6 * rows.abs().amax(-1)).all())


def test_rows_with_outliers_are_rounded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.levels():
        monkeypatch.setattr(kernels, "kernel_for", lambda *_: "integers")
    torch.manual_seed(0)
    layer, x = QuantLinear.from_linear(nn.Linear(1024, OUT)), torch.randn(2, 5, 1024)
    x[1, 3, 7] = 300.0
    expected, found = functional.linear(x, layer.dequantised(), layer.bias), layer(x)
    half = copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for one, other in ((found, expected), (half.float(), expected)):
        assert off(one[1, 3], other[1, 3]) < 5e-3
    if kernels.levels():
        rounded = kernels.rounded_rows(x)
        assert rounded.rest is not None and rounded.rough is not None and rounded.rough.tolist() == [8]
        monkeypatch.setattr(kernels, "WIDE", 1e9)
        kernels.forget_rows()
        assert off(layer(x)[1, 3], expected[1, 3]) > 0.02, "once alone is not enough"


def test_an_example_does_not_feel_the_others_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.levels():
        monkeypatch.setattr(kernels, "kernel_for", lambda *_: "integers")
    layer, x = QuantLinear.from_linear(linear()), given(4, 7)
    alone = layer(x[:1].clone())
    x[1:] *= 1000.0
    torch.testing.assert_close(layer(x)[:1], alone, rtol=1e-5, atol=1e-6)


def test_projections_that_read_the_same_share_its_rounding() -> None:
    x = given(3, 8)
    rounded = kernels.rounded_rows(x)
    assert kernels.rounded_rows(x) is rounded
    assert kernels.rounded_rows(x.clone()) is not rounded
    before = rounded.each.clone()
    kernels.rounded_rows(x)
    x.mul_(2.0)  # written into: another input
    torch.testing.assert_close(kernels.rounded_rows(x).each, before * 2)
    with torch.inference_mode():  # where nothing tells of a change, nothing is shared
        inner = given(3, 8)
        assert kernels.rounded_rows(inner) is not kernels.rounded_rows(inner)


def test_which_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    eight, four, half = ("integers", "bytes"), ("nibbles",), torch.bfloat16
    monkeypatch.setattr(kernels, "levels", lambda: 127)
    monkeypatch.setattr(kernels, "unpacks", lambda: True)
    for slow in (True, False):
        monkeypatch.setattr(kernels, "slow_bfloat16", lambda slow=slow: slow)
        for rows, weights, dtype, possible, expected in (
            (9, 2**20, torch.float32, eight, "dense"),
            (64, 2**20, torch.float32, eight, "integers"),
            (64, 2**20, torch.float32, four, "dense"),
            (1, 2**20, torch.float32, four, "nibbles"),
            (4, 2**26, torch.float32, eight, "bytes"),
            (4, 2**18, torch.float32, eight, "dense"),
            (4, 2**10, half, eight, "bytes"),
            (64, 2**20, half, eight, "integers"),
            (9, 2**20, half, eight, "bytes" if slow else "dense"),
            (900, 2**20, half, four, "nibbles" if slow else "dense"),
            (1, 2**20, half, (), "dense"),
            (1, 2**20, torch.float64, eight, "dense"),
        ):
            found = kernels.kernel_for(given(1, dtype=dtype), rows, weights, possible)
            assert found == expected, (rows, weights, dtype, possible, slow)
    monkeypatch.setattr(kernels, "unpacks", lambda: False)
    assert kernels.kernel_for(given(1), 1, 2**20, four) == "dense"
    for count, expected in ((127, "dense"), (kernels.FULL, "integers")):  # small layers are unpacked anyway
        monkeypatch.setattr(kernels, "levels", lambda count=count: count)
        assert kernels.kernel_for(given(1), 2**10, 2**18, eight) == expected
        assert kernels.kernel_for(given(1), 2**6, 2**19, eight) == expected  # smaller products pay with VNNI


def test_what_a_small_layer_keeps_unpacked_follows_its_codes() -> None:
    layer, x = QuantLinear.from_linear(linear()), given(3)
    layer(x)
    other = QuantLinear.from_linear(linear())
    layer.set_codes(-other.codes().short(), other.scale, None)
    torch.testing.assert_close(layer(x), functional.linear(x, -other.dequantised(), layer.bias))
    assert layer(x.double()).dtype == torch.float64


def test_what_a_small_table_or_convolution_keeps_unpacked_follows_its_codes_and_lets_gradients_pass() -> None:
    torch.manual_seed(0)
    ids, sound = torch.arange(6), torch.randn(1, 4, 9)
    for layer, x in (
        (QuantEmbedding.from_dense(nn.Embedding(6, 8)), ids),
        (QuantConv.from_dense(nn.Conv1d(4, 6, 3)), sound.requires_grad_()),
    ):
        with torch.inference_mode():
            before = layer(x)
        layer.set_codes(-layer.codes().short(), layer.scale, None)
        said = layer(x)
        torch.testing.assert_close(said - shift(layer), shift(layer) - before)
        said.sum().backward() if said.requires_grad else None
        assert copy.deepcopy(layer)._unpacked is None and layer.half()._unpacked is None
    assert sound.grad is not None and bool(sound.grad.any())


def shift(layer: Any) -> Any:
    return 0 if getattr(layer, "bias", None) is None else layer.bias[:, None]


@pytest.mark.parametrize("kernel", ["dense", "integers"])
def test_infinite_inputs_and_none_at_all(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.levels():
        monkeypatch.setattr(kernels, "kernel_for", lambda *_: kernel)
    layer, x = QuantLinear.from_linear(linear()), given(3)
    x[1, 0] = float("nan")
    said = layer(x)
    assert said[1].isnan().all() and said[0].isfinite().all() and said[2].isfinite().all()
    assert layer(given(0)).shape == (0, OUT)
    zeros = torch.zeros(2, INTO)
    torch.testing.assert_close(layer(zeros), layer.bias.expand(2, OUT))


def test_gradients_reach_the_input_and_a_bias_that_is_trained() -> None:
    layer, x = QuantLinear.from_linear(linear()), given(2, 3).requires_grad_()
    weights = torch.randn(2, 3, OUT)
    (layer(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ layer.dequantised(), rtol=1e-4, atol=1e-5)
    assert layer.bias.grad is None and layer.weight.grad is None
    layer.bias.requires_grad_()
    (layer(given(2, 3)) * weights).sum().backward()
    torch.testing.assert_close(layer.bias.grad, weights.sum((0, 1)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x), layer(given(2, 3)))


@pytest.mark.parametrize("bits", [8, 4])
def test_copies_pickles_and_casts(bits: int) -> None:
    layer, x = QuantLinear.from_linear(linear(), bits, 32 if bits == 4 else None), given(3, 8)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    assert all("prepacked" not in key for key in layer.state_dict())
    scale = layer.scale.clone()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.scale.dtype == scale.dtype and torch.equal(half.scale, scale)
    assert half.bias.dtype == torch.bfloat16 and half.weight.dtype == layer.weight.dtype
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(layer).double().scale, scale)
    other = QuantLinear(INTO, OUT, bits=bits, group_size=layer.group_size).requires_grad_(False)
    other(x)  # lays its codes out: they are forgotten when others come
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_it_compiles(bits: int) -> None:
    layer, x = QuantLinear.from_linear(linear(), bits, 32 if bits == 4 else None), given(3, 8)
    dense = functional.linear(x, layer.dequantised(), layer.bias)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), dense, rtol=1e-4, atol=1e-5)


def test_a_table_says_its_rows_in_the_dtype_of_the_model() -> None:
    dense = nn.Embedding(50, 32, padding_idx=0)
    table, ids = QuantEmbedding.from_dense(dense), torch.randint(0, 50, (2, 7))
    assert torch.equal(table(ids), table.dequantised()[ids])
    assert not table(torch.zeros(1, dtype=torch.long)).any()
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert table.scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bits": 9}, "bits = 9 is not allowed"),
        ({"bits": 0}, "bits = 0 is not allowed"),
        ({"bits": True}, "bits = True is not allowed"),
        ({"bits": True}, "bits = True is not allowed"),
        ({"group_size": 7}, "group_size = 7 is not allowed"),
        ({"group_size": 0}, "group_size = 0 is not allowed"),
        ({"group_size": 10**9}, "group_size = 1000000000 is not allowed"),
        ({"symmetric": 1}, "symmetric = 1 is not allowed"),
        ({"bits": 4, "group_size": 1}, "1 codes of 4 bits fill no whole bytes"),
        ({"in_features": 97, "group_size": None}, "in_features = 97 is not an integer from 1 to 96"),
    ],
)
def test_fields_from_the_internet_are_checked(fields: dict[str, Any], says: str) -> None:
    fine = {"in_features": INTO, "out_features": OUT, "bias": True, "bits": 8, "group_size": None, "symmetric": True}
    limits = {"in_features": INTO, "out_features": OUT, "rank": OUT}
    assert KINDS["quant_linear"].mistake(fine, limits) is None
    assert says in (KINDS["quant_linear"].mistake(fine | fields, limits) or "")


def test_what_stands_beside_codes_is_checked() -> None:
    layer = QuantLinear.from_linear(linear())
    assert layer.damage() is None
    layer.scale[3] = float("inf")
    assert layer.damage() == "scale, beside its codes, holds infinite values, or values that are no numbers"
    layer = QuantLinear.from_linear(linear())
    layer.weight.data = layer.weight.data.float()
    assert layer.damage() == "its codes are torch.float32, not torch.int8"
    with pytest.raises(CompressionError, match=r"group_size 36 does not divide 96 columns; the nearest that does is 32\.$"):
        QuantLinear(INTO, OUT, group_size=36)


def test_rounding_takes_the_nearest_code() -> None:
    codes, scale, offset = rounded(torch.tensor([[1.0, 0.5, -1.0, 0.26]]), 8)
    assert offset is None and codes.flatten().tolist() == [127, 64, -127, 33]
    assert scale.item() == pytest.approx(1 / 127)
    codes, scale, offset = rounded(torch.tensor([[0.0, 1.0, 3.0, 15.0]]), 4, symmetric=False)
    assert codes.flatten().tolist() == [0, 1, 3, 15] and scale.item() == 1.0 and offset is not None and offset.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_few_rows_are_told_what_many_are(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(1024, 1024, bias=False), bits, 64, symmetric)
    x = torch.randn(12, 1024).to(dtype)
    with torch.no_grad():
        many, few = layer(x)[:4].float(), layer(x[:4]).float()
    assert float((many - few).norm() / many.norm()) < 0.01
