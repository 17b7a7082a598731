"""prune_weights: zeros where they should be on every family, held by masks, no worse by data, given back after an error."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hfcompress import Adapters, CompressionError, Heal, PruneNeurons, PruneWeights, Quantize, Recipe, riding
from hfcompress.calibration.factoring import matrix_of
from hfcompress.surgery.targets import body_linears
from tests.calibration.test_reconstruct import batches
from tests.methods.test_laws import FewBatches, logits
from tests.tiny import tiny_model

TASK = {"name": "text-classification", "dataset": "me/texts"}
KINDS = ("bert", "llama", "gpt2", "t5", "bart", "vit")
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.5},
    "wanda": {"sparsity": 0.5, "scores": "wanda"},
    "sparsegpt": {"sparsity": 0.5, "scores": "sparsegpt"},
    "2:4": {"pattern": "2:4", "scores": "sparsegpt"},
    "4:8": {"pattern": "4:8", "scores": "wanda"},
    "blocks": {"sparsity": 0.5, "pattern": "4x2", "scores": "wanda"},
    "global": {"sparsity": 0.5, "scores": "wanda", "ranking": "global"},
    "global, blocks": {"sparsity": 0.5, "pattern": "2x2", "scores": "sparsegpt", "ranking": "global", "max_sparsity": 0.8},
}


def with_data(fields: dict[str, Any], **more: Any) -> PruneWeights:
    reads = more.get("repair") or fields.get("scores", "magnitude") != "magnitude"
    return PruneWeights(**fields, **more, **({"samples": 16} if reads else {}))


def zeros(model: Any) -> dict[str, torch.Tensor]:
    """(out, in), bool, of every layer of the body."""
    return {name: matrix_of(model.get_submodule(name)) == 0 for name in body_linears(model)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_zeros_are_where_they_should_be(way: str, repair: bool, kind: str) -> None:
    fields, model = WAYS[way], tiny_model(kind)
    with_data(fields, repair=repair).run(model, batches(kind))
    found = zeros(model)
    total = sum(int(one.sum()) for one in found.values()) / sum(one.numel() for one in found.values())
    assert total == pytest.approx(0.5, abs=0.02)
    for name in found:
        weight = model.get_submodule(name).weight
        assert not weight[weight == 0].signbit().any(), "no negative zeros, which cost a file their signs"
    for name, one in found.items():
        if fields.get("ranking") == "global":
            assert float(one.float().mean()) <= fields.get("max_sparsity", 1.0) + 0.02, name
        else:
            assert float(one.float().mean()) == pytest.approx(0.5, abs=0.01), name
        if "pattern" in fields and ":" in fields["pattern"]:
            stay, of = map(int, fields["pattern"].split(":"))
            assert (one.reshape(-1, of).sum(1) == of - stay).all(), name
        if "x" in fields.get("pattern", ""):
            down, across = map(int, fields["pattern"].split("x"))
            blocks = one.reshape(len(one) // down, down, -1, across).movedim(2, 1).reshape(-1, down * across)
            assert (blocks.all(1) | ~blocks.any(1)).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_data_make_it_better_on_these_data(kind: str) -> None:
    """Of what the whole model says of them: repaired is nearer than cut, and SparseGPT nearer than magnitude."""
    data, off = batches(kind), {}
    for name, fields in {
        "whole": None,
        "magnitude": {},
        "repaired": {"repair": True, "samples": 64},
        "sparsegpt": {"scores": "sparsegpt", "samples": 64},
    }.items():
        model = tiny_model(kind)
        if fields is not None:
            PruneWeights(0.5, **fields).run(model, data)
        with torch.no_grad():
            said = torch.cat([model(**batch).logits.flatten() for batch in data])
        off[name] = said
    errors = {name: float((one - off["whole"]).square().mean()) for name, one in off.items()}
    assert errors["repaired"] < errors["magnitude"]
    assert errors["sparsegpt"] < errors["magnitude"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["wanda", "sparsegpt", "global"])
def test_models_in_half_precision_stay_so(way: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    with_data(WAYS[way], repair=True).run(model, FewBatches("llama"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = zeros(model)
    total = sum(int(one.sum()) for one in found.values()) / sum(one.numel() for one in found.values())
    assert total == pytest.approx(0.5, abs=0.02)
    assert logits(model, "llama").isfinite().all()


@pytest.mark.parametrize(
    "method", [PruneWeights(0.5, repair=True, samples=16), with_data(WAYS["2:4"]), with_data(WAYS["wanda"])]
)
def test_training_keeps_what_was_zeroed(method: PruneWeights) -> None:
    model, task = tiny_model("bert").train(), FewBatches("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with riding(model, [method], task) as tick:
        early = zeros(model)
        for step in range(5):
            model(**task.batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tick((step + 1) / 5)
            now = zeros(model)
            assert all((now[name] | ~early[name]).all() for name in now), "what was zero once stays so"
            early = now
    for name, one in zeros(model).items():
        assert float(one.float().mean()) == pytest.approx(0.5, abs=0.01), name


def test_a_second_training_goes_on_from_the_zeros_that_are_there() -> None:
    model, task = tiny_model("bert"), FewBatches("bert")
    PruneWeights(0.4, scores="sparsegpt", samples=16).run(model, task)
    early = zeros(model)
    with riding(model.train(), [PruneWeights(0.6)], task) as tick:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            model(**task.batch(step)).loss.backward()
            optimizer.step()
            tick((step + 1) / 3)
            assert all((one | ~early[name]).all() for name, one in zeros(model).items())
    assert all(float(one.float().mean()) == pytest.approx(0.6, abs=0.01) for one in zeros(model).values())


@pytest.mark.parametrize("second", [WAYS["sparsegpt"], WAYS["wanda"], {"sparsity": 0.5, "repair": True}, WAYS["2:4"]])
def test_a_second_run_brings_no_zero_back(second: dict[str, Any]) -> None:
    model, task = tiny_model("bert"), FewBatches("bert")
    with_data(WAYS["2:4"]).run(model, task)
    early = zeros(model)
    PruneWeights(**second, samples=16).run(model, task)
    assert all((now | ~early[name]).all() for name, now in zeros(model).items())


def test_a_step_of_the_optimizer_after_the_last_tick_is_no_way_back() -> None:
    model, task = tiny_model("bert").train(), FewBatches("bert")
    with riding(model, [with_data(WAYS["sparsegpt"])], task) as tick:
        tick(0.5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
    assert all(float(one.float().mean()) == pytest.approx(0.5, abs=0.01) for one in zeros(model).values())


@pytest.mark.parametrize(
    "fields", [{"bits": 4}, {"bits": 8}, {"bits": 4, "calibrate": "feedback"}, {"bits": 8, "calibrate": "rounding"}]
)
def test_codes_keep_zeros(fields: dict[str, Any]) -> None:
    model, task = tiny_model("bert"), FewBatches("bert")
    with_data(WAYS["2:4"]).run(model, task)
    early = zeros(model)
    more = {"samples": 16} if fields.get("calibrate") else {}
    Quantize(engine="hfcompress", **fields, **more).run(model, task)
    for name, one in early.items():
        assert not model.get_submodule(name).dequantised()[one].any(), name


def test_codes_without_a_zero_say_that_zeros_are_lost(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("bert")
    PruneWeights(0.5).run(model, None)
    with caplog.at_level(logging.WARNING):
        Quantize(1, engine="hfcompress", calibrate="scales", group_size=16).run(model, None)
    assert "its zeros are lost, as these codes have no zero; choose symmetric codes of 2 bits or more" in caplog.text


def test_under_one_budget_no_layer_is_emptied() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with_data(WAYS["global"]).run(model, FewBatches("llama"))
    assert all(float(one.float().mean()) <= 0.77 for one in zeros(model).values())


def test_a_weight_that_is_new_and_zero_is_not_taken_for_a_pruned_one() -> None:
    model = tiny_model("bert")
    new = model.bert.encoder.layer[0].attention.self.query.weight
    torch.nn.init.zeros_(new)
    with riding(model, [PruneWeights(0.5)], None) as tick:
        tick(0.0)
        torch.nn.init.ones_(new)
        tick(0.01)
        assert float((new != 0).float().mean()) > 0.9


def test_an_error_gives_back_what_was_solved() -> None:
    model = tiny_model("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        riding(model, [PruneWeights(0.5, scores="sparsegpt", repair=True, samples=16)], FewBatches("bert")),
    ):
        assert not torch.equal(
            model.bert.encoder.layer[0].output.dense.weight, before["bert.encoder.layer.0.output.dense.weight"]
        )
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_bias_takes_the_mean_over() -> None:
    """On its samples, the mean output of the first layer is what it was."""
    whole, cut, task = tiny_model("bert"), tiny_model("bert"), FewBatches("bert")
    name = "bert.encoder.layer.0.attention.self.query"
    PruneWeights(0.5, target_modules=[name], repair=True, samples=64).run(cut, task)
    said: list[torch.Tensor] = []
    for model in (whole.eval(), cut.eval()):
        outputs: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[-1]))
        for batch in task.batches(model, 64):
            model(**batch)
        handle.remove()
        mask = torch.cat([batch["attention_mask"].bool().flatten() for batch in task.batches(model, 64)])
        said.append(torch.cat([one.flatten(0, 1) for one in outputs])[mask].mean(0))
    torch.testing.assert_close(said[1], said[0], atol=1e-4, rtol=1e-3)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "give one of sparsity and a pattern N:M, which says how many weights stay"),
    "both": ({"sparsity": 0.5, "pattern": "2:4"}, "give one of sparsity and a pattern N:M"),
    "pattern": ({"pattern": "4/2"}, r"'4/2' is no pattern; possible are N:M, as 2:4"),
    "samples": (
        {"sparsity": 0.5, "samples": 8},
        "samples belong to scores that look at data, wanda and sparsegpt, and to repair",
    ),
    "ramp": (
        {"sparsity": 0.5, "repair": True, "ramp": 0.5},
        "ramp lets zeros come gradually, and scores: sparsegpt and repair",
    ),
    "global": ({"pattern": "2:4", "ranking": "global"}, "pattern 2:4 takes the same share of every layer.*possible is ranking"),
    "max": ({"sparsity": 0.5, "max_sparsity": 0.9}, "max_sparsity bounds what layers lose under ranking: global"),
    "below": (
        {"sparsity": 0.5, "max_sparsity": 0.4, "ranking": "global"},
        "sparsity 0.5 is more than max_sparsity 0.4; set it below",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_fields_that_do_not_fit_are_told(case: str) -> None:
    fields, sentence = WRONG[case]
    with pytest.raises(ValueError, match=sentence):
        PruneWeights(**fields)


def test_a_pattern_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(
        CompressionError,
        match=r"prune_weights: pattern 3:5 does not fit bert\.\S+: its \d+ inputs are no multiple of 5; choose a pattern whose",
    ):
        PruneWeights(pattern="3:5").run(tiny_model("bert"), None)
    with pytest.raises(CompressionError, match=r"its \d+ outputs and \d+ inputs are no multiples of 7 and 1;"):
        PruneWeights(0.5, pattern="7x1").run(tiny_model("bert"), None)


@pytest.mark.parametrize(
    "method", [PruneWeights(0.5, scores="wanda"), PruneWeights(0.5, scores="sparsegpt"), PruneWeights(0.5, repair=True)]
)
def test_without_data_it_says_what_needs_them(method: PruneWeights) -> None:
    with pytest.raises(
        CompressionError, match=r"prune_weights: (scores: \w+|repair) needs calibration data; give a task or batches"
    ):
        method.run(tiny_model("bert"), None)


def test_what_is_read_must_be_finite() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias.fill_(torch.inf)
    with pytest.raises(CompressionError, match=r"prune_weights: what bert\.\S+ reads on the calibration data is infinite"):
        PruneWeights(0.5, scores="wanda", samples=8).run(model, FewBatches("bert"))


def test_a_layer_that_shares_its_weight_is_named() -> None:
    with pytest.raises(CompressionError, match="shares its weight with"):
        PruneWeights(0.5, target_modules=["lm_head"]).run(tiny_model("gpt2"), None)


def recipe(*steps: Any) -> Recipe:
    return Recipe.from_dict({"model": "me/my-bert", "task": TASK, "steps": list(steps)})


@pytest.mark.parametrize("rider", [None, Adapters.key()])
def test_a_training_that_would_fill_the_zeros_is_refused(rider: str | None) -> None:
    train: dict[str, Any] = {"epochs": 1} | ({"with": [rider]} if rider else {})
    with pytest.raises(
        CompressionError,
        match=r"steps\.1: train would undo prune_weights \(steps\.0\), as nothing holds its zeros; list prune_weights under with",
    ):
        recipe({"prune_weights": {"sparsity": 0.5}}, {"train": train})


@pytest.mark.parametrize(
    "rider",
    [{"prune_weights": {"sparsity": 0.5}}, {Heal.key(): {"parts": ["norms"]}}, {"adapters": {"merge": False}}],
)
def test_a_training_that_leaves_the_zeros_is_not(rider: dict[str, Any]) -> None:
    recipe({"prune_weights": {"sparsity": 0.5}}, {"train": {"epochs": 1, "with": [rider]}})


def test_units_are_cut_before_weights() -> None:
    """Both in one recipe: what is cut is gone, and the zeros of what stays are counted anew."""
    model, task = tiny_model("bert"), FewBatches("bert")
    PruneNeurons(0.5, scores="l2").run(model, task)
    PruneWeights(pattern="2:4", scores="wanda", samples=16).run(model, task)
    assert all((one.reshape(-1, 4).sum(1) == 2).all() for one in zeros(model).values())
