"""`quantize: {convolutions: 8}` on models that see and hear: half a step a weight, loaded exactly, smaller, loud without us."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    HubertConfig,
    HubertForCTC,
    MobileViTConfig,
    MobileViTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hfcompress.checkpoint.quantizer  # noqa: F401
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.describe import diff
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import rebuild, twin
from hfcompress.layers.quantized_conv import QuantConv
from hfcompress.methods import Cast, PruneHeads, Quantize
from hfcompress.results.measure import weigh
from hfcompress.surgery.modules import copied
from hfcompress.surgery.targets import codable_convolutions
from tests.tiny import tiny_config, tiny_model

_BODY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_SPEECH: dict[str, Any] = {
    **_BODY,
    **{"conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2), "num_feat_extract_layers": 3},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32},
}
_WHISPER: dict[str, Any] = {
    **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "max_source_positions": 10, "num_mel_bins": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "max_target_positions": 16},
}
_MOBILE: dict[str, Any] = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "patch_size": 2}
_NEXT: dict[str, Any] = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "image_size": 64}
_RESNET: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
# The model; how many convolutions become codes; how many stay dense, and how many more in 4 bits, whose rows are odd.
MODELS: dict[str, tuple[Any, Any, tuple[int, int, int]]] = {
    "vit": (ViTForImageClassification, lambda: tiny_config("vit"), (1, 0, 0)),
    "whisper": (WhisperForConditionalGeneration, lambda: WhisperConfig(**_WHISPER), (2, 0, 0)),
    "wav2vec2": (Wav2Vec2ForCTC, lambda: Wav2Vec2Config(**_SPEECH), (3, 1, 0)),
    "hubert": (HubertForCTC, lambda: HubertConfig(**_SPEECH), (3, 1, 0)),
    "convnextv2": (ConvNextV2ForImageClassification, lambda: ConvNextV2Config(**_NEXT), (4, 4, 0)),
    "mobilevit": (MobileViTForImageClassification, lambda: MobileViTConfig(**_MOBILE, image_size=64), (28, 7, 0)),
    "resnet": (ResNetForImageClassification, lambda: ResNetConfig(**_RESNET), (8, 0, 1)),
}


def made(kind: str) -> Any:
    model_class, config, *_ = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if kind == "whisper":
        return {"input_features": torch.randn(2, 16, 20), "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    if kind in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(2, 800)}
    return {"pixel_values": torch.randn(2, 3, 16, 16) if kind == "vit" else torch.randn(2, 3, 64, 64)}


@torch.no_grad()
def said(model: Any, kind: str) -> Tensor:
    floats = {key: one.to(model.dtype) if one.is_floating_point() else one for key, one in inputs(kind).items()}
    return model.eval()(**floats).logits  # type: ignore[no-any-return]


def convolutions(model: nn.Module) -> dict[str, QuantConv]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantConv)}


@pytest.mark.parametrize(
    ("kind", "bits"), [(kind, bits) for kind in MODELS for bits in (8, 4) if (kind, bits) != ("mobilevit", 4)]
)
def test_half_a_step_a_weight_and_an_exact_reload_twice(
    kind: str, bits: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, (model_class, _, (coded, left, odd)) = made(kind), MODELS[kind]
    before = copied(model)
    with caplog.at_level(logging.INFO, logger="hfcompress"):
        Quantize(8, engine="hfcompress", convolutions=bits).run(model, None)
    assert len([line for line in caplog.messages if "convolutions left dense" in line]) == (left + odd * (bits == 4) > 0)
    found = convolutions(model)
    assert len(found) == coded - odd * (bits == 4) and sum(map(len, codable_convolutions(before)[1].values())) == left
    for name, layer in found.items():
        dense = before.get_submodule(name).weight
        step = layer.scale.float().repeat_interleave(layer.stored.shape[2] * 8 // bits, 1)
        assert ((layer.dequantised() - dense).abs().flatten(1) <= step * (0.5 + 2**-10 * 2**bits)).all(), name
    assert weigh(model)["parameters"] == weigh(before)["parameters"]
    sizes = [sum(weigh(one.get_submodule(name))["bytes"] for name in found) for one in (model, before)]
    assert sizes[0] < sizes[1] / 2
    expected = said(model, kind)
    for folder in ("once", "twice"):
        save(model, None, tmp_path / folder)
        assert diff(rebuild(twin(model), diff(model))) == diff(model)
        model = model_class.from_pretrained(tmp_path / folder)
        assert torch.equal(said(model, kind), expected) and set(convolutions(model)) == set(found)
    assert convolutions(AutoModel.from_pretrained(tmp_path / "once")), "a base model finds them too"


@pytest.mark.parametrize("kind", ["vit", "convnextv2", "wav2vec2"])
def test_codes_say_what_the_dense_model_of_their_weights_says(kind: str) -> None:
    model = made(kind)
    dense = copied(model)
    Quantize(8, engine="hfcompress", convolutions=8, bits_pattern={".*": 16}).run(model, None)
    for name, layer in convolutions(model).items():
        dense.get_submodule(name).weight.data = layer.dequantised()
    assert torch.equal(said(model, kind), said(dense, kind))


@pytest.mark.parametrize("kind", ["vit", "whisper", "convnextv2"])
def test_half_precision_before_after_and_at_the_load(kind: str, tmp_path: Path) -> None:
    """ViT asks the weight of its convolution which dtype to cast pixels to."""
    model, early = made(kind), made(kind)
    Quantize(8, engine="hfcompress", convolutions=8).run(model, None)
    save(model, None, tmp_path)
    Cast().run(model, None)
    Cast().run(early, None)
    Quantize(8, engine="hfcompress", convolutions=8).run(early, None)
    assert said(early, kind).dtype == torch.bfloat16
    assert torch.equal(said(MODELS[kind][0].from_pretrained(tmp_path, dtype=torch.bfloat16), kind), said(model, kind))
    if kind == "vit":
        with torch.no_grad():
            assert torch.equal(model(pixel_values=inputs(kind)["pixel_values"]).logits, said(model, kind))


def test_beside_uneven_heads_bitsandbytes_and_a_target(tmp_path: Path) -> None:
    model = tiny_model("vit")
    PruneHeads(0.5, ranking="global", scores="magnitude").run(model, None)
    Quantize(4, convolutions=4).run(model, None)
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"QuantConv", "Linear4bit"} <= kinds
    save(model, None, tmp_path)
    assert torch.equal(said(ViTForImageClassification.from_pretrained(tmp_path), "vit"), said(model, "vit"))
    data = [{**inputs("vit"), "labels": torch.tensor([0, 1])}]
    dense = weigh(tiny_model("vit"))["bytes"] / 1e6
    sizes = []
    for target in (dense / 2, dense / 3):
        other = tiny_model("vit")
        Quantize(engine="hfcompress", target_megabytes=target, convolutions=8).run(other, data)
        sizes.append(weigh(other)["bytes"] / 1e6)
        assert convolutions(other) and sizes[-1] <= target
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("kind", ["vit", "wav2vec2", "whisper"])  # the second has a convolution of one channel
def test_without_hfcompress_the_load_raises(kind: str, tmp_path: Path) -> None:
    """To transformers alone, hfcompress is a quant_method that it does not know: a warning, and the file as it is."""
    model = made(kind)
    Quantize(8, engine="hfcompress", convolutions=8, bits_pattern={".*": 16}).run(model, None)
    save(model, None, tmp_path)
    told = tmp_path / "config.json"
    told.write_text(told.read_text().replace('"quant_method": "hfcompress"', '"quant_method": "unheard-of"'))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


def test_shared_convolutions_and_skipped_ones_stay_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = made("whisper")
    model.model.encoder.conv2.weight = model.model.encoder.conv1.weight = nn.Parameter(torch.randn(64, 64, 3))
    with pytest.raises(CompressionError) as error:
        Quantize(engine="hfcompress", convolutions=8).run(model, None)
    assert str(error.value) == (
        "quantize: convolutions: the model has no dense convolution that can become codes, but 2 of a weight that others read "
        "(model.encoder.conv1, ...); leave convolutions out."
    )
    model = made("whisper")
    Quantize(engine="hfcompress", convolutions=8, skip_modules=["conv2"]).run(model, None)
    assert list(convolutions(model)) == ["model.encoder.conv1"]


def test_the_mistakes_have_their_sentences() -> None:
    with pytest.raises(CompressionError) as error:
        Quantize(engine="hfcompress", convolutions=8).run(tiny_model("bert"), None)
    assert str(error.value) == (
        "quantize: convolutions: the model has no dense convolution that can become codes; leave convolutions out."
    )
    with pytest.raises(CompressionError) as error:
        Quantize(8).run(made("resnet"), None)
    assert str(error.value) == (
        "quantize: no linear layer of the model can become codes; set convolutions or embeddings, if it has these."
    )
