"""Teachers: labels that are named otherwise, modules that are no transformers models, what the cache holds at a time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from hfcompress import CompressionError, Distill, riding
from hfcompress.calibration.batches import Batches
from hfcompress.distillation import teacher_cache
from hfcompress.distillation.teachers import fitting
from tests.distillation.lessons import SIZES, Rows, batch, pupil

DEFAULT = ["LABEL_0", "LABEL_1", "LABEL_2"]


def classifier(names: list[Any]) -> Any:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    return BertForSequenceClassification(BertConfig(**SIZES, **labels))


def order(student: list[Any], teacher: list[Any]) -> list[int] | None:
    columns = fitting(classifier(student), classifier(teacher), None, None)
    return None if columns is None else columns.tolist()


@pytest.mark.parametrize(
    ("student", "teacher", "columns"),
    [
        (["neg", "neu", "pos"], DEFAULT, None),
        (DEFAULT, ["pos", "neu", "neg"], None),
        (["neg", "neu", "pos"], ["0", "1", "2"], None),
        ([0, 1, 2], DEFAULT, None),
        (["negative", "neutral", "positive"], ["POSITIVE", "Neutral", "NEGATIVE"], [2, 1, 0]),
        (["b", "B", "a"], ["a", "b", "B"], [1, 2, 0]),  # the very names first: these are three
        (["1", "2", "3"], ["3", "1", "2"], [1, 2, 0]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["LABEL_2", "LABEL_0", "LABEL_1"], [1, 2, 0]),
    ],
    ids=str,
)
def test_labels_are_matched_by_names_that_mean_something(student: Any, teacher: Any, columns: Any) -> None:
    assert order(student, teacher) == columns


def test_the_teacher_s_classes_are_learnt_by_the_student_s_names() -> None:
    """The same model with its classes called and ordered otherwise has nothing to teach."""
    student = pupil("sequence", id2label={0: "neg", 1: "neu", 2: "pos"}, label2id={"neg": 0, "neu": 1, "pos": 2})
    teacher = pupil("sequence", id2label={0: "POS", 1: "NEG", 2: "NEU"}, label2id={"POS": 0, "NEG": 1, "NEU": 2})
    with torch.no_grad():
        for parameter in teacher.classifier.parameters():
            parameter.copy_(parameter[[2, 0, 1]])
    with riding(student, [Distill(teacher, alpha=1.0)]):
        assert abs(float(student(**batch("sequence")).loss.detach())) < 1e-6


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (["cat", "dog"], ["neg", "pos"], "['neg', 'pos'] are not the student's ['cat', 'dog']"),
        (["neg", "pos"], DEFAULT, "['LABEL_0', 'LABEL_1', 'LABEL_2'] are not the student's ['neg', 'pos']"),
        (["neg", "pos"], ["1", "2"], "['1', '2'] are not the student's ['neg', 'pos']"),  # which of them comes first?
        (["a", "A"], ["A", "b"], "['A', 'b'] are not the student's ['A', 'a']"),
        ([f"c{n}" for n in range(100)], [f"d{n}" for n in range(100)], "list of 100 entries are not the student's list of 100 entries"),
    ],
)  # fmt: skip
def test_other_labels_are_refused(student: Any, teacher: Any, sentence: str) -> None:
    with pytest.raises(CompressionError) as error:
        order(student, teacher)
    assert str(error.value) == (
        f"distill: the teacher's labels {sentence}; take a teacher that was trained on the same labels."
    )


def test_a_guess_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hfcompress"):
        order(["neg", "neu", "pos"], DEFAULT)
    assert caplog.messages == ["distill: the teacher names no labels, which are taken in the student's order"]


# ---------------------------------------------------------------- plain modules


class Net(nn.Module):
    """A classifier of eight numbers, as people write it without transformers."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.body(x).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Bare(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)["logits"]


