"""What units are worth, each score by its formula, on small models; and which of them stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from hfcompress.calibration.batches import Batches, evaluating, singles, told
from hfcompress.calibration.scores import SCORES, score
from hfcompress.calibration.selection import Target, chosen
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods import Distill, PruneHeads, PruneNeurons, riding
from hfcompress.methods.riding import check_together
from hfcompress.surgery.units.gates import gate
from hfcompress.surgery.units.spans import Segment, Span, Units
from hfcompress.surgery.units.verify import units_of
from tests.methods.test_laws import FewBatches
from tests.tiny import tiny_model

DATA = [name for name, one in SCORES.items() if one.needs_data]


def albert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "embedding_size": 16}
    config = AlbertConfig(vocab_size=128, num_hidden_layers=3, num_labels=3, hidden_dropout_prob=0.0, **sizes)
    return AlbertForSequenceClassification(config).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    config = MixtralConfig(vocab_size=128, num_hidden_layers=2, num_local_experts=4, max_position_embeddings=64, **sizes)
    config._experts_implementation = "eager"  # another one wants sizes in sixteens of bytes, and float32
    return MixtralForCausalLM(config).eval()


def ragged(causal: bool, size: int = 6, length: int = 10) -> dict[str, Tensor]:
    """Texts of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 120, (size, length), generator=generator)
    mask = torch.arange(length) < torch.arange(length, length - size, -1)[:, None]
    ids = ids.masked_fill(~mask, 0)
    labels = ids.masked_fill(~mask, -100) if causal else torch.randint(0, 3, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def given(kind: str) -> tuple[Any, dict[str, Tensor]]:
    if kind == "albert":
        return albert(), ragged(False)
    if kind == "mixtral":
        return mixtral(), ragged(True)
    if kind == "vit":
        generator = torch.Generator().manual_seed(0)
        return tiny_model("vit"), {
            "pixel_values": torch.randn(5, 3, 16, 16, generator=generator),
            "labels": torch.randint(0, 3, (5,), generator=generator),
        }
    if kind in ("t5", "bart"):
        batch = ragged(False)
        return tiny_model(kind), {**batch, "labels": ragged(True, length=8)["labels"].clamp_max(100)}
    return tiny_model(kind), ragged(kind in ("llama", "gpt2"))


def loss_with(model: Any, units: Units, value: Tensor, batch: dict[str, Tensor]) -> float:
    def values(x: Tensor) -> Tensor:
        return value[..., None] if units.lanes == 1 else value.reshape(units.lanes, *[1] * (x.dim() - 3), units.count, 1)

    handle = gate(model, units, values)
    with torch.no_grad():
        output = model(**batch)
    handle.remove()
    logits, labels = output.logits, batch["labels"]
    if logits.dim() == 3:  # models take this loss in float32, too coarse for differences
        shift = 0 if model.config.is_encoder_decoder else 1
        logits, labels = logits[:, : logits.shape[1] - shift].flatten(0, 1), labels[:, shift:].flatten()
    return float(torch.nn.functional.cross_entropy(logits, labels))


KINDS = ("bert", "llama", "gpt2", "t5", "vit", "albert", "mixtral")


@pytest.mark.parametrize("part", ["heads", "neurons"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_fisher_are_finite_differences_of_each_example_s_loss(kind: str, part: str) -> None:
    model, batch = given(kind)
    model = model.double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    all_units = units_of(model, part)
    units = all_units[-1]
    scores = {name: score(name, model, all_units, lambda: [batch])[-1] for name in ("gradient", "fisher")}
    place = (0,) * (len(units.shape) - 1) + (units.count - 1,)
    slopes, step = [], 1e-2
    for one in singles(model, batch):
        sides = []
        for sign in (1, -1):
            value = torch.ones(units.shape, dtype=torch.float64)
            value[place] += sign * step
            sides.append(loss_with(model, units, value, one))
        slopes.append((sides[0] - sides[1]) / (2 * step))
    by_hand = torch.tensor(slopes, dtype=torch.float64)
    assert by_hand.abs().max() > 1e-7, "or the law says nothing"
    torch.testing.assert_close(float(scores["gradient"][place]), float(by_hand.abs().mean()), rtol=1e-2, atol=1e-8)
    torch.testing.assert_close(float(scores["fisher"][place]), float(by_hand.square().mean()), rtol=2e-2, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("name", DATA)
def test_a_score_does_not_depend_on_how_the_batches_are_cut(kind: str, name: str) -> None:
    model, batch = given(kind)
    all_units = units_of(model, "heads")
    whole = score(name, model, all_units, lambda: [batch])
    for mine, theirs in zip(score(name, model, all_units, lambda: singles(model, batch)), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-8)
    wide = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in batch.items() if key != "labels"}
    labels = batch["labels"] if kind != "llama" else torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)
    for mine, theirs in zip(score(name, model, all_units, lambda: [{**wide, "labels": labels}]), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["activation", "obs", "gradient"])
def test_the_padding_of_a_classifier_s_decoder_counts_for_nothing(name: str) -> None:
    """It reads the same text as the encoder, and has labels that are no tokens."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "eos_token_id": 2, "pad_token_id": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    model = BartForSequenceClassification(BartConfig(vocab_size=60, max_position_embeddings=64, **sizes, **heads)).eval()
    ids = torch.randint(5, 60, (6, 8))
    ids[:, -1] = 2
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 3, (6,))}
    long = {
        "input_ids": torch.nn.functional.pad(ids, (0, 5), value=1),
        "attention_mask": torch.nn.functional.pad(short["attention_mask"], (0, 5)),
        "labels": short["labels"],
    }
    all_units = units_of(model, "neurons")
    for mine, theirs in zip(*(score(name, model, all_units, lambda one=one: [one]) for one in (short, long)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["QuestionAnswering", "SequenceClassification", "Model"])
def test_a_decoder_that_is_given_nothing_else_reads_what_the_encoder_does(kind: str) -> None:
    config = BartConfig(vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, eos_token_id=2, num_labels=5)
    model, x = getattr(transformers, f"BartFor{kind}" if kind != "Model" else "BartModel")(config), torch.randn(2, 5, 3)
    batch = {"input_ids": torch.full((2, 5), 7), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])}
    labels = (
        {"labels": torch.ones(2, 5)} if kind == "SequenceClassification" else {}
    )  # several at once: five labels, not tokens
    assert len(told(model, {**batch, **labels}, "decoder.layers.0.fc2", x)) == 7
    assert len(told(model, {**batch, "decoder_attention_mask": torch.ones(2, 5)}, "decoder.layers.0.fc2", x)) == 10
    assert len(told(model, {**batch, "decoder_input_ids": batch["input_ids"]}, "decoder.layers.0.fc2", x)) == 10


def test_a_config_that_asks_for_attentions_is_left_as_it_was() -> None:
    """A folder's config may: a setter would refuse it under sdpa."""
    model = tiny_model("bert").train()
    vars(model.config)["_output_attentions"] = True
    PruneHeads(0.5, scores="activation").run(model, [ragged(False)])
    assert model.config.output_attentions and model.training
    with pytest.raises(KeyError, match="mine"), evaluating(model):
        raise KeyError("mine")
    assert model.config.output_attentions and model.training


def test_a_single_batch_has_its_sentence() -> None:
    with pytest.raises(
        CompressionError, match=r"a single batch was given where several are wanted; give a list .* in \[batch\]"
    ):
        PruneHeads(0.5).run(tiny_model("bert"), ragged(False))


@pytest.mark.parametrize("size", [5, 7])
def test_models_with_tokens_first_are_scored_as_others(size: int) -> None:
    """XLNet turns (batch, tokens) around: as many examples as tokens must not be taken for one another."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0}
    model = XLNetForSequenceClassification(XLNetConfig(**sizes, num_labels=3)).eval()
    batch = {"input_ids": torch.randint(5, 60, (size, 7)), "labels": torch.arange(size) % 3}
    all_units = units_of(model, "neurons")
    for name in ("gradient", "fisher"):
        whole = score(name, model, all_units, lambda: [batch])
        for mine, theirs in zip(whole, score(name, model, all_units, lambda: singles(model, batch)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-8)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[:, 5:] = 0
    x = torch.randn(7, 4, 3)
    rows = told(model, {"attention_mask": mask}, "transformer.layer.0.ff", x)
    torch.testing.assert_close(rows, x[:5].flatten(0, 1))
    assert len(told(model, {"attention_mask": mask.reshape(2, 2, 7)}, "x", torch.randn(4, 7, 3))) == 20  # multiple choice


@pytest.mark.parametrize("length", [1, 2])
def test_obs_and_repair_bear_data_that_hardly_vary(length: int) -> None:
    for part, method in (("heads", PruneHeads), ("neurons", PruneNeurons)):
        model = tiny_model("bert")
        with torch.no_grad():
            for one in model.bert.encoder.layer:
                one.intermediate.dense.bias[0] = 1000.0
        batch = {"input_ids": torch.full((4, length), 7), "labels": torch.zeros(4, dtype=torch.long)}
        found = score("obs", model, units_of(model, part), lambda batch=batch: [batch])
        assert len(found) == 2 and all(values.isfinite().all() for values in found)
        whole, plain, mended = (copy.deepcopy(model) for _ in range(3))
        method(0.5, scores="l1").run(plain, [batch])
        method(0.5, scores="l1", repair=True).run(mended, [batch])
        other = {"input_ids": torch.randint(5, 90, (8, 12))}
        with torch.no_grad():
            expected, *got = (one(**other).logits for one in (whole, plain, mended))
        off = [float((logits - expected).square().mean()) for logits in got]
        assert off[1] < 2 * off[0] + 1e-6, "what says nothing of other texts must do little harm to them"


def test_experts_that_only_later_batches_ask_are_scored_and_others_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
    }
    config = SwitchTransformersConfig(
        **sizes, num_decoder_layers=2, num_sparse_decoder_layers=1, num_experts=4, decoder_start_token_id=0
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    few = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8]])}
    many = {"input_ids": torch.randint(5, 120, (8, 20)), "labels": torch.randint(5, 120, (8, 20))}
    all_units = units_of(model, "neurons")
    first, last = (score("obs", model, all_units, lambda batches=batches: batches) for batches in ([few, many], [many, few]))
    assert [bool(values.any()) for values in first] == [bool(values.any()) for values in last]
    assert any(".expert_" in units.name and values.any() for units, values in zip(all_units, first, strict=True))
    with caplog.at_level("WARNING"):
        found = score("obs", model, all_units, lambda: [few])
    asleep = [units.name for units, values in zip(all_units, found, strict=True) if not values.any()]
    assert asleep and all(
        f"no example ever asks {name}, so all of its units count as nothing" in caplog.text for name in asleep
    )


@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_taylor_is_weight_times_gradient_of_all_that_a_unit_owns(part: str) -> None:
    model, batch = given("llama")
    units = units_of(model, part)[0]
    found = score("taylor", model, [units], lambda: [batch])[0]
    model(**batch).loss.backward()
    unit, total, joint = units.count - 1, 0.0, 0.0
    for span in (*units.inputs, *units.outputs):
        weight = model.get_parameter(span.tensor)
        index = span.index(torch.tensor([unit]), units.count)
        product = (weight * weight.grad).index_select(span.axis, index)
        total += float(product.abs().sum())
        joint += float(product.sum()) if span in units.outputs else 0.0
    torch.testing.assert_close(float(found[unit]), total, rtol=1e-4, atol=1e-9)
    value = torch.ones(units.shape)
    value.requires_grad_(True)
    handle = gate(model, units, lambda x: value[:, None])
    (slope,) = torch.autograd.grad(model(**batch).loss, value)
    handle.remove()
    torch.testing.assert_close(float(slope[unit]), joint, rtol=1e-3, atol=1e-7)  # a gate scales the columns of the output


def test_taylor_holds_no_more_gradients_at_a_time_than_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = given("llama")
    all_units = units_of(model, "neurons")
    at_once = score("taylor", model, all_units, lambda: [batch])
    monkeypatch.setattr("hfcompress.calibration.batches.AT_ONCE", 1)
    passes: list[int] = []
    in_turn = score("taylor", model, all_units, lambda: passes.append(1) or [batch])  # type: ignore[func-returns-value]
    assert len(passes) == len({span.tensor for units in all_units for span in (*units.inputs, *units.outputs)}), "one a weight"
    assert all(torch.allclose(one, other) for one, other in zip(at_once, in_turn, strict=True))


def test_activation_is_the_norm_of_what_a_unit_adds() -> None:
    model, batch = given("bert")
    units = units_of(model, "heads")[1]
    seen: list[Tensor] = []
    layer = model.get_submodule(units.output)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(**batch)
    handle.remove()
    columns = units.outputs[0].index(torch.tensor([2]), units.count)
    added = seen[0][..., columns] @ layer.weight[:, columns].T
    expected = added[batch["attention_mask"].bool()].norm(dim=-1).mean()
    found = score("activation", model, [units], lambda: [batch])[0]
    torch.testing.assert_close(found[2], expected.detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_nobody_reads_is_worth_nothing(kind: str, name: str) -> None:
    model, batch = given(kind)
    all_units = units_of(model, "neurons")
    units = all_units[0]
    for span in units.outputs:
        tensor = model.get_parameter(span.tensor)
        index = span.index(torch.tensor([1]), units.count)
        with torch.no_grad():
            tensor.index_fill_(span.axis, index, 0.0)
    found = score(name, model, all_units, lambda: [batch])[0]
    assert found.shape == units.shape and (found[..., 1] < 1e-9).all() and found.max() > 1e-9


@pytest.mark.parametrize("name", ["activation", "obs"])
def test_experts_that_can_t_be_seen_have_their_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfcompress.calibration.expert_inputs._PRODUCTS", ())
    model, batch = given("mixtral")
    says = rf"scores: {name} can't see what single experts of .* possible are gradient, .*l1, random; choose one of these"
    with pytest.raises(CompressionError, match=says):
        score(name, model, units_of(model, "neurons"), lambda: [batch])


def test_norms_are_those_of_all_weights_of_a_unit() -> None:
    model = mixtral()
    units = units_of(model, "neurons")[0]
    parts = []
    for span in (*units.inputs, *units.outputs):
        index = span.index(torch.tensor([3]), units.count)
        parts.append(model.get_parameter(span.tensor).detach()[1].index_select(span.axis - 1, index).flatten())
    owned = torch.cat(parts)
    torch.testing.assert_close(score("l1", model, [units])[0][1, 3], owned.abs().sum())
    torch.testing.assert_close(score("l2", model, [units])[0][1, 3], owned.norm())
    assert torch.equal(score("l2", model, [units])[0], score("magnitude", model, [units])[0])


def test_chance_is_decided_by_the_seed_and_nothing_else() -> None:
    one, other = tiny_model("bert", seed=1), tiny_model("bert", seed=2)
    first, again, second = (
        score("random", model, units_of(model, "heads"), None, seed) for model, seed in ((one, 1), (other, 1), (one, 2))
    )
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, second))


def test_scoring_leaves_no_trace() -> None:
    model, batch = given("bert")
    model.train()
    model.bert.embeddings.eval()
    model.bert.encoder.layer[0].requires_grad_(False)
    modes = [module.training for module in model.modules()]
    for name in SCORES:
        score(name, model, units_of(model, "neurons"), lambda: [batch])
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.bert.encoder.layer[0].parameters()].count(True) == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------- ranking


def layer(count: int, lanes: int = 1) -> Units:
    return Units(f"layer{count}", "neurons", count, (), (Span("x.weight", 1, (Segment(1),)),), lanes=lanes)


def counts(all_units: list[Units], scores: list[Tensor], target: Target) -> list[int]:
    kept = chosen(all_units, scores, target)
    for keep, one in zip(kept, all_units, strict=True):
        assert (keep.diff() > 0).all() and keep.shape[:-1] == torch.Size(one.shape[:-1])
    return [keep.shape[-1] for keep in kept]


def drawn(all_units: list[Units], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(units.shape, generator=generator) ** 4 for units in all_units]


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5, 0.73])
def test_layers_that_compete_lose_the_ratio_together(ratio: float, round_to: int) -> None:
    all_units = [layer(64), layer(128), layer(96), layer(64, lanes=2)]
    target = Target("prune_neurons", ratio, "global", round_to)
    for seed in range(5):
        kept = counts(all_units, drawn(all_units, seed), target)
        assert all(number % round_to == 0 for number in kept)
        total = sum(number * one.lanes for number, one in zip(kept, all_units, strict=True))
        assert abs(total - 416 * (1 - ratio)) <= round_to * (1 if round_to == 8 else 1.5)
        bounded = counts(all_units, drawn(all_units, seed), replace(target, min_ratio=ratio - 0.1, max_ratio=ratio + 0.1))
        for number, one in zip(bounded, all_units, strict=True):
            assert one.count * (0.9 - ratio) - 1e-6 <= number <= one.count * (1.1 - ratio) + 1e-6
        assert abs(sum(n * one.lanes for n, one in zip(bounded, all_units, strict=True)) - 416 * (1 - ratio)) <= 2 * round_to


def test_the_best_stay() -> None:
    one, other = torch.tensor([1.0, 5, 3, 2, 9, 4, 7, 6]), torch.tensor([5.0, 5, 5, 5, 5, 5, 5, 0.5])
    same = [layer(8), layer(8)]
    assert [keep.tolist() for keep in chosen(same, [one, other], Target("x", 0.5))] == [[1, 4, 6, 7], [0, 1, 2, 3]]
    first, second = chosen(same, [one, other], Target("x", 0.5, "global"))  # of norm one: 0.605, 0.470, 0.403; seven of 0.377
    assert first.tolist() == [4, 6, 7] and second.tolist() == [0, 1, 2, 3, 4]
    first, second = chosen(same, [one, other], Target("x", 0.25, "global"))
    assert first.tolist() == [1, 4, 5, 6, 7] and second.tolist() == [0, 1, 2, 3, 4, 5, 6]
    lanes = torch.stack([one, one.flip(0)])
    assert chosen([layer(8, 2)], [lanes], Target("x", 0.75))[0].tolist() == [[4, 6], [1, 3]]


def test_costs_say_what_a_unit_of_each_layer_is_worth() -> None:
    layers, scores = [layer(8), layer(8)], [torch.arange(1.0, 9.0), torch.arange(1.0, 9.0)]
    even = chosen(layers, scores, Target("x", 0.5, "global"))
    assert [len(keep) for keep in even] == [4, 4]
    assert [keep.tolist() for keep in chosen(layers, scores, Target("x", 0.5, "global"), costs=[3.0, 3.0])] == [
        keep.tolist() for keep in even
    ]
    dear, cheap = chosen(layers, scores, Target("x", 0.5, "global"), costs=[3.0, 1.0])
    assert len(dear) < 4 < len(cheap) and abs(3 * len(dear) + len(cheap) - 16) <= 1.5, "half of 32, to half a unit"


def test_heads_that_a_table_couples_are_one_decision() -> None:
    model = tiny_model("t5")
    coupled = next(units for units in units_of(model, "heads") if len(units.outputs) > 1)
    PruneHeads(0.5, ranking="global", scores="random").run(model, None)
    after = next(units for units in units_of(model, "heads") if units.name == coupled.name)
    assert len({model.get_submodule(span.module).weight.shape for span in coupled.outputs}) == 1
    assert [span.tensor for span in after.outputs] == [span.tensor for span in coupled.outputs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in SCORES if name != "magnitude"])
def test_every_score_cuts_every_kind_of_model(kind: str, name: str) -> None:
    model, batch = given(kind)
    for method in (
        PruneHeads(0.5, scores=name, ranking="layer" if kind == "t5" else "global"),
        PruneNeurons(0.5, scores=name, iterations=2, ranking="global", max_ratio=0.7),
    ):
        with riding(model, [method], [batch]) as tick:
            tick(1.0)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_iterations_score_what_is_left() -> None:
    """Two parts in one step are two steps: the second counts from what the first one left."""
    batch = ragged(False)
    once, twice = tiny_model("bert"), tiny_model("bert")
    with riding(once, [PruneNeurons(0.5, iterations=2, ranking="global", round_to=1)], [batch]) as tick:
        tick(1.0)
    for ratio in (0.25, 1 / 3):
        with riding(twice, [PruneNeurons(ratio, ranking="global", round_to=1)], [batch]):
            pass
    mine, theirs = once.state_dict(), twice.state_dict()
    assert set(mine) == set(theirs) != set() and all(torch.equal(mine[key], theirs[key]) for key in theirs)
    whole = tiny_model("bert")
    with riding(whole, [PruneNeurons(0.5, ranking="global", round_to=1)], [batch]):
        pass
    widths = [sum(layer.intermediate.dense.out_features for layer in model.bert.encoder.layer) for model in (once, whole)]
    assert widths == [128, 128]


# ---------------------------------------------------------------- saved scores


def test_saved_scores_serve_several_targets(tmp_path: Path) -> None:
    file, batch = str(tmp_path / "deep" / "heads.safetensors"), ragged(False)
    cut = {}
    for name, method in {
        "first": PruneHeads(0.25, scores="fisher", samples=6, save_scores=file),
        "again": PruneHeads(0.25, scores=file),
        "half": PruneHeads(0.5, scores=file, ranking="global"),
        "anew": PruneHeads(0.5, scores="fisher", samples=6, ranking="global"),
    }.items():
        model = tiny_model("bert")
        with riding(model, [method], [batch] if method.scores == "fisher" else None):
            pass
        cut[name] = model.state_dict()
    assert cut["first"].keys() == cut["again"].keys() != set() and cut["half"].keys() == cut["anew"].keys() != set()
    assert all(torch.equal(cut["first"][key], cut["again"][key]) for key in cut["first"])
    assert all(torch.equal(cut["half"][key], cut["anew"][key]) for key in cut["half"])
    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
        assert set(opened.keys()) == {units.output for units in units_of(tiny_model("bert"), "heads")}
    assert told == {
        "format": "1", "model_type": "bert", "kind": "heads", "score": "fisher", "samples": "6", "seed": "0"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "method", "says"),
    [
        (lambda: tiny_model("roberta"), PruneHeads, "holds scores of a 'bert', and the model is a 'roberta'"),
        (lambda: tiny_model("bert", layers=3), PruneHeads, r"has none for bert.encoder.layer.2.attention.output.dense"),
        (lambda: tiny_model("bert", num_attention_heads=2), PruneHeads, r"has \(4,\) for .*, which has \(2,\) heads"),
        (lambda: tiny_model("bert", layers=1), PruneHeads, "is of 2 layers, and the model has 1"),
        (lambda: tiny_model("bert"), PruneNeurons, "holds scores of heads, and neurons are to be cut"),
    ],
    ids=["class", "deeper", "sizes", "shallower", "kind"],
)
def test_scores_of_another_model_are_refused(other: Any, method: Any, says: str, tmp_path: Path) -> None:
    file = str(tmp_path / "heads.safetensors")
    PruneHeads(0.5, scores="l1", save_scores=file).run(tiny_model("bert"), None)
    with pytest.raises(CompressionError, match=f"heads.safetensors {says}.*; possible is a file that save_scores wrote"):
        method(0.5, scores=file).run(other(), None)


def test_a_file_that_holds_no_scores_has_its_sentence(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(CompressionError, match="is no file; possible is"):
        PruneHeads(0.5, scores=str(file)).run(tiny_model("bert"), None)
    file.write_bytes(b"no")
    with pytest.raises(CompressionError, match="can't be read"):
        PruneHeads(0.5, scores=str(file)).run(tiny_model("bert"), None)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(CompressionError, match="holds no scores of hfcompress"):
        PruneHeads(0.5, scores=str(file)).run(tiny_model("bert"), None)


# ---------------------------------------------------------------- bad requests


class Nothing:
    original = None

    def batches(self, *_: Any, **__: Any) -> Iterator[dict[str, Tensor]]:
        yield from ()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ratio": 0.95}, r"ratio 0.95 of 4 heads a layer would leave none, and 1 must stay; possible are ratios up to 0.75"),
        ({"ratio": 0.95, "ranking": "global"}, "would leave none"),
        ({"ratio": 0.05}, "cuts nothing; raise ratio or lower round_to"),
        ({"scores": "gradiant"}, r"unknown score; possible are gradient, .* or a .safetensors file.*Did you mean 'gradient'"),
        ({"ranking": "global", "min_ratio": 0.6}, "leave no layer to lose the ratio 0.5"),
        ({"ranking": "global", "max_ratio": 0.4}, "min_ratio up to the ratio and max_ratio from it"),
        ({"max_ratio": 0.9}, "min_ratio and max_ratio have nothing to bound; leave them out"),
        ({"warmup": 0.5}, "warmup 0.5 is not before fade 0.3"),
        ({"save_scores": "heads.bin"}, r"scores are kept in a .safetensors file"),
        ({"scores": "a.safetensors", "iterations": 2}, "iterations score again what is left, and a.safetensors can't"),
        ({"samples": 0}, "greater than or equal to 1"),
    ],
    ids=str,
)
def test_mistakes_have_their_sentence(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PruneHeads(**{"ratio": 0.5, "scores": "l1", **fields}).run(tiny_model("bert"), None)


def test_a_place_that_can_t_be_written_is_told_before_anything_is_scored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, why in ((tmp_path, "it is a folder"), (tmp_path / "file" / "x", "Not a directory|File exists")):
        path = str(place / "x.safetensors") if place != tmp_path else str(tmp_path / "folder.safetensors")
        if place == tmp_path:
            Path(path).mkdir()
        with pytest.raises(
            CompressionError, match=f"prune_heads: save_scores: .* can't be written .({why}).; give a file in a"
        ):
            PruneHeads(0.5, scores="gradient", save_scores=path).run(tiny_model("bert"), [{"input_ids": "never read"}])


@pytest.mark.parametrize(
    ("wrapped", "says"),
    [
        (
            lambda: torch.nn.Linear(2, 2),
            "prune_heads: a Linear is no transformers model, or a wrapper of one; give the PreTrained",
        ),
        (
            lambda: torch.compile(tiny_model("bert")),
            "prune_heads: a OptimizedModule is no transformers model, or a wrapper of one",
        ),
        (lambda: tiny_model("bert").to("meta"), "prune_heads: bert.embeddings.* is not in memory, as the model is offloaded"),
    ],
    ids=["module", "compiled", "meta"],
)
def test_what_is_no_model_in_memory_has_its_sentence(wrapped: Any, says: str) -> None:
    with pytest.raises(CompressionError, match=says):
        PruneHeads(0.5, scores="l1").run(wrapped(), None)


def test_weights_that_are_not_finite_are_told_as_such() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.output.dense.weight[0, 0] = torch.inf
    with pytest.raises(
        CompressionError, match=r"scores: l1 of .*layer.1.* is not finite, as its weights are not; .*check its w"
    ):
        PruneHeads(0.5, scores="l1").run(model, None)


def test_batches_that_can_be_read_once_are_read_again() -> None:
    batch = ragged(False)
    expected, model = tiny_model("bert"), tiny_model("bert")
    method = PruneNeurons(0.5, scores="obs", repair=True, iterations=2)
    method.run(expected, [batch, batch])
    method.run(model, (dict(batch) for _ in range(2)))
    assert all(torch.equal(one, other) for one, other in zip(expected.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", DATA)
def test_scores_on_data_ask_for_it(name: str) -> None:
    with pytest.raises(CompressionError, match=f"scores: {name} needs calibration data; give a task or batches"):
        PruneHeads(0.5, scores=name).run(tiny_model("bert"), None)
    with pytest.raises(CompressionError, match="and the task gave no batch; check its data set"):
        PruneHeads(0.5, scores=name).run(tiny_model("bert"), Nothing())
    with pytest.raises(CompressionError, match=f"scores: {name} needs calibration data; give a task or batches"):
        PruneHeads(0.5, scores=name).run(tiny_model("bert"), Batches())


def test_scores_by_the_loss_ask_for_labels() -> None:
    batch = {key: value for key, value in FewBatches("bert").batch().items() if key != "labels"}
    for name in ("gradient", "fisher", "taylor"):
        with (
            pytest.raises(
                CompressionError, match=f"scores: {name} needs a loss, and the model gave none: the batches hold no labels"
            ),
            riding(tiny_model("bert"), [PruneHeads(0.5, scores=name)], [batch]),
        ):
            pass
    with riding(tiny_model("bert"), [PruneHeads(0.5, scores="activation")], [batch]):
        pass


def test_a_model_that_overflows_is_not_ranked() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.fill_(float("inf"))
    with (
        pytest.raises(CompressionError, match="is not finite, as the model's answers to the calibration data overflow"),
        riding(model, [PruneHeads(0.5)], [ragged(False)]),
    ):
        pass


def test_the_same_units_are_cut_once_in_a_training() -> None:
    with pytest.raises(CompressionError, match="prune_heads: it is listed twice, and both would choose among the same heads"):
        check_together([PruneHeads(0.5), Distill(), PruneHeads(0.2)])
    check_together([PruneHeads(0.5), PruneNeurons(0.5)])
