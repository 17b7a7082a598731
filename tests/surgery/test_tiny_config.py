"""A tiny model of any architecture: it runs, it keeps what it is told to keep, and every sort of layer is still there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hfcompress.surgery.units.specimens.tiny_config import example, miniature

CLASSES = (
    "BertForMaskedLM",
    "LlamaForCausalLM",
    "Gemma3ForConditionalGeneration",
    "DeepseekV3ForCausalLM",
    "JambaForCausalLM",
    "T5ForConditionalGeneration",
    "SwinForImageClassification",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
    "WhisperForConditionalGeneration",
)


@pytest.mark.parametrize("name", CLASSES)
def test_it_runs_and_is_small(name: str) -> None:
    cls: Any = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(miniature(cls.config_class(), layers=2, heads=4)).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    with torch.no_grad():
        first, second = (model(**example(model)).logits for _ in range(2))
    assert torch.isfinite(first).all() and torch.equal(first, second)


def test_without_numbers_layers_and_heads_stay() -> None:
    config = transformers.Gemma2Config()
    tiny = miniature(config)
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "layer_types"):
        assert getattr(tiny, key) == getattr(config, key)
    assert tiny.hidden_size < 100 and tiny.vocab_size < 100
    assert config.hidden_size == transformers.Gemma2Config().hidden_size, "the config itself stays as it is"


def test_every_sort_of_layer_stays_and_groups_stay_grouped() -> None:
    tiny = miniature(transformers.Gemma3TextConfig(), layers=2, heads=4)
    assert set(tiny.layer_types) == {"sliding_attention", "full_attention"} and len(tiny.layer_types) == tiny.num_hidden_layers
    assert (tiny.num_attention_heads, tiny.num_key_value_heads) == (4, 2)
    sizes = (tiny.hidden_size, tiny.intermediate_size, tiny.num_attention_heads * tiny.head_dim, tiny.vocab_size)
    assert len(set(sizes)) == 4
