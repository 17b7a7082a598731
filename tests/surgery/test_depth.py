"""Fewer layers in every kind of architecture, and which ones go: prune_layers, and what student shares with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hfcompress.calibration.layer_scores import angular, block_influence, loss_without
from hfcompress.checkpoint.describe import describe, diff
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods import Cast, Distill, LowRank, PruneHeads, PruneLayers, PruneNeurons, Student, riding
from hfcompress.run.recipe import Recipe
from hfcompress.surgery.depth.drop import keep_layers
from hfcompress.surgery.depth.stacks import Stack, layer_stacks
from hfcompress.surgery.depth.trials import permitted, rehearse
from hfcompress.surgery.units.verify import units_of
from tests.methods.test_laws import FewBatches, logits
from tests.tiny import tiny_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
GROUPED = {**SIZES, **ENDS, "num_key_value_heads": 2, "max_position_embeddings": 40}
IMAGE = {"image_size": 32, "num_labels": 3}
FSMT = {
    "src_vocab_size": 64, "tgt_vocab_size": 64, "langs": ["en", "de"], "d_model": 32, "encoder_layers": 4, "decoder_layers": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
DEEP_SEEK = {
    **SIZES, **ENDS, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
GEMMA3N = {
    **GROUPED, "head_dim": 8, "num_hidden_layers": 6, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
QWEN3_NEXT = {
    **GROUPED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip

# kind -> (model class, config class, sizes, the layers to keep of every stack that has more)
ODD: dict[str, tuple[str, str, dict[str, Any], list[int]]] = {
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", {"vocab_size": 64, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48}, [1, 3]),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "dff": 48}, [0, 2]),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}, [1, 2]),
    "xlm": ("XLMWithLMHeadModel", "XLMConfig", {"vocab_size": 64, "emb_dim": 32, "n_layers": 4, "n_heads": 4}, [0, 3]),
    "fsmt": ("FSMTForConditionalGeneration", "FSMTConfig", FSMT, [0, 2]),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**SIZES, "embedding_size": 8}, [0, 2]),
    "albert of two groups": ("AlbertForMaskedLM", "AlbertConfig", {**SIZES, "embedding_size": 8, "num_hidden_groups": 2}, [1, 2]),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**SIZES, **ENDS, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 3},
        [0, 1, 3],
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**SIZES, "state_size": 4}, [0, 2]),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA3N, [0, 2, 3, 5]),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEP_SEEK, [0, 3]),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        {**GROUPED, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
        [1, 3],
    ),
    "esm": ("EsmForMaskedLM", "EsmConfig", {**SIZES, "mask_token_id": 4, "position_embedding_type": "rotary"}, [1, 3]),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {**IMAGE, "embed_dim": 8, "depths": [2, 4], "num_heads": [2, 4], "window_size": 2},
        [0, 3],
    ),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**SIZES, **IMAGE, "patch_size": 8, "mlp_ratio": 2}, [1, 3]),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {**IMAGE, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 4, 1]}, [0, 2]),
    "pvt_v2": ("PvtV2ForImageClassification", "PvtV2Config", {**IMAGE, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 4, 1], "num_attention_heads": [1, 2, 2, 2]}, [1, 3]),
    "poolformer": ("PoolFormerForImageClassification", "PoolFormerConfig", {**IMAGE, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 4, 1, 1]}, [0, 2]),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {**IMAGE, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 4]}, [0, 3]),
}  # fmt: skip


def made(kind: str, **more: Any) -> Any:
    model_class, config_class, sizes, _ = ODD[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**sizes, **more}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def answer(model: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    ids, pixels = torch.randint(5, 60, (2, 9), generator=random), torch.randn(2, 3, 32, 32, generator=random)
    given = {"pixel_values": pixels} if model.main_input_name == "pixel_values" else {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        return model(**given).logits


def passing(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if type(layer).__name__ == "XLNetLayer":
        return (args[0], args[1], *output[2:])
    return type(output)((given[0], *output[1:])) if isinstance(output, list | tuple) else given[0]


def skip(model: Any, stack: Stack, keep: list[int]) -> None:
    """Make the identity of every other layer; XLM's are four modules each, ALBERT's are told by the number of the call."""
    layers: Any = model.get_submodule(stack.name)
    if stack.repeats:
        calls: list[int] = []

        def turn(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
            calls.append(0)
            return output if len(calls) - 1 in keep else passing(layer, args, kwargs, output)

        for group in layers:
            group.register_forward_hook(turn, with_kwargs=True)
        return
    body = model.get_submodule(stack.name.rpartition(".")[0])
    for index, layer in enumerate(layers):
        if index not in keep and stack.name.endswith("attentions"):
            layer.register_forward_hook(lambda *all_: (all_[-1][0] * 0, *all_[-1][1:]))
            body.ffns[index].register_forward_hook(lambda *all_: all_[-1] * 0)
            for norm in (body.layer_norm1[index], body.layer_norm2[index]):
                norm.register_forward_hook(passing, with_kwargs=True)
        elif index not in keep:
            layer.register_forward_hook(passing, with_kwargs=True)


@pytest.mark.parametrize("kind", ODD)
def test_odd_architectures_lose_layers_too(kind: str, tmp_path: Path) -> None:
    model, whole, keep = made(kind), made(kind), ODD[kind][3]
    cuts = {stack.name: keep for stack in layer_stacks(model) if stack.count > 2 or len(layer_stacks(model)) == 1}
    rehearse(model, cuts, "test")
    keep_layers(model, cuts, "test")
    for stack in layer_stacks(whole):
        if stack.name in cuts:
            skip(whole, stack, keep)
    expected = answer(model)
    torch.testing.assert_close(expected, answer(whole), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, answer(made(kind)), atol=1e-4), "the layers must be felt, or the law says nothing"
    assert describe(model) == {}
    model.save_pretrained(tmp_path / "once")
    once = type(model).from_pretrained(tmp_path / "once").eval()
    once.save_pretrained(tmp_path / "twice")
    twice = type(model).from_pretrained(tmp_path / "twice").eval()
    assert torch.equal(answer(once), expected) and torch.equal(answer(twice), expected)
    if model.can_generate() and kind not in ("xlm", "fsmt"):
        ids = torch.tensor([[5, 6, 7]])
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_fields_that_count_a_part_of_the_layers_follow() -> None:
    model = made("deepseek_v3")
    keep_layers(model, {"model.layers": [0, 2, 3]}, "test")
    assert (model.config.num_hidden_layers, model.config.first_k_dense_replace) == (3, 1)
    model = made("gemma3n")
    keep_layers(model, {"model.layers": [0, 1, 2, 3, 5]}, "test")
    assert (model.config.num_kv_shared_layers, model.model.embed_tokens_per_layer.weight.shape) == (1, (64, 40))
    model = made("swin")
    keep_layers(model, {"swin.encoder.layers.1.blocks": [0, 3]}, "test")
    assert model.config.depths == [2, 2]
    model = made("gpt_neo")
    keep_layers(model, {"transformer.h": [1, 3]}, "test")
    assert model.config.attention_layers == ["local", "local"]


def test_stages_and_what_comes_before_the_layers_are_no_layers() -> None:
    assert [stack.count for stack in layer_stacks(made("pvt_v2"))] == [1, 1, 4, 1]
    assert [stack.name for stack in layer_stacks(made("resnet"))] == [f"resnet.encoder.stages.{i}.layers" for i in (0, 1)]
    assert [stack.name for stack in layer_stacks(made("xlm"))] == ["transformer.attentions"]
    assert layer_stacks(made("albert")) == [Stack("albert.encoder.albert_layer_groups", 4, repeats=True)]


class Padded(FewBatches):
    """Half of every text is padding."""

    noise = 0

    def batch(self, seed: int = 0, size: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
        batch = super().batch(seed, size, length)
        batch["attention_mask"][:, length // 2 :] = 0
        batch["input_ids"][:, length // 2 :] = (7 + self.noise) % 60 + 5
        return batch


def states(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What goes into each layer of a BERT, and what comes out of the last one."""
    with torch.no_grad():
        return list(model(**batch, output_hidden_states=True).hidden_states)