GIVEN = {"x": torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


@pytest.mark.parametrize("teacher", [Net(seed=1), Bare(seed=1)], ids=lambda one: type(one).__name__)
def test_a_plain_module_learns_from_one(teacher: Any) -> None:
    student = Net()
    own, soft = student(**GIVEN), torch.softmax(Net(seed=1)(GIVEN["x"])["logits"] / 2, -1)
    kl = (soft * (soft.log() - torch.log_softmax(own["logits"] / 2, -1))).sum(-1).mean()
    expected = 0.7 * 4 * kl + 0.3 * own["loss"]
    with riding(student, [Distill(teacher)]) as tick:
        found = student(**GIVEN)
        torch.testing.assert_close(found["loss"], expected)
        found["loss"].backward()
        tick(1.0)
        torch.testing.assert_close(student(GIVEN["x"], GIVEN["labels"])["loss"], expected)  # by position
    assert student.head.weight.grad.norm() > 1e-3
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
    torch.testing.assert_close(student(**GIVEN)["loss"], own["loss"])


def test_a_plain_module_learns_from_what_it_was() -> None:
    student = Net()
    with riding(student, [Distill("current", alpha=1.0)]):
        assert abs(float(student(**GIVEN)["loss"].detach())) < 1e-6


def test_a_plain_module_s_answers_are_cached(tmp_path: Path) -> None:
    student, teacher = Net(), Net(seed=1)
    with riding(student, [Distill(teacher)]):
        expected = student(**GIVEN)["loss"].detach()
    with riding(student, [Distill(teacher, cache=str(tmp_path / "answers"))], [GIVEN]):
        torch.testing.assert_close(student(**GIVEN)["loss"].detach(), expected)


@pytest.mark.parametrize(
    ("student", "method", "sentence"),
    [
        (
            Net(),
            Distill(Net(5)),
            "distill: the teacher answers with 5 classes and the student with 3; take a teacher that was trained on the same "
            "labels.",
        ),
        (
            Bare(),
            Distill(Net(), alpha=1.0),
            "distill: Bare returns a Tensor, and its loss is put into a field of the output; return a dict or a ModelOutput with "
            "logits, and train on its loss.",
        ),
        (
            Net(),
            Distill(Net(), terms=["hidden_mse"]),
            "distill: hidden_mse needs hidden_states, and Net.forward takes no output_hidden_states; take a term on answers, "
            "such as kl.",
        ),
        (
            Net(),
            Distill(Net(), terms=["relations"]),
            "distill: relations: a Net is no transformers model, and which of its layers are attention is not known; take "
            "another term, such as kl.",
        ),
        (
            Net(),
            Distill(nn.Linear(8, 3)),
            "distill: the teacher's Linear.forward takes input, and the student was given x, labels; name its arguments as the "
            "student's.",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_plain_module_can_t_do_has_its_sentence(student: Any, method: Distill, sentence: str) -> None:
    given = GIVEN if not isinstance(student, Bare) else {"x": GIVEN["x"]}
    with pytest.raises(CompressionError) as error, riding(student, [method]):
        student(**given)
    assert str(error.value) == sentence


def test_a_copy_that_data_parallel_makes_is_refused() -> None:
    student = pupil("sequence")
    with pytest.raises(CompressionError) as error, riding(student, [Distill("current")]):
        student._replicate_for_data_parallel()(**batch("sequence"))
    assert str(error.value) == (
        "distill: torch's DataParallel runs copies of the student in threads, and has one teacher for all; start a process a "
        "GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
    )


# ---------------------------------------------------------------- what is held at a time


class Largest(TorchDispatchMode):
    """Notes the largest floating tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor) and one.is_floating_point():
                self.numbers = max(self.numbers, one.numel())
        return made


def test_recording_holds_no_whole_batch_of_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 classes for 8 x 10 tokens are 80,000 numbers; what is asked for and computed at a time is much less."""
    vocabulary = 1000
    student, teacher = (pupil("causal-lm", seed, vocab_size=vocabulary) for seed in (0, 1))
    loader = torch.utils.data.DataLoader(Rows("causal-lm", 16), batch_size=8)
    method = {"teacher": teacher, "alpha": 1.0, "top_k": 8}

    def loss(name: str) -> Tensor:
        with riding(student, [Distill(**method, cache=str(tmp_path / name))], Batches(loader)):
            return student(**batch("causal-lm", 16)).loss.detach()

    expected = loss("whole")
    monkeypatch.setattr(teacher_cache, "LOGITS", 2 * 10 * vocabulary)
    monkeypatch.setattr(teacher_cache, "ROWS", 4)
    asked: list[int] = []
    teacher.register_forward_hook(lambda module, args, output: asked.append(output.logits.numel()))
    cache, largest, kept = teacher_cache.TeacherCache, Largest(), teacher_cache.TeacherCache._kept

    def watched(self: Any, *given: Any) -> Any:
        with largest:
            return kept(self, *given)

    monkeypatch.setattr(cache, "_kept", watched)
    torch.testing.assert_close(loss("piecewise"), expected)
    assert max(asked) == 2 * 10 * vocabulary
    assert largest.numbers == 4 * vocabulary


def test_shards_of_whole_answers_hold_few_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "LOGITS", 8 * 10 * 60 * 2)  # two batches
    student, loader = pupil("causal-lm"), torch.utils.data.DataLoader(Rows("causal-lm", 40), batch_size=8)
    method = Distill(pupil("causal-lm", 1), terms=["logits_mse"], cache=str(tmp_path / "cache"))
    with riding(student, [method], Batches(loader)):
        cached = student(**batch("causal-lm", 40)).loss.detach()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    with riding(student, [Distill(pupil("causal-lm", 1), terms=["logits_mse"])]):
        torch.testing.assert_close(student(**batch("causal-lm", 40)).loss.detach(), cached, atol=1e-5, rtol=1e-5)
