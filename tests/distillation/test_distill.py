"""Distillation: the laws of every term on every kind of task, the teachers, the cache, and what can't be done."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hfcompress import CompressionCallback, CompressionError, Distill, Train, attach, riding
from hfcompress.distillation import losses
from hfcompress.distillation.terms import TERMS
from tests import fresh
from tests.distillation.lessons import LESSONS, Rows, batch, padded, pupil
from tests.run.test_train import arguments, env

INNER = ["hidden_mse", "hidden_cosine", "attention_mse", "attention_kl"]
SOFT = ["kl", "soft_cross_entropy", "reverse_kl", "jensen_shannon", "skewed_kl"]


def terms_for(lesson: str) -> list[str]:
    """Every term that fits the task. Relations need an anatomy."""
    if lesson == "embeddings":
        return ["embedding", "logits_mse", *INNER, "relations"]
    fit = [*(SOFT if lesson != "number" else []), "logits_mse", "task", *INNER]
    return fit + (
        ["relations"]
        if lesson in ("sequence", "several-labels", "number", "tokens", "masked-lm", "causal-lm", "answers")
        else []
    )


ALL = [(lesson, term) for lesson in LESSONS for term in terms_for(lesson)]


def loss_of(student: Any, given: dict[str, torch.Tensor], *methods: Distill, task: Any = None) -> torch.Tensor:
    with riding(student, list(methods), task):
        return student(**given)["loss"]


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


def test_cached_embeddings_teach_the_same(tmp_path: Path) -> None:
    student, teacher = pupil("embeddings"), pupil("embeddings", seed=1)
    given = torch.utils.data.default_collate([Rows("embeddings", 40)[row] for row in (17, 3, 39)])
    expected = loss_of(student, given, Distill(teacher, terms=["embedding"])).detach()
    cached = Distill(teacher, terms=["embedding"], cache=str(tmp_path / "cache"))
    for _ in range(2):
        found = loss_of(student, given, cached, task=loader_task("embeddings")).detach()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


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
    "gpt2": ["skewed_kl", "task", {"relations": {"of": ["query", "value"]}}],
    "whisper": ["kl", "task", {"hidden_mse": {"stack": "encoder"}}],
    "t5": ["kl", "task", "hidden_mse", {"attention_mse": {"stack": "encoder"}}],
    "bart": ["reverse_kl", "task", {"hidden_cosine": {"stack": "encoder"}}],
    "answers": ["kl", "task", "hidden_mse"],
    "images": ["kl", "task", "hidden_mse"],
    "several-labels": ["kl", "task"],
    "embeddings": ["embedding", "hidden_mse"],
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
from tests.distillation.test_distill import MIX, change
from accelerate import PartialState
folder = Path(sys.argv[1])
from tests.distillation.test_own_loss import moved as moved_by_its_own
moved = {f"{lesson} {way}": change(lesson, folder, way, 4, 1) for lesson in MIX for way in ("recipe", "callback", "attach")}
moved["focal callback"] = moved_by_its_own("focal", folder, 2, 2)
assert PartialState().num_processes == 2
if PartialState().is_main_process:
    torch.save(moved, folder / "moved.pt")
"""


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    from tests.distillation.test_own_loss import moved

    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    run = fresh.two_processes(script, tmp_path, env=env(str(Path(__file__).parents[2])))
    assert run.returncode == 0, run.stderr[-3000:]
    for name, two in torch.load(tmp_path / "moved.pt").items():
        lesson = name.split()[0]
        one = moved("focal", tmp_path, 8, 1) if lesson == "focal" else change(lesson, tmp_path, "callback", 8, 1)
        assert (one - two).norm() <= 1e-5 * one.norm(), name


# ---------------------------------------------------------------- teachers


