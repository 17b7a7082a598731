"""Low rank: factors that are nearest to what layers say, ranks under one budget, factors as codes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hfcompress import CompressionError, LowRank, Quantize
from hfcompress.calibration.activation_svd import components, damped
from hfcompress.calibration.factoring import _reading_alike, matrix_of
from hfcompress.calibration.paired import Pair
from hfcompress.calibration.ranks import Curve, pays_up_to, ranks_within
from hfcompress.calibration.sensitivity import output_sensitivity
from hfcompress.checkpoint.artifact import save
from hfcompress.layers import kind_of
from hfcompress.surgery.targets import body_linears
from hfcompress.surgery.units.specimens.inputs import example
from hfcompress.surgery.units.specimens.tiny_config import miniature
from tests.methods.test_laws import FewBatches, auto, logits
from tests.tiny import tiny_model

SHAPES = [(24, 40), (40, 24), (32, 32)]
WHITE: dict[str, Any] = {"whiten": True, "samples": 16}


class Examples:
    """A task in miniature for any architecture: batches of random inputs without labels."""

    original, has_data = None, True

    def batches(self, model: nn.Module, samples: int, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        yield from (example(model, seed=number) for number in range(4))


def read(columns: int, tokens: int = 200, seed: int = 0) -> Tensor:
    """(tokens, columns) whose columns differ in scale, depend on each other and are not about zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.logspace(0, -2, columns) + torch.randn(columns, generator=generator)


def error(weight: Tensor, factors: tuple[Tensor, Tensor], x: Tensor) -> float:
    into, out = factors
    return float((x.double() @ (weight.double() - out @ into).T).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [200, 5])
def test_full_rank_is_the_matrix_and_no_rank_is_worse_than_plain_svd_on_its_own_samples(
    shape: tuple[int, int], tokens: int
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape), read(shape[1], tokens)
    square = (x.T @ x).double() / tokens
    white, plain = components(weight, square), components(weight)
    into, out = components(weight, damped(square)).factors(min(shape))
    torch.testing.assert_close((out @ into).float(), weight, atol=1e-4, rtol=1e-4)
    everything = float((x.double() @ weight.double().T).square().sum())
    assert error(weight, white.factors(min(shape)), x) < 1e-6 * everything, "what the samples lack may be lost, without a ridge"
    for rank in (1, 4, 12):
        mine, theirs = (error(weight, found.factors(rank), x) for found in (white, plain))
        assert mine <= theirs + 1e-9 * everything
        assert mine == pytest.approx(float(white.energies[rank:].sum()) * tokens, rel=1e-6, abs=1e-8 * everything)
        into, out = white.factors(rank)
        torch.testing.assert_close(into.norm(dim=1), out.norm(dim=0), msg="both sides of a component have one norm")
    assert error(weight, white.factors(4), x) < 0.7 * error(weight, plain.factors(4), x), "else the law says little"


def test_the_aim_of_a_pair_is_least_squares_on_what_was_said() -> None:
    torch.manual_seed(0)
    weight, before = torch.randn(12, 16), read(16)
    now = before @ (torch.eye(16) + 0.1 * torch.randn(16, 16)) + 0.1 * torch.randn(200, 16)
    same, pair = Pair(), Pair()
    for part in range(4):
        rows = slice(50 * part, 50 * part + 50)
        same.add(before[rows], before[rows])
        pair.add(now[rows], before[rows])
    for about_mean in (False, True):
        square = same.now.square(about_mean)
        torch.testing.assert_close(same.aimed(weight, square, 0.01, about_mean), weight.double(), atol=1e-6, rtol=1e-6)
        z, x = (rows.double() - about_mean * rows.double().mean(0) for rows in (now, before))
        solved = torch.linalg.lstsq(z, x @ weight.double().T).solution.T
        aimed = pair.aimed(weight, pair.now.square(about_mean), 0.0, about_mean)
        torch.testing.assert_close(aimed, solved, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pair.mean_before.double(), before.double().mean(0), atol=1e-5, rtol=1e-5)
    pair.add(now[:3], before[:2])
    assert torch.equal(pair.aimed(weight, pair.now.square(False), 0.01, False), weight.double()), "these have no counterpart"


