"""Scales moved from columns into what comes before them: found by trying, the same model to the bit, less lost by rounding."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertForSequenceClassification, GemmaConfig, GemmaForCausalLM

from hfcompress import CompressionError, Quantize
from hfcompress.calibration.formats import Ours
from hfcompress.calibration.smoothing import Fold, provable, scale, smooth
from hfcompress.checkpoint.describe import diff
from tests.methods.test_laws import FewBatches
from tests.tiny import KINDS, tiny_model

PLACES = {"llama": 6, "qwen2": 6, "qwen3": 6, "mistral": 6, "gpt2": 4, "bert": 2, "minilm": 3, "roberta": 2, "distilbert": 2}
"""Of the layers' own: norms before projections, values before outputs, one half of a gate before what follows."""


def batch(kind: str) -> dict[str, Any]:
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    given = FewBatches("bert").batch(size=2)
    given.pop("labels")
    return {**given, "decoder_input_ids": given["input_ids"][:, :5]} if kind in ("t5", "bart") else given


@torch.no_grad()
def said(model: Any, kind: str) -> torch.Tensor:
    return model(**batch(kind)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "t5", "bart", "vit"])
def test_scales_of_two_change_no_bit(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind).to(dtype)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch(kind).items()}
    with torch.no_grad():
        before = model(**given).logits
        folds = provable(model, given)
        for number, fold in enumerate(folds):
            width = model.get_submodule(fold.readers[0]).weight.shape[0 if kind == "gpt2" else 1]
            scale(model, fold, 2.0 ** torch.randint(-3, 4, (width,), generator=torch.Generator().manual_seed(number)))
        assert torch.equal(model(**given).logits, before)
    body = [fold for fold in folds if not fold.readers[0].endswith(("lm_head", "classifier"))]
    assert len(body) == PLACES.get(kind, len(body)) and len(body) >= 2
    assert diff(model) == {}


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_labels_are_what_a_decoder_reads_where_nothing_else_is_given(kind: str) -> None:
    model, given = tiny_model(kind), batch(kind)
    found = provable(model, given)
    given["labels"] = given.pop("decoder_input_ids")
    assert provable(model, given) == found


def test_what_goes_on_elsewhere_takes_no_scales() -> None:
    """BERT's norms speak to the residual as well, and GELU is no matter of scale."""
    folds = provable(tiny_model("bert"), batch("bert"))
    assert [(fold.source.rpartition(".")[2], [name.rpartition(".")[2] for name in fold.readers]) for fold in folds] == [
        ("value", ["dense"])
    ] * 2


def test_a_tied_head_stays_tied() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert not [fold for fold in provable(model, batch("llama")) if "lm_head" in fold.readers]
    assert "lm_head" in [name for fold in provable(tiny_model("llama"), batch("llama")) for name in fold.readers]


def test_a_norm_of_one_plus_its_weight() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 128}
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    before = said(model, "llama")
    folds = provable(model, batch("llama"))
    norms = [fold for fold in folds if "norm" in fold.source]
    assert len(norms) == 4 and all(fold.how == "one plus" for fold in norms)
    for fold in folds:
        width = model.get_submodule(fold.readers[0]).in_features
        scale(model, fold, 2.0 ** torch.randint(-3, 4, (width,)))
    torch.testing.assert_close(said(model, "llama"), before, atol=1e-5, rtol=1e-5)


def outlying(kind: str) -> Any:
    """A few columns of what layers read are a hundred times as large as the others, and their weights as much smaller."""
    model = tiny_model(kind)
    for fold in provable(model, batch(kind)):
        width = model.get_submodule(fold.readers[0]).weight.shape[0 if kind == "gpt2" else 1]
        scale(model, fold, torch.where(torch.arange(width) % 16 == 3, 1 / 128, 1.0))
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "t5"])
def test_eight_bits_bear_inputs_that_stand_out(kind: str) -> None:
    original, off = outlying(kind), {}
    expected = said(original, kind)
    for smoothed in (False, True):
        model = copy.deepcopy(original)
        Quantize(8, engine="hfcompress", smooth=smoothed).run(model, [batch(kind)])
        off[smoothed] = float((said(model, kind) - expected).norm() / expected.norm())
    assert off[True] < 0.3 * off[False]


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 4, "engine": "hfcompress"}, {"bits": 8}], ids=str)
def test_no_place_is_worse_than_without(fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Quantize(**fields, smooth=True).run(outlying("llama"), FewBatches("llama"))
    line = next(one.args for one in caplog.records if "scales moved" in one.msg)
    moved, places, after, before = line[1:]
    assert places == 6 and 0 < moved <= 6 and after < before


def test_it_goes_before_targets_and_calibration() -> None:
    for fields in ({"target_bits": 5.0}, {"bits": 4, "calibrate": True}):
        model = tiny_model("llama")
        norms = {name: one.clone() for name, one in model.named_parameters() if "layernorm" in name}
        Quantize(**fields, engine="hfcompress", smooth=True, samples=8).run(model, FewBatches("llama"))
        after = dict(model.named_parameters())
        assert any(not torch.equal(one, after[name]) for name, one in norms.items())


def test_layers_that_stay_dense_are_scaled_with_their_neighbours() -> None:
    model = outlying("llama")
    expected = said(model, "llama")
    found = smooth(model, {"model.layers.0.self_attn.q_proj": Ours(4, 32, True)}, lambda: [batch("llama")], "quantize: smooth")
    reads = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert list(found) == [Fold("model.layers.0.input_layernorm", reads)]
    assert torch.equal(said(model, "llama"), expected)


def test_errors() -> None:
    with pytest.raises(CompressionError) as told:
        Quantize(4, smooth=True).run(tiny_model("llama"), None)
    assert str(told.value) == (
        "quantize: smooth needs calibration data; give a task or batches, with or without labels, or leave smooth out."
    )
    sizes = {"hidden_size": 64, "embedding_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    model = AlbertForSequenceClassification(AlbertConfig(**sizes, num_attention_heads=4)).eval()
    with pytest.raises(CompressionError) as told:
        Quantize(4, smooth=True).run(model, FewBatches("bert"))
    assert str(told.value) == (
        "quantize: smooth: AlbertForSequenceClassification has no place for scales, as what its layers read goes elsewhere too, or "
        "is read by several layers in turn; possible are models like Llama, GPT-2, BERT and ViT; leave smooth out."
    )
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressionError) as told:
        Quantize(4, smooth=True).run(model, [{**batch("llama")}, {"inputs_embeds": torch.full((1, 4, 64), torch.inf)}])
    assert str(told.value) == (
        "quantize: smooth: what model.layers.0.self_attn.q_proj reads on the calibration data is infinite or no number; load the "
        "model in float32 or bfloat16, or leave smooth out."
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