def test_a_wider_teacher_is_met_through_a_projection_that_learns_and_is_left_behind(tmp_path: Path) -> None:
    student, teacher = pupil("sequence"), pupil("sequence", seed=1, hidden_size=64)
    keys = set(student.state_dict())
    method = Distill(teacher, terms=[{"hidden_mse": {"layers": "even", "embeddings": True}}], projection_lr=0.05)
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append((logs or {}).get("distill/hidden_mse"))

    work = arguments(tmp_path, 8, max_steps=30, learning_rate=1e-9, logging_steps=1, save_strategy="steps", save_steps=30)
    frozen = {key: value.clone() for key, value in teacher.state_dict().items()}
    Trainer(model=student, args=work, train_dataset=Rows("sequence"), callbacks=[CompressionCallback(method), Watch()]).train()
    assert seen[29] < 0.6 * seen[0], "only the projections learn at this learning rate, and they do"
    assert set(student.state_dict()) == keys
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-30" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == keys
    assert all(torch.equal(frozen[key], value) for key, value in teacher.state_dict().items())
    again = Trainer(
        model=pupil("sequence"),
        args=arguments(tmp_path, 8, max_steps=40, learning_rate=1e-9),
        train_dataset=Rows("sequence"),
        callbacks=[CompressionCallback(method)],
    )
    with pytest.raises(CompressionError) as error:
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert str(error.value) == (
        "resume_from_checkpoint: hidden_mse learns a projection from width 32 to 64, which no checkpoint holds; "
        "train from the start, or take terms without one (relations)."
    )


def test_two_processes_keep_one_projection(tmp_path: Path) -> None:
    """Projections are no part of the model that DistributedDataParallel keeps in step."""
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import PartialState\n"
        "from hfcompress import Distill, attach\n"
        "from tests.distillation.lessons import Rows, pupil\n"
        "from tests.run.test_train import arguments\n"
        "from transformers import Trainer\n"
        "from hfcompress.distillation import hooks\n"
        "kept, tick = [], hooks.Distillation.tick\n"
        "def spied(self, progress):\n"
        "    told = tick(self, progress); kept.append([p.weight.detach().clone() for p in self._projections.values()]); return told\n"
        "hooks.Distillation.tick = spied\n"
        "method = Distill(pupil('sequence', seed=1, hidden_size=64), terms=['hidden_mse'], projection_lr=0.05)\n"
        "trainer = Trainer(model=pupil('sequence'), args=arguments(sys.argv[1], 4, max_steps=3), train_dataset=Rows('sequence', 24))\n"
        "attach(trainer, method).train()\n"
        "torch.save(kept, f'{sys.argv[1]}/kept-{PartialState().process_index}.pt')\n"
    )
    run = fresh.two_processes(script, tmp_path, env=env(str(Path(__file__).parents[2])))
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"kept-{number}.pt") for number in (0, 1))
    assert len(first) == 3 and all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], first[2][0])


def test_an_ensemble_is_the_mean_of_its_teachers() -> None:
    student, given = pupil("sequence"), batch("sequence")
    one, two = pupil("sequence", seed=1), pupil("sequence", seed=2)
    method = Distill([one, two], alpha=1.0, temperature=3.0)
    with torch.no_grad():
        given_two = {key: value for key, value in given.items() if key != "labels"}
        mean = sum(torch.softmax(teacher.eval()(**given_two).logits / 3, -1) for teacher in (one, two)) / 2
        own = torch.log_softmax(student(**given).logits / 3, -1)
    expected = 9 * (mean * (mean.log() - own)).sum(-1).mean()
    torch.testing.assert_close(loss_of(student, given, method).detach(), expected)
    same = Distill([one, one], alpha=1.0, temperature=3.0)
    alone = Distill(one, alpha=1.0, temperature=3.0)
    torch.testing.assert_close(loss_of(student, given, same), loss_of(student, given, alone))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_teacher_in_low_bits_is_near_the_dense_one(bits: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    student, given = pupil("sequence", **sizes), batch("sequence")
    pupil("sequence", seed=1, **sizes).save_pretrained(tmp_path / "teacher")
    dense = loss_of(student, given, Distill(str(tmp_path / "teacher"), alpha=1.0)).detach()
    coded = loss_of(student, given, Distill(str(tmp_path / "teacher"), alpha=1.0, teacher_bits=bits)).detach()
    assert coded != dense
    assert abs(coded - dense) < (0.05 if bits == 8 else 0.4) * dense
    with pytest.raises(CompressionError, match="teacher_bits would change your own teacher object"):
        loss_of(student, given, Distill(pupil("sequence"), teacher_bits=bits))


def test_a_padded_vocabulary_is_tolerated_where_no_token_is_lost() -> None:
    class Tokens:
        """A tokenizer of 50 tokens."""

        def get_vocab(self) -> dict[str, int]:
            return {f"t{number}": number for number in range(50)}

        def __len__(self) -> int:
            return 50

    class Some:
        original, processor = None, Tokens()

        def batches(self, *_: Any) -> Any:
            return iter(())

    given = batch("causal-lm")
    given["input_ids"], given["labels"] = given["input_ids"] % 50, torch.where(given["labels"] > 0, given["labels"] % 50, -100)
    for mine, theirs in ((60, 64), (64, 56)):
        student, teacher = pupil("causal-lm", vocab_size=mine), pupil("causal-lm", seed=1, vocab_size=theirs)
        assert loss_of(student, given, Distill(teacher), task=Some()) > 0
    with pytest.raises(CompressionError, match="the teacher's vocabulary has 48 tokens and the student's 60"):
        loss_of(pupil("causal-lm"), given, Distill(pupil("causal-lm", vocab_size=48)), task=Some())


def test_the_teacher_is_run_at_the_precision_of_the_student() -> None:
    student, teacher = pupil("sequence"), pupil("sequence", seed=1)
    seen = []
    teacher.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    forward = student.forward
    student.forward = torch.autocast("cpu", dtype=torch.bfloat16)(forward)  # as accelerate does
    loss_of(student, batch("sequence"), Distill(teacher))
    student.forward = forward
    loss_of(student, batch("sequence"), Distill(teacher))
    assert seen == [torch.bfloat16, torch.float32]


# ---------------------------------------------------------------- the cache


def loader(lesson: str, count: int = 40) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Rows(lesson, count), batch_size=4)


