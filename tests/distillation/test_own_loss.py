"""The task term is the model's own loss where it has one, in the right scale; and labels that a model ignores, terms ignore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

from hfcompress import CompressionCallback, CompressionError, Distill, Train, riding
from tests.distillation.lessons import SIZES, Rows, batch, padded, pupil
from tests.run.test_train import arguments

WEIGHTS = torch.tensor([0.2, 1.0, 5.0])


class Focal(BertForSequenceClassification):
    """Lin et al. 2017: examples that are known already count less."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if kwargs.get("labels") is not None:
            each = F.cross_entropy(output.logits, kwargs["labels"], reduction="none")
            output.loss = ((1 - (-each).exp()) ** 2 * each).mean()
        return output


class Weighted(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if kwargs.get("labels") is not None:
            output.loss = F.cross_entropy(output.logits, kwargs["labels"], weight=WEIGHTS.to(output.logits.dtype))
        return output


class Auxiliary(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **{**kwargs, "output_hidden_states": True})
        if kwargs.get("labels") is not None:
            output.loss = output.loss + 0.1 * output.hidden_states[-1].square().mean()
        return output


class SmoothedAnswers(BertForQuestionAnswering):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if (start := kwargs.get("start_positions")) is not None:
            output.loss = F.cross_entropy(output.start_logits, start, label_smoothing=0.1)
        return output


class SmoothedText(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if (labels := kwargs.get("labels")) is not None:
            output.loss = F.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:], label_smoothing=0.1)
        return output


OWN = {
    "focal": (Focal, "sequence"),
    "weighted": (Weighted, "sequence"),
    "auxiliary": (Auxiliary, "sequence"),
    "answers": (SmoothedAnswers, "answers"),
    "text": (SmoothedText, "causal-lm"),
}


def made(name: str, seed: int = 0) -> tuple[Any, str]:
    """A pupil whose class has a loss of its own, and the kind of its data."""
    kind, lesson = OWN[name]
    model = pupil(lesson, seed)
    model.__class__ = kind
    return model, lesson


def grad(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_task_term_is_the_loss_of_the_model(name: str, half: bool) -> None:
    model, lesson = made(name)
    model, given = model.to(torch.bfloat16 if half else torch.float32), batch(lesson)
    own = model(**given).loss
    expected = grad(model, own)
    with riding(model, [Distill(terms=["task"])]):
        found = model(**given).loss
        felt = grad(model, found)
    torch.testing.assert_close(found, own.float())
    torch.testing.assert_close(felt, expected)


def test_it_is_mixed_with_the_teacher_by_its_weight() -> None:
    (model, _), teacher, given = made("focal"), pupil("sequence", 1), batch("sequence")
    own = model(**given).loss
    with riding(model, [Distill(teacher, alpha=1.0)]):
        soft = model(**given).loss
    with riding(model, [Distill(teacher, alpha=0.7)]):
        torch.testing.assert_close(model(**given).loss, 0.7 * soft + 0.3 * own)


def moved(name: str, folder: Path, size: int, accumulate: int, way: str = "callback") -> torch.Tensor:
    """What one step of plain SGD adds to the weights."""
    model, lesson = made(name)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    if way == "train":  # a plain train step, without a method

        class Rowed:
            train_dataset = eval_dataset = Rows(lesson)
            collator = processor = original = None
            headline = "accuracy"

        fields = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 1.0, "bf16": False}
        fields |= {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulate,
            "max_steps": 1,
            "remove_unused_columns": False,
        }
        Train(**fields).run(model, Rowed())
    else:
        work = arguments(
            folder, size, accumulate, learning_rate=1.0, remove_unused_columns=False, train_sampling_strategy="sequential"
        )
        callback = CompressionCallback(Distill(terms=["task"]))
        Trainer(model=model, args=work, train_dataset=Rows(lesson), callbacks=[callback]).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.mark.parametrize("way", ["callback", "train"])
def test_a_loss_of_examples_is_the_same_at_once_and_accumulated(way: str, tmp_path: Path) -> None:
    at_once, accumulated = (moved("focal", tmp_path, size, times, way) for size, times in ((8, 1), (2, 4)))
    assert at_once.norm() > 1e-3
    assert (at_once - accumulated).norm() <= 1e-5 * at_once.norm()


def test_accumulated_batches_of_any_other_loss_are_weighted_by_their_labels(tmp_path: Path) -> None:
    """Class weights divide by their own sum: the step is the mean of those of its batches."""
    model, _ = made("weighted")
    whole = Rows("sequence")
    parts = [torch.utils.data.default_collate([whole[row], whole[row + 1]]) for row in range(0, 8, 2)]
    expected = torch.zeros(sum(p.numel() for p in model.parameters()))
    for part in parts:
        model.zero_grad()
        model(**part).loss.backward()
        expected -= (
            torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]) / 4
        )
    assert (moved("weighted", tmp_path, 2, 4) - expected).norm() <= 1e-5 * expected.norm()


