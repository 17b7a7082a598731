"""Heads and neurons of the architectures that people bring: found, proven, cut, saved; and refused where they can't be cut."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hfcompress.checkpoint.quantizer  # noqa: F401
from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import twin
from hfcompress.methods import PruneHeads, PruneLayers, PruneNeurons
from hfcompress.methods.prune_units import without_units
from hfcompress.surgery.units.cut import cut
from hfcompress.surgery.units.gates import silenced
from hfcompress.surgery.units.spans import Units, roles
from hfcompress.surgery.units.specimens.inputs import example, set_norms
from hfcompress.surgery.units.specimens.tiny_config import miniature
from hfcompress.surgery.units.verify import answers, close, proven, units_of
from tests.tiny import tiny_model

# class: what its own config calls heads (or groups of keys and values) and neurons
CLASSES: dict[str, tuple[str, str]] = {
    "BertForSequenceClassification": ("num_attention_heads", "intermediate_size"),
    "RobertaForMaskedLM": ("num_attention_heads", "intermediate_size"),
    "DebertaV2ForSequenceClassification": ("num_attention_heads", "intermediate_size"),
    "ModernBertForMaskedLM": ("num_attention_heads", "intermediate_size"),
    "ElectraForTokenClassification": ("num_attention_heads", "intermediate_size"),
    "DistilBertForQuestionAnswering": ("n_heads", "hidden_dim"),
    "AlbertForMaskedLM": ("num_attention_heads", "intermediate_size"),
    "MPNetForMaskedLM": ("num_attention_heads", "intermediate_size"),
    "XLMRobertaForTokenClassification": ("num_attention_heads", "intermediate_size"),
    "GPT2LMHeadModel": ("n_head", "n_inner"),
    "GPTNeoXForCausalLM": ("num_attention_heads", "intermediate_size"),
    "OPTForCausalLM": ("num_attention_heads", "ffn_dim"),
    "LlamaForCausalLM": ("num_key_value_heads", "intermediate_size"),
    "MistralForCausalLM": ("num_key_value_heads", "intermediate_size"),
    "Qwen2ForCausalLM": ("num_key_value_heads", "intermediate_size"),
    "Qwen3ForCausalLM": ("num_key_value_heads", "intermediate_size"),
    "Gemma2ForCausalLM": ("num_key_value_heads", "intermediate_size"),
    "Phi3ForCausalLM": ("num_key_value_heads", "intermediate_size"),
    "FalconForCausalLM": ("num_attention_heads", "ffn_hidden_size"),
    "MixtralForCausalLM": ("num_key_value_heads", "intermediate_size"),
    "GptOssForCausalLM": ("num_key_value_heads", "intermediate_size"),
    "DeepseekV3ForCausalLM": ("num_attention_heads", "intermediate_size"),
    "T5ForConditionalGeneration": ("num_heads", "d_ff"),
    "BartForConditionalGeneration": ("encoder_attention_heads", "encoder_ffn_dim"),
    "MarianMTModel": ("encoder_attention_heads", "encoder_ffn_dim"),
    "WhisperForConditionalGeneration": ("encoder_attention_heads", "encoder_ffn_dim"),
    "Wav2Vec2ForCTC": ("num_attention_heads", "intermediate_size"),
    "ViTForImageClassification": ("num_attention_heads", "intermediate_size"),
    "DeiTForImageClassification": ("num_attention_heads", "intermediate_size"),
}
MORE = ("CLIPForImageClassification", "SiglipForImageClassification", "SwinForImageClassification")


def tiny(name: str, layers: int = 2, heads: int = 4) -> Any:
    """A random model whose biases and norms hide nothing."""
    kind: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = kind(miniature(kind.config_class(), layers=layers, heads=heads)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.02 * torch.randn_like(parameter)
            elif parameter.requires_grad:  # else a table of sinusoids
                parameter *= 3
    return model


def some(units: Units, number: int) -> torch.Tensor:
    """Half of the units, other ones in every layer; kernels for experts want eights."""
    size = max(1, units.count // 2 - (units.count // 2) % 8) if units.count > 8 else units.count // 2
    return torch.stack([torch.randperm(units.count)[:size].sort().values for _ in range(units.lanes)]).reshape(
        *units.shape[:-1], size
    )


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("name", [*CLASSES, *MORE])
def test_cut_equals_silenced_and_reload_is_exact(name: str, kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = tiny(name)
    batch, before = example(model), answers(model, example(model))
    units = units_of(model, kind)
    kept = [some(one, number) for number, one in enumerate(units)]
    with silenced(model, list(zip(units, kept, strict=True))):
        expected = answers(model, batch)
    for one, keep in zip(units, kept, strict=True):
        cut(model, one, keep)
    got = answers(model, batch)
    assert not close(expected[0], before[0], 1e-4), "silencing must be felt, or the law says nothing"
    assert all(close(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    describe(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(answers(again, batch), got, strict=True))
    if getattr(again.config, "num_key_value_heads", None) != 1:  # else every query head is a unit now
        assert [one.count for one in units_of(again, kind)] == [keep.shape[-1] for keep in kept], "it can be cut again"


# A specimen has all layers and experts of the model it stands for: of 61 layers with 256 experts each, that takes minutes.
FEWER = {"DeepseekV3ForCausalLM": {"num_hidden_layers": 4, "n_routed_experts": 16}}


@pytest.mark.parametrize("name", CLASSES)
def test_a_large_model_has_the_units_of_its_config(name: str) -> None:
    kind: Any = getattr(transformers, name)
    config = kind.config_class(**FEWER.get(name, {}))
    with torch.device("meta"):
        model = kind(config)
    heads, neurons = (getattr(config, key) for key in CLASSES[name])
    found = units_of(model, "heads")[0]
    assert found.count == heads
    assert found.count * found.size == model.get_submodule(found.output).weight.shape[found.outputs[0].axis]
    assert units_of(model, "neurons")[0].count == (neurons or 4 * config.hidden_size)


def test_heads_that_share_a_table_of_positions_are_one_decision() -> None:
    units = units_of(tiny("T5ForConditionalGeneration", layers=3), "heads")
    sides = [
        sorted(name for name in ("encoder", "decoder") if any(s.tensor.startswith(name) for s in one.outputs)) for one in units
    ]
    assert [len(one.outputs) for one in units if len(one.outputs) > 1] == [3, 3, 3]
    assert all(len(side) == 1 for side in sides), "encoder, decoder and cross attentions decide for themselves"


def test_groups_of_queries_go_together() -> None:
    kind = transformers.LlamaForCausalLM
    config = miniature(transformers.LlamaConfig(num_key_value_heads=2, num_attention_heads=4), layers=2)
    one = units_of(kind(config), "heads")[0]
    widths = {span.module.rpartition(".")[2][0]: span.width for span in one.inputs}
    assert one.count == 2 and widths["q"] == 2 * widths["k"] == 2 * widths["v"]


@pytest.mark.parametrize("name, heads", [("LlamaForCausalLM", 4), ("GemmaForCausalLM", 4), ("GPTBigCodeForCausalLM", 4)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_queries_of_one_key_are_cut_for_every_kernel_and_any_padding(name: str, heads: int, implementation: str) -> None:
    """sdpa shares the one key among queries by itself where there is no mask: nothing would tell that a count must follow."""
    kind: Any = getattr(transformers, name)
    config = miniature(kind.config_class(), layers=2, heads=heads)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 1
    torch.manual_seed(0)
    model = kind(config).eval()
    PruneHeads(0.5, scores="random", ranking="global").run(model, None)
    model.set_attn_implementation(implementation)
    ids = torch.randint(5, 30, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        padded, alone = model(input_ids=ids, attention_mask=mask).logits[1, :6], model(input_ids=ids[1:, :6]).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


def test_a_proof_does_not_depend_on_kernels_or_on_what_is_answered() -> None:
    model = tiny_model("llama")
    plain = proven(model)
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        assert proven(model) is plain
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    assert proven(model) is plain
    batch = {"input_ids": torch.randint(5, 90, (4, 8)), "labels": torch.randint(5, 90, (4, 8))}
    for change in ({}, {"return_dict": False}):
        vars(model.config).update(change)
        for method in (PruneNeurons(0.2, scores="gradient"), PruneLayers(0.5, scores="loss")):
            small = copy.deepcopy(model)
            method.run(small, [batch])
            assert (small.config.output_hidden_states, small.config.output_attentions) == (True, True)


def test_cross_attentions_with_three_heads_are_one_decision_too() -> None:
    """Three units lose one or two in turns: one of each would fit any number."""
    units = units_of(tiny_model("t5", layers=2, num_heads=3), "heads")
    assert [len(one.outputs) for one in units] == [2, 2, 2]  # of the encoder, of the decoder, and between them


def test_deep_convolutions_are_felt_by_what_follows() -> None:
    """With the statistics of a fresh batch norm, signals of small random weights vanish before they are out."""
    units = units_of(tiny("MobileViTForImageClassification"), "heads")
    assert len(units) == 6 and all(one.count == 4 for one in units)
    model = tiny("MobileViTForImageClassification")
    batch = example(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    weights = {name: norm.weight.detach()[:, None, None].clone() for name, norm in norms.items()}
    set_norms(model, batch)
    seen: dict[str, torch.Tensor] = {}

    def see(name: str, norm: Any, _: Any, out: torch.Tensor) -> None:
        normal = (out - norm.bias[:, None, None]) / weights[name]
        seen[name] = normal.transpose(0, 1).flatten(1)

    handles = [norm.register_forward_hook(partial(see, name)) for name, norm in norms.items()]
    answers(model, batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(norms) > 10 and not model.training
    for normal in seen.values():
        spread = normal.var(1, unbiased=False)  # of all channels but those that hardly vary
        assert normal.mean(1).abs().max() < 1e-2 and spread.max() < 1.05 and spread.median() > 0.3


def test_experts_have_neurons_of_their_own() -> None:
    units = units_of(tiny("MixtralForCausalLM"), "neurons")
    assert len(units) == 2 and all(one.lanes > 1 and one.shape == (one.lanes, one.count) for one in units)


def test_projections_have_their_roles() -> None:
    for name in ("BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM", "DistilBertForQuestionAnswering"):
        parts = [part for _, parts in roles(units_of(tiny(name), "heads")[0]) for part in parts]
        assert parts == ["query", "key", "value"]


REFUSED = [  # class, kind, and why, in the sentence's own words
    (
        "BloomForCausalLM",
        "heads",
        "transformer.h.0.self_attention (BloomAttention) is written for all of them",
    ),  # by their number
    ("Olmo2ForCausalLM", "heads", "model.layers.0.self_attn.q_norm (Olmo2RMSNorm) is written for all of them"),  # one norm
    ("MambaForCausalLM", "heads", "the architecture has no heads"),
    ("BitNetForCausalLM", "neurons", "its neurons depend on each other (a norm or a mixture over all of them)"),
]


@pytest.mark.parametrize("name, kind, why", REFUSED)
def test_what_is_not_proven_is_refused_by_name(name: str, kind: str, why: str) -> None:
    model = tiny(name)
    before = answers(model, example(model))
    method = PruneHeads(0.5, scores="magnitude") if kind == "heads" else PruneNeurons(0.5, scores="magnitude")
    with pytest.raises(CompressionError) as error:
        method.run(model, None)
    assert str(error.value).startswith(f"{name}: ") and why in str(error.value)
    assert str(error.value) == f"{name}: {proven(model).refusals[kind]}; {without_units()}."
    assert all(torch.equal(one, two) for one, two in zip(answers(model, example(model)), before, strict=True))


def test_where_gradients_are_off_units_are_found_all_the_same() -> None:
    with torch.no_grad():
        assert len(units_of(tiny("ElectraForTokenClassification", layers=3), "heads")) == 3


def test_a_proof_is_made_once_for_a_config() -> None:
    one, two = tiny("BertForSequenceClassification"), tiny("BertForSequenceClassification")
    assert proven(one) is proven(two)
    assert proven(twin(one)) is proven(one), "an empty model has the same units"


def test_a_model_that_somebody_else_cut_is_refused() -> None:
    model = tiny("BertForSequenceClassification")
    layer: Any = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    layer.weight = nn.Parameter(layer.weight[:-3])
    with pytest.raises(CompressionError, match="nobody cut"):
        units_of(model, "neurons")


def test_heads_and_neurons_can_be_named() -> None:
    model = tiny("BertForSequenceClassification")
    PruneHeads(keep={1: [0, 3]}).run(model, None)
    PruneNeurons(keep={0: [5, 7, 11]}).run(model, None)
    assert [units.count for units in units_of(model, "heads")] == [4, 2]
    assert units_of(model, "neurons")[0].count == 3


def grouped() -> Any:
    config = miniature(transformers.LlamaConfig(hidden_size=48, num_key_value_heads=2, num_attention_heads=6), layers=2)
    return transformers.LlamaForCausalLM(config).eval()


def test_named_heads_of_a_group_go_together() -> None:
    model = grouped()
    PruneHeads(keep={0: [3, 4, 5]}).run(model, None)
    assert [units.count for units in units_of(model, "heads")] == [1, 2]


NAMED = [
    (
        {0: [0, 1]},
        "prune_heads: keep: [0, 1] of model.layers.0.self_attn breaks a group: heads 0 to 2 share a key and value; possible are "
        "whole groups of 3; keep all of them or none.",
    ),
    ({7: [0]}, "prune_heads: keep: there is no layer 7; possible are 0 to 1, as the model runs."),
    (
        {0: []},
        "prune_heads: keep: [] of model.layers.0.self_attn, which has 6 heads; possible are some of 0 to 5, each once.",
    ),
    (
        {0: [6]},
        "prune_heads: keep: [6] of model.layers.0.self_attn, which has 6 heads; possible are some of 0 to 5, each once.",
    ),
    ({0: [0, 1, 2, 3, 4, 5]}, "prune_heads: keep names all heads, so nothing is cut; name fewer."),
]


@pytest.mark.parametrize("keep, sentence", NAMED)
def test_what_can_not_be_named_has_its_sentence(keep: dict[int, list[int]], sentence: str) -> None:
    with pytest.raises(CompressionError) as error:
        PruneHeads(keep=keep).run(grouped(), None)
    assert str(error.value) == sentence


def test_a_ratio_or_names_and_not_both() -> None:
    with pytest.raises(ValueError, match="give one of ratio and keep"):
        PruneHeads(0.5, keep={0: [1]})
    with pytest.raises(ValueError, match="give one of ratio and keep"):
        PruneNeurons()
    with pytest.raises(ValueError, match="keep says which heads stay, and scores would choose them"):
        PruneHeads(keep={0: [1]}, scores="l1")
