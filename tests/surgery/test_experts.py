"""Fewer experts: cutting one equals a router that never chooses it, and the result is a plain transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hfcompress.calibration.expert_usage import usage
from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods import PruneExperts, PruneLayers
from hfcompress.run.recipe import Recipe
from hfcompress.surgery.experts import Mixtures, keep_experts, magnitude, mixtures
from tests.tiny import tiny_model

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
MOE = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LATENT = {
    **MOE, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
JAMBA = {
    **MOE, "num_experts": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip
DBRX = {
    "vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 40, "pad_token_id": 0,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
}  # fmt: skip
SWITCH = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "num_experts": 8, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0,
}  # fmt: skip

# kind -> (model class, config class, sizes)
ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**MOE, "num_local_experts": 8}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**MOE, "num_experts": 8}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**MOE, "num_experts": 8, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**MOE, "num_experts": 8}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**LATENT, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**MOE, "num_local_experts": 8, "head_dim": 8}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**MOE, "num_local_experts": 8}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**MOE, "num_local_experts": 8}),
    "dbrx": ("DbrxForCausalLM", "DbrxConfig", DBRX),
    "jamba": ("JambaForCausalLM", "JambaConfig", JAMBA),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", {**MOE, "num_local_experts": 8, "kv_channels": 8}),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", SWITCH),
}  # fmt: skip


def made(kind: str, **more: Any) -> Any:
    model_class, config_class, sizes = ZOO[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**sizes, **more}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for buffer in model.buffers():
                if buffer.shape == (8,):  # DeepSeek's corrections of scores
                    buffer.add_(torch.randn(8) * 0.1)
    return model.eval()


def batch(seed: int = 0, size: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (size, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Given:
    original = None

    def __init__(self, *batches: dict[str, torch.Tensor]) -> None:
        self.given = batches

    def batches(self, model: Any, samples: int) -> Any:
        return self.given


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(99)).logits


def silence(model: Any, experts: Mixtures, kept: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the router's logit of every other expert minus infinity."""
    routers: dict[int, list[int]] = {}
    for mixture, keep in zip(experts.layers, kept, strict=True):
        gone = [index for index in range(experts.count) if index not in keep]
        for name in mixture.tensors:
            tensor = model.state_dict(keep_vars=True)[name]
            if "correction" in name:
                tensor[gone] = -torch.inf
            elif tensor.dim() == 2 and ("router" in name or not name.startswith(f"{mixture.name}.")):
                routers[tensor.data_ptr()] = gone
    linear = torch.nn.functional.linear

    def silenced(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = linear(x, weight, bias)
        return out.index_fill(-1, torch.tensor(routers.get(weight.data_ptr(), []), dtype=torch.long), -torch.inf)

    assert len(routers) == len(experts.layers)
    monkeypatch.setattr(torch.nn.functional, "linear", silenced)


@pytest.mark.parametrize("kind", ZOO)
def test_cutting_an_expert_equals_silencing_it_in_the_router(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = made(kind), made(kind)
    experts = mixtures(model, "test")
    each = torch.Generator().manual_seed(3)
    half = experts.count // experts.groups // 2
    kept = [
        torch.cat([torch.randperm(half * 2, generator=each)[:half].sort().values + half * 2 * g for g in range(experts.groups)])
        for _ in experts.layers
    ]
    assert len({tuple(keep.tolist()) for keep in kept}) > 1 or len(kept) == 1, "each layer keeps its own"
    keep_experts(model, experts, kept)
    expected = answer(model)
    with monkeypatch.context() as patch:
        silence(whole, experts, kept, patch)
        torch.testing.assert_close(expected, answer(whole), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, answer(made(kind)), atol=1e-4), "the experts must be felt, or the law says nothing"
    assert describe(model) == {} and mixtures(model, "test").count == 4
    model.save_pretrained(tmp_path / "once")
    once = type(model).from_pretrained(tmp_path / "once").eval()
    once.save_pretrained(tmp_path / "twice")
    assert torch.equal(answer(once), expected)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path / "twice").eval()), expected)
    model.train()(**batch()).loss.backward()
    if kind != "switch_transformers":
        model.eval().generate(torch.tensor([[7, 8, 9]]), max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_usage_is_the_share_of_routing_weight_and_padding_has_none() -> None:
    model = made("mixtral")
    experts = mixtures(model, "test")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append((args[1], args[2])))
    short, long = batch(1, length=5), batch(1)
    long["input_ids"][:, :5] = short["input_ids"]
    long["attention_mask"][:, 5:] = 0
    scores = usage(model, experts, lambda: [short], "test")
    for (index, weights), score in zip(seen, scores, strict=True):
        shares = torch.stack([weights[index == expert].sum() for expert in range(8)]) / weights.sum()
        torch.testing.assert_close(score, shares.float())
    padded = usage(model.train(), experts, lambda: [long], "test")
    assert model.training
    for mine, theirs in zip(padded, scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_the_experts_most_used_stay_in_each_layer() -> None:
    model = made("mixtral")
    scores = usage(model, mixtures(model, "test"), lambda: [batch(1)], "test")
    down = [layer.mlp.experts.down_proj.detach().clone() for layer in model.model.layers]
    PruneExperts(0.5).run(model, Given(batch(1)))
    for layer, score, old in zip(model.model.layers, scores, down, strict=True):
        assert torch.equal(layer.mlp.experts.down_proj, old[score.topk(4).indices.sort().values])
        assert isinstance(layer.mlp.experts.down_proj, torch.nn.Parameter) and layer.mlp.gate.num_experts == 4
    assert model.config.num_local_experts == 4


def test_magnitude_and_chance_choose_without_data() -> None:
    model = made("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[[1, 6]] *= 0.1
        model.model.layers[0].mlp.experts.down_proj[[1, 6]] *= 0.1
    experts = mixtures(model, "test")
    assert sorted(magnitude(model, experts)[0].argsort()[:2].tolist()) == [1, 6]
    up = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    PruneExperts(0.25, scores="magnitude").run(model, None)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, up[[0, 2, 3, 4, 5, 7]])
    twice = [made("qwen3_moe"), made("qwen3_moe"), made("qwen3_moe")]
    for one, seed in zip(twice, (1, 1, 2), strict=True):
        PruneExperts(number=4, scores="random", seed=seed).run(one, None)
    assert torch.equal(answer(twice[0]), answer(twice[1])) and not torch.equal(answer(twice[0]), answer(twice[2]))


def test_groups_lose_as_many_each() -> None:
    model = made("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:4] *= 0.01  # the whole first group is weak
    PruneExperts(number=4, scores="magnitude").run(model, None)
    assert model.model.layers[1].mlp.experts.down_proj.abs().amax((1, 2)).lt(0.1).tolist() == [True, True, False, False]


def test_layers_and_experts_go_together(tmp_path: Path) -> None:
    model = made("mixtral", num_hidden_layers=3)
    PruneLayers(layers=[0, 2]).run(model, None)
    PruneExperts(0.5).run(model, Given(batch()))
    assert describe(model) == {}
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path).eval()), answer(model))


