"""The layer-by-layer walk: what it hands over is what whole forwards would read, however models are built."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hfcompress.calibration.layerwise import layerwise
from hfcompress.calibration.replay import Replay, routed
from hfcompress.calibration.second_moments import Projection
from hfcompress.surgery.units.specimens.inputs import example
from hfcompress.surgery.units.specimens.tiny_config import miniature
from hfcompress.surgery.units.verify import proven, units_of

BY_LAYERS = [
    "BertForSequenceClassification",
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",  # the first layer's positions serve all, and the decoder reads the encoder
    "WhisperForConditionalGeneration",
    "ViTForImageClassification",
    "SwinForImageClassification",  # stages of several widths
    "DebertaV2ForSequenceClassification",
    "MixtralForCausalLM",
    "FunnelForSequenceClassification",
]
WHOLE = {
    "AlbertForSequenceClassification": "its layers share their weights",
    "XLMWithLMHeadModel": "transformer.ffns.0.lin2 is in no layer",
}


def tiny(name: str) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(miniature(kind.config_class(), layers=3, heads=4)).eval()


def targets_of(model: Any) -> list[Projection]:
    kinds = proven(model).units
    found = [
        Projection.of(units, span) for kind in kinds if kinds[kind] for units in units_of(model, kind) for span in units.outputs
    ]
    return list(dict.fromkeys(found))


def batches(model: Any) -> list[dict[str, Tensor]]:
    return [example(model, seed=seed) for seed in range(3)]


def by_hand(model: Any, target: Projection, data: list[dict[str, Tensor]]) -> list[Tensor]:
    """sum x x^T of each lane, by whole forwards."""
    total: list[Any] = [0.0] * target.lanes

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for lane, rows in enumerate(target.rows(model, batch, args, kwargs, False)):
            total[lane] = total[lane] + rows.double().T @ rows.double()

    handle = model.get_submodule(target.module).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return total


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", [*BY_LAYERS, *WHOLE])
def test_each_projection_is_seen_on_what_was_done_to_those_before_it(
    name: str, offload: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(name)
    data, targets, seen = batches(model), targets_of(model), []

    def halve(target: Projection, moments: list[Any]) -> None:
        seen.append(target)
        expected = by_hand(model, target, data)
        for some, sums in zip(moments, expected, strict=True):
            if some.tokens:
                torch.testing.assert_close(some.square(False) * some.tokens, sums, rtol=1e-4, atol=1e-4)
        for _, weight in target.weights(model):
            weight.mul_(0.5)

    with caplog.at_level(logging.INFO, logger="hfcompress"):
        layerwise(model, targets, lambda: data, "a test", halve, offload=offload)
    assert sorted(seen, key=str) == sorted(targets, key=str), "each once"
    said = f"a test: {name} is run whole for every projection, which takes longer: {WHOLE.get(name)}."
    assert (said in caplog.text) == (name in WHOLE) and ("run whole" in caplog.text) == (name in WHOLE)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration", "MixtralForCausalLM"])
def test_where_nothing_is_written_every_layer_runs_once(name: str) -> None:
    model = tiny(name)
    data, targets = batches(model), targets_of(model)
    first = next(module for _, module in model.named_modules() if type(module).__name__.endswith(("DecoderLayer", "Block")))
    expected = {target: by_hand(model, target, data) for target in targets}
    inner, runs = next(module for module in first.modules() if isinstance(module, nn.Linear)), []
    handle = inner.register_forward_hook(lambda *_: runs.append(1))
    found: dict[Projection, Any] = {}
    layerwise(model, targets, lambda: data, "a test", found.__setitem__, writes=False)
    handle.remove()
    assert set(found) == set(targets)
    assert len(runs) == len(data) + 1, "and once more for the example on which the way is tried"
    for target, moments in found.items():
        for some, sums in zip(moments, expected[target], strict=True):
            if some.tokens:
                torch.testing.assert_close(some.square(False) * some.tokens, sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("writes", [False, True])
def test_what_runs_before_and_after_all_layers_costs_these_no_walk(writes: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A projection of the embeddings and a pooler: each seen as the model is by then, and the layers still one by one."""
    model = tiny("ElectraForSequenceClassification")
    model.electra.embeddings_project = nn.Linear(model.config.embedding_size, model.config.hidden_size)
    first, inner, last = "electra.embeddings_project", "electra.encoder.layer.0.output.dense", "classifier.dense"
    data, seen = batches(model), []

    def halve(target: Projection, moments: list[Any]) -> None:
        seen.append(target.module)
        expected = by_hand(model, target, data)[0]
        torch.testing.assert_close(moments[0].square(False) * moments[0].tokens, expected, rtol=1e-4, atol=1e-4)
        if writes:
            target.weights(model)[0][1].mul_(0.5)

    targets = [Projection(name, 1) for name in (last, inner, first)]
    with caplog.at_level(logging.INFO, logger="hfcompress"):
        layerwise(model, targets, lambda: data, "a test", halve, writes=writes)
    assert seen == [first, inner, last]
    assert "run whole" not in caplog.text


def test_a_projection_that_never_runs_comes_last_with_no_tokens() -> None:
    model = tiny("LlamaForCausalLM")
    model.add_module("idle", nn.Linear(4, 4))
    told: list[tuple[str, int]] = []
    targets = [Projection("idle", 1), Projection("model.layers.0.mlp.down_proj", 1)]
    layerwise(
        model, targets, lambda: batches(model), "a test", lambda one, moments: told.append((one.module, moments[0].tokens))
    )
    assert [name for name, _ in told] == ["model.layers.0.mlp.down_proj", "idle"] and told[0][1] > 0 and told[1][1] == 0


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "AlbertForSequenceClassification"])
def test_an_error_leaves_no_hook_and_no_forward_behind(name: str) -> None:
    model = tiny(name)
    model.train()

    def fail(*_: Any) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        layerwise(model, targets_of(model), lambda: batches(model), "a test", fail)
    assert model.training and not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_a_library_put_on_a_layer_is_put_back() -> None:
    model = tiny("BertForSequenceClassification")
    layer = model.bert.encoder.layer[1]
    calls: list[int] = []
    plain = layer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    layer.forward = counted
    layerwise(model, targets_of(model), lambda: batches(model), "a test", lambda *_: None)
    assert layer.forward is counted and calls, "and it ran"


def test_only_the_hidden_states_between_two_layers_are_kept() -> None:
    """And of an encoder its last ones, which the decoder reads."""
    model = tiny("T5ForConditionalGeneration")
    batch = example(model)
    with torch.no_grad():
        route = routed(model, [target.module for target in targets_of(model)], batch)
        states: dict[int, Any] = {}
        replay = Replay(model, route, offload=False)
        for place in range(len(route.layers)):
            replay.advance(batch, states, place)
            assert set(states) == ({place} if place <= 2 else {2, place})


def test_half_precision_keeps_hidden_states_in_its_dtype() -> None:
    model = tiny("LlamaForCausalLM").to(torch.bfloat16)
    batch = example(model)
    with torch.no_grad():
        route = routed(model, ["model.layers.0.mlp.down_proj"], batch)
        states: dict[int, Any] = {}
        Replay(model, route, offload=True).advance(batch, states, 0)
    kept = states[0] if isinstance(states[0], Tensor) else states[0][0]
    assert kept.dtype == torch.bfloat16
