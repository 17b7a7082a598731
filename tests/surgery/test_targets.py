"""What may become codes: not what the code of an architecture reads, writes or hands on past a layer's forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hfcompress import CompressionError, Quantize
from hfcompress.checkpoint.artifact import save
from hfcompress.layers import holds_codes, kind_of
from hfcompress.surgery.targets import body_linears, codable, codable_tables
from hfcompress.surgery.units.specimens.inputs import example
from hfcompress.surgery.units.specimens.tiny_config import miniature

FAMILIES = {
    "PerceiverForMaskedLM": "perceiver",
    "RwkvForCausalLM": "rwkv",
    "WhisperForConditionalGeneration": "whisper",
    "OlmoForCausalLM": "olmo",
    "IBertForMaskedLM": "ibert",
}


def tiny(name: str) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(miniature(transformers.CONFIG_MAPPING[FAMILIES[name]](), layers=2, heads=4)).eval()


def test_layers_that_only_bear_our_names_are_not_ours() -> None:
    model = tiny("IBertForMaskedLM")
    named = [module for module in model.modules() if type(module).__name__ in ("QuantLinear", "QuantEmbedding")]
    assert named and not any(map(kind_of, named)) and not any(map(holds_codes, named))
    assert body_linears(model) == codable_tables(model) == []


def test_what_others_read_stays_dense() -> None:
    rwkv = codable(tiny("RwkvForCausalLM"))
    assert rwkv and not any(name.endswith(("attention.output", "feed_forward.value")) for name in rwkv), "scaled by its depth"
    perceiver = codable_tables(tiny("PerceiverForMaskedLM"))
    assert perceiver == [["perceiver.input_preprocessor.position_embeddings"]], "its decoder multiplies by the other one"
    whisper = [name for group in codable_tables(tiny("WhisperForConditionalGeneration")) for name in group]
    assert "model.decoder.embed_tokens" in whisper and not any(name.endswith("encoder.embed_positions") for name in whisper)
    assert not codable_tables(tiny("OlmoForCausalLM")), "its norms have no parameters, and a dtype is read off one"


@pytest.mark.parametrize("name", ["RwkvForCausalLM", "WhisperForConditionalGeneration"])
def test_what_is_coded_reloads_exactly(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    batch = example(model)
    Quantize(8, engine="hfcompress", embeddings=8).run(model, None)
    expected = model(**batch).logits
    save(model, None, tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**batch).logits, expected)


def test_a_model_that_would_be_left_without_a_dtype_is_refused_its_tables() -> None:
    with pytest.raises(CompressionError, match="no dense table that can become codes; leave embeddings out"):
        Quantize(8, engine="hfcompress", embeddings=8).run(tiny("OlmoForCausalLM"), None)