def curves(seed: int = 0) -> list[Curve]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Curve.of((out, into), torch.rand(min(out, into), generator=generator).sort(descending=True).values.double() ** power)
        for out, into, power in [(12, 20, 1), (20, 12, 6), (16, 16, 3), (8, 30, 9)]
    ]


def spent(found: list[int | None], given: list[Curve]) -> int:
    return sum(curve.dense if rank is None else rank * curve.cost for rank, curve in zip(found, given, strict=True))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_ranks_meet_the_budget_within_one_and_no_single_move_is_better(ratio: float) -> None:
    given = curves()
    found = ranks_within(given, ratio)
    budget = ratio * sum(curve.dense for curve in given)
    assert budget - max(curve.cost for curve in given) < spent(found, given) <= budget

    def loss(ranks: list[int | None]) -> float:
        return sum(0.0 if rank is None else curve.losses[rank] for rank, curve in zip(ranks, given, strict=True))

    for one, rank in enumerate(found):
        for other, theirs in enumerate(found):
            if one == other or rank is None or theirs is None or rank < 2:
                continue
            moved = list(found)
            moved[one], moved[other] = rank - 1, theirs + 1
            if theirs + 1 < len(given[other].losses) and spent(moved, given) <= spent(found, given):
                assert loss(moved) >= loss(found) - 1e-12


def test_ranks_are_multiples_and_a_layer_that_is_not_low_rank_stays_dense() -> None:
    flat, steep = torch.ones(16, dtype=torch.float64), 0.5 ** torch.arange(16, dtype=torch.float64)
    given = [Curve.of((16, 16), flat), Curve.of((16, 16), steep)]
    assert ranks_within(given, 0.75) == [None, 4], "1 x 256 + 4 x 32 parameters of 512"
    assert ranks_within(given, 0.74, round_to=2) == [None, 2]
    assert pays_up_to((16, 16)) == 7 and pays_up_to((1, 9)) == 0


def test_a_global_budget_is_met_within_one_rank() -> None:
    for method in (LowRank(ratio=0.6, ranking="global"), LowRank(ratio=0.6, ranking="global", **WHITE)):
        model = tiny_model("llama")
        names = body_linears(model)
        before = sum(model.get_submodule(name).weight.numel() for name in names)
        method.run(model, FewBatches("llama"))
        layers = [model.get_submodule(name) for name in names]
        after = sum(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
        assert 0.6 * before - (64 + 128) < after <= 0.6 * before
        assert len({layer.rank for layer in layers if kind_of(layer) == "low_rank_linear"}) > 1


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "ViTForImageClassification",
        "MixtralForCausalLM",
        "AlbertForSequenceClassification",
    ],
)
def test_no_factors_of_a_rank_keep_better_what_a_layer_says(name: str) -> None:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    made = kind(miniature(kind.config_class(), layers=2, heads=4)).eval()
    for target in (body_linears(made)[1], body_linears(made)[-2]):
        lost = {}
        for label, more in {"plain": {}, "white": WHITE, "repaired": {**WHITE, "repair": True}}.items():
            model = copy.deepcopy(made)
            before = said_by(model, target)
            LowRank(rank=3, target_modules=[target], **more, **({"damping": 0.0} if more else {})).run(model, Examples())
            assert kind_of(model.get_submodule(target)) == "low_rank_linear"
            lost[label] = float((said_by(model, target) - before).square().sum())
        assert 0 < lost["white"] < lost["plain"]
        assert lost["repaired"] == pytest.approx(lost["white"], rel=1e-2), "nothing before it has changed"
    LowRank(ratio=0.5, ranking="global", repair=True, **WHITE).run(made, Examples())
    assert said_by(made, body_linears(kind(made.config))[0]).isfinite().all()


