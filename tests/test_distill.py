"""Distillation: the laws of every term on every kind of task, the teachers, the cache, and what can't be done."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hfcompress import CompressionCallback, Distill, Train, attach, losses, riding
from hfcompress.terms import TERMS
from tests.lessons import LESSONS, Rows, batch, padded, pupil
from tests.test_train import arguments, env

INNER = ["hidden_mse", "hidden_cosine", "attention_mse", "attention_kl"]
SOFT = ["kl", "soft_cross_entropy", "reverse_kl", "jensen_shannon", "skewed_kl"]


def terms_for(lesson: str) -> list[str]:
    """Every term that fits the task. Relations need an anatomy."""
    fit = [*(SOFT if lesson != "number" else []), "logits_mse", "task", *INNER]
    return fit + (
        ["relations"]
        if lesson in ("sequence", "several-labels", "number", "tokens", "masked-lm", "causal-lm", "answers")
        else []
    )


ALL = [(lesson, term) for lesson in LESSONS for term in terms_for(lesson)]


def loss_of(student: Any, given: dict[str, torch.Tensor], *methods: Distill, task: Any = None) -> torch.Tensor:
    with riding(student, list(methods), task):
        return student(**given).loss


def gradient(student: Any, loss: torch.Tensor) -> torch.Tensor:
    student.zero_grad()
    loss.backward()
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in student.parameters()])


def test_every_term_has_its_row() -> None:
    assert set(TERMS) == {term for _, term in ALL}


@pytest.mark.parametrize(("lesson", "term"), [pair for pair in ALL if pair[1] != "task"])
def test_learning_from_itself_is_nothing_to_learn(lesson: str, term: str) -> None:
    student = pupil(lesson)
    other = loss_of(student, batch(lesson), Distill(pupil(lesson, seed=1), terms=[term]))
    felt = gradient(student, other).norm()
    assert felt > 1e-5, "a teacher that differs is felt, or the law says nothing"
    own = loss_of(student, batch(lesson), Distill("current", terms=[term]))
    if term != "soft_cross_entropy":  # whose least value is the teacher's entropy
        assert abs(own) < 1e-6 and abs(own) < 1e-3 * other
    assert gradient(student, own).norm() < 1e-4 * felt + 1e-8


@pytest.mark.parametrize(("lesson", "term"), [pair for pair in ALL if pair[0] != "images"])
def test_padding_further_changes_nothing(lesson: str, term: str) -> None:
    student, teacher, given = pupil(lesson), pupil(lesson, seed=1), batch(lesson)
    method, wide = Distill(teacher, terms=[term]), padded(given, 5)
    if lesson == "several-labels":
        wide["labels"] = given["labels"]
    torch.testing.assert_close(loss_of(student, wide, method), loss_of(student, given, method), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "lesson", ["sequence", "tokens", "masked-lm", "causal-lm", "t5", "bart", "answers", "images", "several-labels"]
)
def test_alone_the_task_term_is_the_models_own_loss(lesson: str) -> None:
    student, given = pupil(lesson), batch(lesson)
    if lesson == "answers":  # transformers lets an answer start in the padding; the term does not
        given = {key: value for key, value in given.items() if key != "attention_mask"}
    own = student(**given).loss
    torch.testing.assert_close(loss_of(student, given, Distill(terms=["task"])), own, atol=1e-5, rtol=1e-5)


def test_soft_targets_against_the_formulas() -> None:
    """Written out with probabilities, for a batch of three and four classes."""
    p, q = torch.softmax(torch.randn(3, 4), -1), torch.softmax(torch.randn(3, 4), -1)
    student, teacher = q.log(), p.log()
    kl = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses.kl(student, teacher), kl)
    torch.testing.assert_close(losses.reverse_kl(student, teacher), (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(losses.soft_cross_entropy(student, teacher), kl - (p * p.log()).sum(-1))
    mixed = 0.3 * p + 0.7 * q
    expected = 0.3 * (p * (p / mixed).log()).sum(-1) + 0.7 * (q * (q / mixed).log()).sum(-1)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, 0.3), expected)
    torch.testing.assert_close(losses.skewed_kl(student, teacher, 0.3), (p * (p / mixed).log()).sum(-1))
    assert (losses.skewed_kl(torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]]), 0.1) <= math.log(10) + 1e-5).all()
    torch.testing.assert_close(losses.mean_probs([student, teacher]), ((p + q) / 2).log())


def test_the_gradient_keeps_its_size_when_the_temperature_changes() -> None:
    student, teacher, given = pupil("sequence"), pupil("sequence", seed=1), batch("sequence")
    sizes = [
        gradient(student, loss_of(student, given, Distill(teacher, alpha=1.0, temperature=heat))).norm() for heat in (50, 100)
    ]
    assert 0.95 < sizes[0] / sizes[1] < 1.05


# ---------------------------------------------------------------- however a batch is cut

MIX = {
    "sequence": ["kl", "task", "hidden_mse", "attention_kl", "relations"],
    "tokens": ["kl", "task", "hidden_cosine"],
    "masked-lm": [{"kl": {"weight": 5, "positions": "all"}}, {"task": 2}, "hidden_cosine"],
    "causal-lm": ["jensen_shannon", "task", "hidden_mse", "relations"],
    "t5": ["kl", "task", "hidden_mse", {"attention_mse": {"stack": "encoder"}}],
    "bart": ["reverse_kl", "task", {"hidden_cosine": {"stack": "encoder"}}],
    "answers": ["kl", "task", "hidden_mse"],
    "images": ["kl", "task", "hidden_mse"],
    "several-labels": ["kl", "task"],
}


def change(lesson: str, folder: Path, way: str, size: int, accumulate: int) -> torch.Tensor:
    """What one step of plain SGD adds to the weights: the gradient, whatever the Trainer did to it."""
    model, method = pupil(lesson), Distill(pupil(lesson, seed=1), terms=MIX[lesson])
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    work = arguments(folder, size, accumulate, learning_rate=1.0)
    if way == "recipe":

        class Rowed:
            train_dataset = eval_dataset = Rows(lesson)
            collator = processor = original = None
            headline = "accuracy"

        fields = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 1.0, "bf16": False}
        fields |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_steps": 1}
        Train(riders=(method,), **fields).run(model, Rowed())
    elif way == "callback":
        Trainer(model=model, args=work, train_dataset=Rows(lesson), callbacks=[CompressionCallback(method)]).train()
    else:
        attach(Trainer(model=model, args=work, train_dataset=Rows(lesson)), method).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.mark.parametrize("way", ["recipe", "callback", "attach"])
@pytest.mark.parametrize("lesson", MIX)
def test_the_gradient_is_the_same_at_once_and_accumulated(lesson: str, way: str, tmp_path: Path) -> None:
    at_once, accumulated = change(lesson, tmp_path, way, 8, 1), change(lesson, tmp_path, way, 2, 4)
    assert at_once.norm() > 1e-3
    assert (at_once - accumulated).norm() <= 1e-5 * at_once.norm()


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
from tests.test_distill import MIX, change
from accelerate import PartialState
folder = Path(sys.argv[1])
moved = {f"{lesson} {way}": change(lesson, folder, way, 4, 1) for lesson in MIX for way in ("recipe", "callback", "attach")}
assert PartialState().num_processes == 2
if PartialState().is_main_process:
    torch.save(moved, folder / "moved.pt")
"""


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = str(Path(__file__).parent.parent)
    run = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, env=env(root), timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    for name, two in torch.load(tmp_path / "moved.pt").items():
        one = change(name.split()[0], tmp_path, "callback", 8, 1)
        assert (one - two).norm() <= 1e-5 * one.norm(), name
