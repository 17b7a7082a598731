"""Repair without training: exact where what was cut can be told from what stays, never worse than the cut alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hfcompress.calibration.batches import Batches
from hfcompress.calibration.layerwise import layerwise
from hfcompress.calibration.reconstruct import Repaired, repair
from hfcompress.calibration.scores import score
from hfcompress.calibration.second_moments import Projection
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import kind_of
from hfcompress.methods import PruneHeads, PruneNeurons, PruneWeights, riding
from hfcompress.surgery.modules import copied
from hfcompress.surgery.units.cut import cut
from hfcompress.surgery.units.fading import Fading
from hfcompress.surgery.units.specimens.tiny_config import miniature
from hfcompress.surgery.units.verify import units_of
from tests.calibration.test_scores import given, mixtral, ragged
from tests.tiny import tiny_model

KINDS = ("bert", "llama", "gpt2", "qwen3", "t5", "vit", "albert", "mixtral")


def batches(kind: str, count: int = 6, size: int = 8) -> list[dict[str, Tensor]]:
    """Enough tokens for the columns of a tiny model."""
    if kind == "vit":
        generator = torch.Generator().manual_seed(0)
        return [{"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)} for _ in range(count * 4)]
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        ids = torch.randint(5, 120, (size, 12), generator=generator)
        mask = torch.arange(12) < torch.randint(6, 13, (size, 1), generator=generator)
        batch = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
        made.append({**batch, "labels": ids.masked_fill(~mask, -100)} if kind == "t5" else batch)
    return made


def repaired(model: Any, part: str, kept: list[Tensor], data: list[dict[str, Tensor]], damping: float) -> list[Repaired]:
    """Silence, repair and cut."""
    all_units = units_of(model, part)
    fading = Fading(model, all_units)
    fading.prune(kept)
    fading.silence(fading.pruned)
    told = repair(model, all_units, kept, lambda: data, damping)
    fading.remove()
    for units, keep in zip(all_units, kept, strict=True):
        cut(model, units, keep)
    return told


def half(model: Any, part: str) -> list[Tensor]:
    """(kept,), or (lanes, kept): the same of every expert."""
    return [torch.arange(0, units.count, 2).expand(*units.shape[:-1], -1) for units in units_of(model, part)]


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def double(model: Any, part: str) -> None:
    """Every odd unit makes what the even one before it makes, from now on."""
    for units in units_of(model, part):
        for span in units.inputs:
            tensor = model.get_parameter(span.tensor)
            even, odd = (span.index(torch.arange(start, units.count, 2), units.count) for start in (0, 1))
            with torch.no_grad():
                tensor.index_copy_(span.axis, odd, tensor.index_select(span.axis, even))


@pytest.mark.parametrize("part", ["heads", "neurons"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_others_can_say_is_cut_without_loss(kind: str, part: str) -> None:
    model, data = given(kind)[0].double(), batches(kind)
    double(model, part)
    data = [{key: value.double() if value.is_floating_point() else value for key, value in batch.items()} for batch in data]
    expected = [logits(model, batch) for batch in data]
    told = repaired(model, part, half(model, part), data, damping=0.0)
    assert len(told) == sum(len(units.outputs) * units.lanes for units in units_of(model, part))
    assert all(one.before > 1e-6 and one.after < 1e-9 for one in told)
    for batch, before in zip(data, expected, strict=True):
        rows = batch["attention_mask"].bool() if before.dim() == 3 and kind != "t5" else slice(None)
        if kind == "t5":
            rows = batch["labels"] != -100
        torch.testing.assert_close(logits(model, batch)[rows], before[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["heads", "neurons"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_never_larger_than_before(kind: str, part: str) -> None:
    for damping in (1e-3, 10.0):
        model = given(kind)[0]
        told = repaired(model, part, half(model, part), batches(kind), damping)
        assert told and all(one.tokens > 50 for one in told)
        assert all(one.after <= one.before * (1 + 1e-6) for one in told)
        assert damping > 1 or sum(one.after for one in told) < 0.9 * sum(one.before for one in told)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [PruneHeads, PruneNeurons])
def test_of_two_that_say_the_same_obs_cuts_one(kind: str, method: Any) -> None:
    model, data = given(kind)[0].double(), batches(kind)
    double(model, method.kind)
    data = [{key: value.double() if value.is_floating_point() else value for key, value in batch.items()} for batch in data]
    expected = [logits(model, batch) for batch in data]
    with riding(model, [method(0.5, scores="obs", repair=True, damping=0.0)], data):
        pass
    for batch, before in zip(data, expected, strict=True):
        rows = batch["labels"] != -100 if kind == "t5" else slice(None)
        if before.dim() == 3 and kind != "t5":
            rows = batch["attention_mask"].bool()
        torch.testing.assert_close(logits(model, batch)[rows], before[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["heads", "neurons"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "vit"])
def test_obs_foretells_what_repair_can_t_win_back(kind: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer, that is: the others are repaired on what it says then."""
    monkeypatch.setattr("hfcompress.calibration.scores.DAMPING", 1e-9)
    model, data = given(kind)[0].double(), batches(kind)
    data = [{key: value.double() if value.is_floating_point() else value for key, value in batch.items()} for batch in data]
    all_units = units_of(model, part)
    found = score("obs", model, all_units, lambda: data)
    kept = [values.argsort(descending=True)[: len(values) // 2].sort().values for values in found]
    told = repaired(model, part, kept, data, 1e-9)[0]
    assert told.module == all_units[0].output
    lost, power = float(found[0].sort().values[len(found[0]) // 2 - 1]), spoken(given(kind)[0].double(), told.module, data)
    assert told.after * power["raw"] == pytest.approx(lost * power["priced"], rel=1e-3) and lost > 1e-4


def spoken(model: Any, name: str, data: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean square of what a projection says, padding excluded; "priced" is about the mean where it has a bias."""
    layer, rows = model.get_submodule(name), []
    handle = layer.register_forward_hook(lambda _, args, output: rows.append(output.detach()))
    for batch in data:
        logits(model, batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() if "attention_mask" in batch else slice(None) for batch in data]
    said = torch.cat([row[mask].flatten(0, -2) for row, mask in zip(rows, masks, strict=True)])
    bias = getattr(layer, "bias", None)
    said = said if bias is None else said - bias.detach()
    priced = said if bias is None else said - said.mean(0)
    return {key: float(value.square().sum(-1).mean()) for key, value in (("raw", said), ("priced", priced))}


def naive(model: Any, part: str, kept: list[Tensor], data: list[dict[str, Tensor]], damping: float) -> None:
    """The same by whole forwards for every layer, as the columns that stay tell best what all of them said."""
    all_units = units_of(model, part)
    fading = Fading(model, all_units)
    fading.prune(kept)
    fading.silence(fading.pruned)

    def seen(name: str) -> Tensor:
        rows: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_pre_hook
        handle = hook(lambda _, args: rows.append(args[0].detach()), prepend=True)
        for batch in data:
            logits(model, batch)
        handle.remove()
        return torch.cat([row[batch["attention_mask"].bool()] for row, batch in zip(rows, data, strict=True)]).double()

    for units, keep in zip(all_units, kept, strict=True):
        layer = model.get_submodule(units.output)
        columns = units.outputs[0].index(keep, units.count)
        x = seen(units.output)
        is_conv = kind_of(layer) == "conv1d"
        weight = (layer.weight.T if is_conv else layer.weight).detach().double()
        y, z, old = x @ weight.T, x[:, columns], weight[:, columns]
        bias = layer.bias is not None
        mean_y, mean_z = (y.mean(0), z.mean(0)) if bias else (torch.zeros(()), torch.zeros(()))
        y, z = y - mean_y, z - mean_z
        ridge = damping * z.square().sum(0).mean() * torch.eye(len(columns), dtype=torch.float64)
        new = old + (y.T @ z - old @ z.T @ z) @ torch.linalg.inv(z.T @ z + ridge)
        with torch.no_grad():
            (layer.weight.T if is_conv else layer.weight)[:, columns] = new.to(layer.weight.dtype)
            if bias:
                layer.bias += mean_y - new @ mean_z
    fading.remove()
    for units, keep in zip(all_units, kept, strict=True):
        cut(model, units, keep)


@pytest.mark.parametrize("part", ["heads", "neurons"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_one_walk_is_what_a_forward_for_every_layer_would_give(kind: str, part: str) -> None:
    data, (mine, theirs) = batches(kind), (given(kind)[0].double() for _ in range(2))
    kept = half(mine, part)
    repaired(mine, part, kept, data, 0.01)
    naive(theirs, part, kept, data, 0.01)
    told = theirs.state_dict()
    for name, weight in mine.state_dict().items():
        torch.testing.assert_close(weight, told[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_and_the_size_of_batches_change_nothing(kind: str) -> None:
    one, other = given(kind)[0].double(), given(kind)[0].double()
    data = batches(kind)
    kept = half(one, "neurons")
    repaired(one, "neurons", kept, data, 0.01)
    wide = [
        {key: torch.nn.functional.pad(value[start : start + 2], (0, 5)) for key, value in batch.items()}
        for batch in data
        for start in range(0, 8, 2)
    ]
    repaired(other, "neurons", kept, wide, 0.01)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_the_mean_of_what_is_cut_goes_into_the_bias() -> None:
    model = given("bert")[0].double()
    data = batches("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[1::2] = 0.0  # these always say the same
    biases = [layer.output.dense.bias.detach().clone() for layer in model.bert.encoder.layer]
    expected = [logits(model, batch) for batch in data]
    repaired(model, "neurons", half(model, "neurons"), data, 0.1)
    for layer, before in zip(model.bert.encoder.layer, biases, strict=True):
        assert not torch.allclose(layer.output.dense.bias, before)
    for batch, before in zip(data, expected, strict=True):
        torch.testing.assert_close(logits(model, batch), before, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_constants_are_folded_without_data(kind: str) -> None:
    model, batch = given(kind)
    for units in units_of(model, "neurons"):
        for span in units.inputs:
            tensor = model.get_parameter(span.tensor)
            with torch.no_grad():
                index = span.index(torch.arange(0, units.count, 2), units.count)
                if tensor.dim() > 1:
                    tensor.mul_(10.0)  # the others are worth more
                    tensor.index_fill_(span.axis, index, 0.0)
                else:
                    tensor[index] += 0.5
    expected = logits(model, batch)
    with riding(model, [PruneNeurons(0.5, scores="magnitude")], None) as tick:
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
        tick(0.1)
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    assert units_of(model, "neurons")[0].count == 64


@pytest.mark.parametrize("method", [PruneHeads(0.5, repair=True), PruneNeurons(0.5, repair=True, iterations=2)], ids=str)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_repaired_cut_is_nearer_to_the_original(kind: str, method: Any) -> None:
    data = [{**batch, "labels": batch["input_ids"]} if kind == "llama" else batch for batch in batches(kind)]
    data = data if kind == "llama" else [{**batch, "labels": torch.arange(8) % 3} for batch in data]
    whole, plain, mended = (tiny_model(kind) for _ in range(3))
    with riding(plain, [method.model_copy(update={"repair": False})], data) as tick:
        tick(1.0)
    with riding(mended, [method], data) as tick:
        before = logits(mended, data[0])
        tick(0.0)
        assert torch.equal(logits(mended, data[0]), before), "there is nothing left to fade"
    torch.testing.assert_close(logits(mended, data[0]), before, atol=1e-5, rtol=1e-4)
    off = [float((logits(model, data[0]) - logits(whole, data[0])).square().mean()) for model in (plain, mended)]
    assert off[1] < 0.8 * off[0]


def test_experts_that_can_t_be_seen_are_left_alone_and_said_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfcompress.calibration.expert_inputs._PRODUCTS", ())
    model = mixtral()
    with caplog.at_level(logging.WARNING), riding(model, [PruneNeurons(0.5, repair=True)], [ragged(True)]):
        pass
    assert "mlp.experts.down_proj is left as it is: what it reads can't be seen, or is never asked for" in caplog.text


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_what_an_expert_reads_is_what_it_makes_of_the_tokens_sent_to_it(implementation: str) -> None:
    model, batch = mixtral(), ragged(True)
    model.config._experts_implementation = implementation
    experts = model.model.layers[1].mlp.experts
    given: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda _, args: given.extend(args))
    model(**batch)
    handle.remove()
    hidden, chosen, _ = given
    units = units_of(model, "neurons")[1]
    inputs = {"args": (hidden, *given[1:]), "kwargs": {}}
    read = Projection.of(units, units.outputs[0]).rows(model, batch, **inputs, past_gates=False)
    attended = batch["attention_mask"].bool().flatten()
    for expert, rows in enumerate(read):
        mine = hidden[attended & (chosen == expert).any(-1)]
        gate, up = (mine @ experts.gate_up_proj[expert].T).chunk(2, -1)
        expected = (torch.nn.functional.silu(gate) * up).detach()
        assert rows.shape == expected.shape, "in whatever order"
        torch.testing.assert_close(rows.T @ rows, expected.T @ expected, atol=1e-7, rtol=1e-5)
    assert (
        sum(map(len, read)) == int(attended.sum()) * chosen.shape[1] and model.config._experts_implementation == implementation
    )


def test_padding_is_left_out_where_every_expert_is_given_all_tokens() -> None:
    """As in Llama 4: (experts * tokens, hidden)."""
    config = miniature(transformers.Llama4TextConfig(), layers=2, heads=4)
    torch.manual_seed(0)
    model, batch = transformers.Llama4ForCausalLM(config).eval(), ragged(True)
    batch["input_ids"] %= config.vocab_size
    del batch["labels"]
    units = next(one for one in units_of(model, "neurons") if one.lanes > 1)
    given: list[Any] = []
    handle = model.get_submodule(units.output).register_forward_pre_hook(lambda _, args: given.extend(args))
    model(**batch)
    handle.remove()
    read = Projection.of(units, units.outputs[0]).rows(model, batch, tuple(given), {}, past_gates=False)
    assert len(given[0]) == units.lanes * batch["attention_mask"].numel()
    assert {len(rows) for rows in read} == {int(batch["attention_mask"].sum())}


@pytest.mark.parametrize("kind", ["mixtral", "llama", "t5"])
def test_moments_are_of_what_gates_leave_or_of_what_comes_to_them(kind: str) -> None:
    model, batch = given(kind)
    all_units = units_of(model, "neurons")
    fading = Fading(model, all_units)
    fading.prune([torch.arange(4, units.count).expand(*units.shape[:-1], -1) for units in all_units])

    def squares(past_gates: bool) -> Tensor:
        found: list[Tensor] = []
        targets = [Projection.of(units, span) for units in all_units for span in units.outputs]
        then = lambda _, moments: found.extend(one.square(False).diagonal() for one in moments)  # noqa: E731
        layerwise(model, targets, lambda: [batch], "a test", then, past_gates=past_gates)
        return torch.stack(found)

    whole = squares(True)
    assert whole.gt(0).all() and torch.equal(whole, squares(False))
    fading.silence(fading.pruned)
    assert squares(False)[0].gt(0).all() and squares(True)[:, :4].eq(0).all() and squares(True)[:, 4:].gt(0).all()
    assert score("activation", model, all_units, lambda: [batch])[0][..., :4].lt(1e-9).all()
    fading.remove()
    assert torch.equal(whole, squares(True)), "and nothing stays behind"


def test_repair_asks_for_data() -> None:
    for task in (None, Batches()):
        with pytest.raises(CompressionError, match="prune_heads: repair needs calibration data; give a task or batches"):
            PruneHeads(0.5, scores="l1", repair=True).run(tiny_model("bert"), task)


def test_an_error_in_a_forward_is_raised_and_leaves_no_hook() -> None:
    model = tiny_model("bert")
    bad = [{"input_ids": torch.tensor([[5, 6, 500]])}]
    with pytest.raises(IndexError), riding(model, [PruneHeads(0.5, scores="l1", repair=True)], bad):
        pass
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("repaired", [True, False])
def test_what_is_folded_or_repaired_is_undone_by_an_error_and_silent_until_then(repaired: bool) -> None:
    model, data = tiny_model("bert"), [{**batch, "labels": torch.arange(8) % 3} for batch in batches("bert")]
    if not repaired:  # constants, then
        with torch.no_grad():
            for layer in model.bert.encoder.layer:
                layer.intermediate.dense.weight *= 10.0
                layer.intermediate.dense.weight[::2], layer.intermediate.dense.bias[::2] = 0.0, 1.0
    before = copy.deepcopy(model.state_dict())
    method = PruneNeurons(0.5, scores="l2", repair=repaired)
    with pytest.raises(KeyboardInterrupt), riding(model, [method], data):
        said, plain = logits(model, data[0]), copied(model)  # as a checkpoint would hold it
        torch.testing.assert_close(logits(plain, data[0]), said, atol=1e-5, rtol=1e-4)
        assert any(not torch.equal(before[key], value) for key, value in plain.state_dict().items())
        with torch.no_grad():
            model.classifier.weight += 1.0
            model.bert.encoder.layer[0].output.dense.weight += 1.0
        raise KeyboardInterrupt
    before["classifier.weight"] += 1.0
    before["bert.encoder.layer.0.output.dense.weight"] += 1.0
    for key, value in model.state_dict().items():  # training goes on from what it has learnt
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_model_is_exactly_as_it_was_after_an_error(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    before = copy.deepcopy(model.state_dict())
    data = batches("llama")
    with pytest.raises(ValueError, match="mine"), riding(model, [PruneNeurons(0.5, scores="l2", repair=True)], data):
        raise ValueError("mine")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "quantization_config" not in model.config.to_dict()


def test_zeros_of_repair_are_not_those_of_prune_weights() -> None:
    methods = [PruneNeurons(0.5, scores="l2", repair=True), PruneWeights(0.5)]
    with pytest.raises(CompressionError, match=r"prune_weights: it would count what repair has set to zero.*in a step after"):
        riding(tiny_model("bert"), methods, batches("bert")).__enter__()