def test_block_influence_is_one_minus_the_mean_cosine_over_real_tokens() -> None:
    model, task = tiny_model("bert", layers=4), Padded("bert")
    stack = layer_stacks(model)[0]
    scores = block_influence(model, stack, lambda: task.batches(model, 16), "test")
    seen = [states(model, task.batch(number)) for number in range(2)]
    for index in range(4):
        cosines = [torch.cosine_similarity(one[index], one[index + 1], dim=-1)[:, :6] for one in seen]
        torch.testing.assert_close(scores[index], 1 - torch.cat(cosines).mean(), atol=1e-5, rtol=1e-4)
    assert not model.training
    task.noise = 11
    again = block_influence(model.train(), stack, lambda: task.batches(model, 16), "test")
    torch.testing.assert_close(again, scores, atol=1e-6, rtol=1e-5)
    assert model.training


def test_angular_distance_finds_the_run_that_does_nothing() -> None:
    model, task = tiny_model("llama", layers=6), FewBatches("llama")
    stack = layer_stacks(model)[0]
    with torch.no_grad():
        for index in (2, 3):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    distances = angular(model, stack, lambda: task.batches(model, 8), 2, "test")
    assert distances.shape == (5,) and distances.argmin() == 2 and distances[2] < 1e-3
    assert all(0 <= distance <= 1 for distance in distances)
    before, kept = logits(model, "llama"), [model.model.layers[index] for index in (0, 1, 4, 5)]
    for scores in ("angular", "block_influence"):
        one = copy.deepcopy(model)
        PruneLayers(number=4, scores=scores).run(one, task)
        torch.testing.assert_close(logits(one, "llama"), before)
    PruneLayers(number=4, scores="angular", samples=8).run(model, task)
    assert list(model.model.layers) == kept