@torch.no_grad()
def said_by(model: nn.Module, target: str) -> Tensor:
    """(tokens, out)"""
    found: list[Tensor] = []
    hook = model.get_submodule(target).register_forward_hook(lambda _, __, out: found.append(out.flatten(0, -2)))
    for batch in Examples().batches(model, 16):
        model(**batch)
    hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_bias_takes_over_the_mean(kind: str, repair: bool) -> None:
    """What a layer says is, on the mean of the samples, what it said before."""
    model, task = tiny_model(kind), FewBatches(kind)
    first = body_linears(model)[0]
    said: dict[str, list[Tensor]] = {"before": [], "after": []}
    for when in said:
        hook = model.get_submodule(first).register_forward_hook(lambda _, __, out, when=when: said[when].append(out.detach()))
        with torch.no_grad():
            for batch in task.batches(model, 16):
                model(**batch)
        hook.remove()
        if when == "before":
            LowRank(rank=2, repair=repair, **WHITE).run(model, task)
    before, after = (torch.cat(found).flatten(0, -2) for found in said.values())
    torch.testing.assert_close(after.mean(0), before.mean(0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_is_finite(dtype: torch.dtype) -> None:
    for kind in ("llama", "bert"):
        model = tiny_model(kind).to(dtype)
        LowRank(ratio=0.5, ranking="global", repair=True, **WHITE).run(model, FewBatches(kind))
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert logits(model, kind).isfinite().all()


@pytest.mark.parametrize("trained", [True, False])
def test_sensitivity_is_the_squared_gradient_of_what_a_layer_says(trained: bool) -> None:
    model, task = tiny_model("llama").requires_grad_(trained), FewBatches("llama")
    names = body_linears(model)
    found = output_sensitivity(model, names, lambda: task.batches(model, 16), "a test")
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad == trained for parameter in model.parameters())
    model.requires_grad_(True)
    for name in names[:3]:
        total, said = 0.0, list[Tensor]()
        hook = model.get_submodule(name).register_forward_hook(lambda _, __, out, said=said: said.append(out))
        for batch in task.batches(model, 16):
            (slope,) = torch.autograd.grad(model(**batch).loss, said.pop())
            total += float(slope.square().sum() / slope.shape[-1])
        hook.remove()
        assert found is not None and found[name] == pytest.approx(total, rel=1e-4) and total > 0
    assert output_sensitivity(model, names, lambda: Examples().batches(model, 16), "a test") is None, "these have no labels"


def test_what_the_loss_does_not_feel_is_factored_first() -> None:
    """The first layer's value projection is of no use here, as nothing reads it; by shares alone it would count like any."""
    kept = {}
    for name, task in {"labels": FewBatches("llama"), "no labels": Examples()}.items():
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
        LowRank(ratio=0.6, ranking="global", **WHITE).run(model, task)
        layer: Any = model.model.layers[0].self_attn.v_proj
        kept[name] = layer.rank if kind_of(layer) == "low_rank_linear" else 32
    assert kept["labels"] <= 2 < kept["no labels"]


def test_layers_that_read_one_tensor_share_its_moments() -> None:
    model = tiny_model("llama", layers=1)
    layer = "model.layers.0"
    found = _reading_alike(model, body_linears(model), lambda: FewBatches("llama").batches(model, 8))
    assert found == {
        f"{layer}.self_attn.q_proj": [f"{layer}.self_attn.{name}_proj" for name in "qkv"],
        f"{layer}.self_attn.o_proj": [f"{layer}.self_attn.o_proj"],
        f"{layer}.mlp.gate_proj": [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
        f"{layer}.mlp.down_proj": [f"{layer}.mlp.down_proj"],
    }


def test_rows_of_frequent_tokens_are_kept_better() -> None:
    class Often(FewBatches):
        def batch(self, seed: int = 0, size: int = 8, length: int = 12) -> dict[str, Tensor]:
            made = super().batch(seed, size, length)
            return {**made, "input_ids": 5 + made["input_ids"] % 4}

    lost = {}
    for label, more in {"plain": {}, "white": WHITE}.items():
        model = tiny_model("bert")
        table = model.bert.embeddings.word_embeddings.weight.detach().clone()
        LowRank(rank=8, target_modules=["word_embeddings"], **more).run(model, Often("bert"))
        off = (model.bert.embeddings.word_embeddings.dequantised() - table).square().sum(1)
        lost[label] = float(off[5:9].sum()), float(off.sum())
    assert lost["white"][0] < 0.1 * lost["plain"][0] and lost["white"][1] > lost["plain"][1]


@pytest.mark.parametrize("bits", [8, 4])
def test_factors_become_codes_in_turn(bits: Any, tmp_path: Any) -> None:
    model = tiny_model("bert", layers=1, hidden_size=128, intermediate_size=256)
    LowRank(ratio=0.9, round_to=64, target_modules=["intermediate.dense"]).run(model, None)
    dense = model.bert.encoder.layer[0].intermediate.dense.dequantised()
    Quantize(bits).run(model, None)
    layer: Any = model.bert.encoder.layer[0].intermediate.dense
    kind = f"linear_{bits}bit"
    assert layer.rank == 64 and kind_of(layer.first) == kind and kind_of(layer.second) == kind
    expected = logits(model, "bert")
    save(model, None, tmp_path)
    assert torch.equal(logits(auto("bert").from_pretrained(tmp_path), "bert"), expected)
    off = (layer.dequantised() - dense).norm() / dense.norm()
    assert 0 < off < (0.02 if bits == 8 else 0.2)
    plain = layer.export_form()
    assert all(kind_of(part) != kind for part in plain)
    x = torch.randn(3, 128)
    torch.testing.assert_close(plain(x), x @ layer.dequantised().float().T + layer.bias, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"ratio": 0.5, "samples": 8, "repair": True},
            "repair, samples belong to whiten: true, which looks at data; set it, or leave them",
        ),
        (
            {"rank": 4, "ranking": "global"},
            "ranking: global shares one budget among the layers, which ratio gives; give ratio, or set ranking: layer",
        ),
        (
            {"rank": 4, "round_to": 2},
            "round_to rounds the ranks that ratio and energy choose, and rank names one; leave one of the two out",
        ),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        LowRank(**fields)
    assert sentence in str(error.value)


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_whiten_needs_data(ranking: Any) -> None:
    with pytest.raises(CompressionError) as error:
        LowRank(ratio=0.5, ranking=ranking, whiten=True).run(tiny_model("bert"), None)
    assert str(error.value) == (
        "low_rank: whiten needs calibration data; give a task or batches, with or without labels, or leave whiten out."
    )


def test_a_budget_that_no_ranks_meet() -> None:
    with pytest.raises(CompressionError) as error:
        LowRank(ratio=0.3, ranking="global", round_to=32).run(tiny_model("bert"), None)
    assert str(error.value) == (
        "low_rank: ratio 0.3 is less than factors of rank 32 in every layer have; possible are ratios from 0.8824; raise ratio or "
        "lower round_to."
    )


def test_what_is_not_finite_is_said_and_the_model_left_as_it_was() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.inf)
    with pytest.raises(CompressionError) as error:
        LowRank(ratio=0.5, whiten=True, target_modules=["down_proj"]).run(model, FewBatches("llama"))
    assert str(error.value) == (
        "low_rank: whiten: what model.layers.1.mlp.down_proj reads on the calibration data is not finite; load the model in "
        "float32 or bfloat16."
    )
    assert (
        type(model.model.layers[0].mlp.down_proj) is nn.Linear
        and matrix_of(model.model.layers[0].mlp.down_proj).isfinite().all()
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
