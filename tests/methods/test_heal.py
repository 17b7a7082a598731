"""Training a few dense parameters of a model, low-bit ones included: what is frozen, what learns, what is given back."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hfcompress import Adapters, CompressionCallback, CompressionError, Distill, Heal, LowRank, Quantize, Recipe, riding
from hfcompress.checkpoint.artifact import save
from hfcompress.layers import holds_codes
from hfcompress.surgery.targets import parts_of
from tests.methods.test_laws import FewBatches, auto, logits
from tests.tiny import DECODERS, KINDS, tiny_checkpoint, tiny_model, tiny_texts


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def heal(model: Any, kind: str, *methods: Any, steps: int = 2, lr: float = 1e-2, seeds: int = 2) -> set[str]:
    """Train with these riders; the names of the parameters that are other ones afterwards."""
    before, task = values(model), FewBatches(kind)
    model.train()
    with riding(model, list(methods), task) as tick:
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=lr, weight_decay=0.0)
        for step in range(steps):
            model(**task.batch(step % seeds)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tick((step + 1) / steps)
    model.eval()
    return {name for name, value in values(model).items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_parts_named_are_trained_and_all_else_is_given_back(kind: str) -> None:
    for part in ("norms", "biases", "embeddings"):
        model = tiny_model(kind)
        next(model.parameters()).requires_grad_(False)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        wanted = set(parts_of(model)[part])
        if not wanted:
            continue
        changed = heal(model, kind, Heal(parts=[part]))
        # a table of types or a pooler that these inputs or this head leave alone has no gradient
        assert changed and changed <= wanted, part
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert Heal().parts == ["norms", "biases"]


def test_parts_are_found_by_what_they_are() -> None:
    bert, llama = parts_of(tiny_model("bert")), parts_of(tiny_model("llama"))
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in bert["norms"].keys() & bert["biases"].keys()
    assert "classifier.bias" in bert["biases"] and "classifier.weight" not in {*bert["norms"], *bert["biases"]}
    assert {name.split(".")[-2] for name in bert["embeddings"]} == {
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
    }
    assert set(llama["norms"]) >= {"model.norm.weight", "model.layers.0.input_layernorm.weight"} and not llama["biases"]
    factored = tiny_model("bert")
    LowRank(rank=4, target_modules=["word_embeddings"]).run(factored, None)
    assert any("word_embeddings" in name for name in parts_of(factored)["embeddings"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_model_of_codes_is_healed_and_reloads_exactly(kind: str, bits: int, tmp_path: Any) -> None:
    """Gradients pass through low-bit layers to the norms before them; their biases, frozen with them, are trained as well."""
    model, dense = tiny_model(kind), tiny_model(kind)
    Quantize(bits).run(model, None)
    codes = {name: module.weight.data.clone() for name, module in model.named_modules() if holds_codes(module)}
    was = logits(model, kind)
    changed = heal(model, kind, Heal(), Distill(dense, alpha=1.0))
    parts = parts_of(model)
    assert changed and changed <= {*parts["norms"], *parts["biases"]}
    first = next(name for name in parts["norms"] if ".0." in name)
    assert first in changed, "the first norm, before every low-bit layer"
    coded_biases = {f"{name}.bias" for name in codes if getattr(model.get_submodule(name), "bias", None) is not None}
    assert not coded_biases or coded_biases & changed
    assert all(torch.equal(model.get_submodule(name).weight.data, value) for name, value in codes.items())
    assert not any(model.get_parameter(name).requires_grad for name in coded_biases), "frozen again"
    assert not torch.equal(logits(model, kind), was)
    expected = logits(model, kind)
    save(model, None, tmp_path)
    assert torch.equal(logits(auto(kind).from_pretrained(tmp_path), kind), expected)


def test_healing_brings_a_quantised_model_nearer_to_the_original() -> None:
    """On the text that it is healed on: norms have a share in the error of the codes that they can take back."""
    model, dense, batch = tiny_model("llama"), tiny_model("llama"), FewBatches("llama").batch(0)

    def error() -> float:
        with torch.no_grad():
            return float((model(**batch).logits - dense(**batch).logits).square().mean())

    Quantize(4, quant_type="fp4").run(model, None)
    before = error()
    heal(model, "llama", Heal(), Distill(dense, terms=["logits_mse"]), steps=40, lr=1e-3, seeds=1)
    assert 0 < error() < 0.9 * before


def test_a_tied_head_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    with caplog.at_level(logging.INFO, "hfcompress"):
        heal(model, "llama", Heal(parts=["embeddings"]))
    assert caplog.messages == ["heal: model.embed_tokens.weight is trained, and so is lm_head.weight, which is the same tensor"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(CompressionError) as caught:
        heal(tiny_model("llama"), "llama", Heal(parts=["biases"]))
    assert str(caught.value) == (
        "heal: LlamaForCausalLM has no biases to train; possible parts here are norms and embeddings; name one."
    )
    with pytest.raises(CompressionError) as caught:
        heal(tiny_model("llama"), "llama", Heal(), Adapters(r=4))
    assert str(caught.value) == (
        "adapters: it says what is trained, and so does heal; leave one of the two out, or give each a train of its own."
    )


def test_an_error_gives_back_what_was_trained() -> None:
    model = tiny_model("bert")
    with pytest.raises(RuntimeError, match="stop"), riding(model, [Heal()], FewBatches("bert")):
        assert not all(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError("stop")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recipe_heals_codes(dtype: str, tmp_path: Any) -> None:
    """The step of a recipe: in half precision too, where what is trained is in float32 meanwhile."""
    tiny_texts(tmp_path / "texts", each=8)
    tiny_checkpoint(tmp_path / "model", "llama")
    distil = {"distill": {"teacher": "original", "alpha": 1.0}}
    steps = [
        {"quantize": {"bits": 4}},
        {"train": {"epochs": 2, "learning_rate": 1e-2, "bf16": False, "with": ["heal", distil]}},
    ]
    task = {"name": "causal-lm", "dataset": str(tmp_path / "texts"), "block_size": 16}
    recipe = Recipe.from_dict({"model": str(tmp_path / "model"), "task": task, "steps": steps})
    model = recipe.task.load_model(recipe.model, dtype=dtype)
    recipe.task.keep_original(model)
    recipe.steps[0].run(model, recipe.task)
    before = values(model)
    recipe.steps[1].run(model, recipe.task)
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert changed and changed <= set(parts_of(model)["norms"])
    assert all(value.dtype == before[name].dtype for name, value in values(model).items())
    expected = logits(model, "llama")
    save(model, recipe.task.processor, tmp_path / "saved")
    loaded = recipe.task.load_model(str(tmp_path / "saved"))
    assert torch.equal(logits(loaded, "llama"), expected)
    before = values(loaded)
    recipe.steps[1].run(loaded, recipe.task)  # as after a run that was killed; transformers' Trainer alone refuses it
    changed = {name for name, value in values(loaded).items() if not torch.equal(value, before[name])}
    assert changed and changed <= set(parts_of(loaded)["norms"]) and loaded.is_quantized


def test_it_rides_along_with_a_trainer_of_the_user_s(tmp_path: Any) -> None:
    """It acts before the optimizer is built, which would else not hold the biases of low-bit layers."""
    model = tiny_model("gpt2")
    Quantize(8).run(model, None)
    before = values(model)
    batch = FewBatches("gpt2").batch()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(8)]
    given = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no"
    )
    Trainer(model, given, train_dataset=rows, callbacks=[CompressionCallback(Heal(["biases"]))]).train()
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert "transformer.h.0.mlp.c_fc.bias" in changed <= set(parts_of(model)["biases"])
    assert not model.transformer.h[0].mlp.c_fc.bias.requires_grad


def test_a_model_that_is_frozen_whole_can_be_healed() -> None:
    for kind in DECODERS[:1]:
        model = tiny_model(kind).requires_grad_(False)
        assert heal(model, kind, Heal())
        assert not any(parameter.requires_grad for parameter in model.parameters())