def test_loss_takes_one_layer_after_another() -> None:
    model, task = tiny_model("gpt2", layers=4), FewBatches("gpt2")
    stack = layer_stacks(model)[0]
    one = min(range(4), key=lambda index: loss_without(model, stack, lambda: task.batches(model, 8), [index], "test"))
    left = [index for index in range(4) if index != one]
    two = min(left, key=lambda index: loss_without(model, stack, lambda: task.batches(model, 8), [one, index], "test"))
    layers = list(model.transformer.h)
    PruneLayers(0.5, scores="loss", samples=8).run(model, task)
    assert list(model.transformer.h) == [layers[index] for index in range(4) if index not in (one, two)]


def test_position_cuts_the_deepest_but_the_last() -> None:
    model = tiny_model("bert", layers=6)
    layers = list(model.bert.encoder.layer)
    PruneLayers(0.5, scores="position").run(model, None)
    assert list(model.bert.encoder.layer) == [layers[index] for index in (0, 1, 5)]


def test_a_decoders_padding_is_its_own() -> None:
    model = tiny_model("bart", layers=3)
    ids = torch.randint(5, 60, (4, 8))
    labels = ids.clone()
    labels[:, 3:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    decoder = layer_stacks(model)[1]
    scores = block_influence(model, decoder, lambda: [batch], "test")
    other = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    other["decoder_input_ids"][:, 3:] = 9
    torch.testing.assert_close(block_influence(model, decoder, lambda: [other], "test"), scores, atol=1e-6, rtol=1e-4)
    PruneLayers(number=2).run(model, Given([batch]))
    assert [stack.count for stack in layer_stacks(model)] == [2, 2]


class Given:
    original = None

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.given = batches

    def batches(self, model: Any, samples: int) -> list[dict[str, torch.Tensor]]:
        return self.given


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_cut_and_factored_model_may_lose_layers(kind: str, tmp_path: Path) -> None:
    model, task = tiny_model(kind, layers=4), FewBatches(kind)
    PruneHeads(0.5, ranking="global").run(model, task)
    PruneNeurons(0.3, ranking="global").run(model, task)
    LowRank(rank=4, target_modules=[units.output for units in units_of(model, "neurons")[1:3]]).run(model, None)
    whole, keep = copy.deepcopy(model), [1, 2]
    edits = diff(model)
    PruneLayers(layers=keep).run(model, None)
    skip(whole, layer_stacks(whole)[0], keep)
    torch.testing.assert_close(logits(model, kind), logits(whole, kind), atol=1e-5, rtol=1e-5)
    stack = layer_stacks(model)[0].name
    renumbered = {
        name.replace(f"{stack}.{index}.", f"{stack}.{number}."): edit
        for number, index in enumerate(keep)
        for name, edit in edits.items()
        if name.startswith(f"{stack}.{index}.")
    }
    assert diff(model) == renumbered
    describe(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), kind), logits(model, kind))