def test_a_recipe_lists_it() -> None:
    steps = [{"prune_experts": {"ratio": 0.25}}, {"prune_experts": {"number": 4, "scores": "random", "seed": 3}}]
    raw = {"model": "m", "task": {"name": "text-classification", "dataset": "d"}, "steps": steps}
    assert Recipe.from_dict(raw).to_dict()["steps"] == steps
    for fields in ({}, {"ratio": 0.5, "number": 2}):
        with pytest.raises(CompressionError, match=r"^recipe: steps.0.prune_experts: give one of ratio and number\.$"):
            Recipe.from_dict({**raw, "steps": [{"prune_experts": fields}]})


MIXTRAL = "MixtralForCausalLM's 8 experts a layer"
MISTAKES: list[tuple[str, dict[str, Any], Any, str]] = [
    ("mixtral", {"number": 8}, None, f"prune_experts (number: 8) cuts nothing of {MIXTRAL}; keep fewer."),
    ("mixtral", {"ratio": 0.05}, None, f"prune_experts (ratio: 0.05) cuts nothing of {MIXTRAL}; keep fewer."),
    (
        "mixtral",
        {"number": 1},
        None,
        f"prune_experts (number: 1) keeps 1 of {MIXTRAL}, and every token goes to 2; possible are 2 to 7; keep more.",
    ),
    (
        "deepseek_v3",
        {"number": 5},
        None,
        "prune_experts (number: 5) keeps 5 of DeepseekV3ForCausalLM's 8 experts a layer, which stand in 2 groups of the same size; possible are multiples of 2 from 4 on; give number.",
    ),
    (
        "deepseek_v3",
        {"number": 2},
        None,
        "prune_experts (number: 2) keeps 2 of DeepseekV3ForCausalLM's 8 experts a layer, which stand in 2 groups of the same size; possible are multiples of 2 from 4 on; give number.",
    ),
    (
        "mixtral",
        {"ratio": 0.5},
        None,
        "prune_experts: usage needs calibration data; give a task or batches, as in run(model, batches) before a Trainer is built or "
        "attach(trainer, ...) after, or choose scores: magnitude.",
    ),
    (
        "mixtral",
        {"ratio": 0.5},
        Given(),
        "prune_experts: usage needs calibration data, and the task gave no batch; check its data set.",
    ),
    (
        "jetmoe",
        {"ratio": 0.5},
        Given(batch()),
        "prune_experts: the experts are not told which token goes to which, so their use can't be counted; possible are scores: magnitude and random.",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "task", "sentence"), MISTAKES)
def test_a_mistake_has_its_sentence_and_changes_nothing(kind: str, fields: dict[str, Any], task: Any, sentence: str) -> None:
    model = made(kind)
    with pytest.raises(CompressionError) as told:
        PruneExperts(**fields).run(model, task)
    assert str(told.value) == sentence
    assert torch.equal(answer(model), answer(made(kind)))


def test_models_without_experts_that_can_go_are_refused_by_name() -> None:
    with pytest.raises(CompressionError) as told:
        PruneExperts(0.5).run(tiny_model("bert"), None)
    assert str(told.value) == (
        "prune_experts: BertForSequenceClassification has no experts that its config counts; possible are mixtures of experts "
        "whose layers all have the same number; choose another method."
    )
    model = made("mixtral")
    model.__class__ = type("HashedForCausalLM", (type(model),), {"__init__": hashed})
    with pytest.raises(CompressionError) as told:
        PruneExperts(0.5).run(model, None)
    assert str(told.value) == (
        "prune_experts: model.layers.0.mlp.gate.table tells by number which experts a token goes to, and no other expert may "
        "take its place; possible are models whose routers weigh all experts; choose another method."
    )


def hashed(self: Any, config: Any) -> None:
    """A Mixtral whose router has a table, as DeepSeek V4's first layers have."""
    transformers.MixtralForCausalLM.__init__(self, config)
    for layer in self.model.layers:
        layer.mlp.gate.register_buffer("table", torch.zeros(64, 2, dtype=torch.long))