def test_a_loss_that_cant_be_had_has_its_sentence() -> None:
    class Each(Focal):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.loss = output.loss.expand(8)
            return output

    class Cut(Focal):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.loss = output.loss.detach()
            return output

    def refused(kind: Any, sentence: str) -> None:
        model = pupil("sequence")
        model.__class__ = kind
        with pytest.raises(CompressionError) as error, riding(model, [Distill(terms=["task"])]):
            model(**batch("sequence"))
        assert str(error.value) == sentence

    refused(
        Each,
        "distill: the loss of Each has shape (8,), and a task term needs the mean over the batch; return the mean.",
    )
    refused(
        Cut,
        "distill: the loss of Cut is not that of its labels alone, and has no gradient to learn by; compute it without detach, "
        "or set alpha to 1 to learn from the teacher alone.",
    )


# ---------------------------------------------------------------- answers in a text


@pytest.mark.parametrize("term", ["task", "kl", "logits_mse", "hidden_mse"])
def test_an_answer_past_the_end_or_in_the_padding_is_ignored(term: str) -> None:
    """As if the example had not been in the batch, where both of its ends are lost."""
    student, method = pupil("answers"), Distill(pupil("answers", 1), terms=[term])
    given = batch("answers")
    given["attention_mask"][:, 8:] = 0
    lost = {key: value.clone() for key, value in given.items()}
    lost["start_positions"][2:4], lost["end_positions"][2:4] = torch.tensor([10, 9]), torch.tensor([500, 9])
    lost["start_positions"][4], lost["end_positions"][4] = -100, -1
    kept = {key: value[[0, 1, 5, 6, 7]] for key, value in given.items()}
    with riding(student, [method]):
        torch.testing.assert_close(student(**lost).loss, student(**kept).loss, atol=1e-6, rtol=1e-5)
        assert student(**lost).loss < 10


def test_where_one_end_is_lost_the_other_is_learnt_as_the_model_does() -> None:
    model, given = pupil("answers"), batch("answers")
    del given["attention_mask"]  # transformers lets an answer start in the padding
    given["end_positions"][:3] = 10
    expected = model(**given).loss
    with riding(model, [Distill(terms=["task"])]):
        torch.testing.assert_close(model(**given).loss, expected)


def test_a_batch_without_any_answer_is_nothing_to_learn() -> None:
    model, given = pupil("answers"), batch("answers")
    given["start_positions"][:] = given["end_positions"][:] = 10
    with riding(model, [Distill(pupil("answers", 1))]):
        loss = model(**given).loss
        assert float(loss.detach()) == 0
        assert not grad(model, loss).any()


def test_padding_further_keeps_lost_answers_lost() -> None:
    student, given = pupil("answers"), batch("answers")
    given["end_positions"][3] = 10
    with riding(student, [Distill(pupil("answers", 1))]):
        torch.testing.assert_close(student(**padded(given, 5)).loss, student(**given).loss, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- mixtures of experts


@pytest.mark.parametrize("terms", [["task"], ["kl"]], ids=str)
def test_a_whole_accumulated_batch_without_a_label_leaves_experts_alone(terms: list[str], tmp_path: Path) -> None:
    config = MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1.0
    )
    student, teacher = MixtralForCausalLM(config), MixtralForCausalLM(config)
    before = [parameter.detach().clone() for parameter in student.parameters()]

    class Unlabelled(Rows):
        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            given = super().__getitem__(row)
            return {**given, "labels": torch.full_like(given["labels"], -100)}

    callback = CompressionCallback(Distill(teacher, terms=terms))
    work = arguments(tmp_path, 2, 4, max_grad_norm=1.0)
    trainer = Trainer(model=student, args=work, train_dataset=Unlabelled("causal-lm"), callbacks=[callback])
    trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True))
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


def test_experts_are_balanced_once_whatever_the_weight_of_the_task() -> None:
    config = MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=10.0
    )
    model, given = MixtralForCausalLM(config).train(), batch("causal-lm")
    own = model(**given)
    auxiliary = 10.0 * own.aux_loss
    with riding(model, [Distill(terms=[{"task": 0.25}])]):
        torch.testing.assert_close(model(**given).loss, 0.25 * (own.loss - auxiliary) + auxiliary, atol=1e-5, rtol=1e-5)