def test_where_sorts_have_an_order_the_best_of_each_sort_stay() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=6, num_decoder_layers=6, num_heads=4, num_experts=2,
        num_sparse_encoder_layers=3, num_sparse_decoder_layers=3,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    encoder = layer_stacks(model)[0]
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7])
    keep = permitted(model, encoder, scores, 4, "test")
    sorts = [type(model.encoder.block[index].layer[-1].mlp).__name__ for index in keep]
    rehearse(model, {encoder.name: keep, "decoder.block": [0, 1, 2, 3]}, "test")
    assert keep != scores.topk(4).indices.sort().values.tolist() and len(set(sorts)) == 2
    albert = made("albert of two groups")
    assert permitted(albert, layer_stacks(albert)[0], torch.tensor([1.0, 2.0, 4.0, 3.0]), 2, "test") == [1, 2]


def test_an_attention_layer_is_left() -> None:
    types = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    config = transformers.Qwen3NextConfig(**QWEN3_NEXT, layer_types=types)
    model = transformers.Qwen3NextForCausalLM(config).eval()
    stack = layer_stacks(model)[0]
    assert permitted(model, stack, torch.tensor([4.0, 3.0, 1.0, 2.0]), 2, "test") == [0, 2]
    with pytest.raises(CompressionError, match="no attention layer would be left"):
        PruneLayers(layers=[0, 1]).run(model, None)


def test_it_rides_before_a_teacher_and_its_parameters_are_trained() -> None:
    model = tiny_model("bert", layers=4)
    with riding(model, [PruneLayers(0.5, scores="position"), Distill(alpha=1.0)]) as tick:
        assert len(model.bert.encoder.layer) == 2
        model.train()(**FewBatches("bert").batch()).loss.backward()
        tick(1.0)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_low_bit_cast_comes_after(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=4)
    PruneLayers(0.5).run(model, FewBatches("llama"))
    Cast().run(model, None)
    assert describe(model) == {} and model.config.num_hidden_layers == 2


def test_a_recipe_lists_it() -> None:
    steps = [{"prune_layers": {"ratio": 0.25, "stack": "decoder"}}, {"prune_layers": {"layers": [0, 3]}}]
    raw = {"model": "m", "task": {"name": "text-classification", "dataset": "d"}, "steps": steps}
    assert Recipe.from_dict(raw).to_dict()["steps"] == steps


CHOICES: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing says how many layers go; give one of ratio, number and layers"),
    ({"ratio": 0.5, "number": 3}, "ratio and number are several ways to choose layers; give one of ratio, number and layers"),
    ({"layers": [2, 1]}, "layers must ascend without repeats"),
    (
        {"layers": [1], "scores": "loss"},
        "scores and samples are for choosing layers, and layers tells them; take scores and samples out",
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), CHOICES)
def test_a_wrong_choice_has_its_sentence(fields: dict[str, Any], sentence: str) -> None:
    raw = {"model": "m", "task": {"name": "text-classification", "dataset": "d"}, "steps": [{"prune_layers": fields}]}
    with pytest.raises(CompressionError) as told:
        Recipe.from_dict(raw)
    assert str(told.value) == f"recipe: steps.0.prune_layers: {sentence}."


HAS = "bert.encoder.layer, which has 4"
MISTAKES: list[tuple[dict[str, Any], Any, str]] = [
    ({"layers": [0, 4]}, None, f"prune_layers: layers [0, 4] of {HAS}; possible are 0 to 3."),
    ({"number": 5}, None, f"prune_layers: number 5 of {HAS}; possible are 1 to 4."),
    ({"number": 4}, None, f"prune_layers (number: 4) cuts nothing of {HAS}; keep fewer."),
    ({"ratio": 0.1}, None, f"prune_layers (ratio: 0.1) cuts nothing of {HAS}; keep fewer."),
    ({"ratio": 0.9}, None, f"prune_layers: ratio 0.9 of {HAS}, leaves nothing; lower ratio, or give number."),
    (
        {"ratio": 0.5},
        None,
        "prune_layers: block_influence needs calibration data; give a task or batches, as in run(model, batches) before a Trainer is "
        "built or attach(trainer, ...) after, or choose scores: position.",
    ),
    (
        {"ratio": 0.5},
        Given([]),
        "prune_layers: a score needs calibration data, and the task gave no batch; check its data set.",
    ),
    (
        {"ratio": 0.5, "scores": "loss"},
        Given([{"input_ids": torch.tensor([[5, 6]])}]),
        "prune_layers: scores: loss needs a loss, and the model gave none: the batches hold no labels, or the model no head; add labels, "
        "or choose scores: block_influence.",
    ),
    (
        {"ratio": 0.5, "stack": "decoder"},
        None,
        "prune_layers: stack 'decoder' is none of BertForSequenceClassification's; possible are all, encoder, bert.encoder.layer.",
    ),
]


