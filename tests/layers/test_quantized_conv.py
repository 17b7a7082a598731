"""Convolutions of codes compute what the dense ones of their weight do, however these step, pad and group."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import rebuild, twin
from hfcompress.layers import KINDS
from hfcompress.layers.quantized_conv import QuantConv, group_within
from hfcompress.results.measure import weigh
from tests.tiny import tiny_model

SHAPES: list[tuple[Any, tuple[int, ...]]] = [
    (lambda **more: nn.Conv1d(8, 12, 4, stride=3, padding=2, **more), (2, 8, 23)),
    (lambda **more: nn.Conv1d(8, 12, 4, padding="same", dilation=3, groups=4, bias=False, **more), (2, 8, 23)),
    (lambda **more: nn.Conv2d(6, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=3, **more), (2, 6, 11, 13)),
    (lambda **more: nn.Conv2d(6, 10, 4, padding="valid", **more), (6, 11, 9)),
    (lambda **more: nn.Conv3d(4, 8, (2, 4, 3), stride=(2, 4, 3), padding=(1, 0, 1), **more), (1, 4, 4, 8, 9)),
]


def convolution(make: Any = SHAPES[2][0], **more: Any) -> Any:
    torch.manual_seed(0)
    return make(**more)


def dense_of(layer: Any, codes: QuantConv) -> Any:
    """The dense convolution with the weight that the codes stand for."""
    dense = copy.deepcopy(layer)
    dense.weight.data = codes.dequantised().to(layer.weight.dtype)
    return dense


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("make", "size"), SHAPES)
def test_it_says_what_the_dense_one_of_its_weight_says(make: Any, size: tuple[int, ...], mode: str) -> None:
    layer, x = convolution(make, padding_mode=mode), torch.randn(size)
    for bits, group in ((8, None), (4, 8)):
        for symmetric in (True, False):
            group = group_within(layer.weight[0].numel(), bits, group)
            codes = QuantConv.from_dense(layer, bits, group, symmetric)
            assert torch.equal(codes(x), dense_of(layer, codes)(x))
            step = codes.scale.float().repeat_interleave(codes.stored.shape[2] * 8 // bits, 1)
            near = 0.5 + 2**-10 * 2**bits  # scales and offsets of groups are in float16
            beside = 0 if codes.offset is None else codes.offset.abs().max() * 2**-10
            assert ((codes.dequantised() - layer.weight).abs().flatten(1) <= step * near + beside).all()
            assert KINDS["quant_conv"].mistake(codes.fields(), QuantConv.limits(layer)) is None
            assert KINDS["quant_conv"].build(**codes.fields()).fields() == codes.fields()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_casts(dtype: torch.dtype) -> None:
    layer, x = convolution(), torch.randn(2, 6, 11, 13)
    codes = QuantConv.from_dense(layer)
    scale, stored = codes.scale.clone(), codes.stored.clone()
    half = copy.deepcopy(codes).to(dtype)
    assert half.weight.dtype == half.bias.dtype == half(x.to(dtype)).dtype == half.export_form()(x.to(dtype)).dtype == dtype
    assert torch.equal(half.scale, scale) and half.scale.dtype == torch.float32 and torch.equal(half.stored, stored)
    assert torch.equal(half(x.to(dtype)), dense_of(layer.to(dtype), half)(x.to(dtype)))
    assert QuantConv.from_dense(layer).bias.dtype == dtype


def test_gradients_reach_the_input_and_a_bias_that_is_trained() -> None:
    layer = convolution()
    codes = QuantConv.from_dense(layer)
    dense = dense_of(layer, codes)
    assert not any(parameter.requires_grad for parameter in codes.parameters())
    codes.bias.requires_grad_()
    found, expected = (torch.randn(2, 6, 11, 13, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    codes(found).square().sum().backward()
    dense(expected).square().sum().backward()
    assert torch.equal(found.grad, expected.grad) and torch.equal(codes.bias.grad, dense.bias.grad)
    assert codes.weight.grad is None


def test_copies_pickles_compiling_and_size() -> None:
    layer, x = convolution(), torch.randn(2, 6, 11, 13)
    codes = QuantConv.from_dense(layer, 4, 10)
    expected = codes(x)
    file = io.BytesIO()
    torch.save(codes, file)
    file.seek(0)
    empty = QuantConv.build(**codes.fields())
    empty.load_state_dict(codes.state_dict())
    for other in (copy.deepcopy(codes), torch.load(file, weights_only=False), empty):
        assert torch.equal(other(x), expected)
    torch.testing.assert_close(torch.compile(codes, backend="aot_eager", fullgraph=True)(x), expected)
    assert codes.stored.shape == (12, 3, 5) and all(key in codes.state_dict() for key in ("weight", "packed", "scale", "bias"))
    told = weigh(codes)
    assert told["parameters"] == sum(parameter.numel() for parameter in layer.parameters()), "counted as what it stands for"
    assert told["bytes"] == 12 * 3 * 5 + 12 * 3 * 2 + 12 * 4 + 4


def test_groups_of_columns_divide_rows() -> None:
    assert [group_within(columns, 4, 32) for columns in (768, 240, 30, 7, 14, 147)] == [32, 30, 30, None, 14, None]
    assert group_within(768, 8, None) is None
    with pytest.raises(
        CompressionError, match=r"^QuantConv: 147 codes of 4 bits fill no whole bytes; the nearest bits that do are 8\.$"
    ):
        QuantConv.from_dense(nn.Conv2d(3, 8, 7), 4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"in_channels": 12}, "in_channels = 12 is not an integer from 1 to 6"),
        ({"groups": 4}, "groups = 4 does not divide its channels"),
        ({"groups": 6}, "groups = 6 is not an integer from 1 to 3"),
        ({"groups": 0}, "groups = 0 is not an integer from 1 to 3"),
        ({"groups": True}, "groups = True is not an integer from 1 to 3"),
        ({"kernel_size": [3, 10**9]}, "kernel_size = [3, 1000000000] is not allowed"),
        ({"kernel_size": [3]}, "kernel_size = [3] is not allowed"),
        ({"stride": [True, 1]}, "stride = [True, 1] is not allowed"),
        ({"padding": "same"}, "padding = 'same' is not allowed"),
        ({"padding_mode": "reflect"}, "padding_mode = 'reflect' is not allowed"),
        ({"group_size": 7}, "group_size 7 does not divide 30 columns; the nearest that does is 6"),
        ({"group_size": -2}, "group_size = -2 is not allowed"),
        ({"bits": 9}, "bits = 9 is not allowed"),
        ({"bias": 1}, "bias = 1 is not allowed"),
        ({"transposed": True}, "'transposed' is not allowed: QuantConv has in_channels, out_channels, groups"),
    ],
)
def test_fields_from_the_internet_are_checked(fields: dict[str, Any], says: str) -> None:
    layer = convolution()
    fine, limits = QuantConv.from_dense(layer).fields(), QuantConv.limits(layer)
    assert says in (QuantConv.mistake(fine | fields, limits) or "")
    missing = {key: value for key, value in fine.items() if key != "stride"}
    assert QuantConv.mistake(missing, limits) == "stride missing"


def test_a_structure_puts_it_in_place_of_a_convolution_alone() -> None:
    vit = tiny_model("vit")
    name = "vit.embeddings.patch_embeddings.projection"
    edit = {"kind": "quant_conv", **QuantConv.from_dense(vit.get_submodule(name)).fields()}
    assert rebuild(twin(vit), {name: edit}).get_submodule(name).fields() == {k: v for k, v in edit.items() if k != "kind"}  # type: ignore[operator]
    with pytest.raises(CompressionError, match=r"'classifier': a Linear can't become a quant_conv"):
        rebuild(twin(vit), {"classifier": edit})


def test_damage_is_told() -> None:
    codes = QuantConv.from_dense(convolution())
    assert codes.damage() is None
    codes.packed = codes.packed.float()
    assert codes.damage() == "its codes are torch.float32, not torch.int8"
