"""quantize_aware: what is trained is what is stored, to the bit; gradients are LSQ's; few bits gain by it; ties are kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Trainer

from hfcompress import (
    CompressionCallback,
    CompressionError,
    Heal,
    PruneNeurons,
    PruneWeights,
    Quantize,
    QuantizeAware,
    Recipe,
    attach,
    compress,
    riding,
)
from hfcompress.layers.fake_quantized import FakeQuantized, dense_again, fake_quantise
from hfcompress.layers.quantized import Codes, QuantEmbedding, QuantLinear
from tests.calibration.test_reconstruct import batches
from tests.methods.test_laws import FewBatches, logits
from tests.run.test_train import Rows as FewRows
from tests.run.test_train import arguments
from tests.tiny import tiny_checkpoint, tiny_model, tiny_texts

KINDS = ("bert", "llama", "gpt2", "t5", "vit")


def said(model: Any, data: list[dict[str, Tensor]]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten() for batch in data])


def train(model: Any, task: FewBatches, tick: Any, steps: int = 6, lr: float = 1e-2, of: int = 1000) -> None:
    """On batches 0 to `of`, again and again."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        model.train()(**task.batch(step % of)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tick((step + 1) / steps)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_what_is_stored(kind: str, bits: int) -> None:
    """The layers that come out hold the very weights that the last forward computed with."""
    model, data = tiny_model(kind), batches(kind)
    with riding(model, [QuantizeAware(bits, group_size=16)], None) as tick:
        for layer in (one for one in model.modules() if isinstance(one, FakeQuantized)):
            with torch.no_grad():
                layer.step_log.normal_(0, 0.2)
                layer._parameters["weight"].mul_(1.3)
        tick(1.0)
        worth = {name: one.weight.detach().clone() for name, one in model.named_modules() if isinstance(one, FakeQuantized)}
        trained = said(model, data)
    assert worth
    for name, weight in worth.items():
        layer: Any = model.get_submodule(name)
        assert isinstance(layer, QuantLinear) and layer.bits == bits
        dense = layer.dequantised()
        assert torch.equal(dense, weight if dense.shape == weight.shape and kind != "gpt2" else weight.T)
    torch.testing.assert_close(said(model, data), trained, atol=2e-2 if bits == 8 else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_it_trains_rounds_and_lowers_the_loss(kind: str) -> None:
    model, task = tiny_model(kind), FewBatches(kind)
    dense = model.get_submodule(next(name for name, one in model.named_modules() if type(one).__name__ in ("Linear", "Conv1D")))
    before = dense.weight.detach().clone()
    with riding(model, [QuantizeAware(2, group_size=16)], task) as tick:
        first = float(model(**task.batch(0)).loss)
        train(model, task, tick, steps=30, of=1)
        model.eval()
        assert float(model(**task.batch(0)).loss) < first
        moved = [one for one in model.modules() if isinstance(one, FakeQuantized) and one.step_log.abs().max() > 0]
        assert moved, "steps are learned"
        assert not torch.equal(dense._parameters["weight"], before)
    assert not any(isinstance(one, FakeQuantized) for one in model.modules())
    assert not any("step" in name for name in model.state_dict())


def test_gradients_are_those_of_learned_steps() -> None:
    """Esser et al. 2020, equations 3 and 5: 1 inside and 0 outside for a weight; q - w/s inside, the bound outside, for a step."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[0.26, -0.1, 0.9, -2.0]])
    fake_quantise(layer, 3, None)
    wrapped: Any = layer
    wrapped.first_step.fill_(0.2)  # codes from -3 to 3, so that 0.6 is the most
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    layer(x).sum().backward()
    assert torch.equal(layer._parameters["weight"].grad, torch.tensor([[1.0, 10.0, 0.0, 0.0]]))
    scaled = torch.tensor([1.3, -0.5, 3.0, -3.0])
    each = torch.tensor([1.0 - 1.3, -0.0 + 0.5, 3.0, -3.0])
    assert torch.equal(scaled.round(), torch.tensor([1.0, -0.0, 3.0, -3.0]))
    expected = (each * x[0]).sum() * 0.2 / (4 * 3) ** 0.5  # by the logarithm of the step, and LSQ's scale
    torch.testing.assert_close(wrapped.step_log.grad, expected.reshape(1, 1))


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_rows_of_zeros_and_of_tiny_weights_train_on(bits: int, group: int | None) -> None:
    layer: Any = nn.Linear(16, 3, bias=False)
    layer.weight.data[0], layer.weight.data[1] = 0.0, 1e-9
    fake_quantise(layer, bits, group)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(5):
        layer(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    codes, step = layer.codes()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer.weight.isfinite().all() and step.isfinite().all() and (step > 0).all()
    assert codes.abs().max() <= max(1, 2 ** (bits - 1) - 1)


def test_one_bit_is_the_sign_times_a_step() -> None:
    layer = nn.Linear(8, 2)
    before = layer.weight.detach().clone()
    fake_quantise(layer, 1, None)
    expected = before.abs().mean(1, keepdim=True) * torch.where(before >= 0, 1.0, -1.0)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(dense_again(layer).weight, before) and type(layer) is nn.Linear


@pytest.mark.parametrize("bits", [1, 2])
def test_training_as_codes_beats_rounding_what_was_trained(bits: int) -> None:
    """Both learn the same texts by heart; one is rounded afterwards, by the best scales, of which it has the more."""
    task, losses = FewBatches("llama"), {}
    for aware in (True, False):
        model = tiny_model("llama")
        with riding(model, [QuantizeAware(bits)] if aware else [], task) as tick:
            train(model, task, tick, steps=120, lr=3e-3, of=4)
        if not aware:
            Quantize(bits, engine="hfcompress", group_size=32, calibrate="scales").run(model, None)
        model.eval()
        with torch.no_grad():
            losses[aware] = sum(float(model(**task.batch(number)).loss) for number in range(4))
    assert losses[True] < 0.8 * losses[False]


def test_tied_tables_share_their_codes_and_their_step() -> None:
    model = tiny_model("gpt2")
    with riding(model, [QuantizeAware(4, group_size=16, embeddings=4)], FewBatches("gpt2")) as tick:
        table, head = model.transformer.wte, model.lm_head
        assert head.step_owner[0] is table and torch.equal(table.step(), head.step())
        assert table._parameters["weight"] is head._parameters["weight"]
        assert not any(name.startswith("lm_head") for name, _ in model.named_parameters())
        train(model, FewBatches("gpt2"), tick)
    assert isinstance(model.transformer.wte, QuantEmbedding) and isinstance(model.lm_head, QuantLinear)
    assert model.transformer.wte.weight is model.lm_head.weight


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_trainer_saves_checkpoints_of_tied_tables(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, tie_word_embeddings=True)
    work = arguments(tmp_path, 8, max_steps=4, save_strategy="steps", save_steps=2)
    callback = CompressionCallback(QuantizeAware(3, group_size=16, embeddings=4))
    Trainer(model=model, args=work, train_dataset=FewRows(kind), callbacks=[callback]).train()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("method", [QuantizeAware(3, embeddings=3), Quantize(3, engine="hfcompress", embeddings=3)])
def test_tables_that_fill_no_whole_bytes_stay_dense(method: Any) -> None:
    """T5's table of relative positions has as many columns as there are heads."""
    model = tiny_model("t5")
    with riding(model, [method], batches("t5")) as tick:
        tick(1.0)
    assert isinstance(model.shared, QuantEmbedding)
    bias = next(one for name, one in model.named_modules() if name.endswith("relative_attention_bias"))
    assert type(bias) is nn.Embedding


def test_weights_are_rounded_after_the_warmup() -> None:
    model = tiny_model("bert")
    whole = logits(model, "bert")
    with riding(model, [QuantizeAware(2, warmup=0.5)], None) as tick:
        assert torch.equal(logits(model, "bert"), whole)
        tick(0.4)
        assert torch.equal(logits(model, "bert"), whole)
        tick(0.5)
        assert not torch.equal(logits(model, "bert"), whole)


def test_an_error_gives_the_dense_model_back() -> None:
    model = tiny_model("bert")
    kinds = {name: type(one) for name, one in model.named_modules()}
    before, whole = copy.deepcopy(model.state_dict()), logits(model, "bert")
    with pytest.raises(RuntimeError, match="stop"), riding(model, [QuantizeAware(2, embeddings=4)], None):
        raise RuntimeError("stop")
    assert {name: type(one) for name, one in model.named_modules()} == kinds
    assert list(model.state_dict()) == list(before)
    assert torch.equal(logits(model, "bert"), whole)


def test_a_copy_of_a_layer_is_one_of_its_own() -> None:
    layer = nn.Linear(16, 4)
    fake_quantise(layer, 2, None)
    twin: Any = copy.deepcopy(layer)
    with torch.no_grad():
        twin.step_log.add_(1.0)
    assert not torch.equal(twin.weight, layer.weight)
    assert twin.to(torch.bfloat16)(torch.ones(1, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_and_gradient_checkpointing_train() -> None:
    model, task = tiny_model("llama").train(), FewBatches("llama")
    model.gradient_checkpointing_enable()
    with riding(model, [QuantizeAware(4, group_size=16)], task) as tick, torch.autocast("cpu", torch.bfloat16):
        model(**task.batch(0)).loss.backward()
        assert all(one.step_log.grad is not None for one in model.modules() if isinstance(one, FakeQuantized))
        tick(1.0)


def test_skipped_layers_stay_dense() -> None:
    model = tiny_model("bert")
    with riding(model, [QuantizeAware(2, skip_modules=["pooler.dense", "query"])], None) as tick:
        tick(1.0)
    assert type(model.bert.pooler.dense) is nn.Linear and isinstance(model.bert.encoder.layer[0].output.dense, Codes)
    assert type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear


REFUSED: dict[str, tuple[list[Any], str]] = {
    "units": ([PruneNeurons(0.5), QuantizeAware(2)], "quantize_aware: it would code the layers before prune_neurons cuts them"),
    "units after": (
        [QuantizeAware(2), PruneNeurons(0.5)],
        "quantize_aware: it holds the layers that prune_neurons would change in the same training; do prune_neurons in a step",
    ),
    "zeros": ([QuantizeAware(2), PruneWeights(0.5)], "quantize_aware: it holds the layers that prune_weights would change"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_its_layers_can_not_ride_along(case: str) -> None:
    methods, sentence = REFUSED[case]
    with pytest.raises(CompressionError, match=sentence):
        riding(tiny_model("bert"), methods, batches("bert")).__enter__()


def test_heal_may_ride_along() -> None:
    model, task = tiny_model("bert"), FewBatches("bert")
    with riding(model, [QuantizeAware(4), Heal(["norms"])], task) as tick:
        model.train()(**task.batch(0)).loss.backward()
        tick(1.0)
    assert isinstance(model.bert.encoder.layer[0].output.dense, QuantLinear)


def test_alone_it_is_refused_in_a_recipe() -> None:
    raw = {"model": "me/my-bert", "task": {"name": "text-classification", "dataset": "me/texts"}, "steps": ["quantize_aware"]}
    with pytest.raises(CompressionError, match=r"steps.0: quantize_aware does nothing without training; list it under `with:`"):
        Recipe.from_dict(raw)
    raw["steps"] = [{"train": {"with": [{"quantize_aware": {"bits": 2}}]}}, {"train": {"epochs": 1}}]
    with pytest.raises(
        CompressionError, match=r"steps.1: train comes after quantize_aware \(steps.0\), and codes can't be trained"
    ):
        Recipe.from_dict(raw)


def test_a_recipe_trains_as_codes_and_saves_them(tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "model": str(tiny_checkpoint(tmp_path / "bert", "bert")),
        "task": {"name": "text-classification", "max_length": 32, "dataset": str(tiny_texts(tmp_path / "texts"))},
        "steps": [{"train": {"epochs": 2, "with": ["distill", {"quantize_aware": {"bits": 2, "group_size": 16}}]}}],
        "storage": "packed",
    }
    report = compress(Recipe.from_dict(raw), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.bert.encoder.layer[1].output.dense.bits == 2
    assert report.rows[1].megabytes < report.rows[0].megabytes / 3
    again = compress(Recipe.from_dict(raw), tmp_path / "again")
    assert again.rows[1].score == report.rows[1].score


@pytest.mark.parametrize("late", [False, True])
def test_the_callback_of_a_users_trainer_leaves_codes(late: bool, tmp_path: Path) -> None:
    """In the Trainer's list, or attached to one that is built; a checkpoint in the middle is a plain one."""
    model, rows = tiny_model("bert"), FewRows("bert")
    method, work = (
        QuantizeAware(2, group_size=16, embeddings=4),
        arguments(tmp_path, 8, max_steps=4, save_strategy="steps", save_steps=2),
    )
    callbacks = [] if late else [CompressionCallback(method)]
    trainer = Trainer(model=model, args=work, train_dataset=rows, callbacks=callbacks)
    if late:
        attach(trainer, method)
    trainer.train()
    assert isinstance(model.bert.embeddings.word_embeddings, QuantEmbedding)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))
    halfway = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert type(halfway.bert.encoder.layer[0].output.dense) is nn.Linear


def test_mistakes_are_told() -> None:
    model = tiny_model("bert")
    with pytest.raises(
        CompressionError, match=r"quantize_aware: bert\.\S+: group_size 7 does not divide \d+ columns; the nearest"
    ):
        riding(model, [QuantizeAware(2, group_size=7)], None).__enter__()
    with pytest.raises(
        CompressionError, match=r"quantize_aware: skip_modules leaves no layer to quantise; take some out of it"
    ):
        riding(model, [QuantizeAware(2, target_modules=["query"], skip_modules=["query"])], None).__enter__()
    Quantize(8).run(model, None)
    with pytest.raises(CompressionError, match=r"quantize_aware: no dense linear layer is left; list it before quantize"):
        riding(model, [QuantizeAware(2)], None).__enter__()


@pytest.mark.parametrize("bits", [3, 1])
def test_bitsandbytes_has_no_such_codes(bits: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"engine: bitsandbytes has no codes of {bits} bits; possible are 8 and 4; choose one"
    ):
        Quantize(bits)