@pytest.mark.parametrize(("fields", "task", "sentence"), MISTAKES)
def test_a_mistake_has_its_sentence_and_changes_nothing(fields: dict[str, Any], task: Any, sentence: str) -> None:
    model = tiny_model("bert", layers=4)
    with pytest.raises(CompressionError) as told:
        PruneLayers(**fields).run(model, task)
    assert str(told.value) == sentence
    assert torch.equal(logits(model, "bert"), logits(tiny_model("bert", layers=4), "bert"))


def test_without_batches_a_bare_loop_says_so() -> None:
    methods = [PruneLayers(0.5, scores="angular")]
    with pytest.raises(CompressionError, match="angular needs calibration data"), riding(tiny_model("bert"), methods):
        pass


REFUSED: list[tuple[str, list[int], str]] = [
    ("resnet", [1, 2], r"layer 1 of resnet.encoder.stages.1.layers can't become layer 0.*keep layer 0\."),
    (
        "swin",
        [0, 2],
        r"layer 2 of .* can't become layer 1.*shift_size is 0 and would be 1.*keep a layer of the sort of layer 1 there",
    ),
    (
        "albert of two groups",
        [0, 1],
        r"layers \[0, 1\] of albert.* are of the groups \[0, 0\], and the config describes \[0, 1\]",
    ),
]


@pytest.mark.parametrize(("kind", "keep", "sentence"), REFUSED)
def test_what_a_config_cant_tell_is_refused(kind: str, keep: list[int], sentence: str) -> None:
    model = made(kind)
    stack = max(layer_stacks(model), key=lambda one: one.count)
    with pytest.raises(CompressionError, match=f"student: {sentence}"):
        Student(layers=keep, stack=stack.name).run(model, None)


def test_an_encoder_shorter_than_its_decoder_is_refused_where_the_cache_needs_it() -> None:
    model = tiny_model("t5", layers=4)
    with pytest.raises(
        CompressionError, match=r"transformers makes the cache of .* as long as its encoder, 2;.*cut the decoder"
    ):
        PruneLayers(0.5, stack="encoder", scores="position").run(model, None)
    PruneLayers(0.5, scores="position").run(model, None)
    assert [stack.count for stack in layer_stacks(model)] == [2, 2]


def test_what_is_made_from_a_layers_place_does_not_move() -> None:
    model = tiny_model("llama", layers=4)
    for index, layer in enumerate(model.model.layers):
        layer.register_buffer("slope", torch.tensor(float(index)), persistent=False)
    with pytest.raises(
        CompressionError, match=r"layer 2 of model.layers can't become layer 1: its slope is made from its place"
    ):
        PruneLayers(layers=[0, 2]).run(model, None)
    PruneLayers(layers=[0, 1]).run(model, None)


def test_layers_that_are_not_called_are_not_scored() -> None:
    model = tiny_model("bert", layers=4)
    output = transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions
    model.bert.encoder.forward = lambda hidden_states, *_, **more: output(last_hidden_state=hidden_states)
    with pytest.raises(CompressionError, match=r"the hidden states between the layers of bert.encoder.layer can't be followed"):
        PruneLayers(0.5).run(model, FewBatches("bert"))
    assert isinstance(model.bert.encoder.layer, nn.ModuleList) and len(model.bert.encoder.layer) == 4


def test_batches_without_a_label_weigh_nothing_and_others_by_their_labels() -> None:
    model = tiny_model("llama", layers=4)
    batches = [{"input_ids": torch.randint(5, 90, (rows, 8)), "labels": torch.randint(5, 90, (rows, 8))} for rows in (5, 1)]
    none = {"input_ids": batches[0]["input_ids"], "labels": torch.full((5, 8), -100)}
    whole = [{key: torch.cat([batch[key] for batch in batches]) for key in none}]
    (stack,) = layer_stacks(model)
    found = [loss_without(model, stack, lambda given=given: given, [1], "x") for given in (whole, batches, [*batches, none])]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)
    with pytest.raises(CompressionError, match="x: loss is not finite on the calibration data, or no batch has a label"):
        loss_without(model, stack, lambda: [none], [1], "x")