class Counted(nn.Module):
    """A teacher that counts how often it is asked."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.asked = model, model.config, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        return self.model(*args, **kwargs)


CACHED = [(lesson, "labels") for lesson in ("sequence", "several-labels", "tokens", "masked-lm", "causal-lm", "t5", "images")]


@pytest.mark.parametrize(("lesson", "positions"), [*CACHED, *((lesson, "all") for lesson in ("masked-lm", "causal-lm", "t5"))])
def test_a_cached_teacher_teaches_the_same(lesson: str, positions: str, tmp_path: Path) -> None:
    student, teacher = pupil(lesson), Counted(pupil(lesson, seed=1))
    terms = [{"kl": {"positions": positions, "weight": 0.5}}, {"jensen_shannon": {"temperature": 2.0}}, "task"]
    online, data = Distill(teacher, terms=terms), list(loader(lesson))
    given = torch.utils.data.default_collate([Rows(lesson, 40)[row] for row in (17, 3, 39)])  # another order, another batch
    expected = loss_of(student, given, online).detach()
    for most in (100, 59):  # whole answers; 59 of 60 classes, which leaves nothing unsaid either
        cached = Distill(teacher, terms=terms, cache=str(tmp_path / f"{most}"), top_k=most)
        found = loss_of(student, given, cached, task=loader_task(lesson)).detach()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        teacher.asked = 0
        loss_of(student, given, cached, task=loader_task(lesson))
        assert teacher.asked == 0, "what was recorded is not asked again"
    assert len(data) == 10


def loader_task(lesson: str, count: int = 40) -> Any:
    from hfcompress.calibration.batches import Batches

    return Batches(loader(lesson, count))


def test_few_classes_and_the_mass_of_the_rest_are_less_than_all(tmp_path: Path) -> None:
    """Putting classes into one bucket never adds to a divergence; it tends to the whole with more of them."""
    student, teacher = pupil("causal-lm"), pupil("causal-lm", seed=1)
    given = torch.utils.data.default_collate([Rows("causal-lm", 40)[row] for row in range(8)])
    whole = loss_of(student, given, Distill(teacher, alpha=1.0)).item()
    found = [
        loss_of(
            student, given, Distill(teacher, alpha=1.0, cache=str(tmp_path / f"{k}"), top_k=k), task=loader_task("causal-lm")
        ).item()
        for k in (1, 8, 32, 59)
    ]
    assert found == sorted(found) and 0 < found[0] < 0.5 * whole and 0.97 * whole < found[-1] <= whole + 1e-6
    own = Distill("current", alpha=1.0, cache=str(tmp_path / "own"), top_k=8)
    loss = loss_of(student, given, own, task=loader_task("causal-lm"))
    assert abs(loss) < 1e-6 and gradient(student, loss).norm() < 1e-5


def test_a_killed_recording_goes_on_and_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfcompress.distillation.teacher_cache.BATCHES_A_SHARD", 1)
    student, teacher = pupil("sequence"), Counted(pupil("sequence", seed=1))
    given, task = batch("sequence", 4), loader_task("sequence")
    method = Distill(teacher, cache=str(tmp_path / "cache"))
    whole = Distill(teacher, cache=str(tmp_path / "whole"))
    loss_of(student, batch("sequence", 40), whole, task=task)
    asked, forward = teacher.asked, teacher.model.forward

    def killed(**kwargs: Any) -> Any:
        if teacher.asked >= asked + 3:
            raise KeyboardInterrupt
        return forward(**kwargs)

    teacher.model.forward = killed
    with pytest.raises(KeyboardInterrupt):
        loss_of(student, given, method, task=task)
    teacher.model.forward = forward
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "manifest.json",
        "signals-00000.safetensors",
        "signals-00001.safetensors",
    ]
    teacher.asked = 0
    loss_of(student, batch("sequence", 40), method, task=task)
    assert teacher.asked == asked - 2
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    student, folder = pupil("sequence"), str(tmp_path / "cache")
    given, task = batch("sequence", 40), loader_task("sequence")
    loss_of(student, given, Distill(pupil("sequence", seed=1), cache=folder), task=task)

    def refused(match: str, method: Distill, given: Any = given, task: Any = task, student: Any = student) -> None:
        with pytest.raises(CompressionError, match=match):
            loss_of(student, given, method, task=task)

    same = Distill(pupil("sequence", seed=1), cache=folder)
    refused(
        r"cache '.*' was recorded with teachers \[.*\], not \[.*\]; delete it", Distill(pupil("sequence", seed=2), cache=folder)
    )
    refused(
        r"was recorded with temperatures \[2.0\], not \[4.0\]", Distill(pupil("sequence", seed=1), cache=folder, temperature=4)
    )
    refused(
        r"does not know 40 of 40 training examples; delete it if the data are others now; leave cache out if they change each epoch",
        same,
        task=loader_task("sequence-2"),
    )
    refused(
        "does not know an example of this batch; leave cache out where data change from epoch to epoch",
        same,
        given=batch("sequence", 4, seed=9),
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused("holds something else; choose another folder", Distill(cache=str(tmp_path / "full")), task=Original(task, student))
    refused(
        "cache stores classes, and BertForQuestionAnswering answers with positions; leave cache out",
        Distill(pupil("answers", seed=1), cache=str(tmp_path / "qa")),
        batch("answers"),
        loader_task("answers"),
        pupil("answers"),
    )
    with pytest.raises(ValueError, match="cache stores the teacher's answers, and hidden_mse needs its hidden_states"):
        Distill(cache=folder, terms=["hidden_mse"])


class Original:
    """A task with batches and an original."""

    def __init__(self, task: Any, original: Any) -> None:
        import copy

        self.batches, self.original = task.batches, copy.deepcopy(original)


def test_a_teacher_of_another_architecture_is_shown_what_it_knows(tmp_path: Path) -> None:
    """DistilBERT has no token types, and a bare default of its own for everything else."""
    teacher = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=60, dim=32, n_layers=1, n_heads=4, hidden_dim=48, num_labels=3)
    )
    given = batch("sequence")
    given["token_type_ids"] = torch.ones_like(given["input_ids"])
    assert loss_of(pupil("sequence"), given, Distill(teacher)) > 0


def test_what_answers_with_no_classes_has_its_sentence() -> None:
    def refused(student: Any, given: dict[str, Any], sentence: str) -> None:
        with pytest.raises(CompressionError) as error:
            loss_of(student.train(), given, Distill(alpha=1.0))
        assert str(error.value) == sentence

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 10}
    sound = {
        "conv_dim": (8,),
        "conv_kernel": (4,),
        "conv_stride": (4,),
        "num_feat_extract_layers": 1,
        "num_conv_pos_embeddings": 4,
    }
    ctc = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **sound, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, pad_token_id=0))
    refused(
        ctc,
        {"input_values": torch.randn(2, 64), "labels": torch.randint(1, 9, (2, 3))},
        "distill: Wav2Vec2ForCTC answers for (2, 16) positions and has labels for (2, 3); possible are models with a label a "
        "position, which CTC models don't have.",
    )
    refused(
        BertModel(BertConfig(**sizes)),
        {"input_ids": torch.randint(1, 9, (2, 4))},
        "distill: BertModel answers with no logits of examples or tokens; possible are classifiers of texts, tokens, images and "
        "sounds, language models and question answering.",
    )


def test_more_kinds_of_head_can_be_taught() -> None:
    """Multiple choice: the classes are the choices."""
    fields = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    student = BertForMultipleChoice(BertConfig(**fields, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    ids = torch.randint(5, 60, (2, 4, 6))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([1, 3])}
    torch.testing.assert_close(loss_of(student, given, Distill(terms=["task"])), student(**given).loss)
    assert abs(loss_of(student, given, Distill("current", alpha=1.0))) < 1e-6
