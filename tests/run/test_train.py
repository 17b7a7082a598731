"""Training with methods riding along: the train step, the callback, attach and a bare loop; gradients on any number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hfcompress import (
    Adapters,
    CompressionCallback,
    CompressionError,
    Distill,
    LowRank,
    PruneHeads,
    PruneNeurons,
    PruneWeights,
    Train,
    attach,
    riding,
)
from hfcompress.checkpoint.describe import diff
from tests import fresh
from tests.methods.test_laws import FewBatches, auto, logits
from tests.tiny import tiny_model


class Rows(Dataset):
    """Eight labelled rows; the texts of half of them are padded, so that a mean over tokens is not a mean over examples."""

    def __init__(self, kind: str, rows: int = 8) -> None:
        batch = FewBatches(kind).batch(size=rows)
        if FewBatches(kind).causal:
            batch["labels"] = batch["labels"].clone()
            batch["labels"][::2, 5:] = -100
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def arguments(folder: Path, batch: int = 8, accumulate: int = 1, **more: Any) -> TrainingArguments:
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 1,
        "learning_rate": 10.0,  # large: what is lost to the rounding of the weights must not count
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**fields, **more})


def still(kind: str, **config: Any) -> Any:
    """A tiny model without dropout."""
    model = tiny_model(kind, **config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model


def change(kind: str, folder: Path, way: str, batch: int, accumulate: int) -> torch.Tensor:
    """What one step of plain SGD adds to the weights: the gradient, whatever the Trainer did to it."""
    model, methods = still(kind), (Distill(still(kind, seed=1)),)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    if way == "recipe":

        class Rowed:
            train_dataset = eval_dataset = Rows(kind)
            collator = processor = original = None
            headline = "perplexity" if FewBatches(kind).causal else "accuracy"

        fields = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 10.0, "bf16": False}
        step = Train(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=1, riders=methods, **fields
        )
        step.run(model, Rowed())
    elif way == "callback":
        callback = CompressionCallback(*methods)
        Trainer(model=model, args=arguments(folder, batch, accumulate), train_dataset=Rows(kind), callbacks=[callback]).train()
    else:
        trainer = Trainer(model=model, args=arguments(folder, batch, accumulate), train_dataset=Rows(kind))
        attach(trainer, *methods).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.mark.parametrize("way", ["recipe", "callback", "attach"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_gradient_is_the_same_at_once_and_accumulated(kind: str, way: str, tmp_path: Path) -> None:
    at_once = change(kind, tmp_path, way, 8, 1)
    accumulated = change(kind, tmp_path, way, 2, 4)
    assert at_once.norm() > 0
    assert (at_once - accumulated).norm() <= 1e-5 * at_once.norm()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_gradient_is_that_of_a_bare_loop(kind: str, tmp_path: Path) -> None:
    model = still(kind).train()
    batch = torch.utils.data.default_collate(list(Rows(kind)))
    with riding(model, [Distill(still(kind, seed=1))], None):
        model(**batch).loss.backward()
    bare = torch.cat([(-10.0 * p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])
    assert (bare - change(kind, tmp_path, "callback", 2, 4)).norm() <= 1e-5 * bare.norm()


def test_plain_training_accumulates_rightly_too() -> None:
    """Without distillation, stock heads ignore the Trainer's count of items; the train step must not."""
    gradients = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = still("bert")
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])

        class Rowed:
            train_dataset = eval_dataset = Rows("bert")
            collator = processor = original = None
            headline = "accuracy"

        Train(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            learning_rate=10.0,
            bf16=False,
        ).run(model, Rowed())
        gradients.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
from tests.run.test_train import change
folder, kind = sys.argv[1], sys.argv[2]
moved = change(kind, Path(folder), "callback", 4, 1)
from accelerate import PartialState
if PartialState().is_main_process:
    assert PartialState().num_processes == 2
    torch.save(moved, Path(folder) / "moved.pt")
"""


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_two_processes_give_the_gradient_of_one(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    run = fresh.two_processes(script, tmp_path, kind, env=env(str(Path(__file__).parents[2])))
    assert run.returncode == 0, run.stderr[-2000:]
    two = torch.load(tmp_path / "moved.pt")
    one = change(kind, tmp_path, "callback", 8, 1)
    assert (one - two).norm() <= 1e-5 * one.norm()


def env(root: str) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


METHODS_OF_A_SCRIPT = [
    (Distill(), PruneHeads(0.5), PruneNeurons(0.5, ranking="global", round_to=1)),
    (LowRank(rank=4), Distill()),
    (PruneWeights(0.5),),
    (Adapters(r=2),),
]


@pytest.mark.parametrize("methods", METHODS_OF_A_SCRIPT, ids=lambda methods: "+".join(m.key() for m in methods))
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_one_line_in_a_script_and_save_model_loads_plainly(kind: str, methods: Any, tmp_path: Path) -> None:
    model = still(kind)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, batch=4, max_steps=4, learning_rate=1e-2),
        train_dataset=Rows(kind),
        callbacks=[CompressionCallback(*methods)],
    )
    trainer.train()
    assert trainer.model is model, "the model stays the user's model"
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(auto(kind).from_pretrained(tmp_path / "saved"), kind), logits(model, kind))
    assert "eval_loss" in trainer.evaluate(Rows(kind))


def test_new_parameters_are_trained(tmp_path: Path) -> None:
    model = still("bert")
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, batch=4, max_steps=2),
        train_dataset=Rows("bert"),
        callbacks=[CompressionCallback(LowRank(rank=4))],
    )
    factor = model.bert.encoder.layer[0].intermediate.dense.first.weight
    before = factor.detach().clone()
    trainer.train()
    assert not torch.equal(factor, before)


def test_a_checkpoint_holds_student_keys_only_and_the_teacher_stays_frozen(tmp_path: Path) -> None:
    model, teacher = still("bert"), still("bert", seed=1)
    keys, frozen = set(model.state_dict()), {k: v.clone() for k, v in teacher.state_dict().items()}
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, batch=4, max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=Rows("bert"),
        callbacks=[CompressionCallback(Distill(teacher), PruneHeads(0.5))],
    )
    trainer.train()
    with safe_open(tmp_path / "checkpoint-1" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == keys
    assert all(torch.equal(frozen[k], v) for k, v in teacher.state_dict().items())
    assert not teacher.training
    assert not any("teacher" in name for name, _ in model.named_modules())


def test_distillation_does_not_touch_evaluation(tmp_path: Path) -> None:
    model = still("bert")
    plain = Trainer(model=model, args=arguments(tmp_path), eval_dataset=Rows("bert")).evaluate()["eval_loss"]
    with riding(model, [Distill(still("bert", seed=1))], None):
        assert Trainer(model=model, args=arguments(tmp_path), eval_dataset=Rows("bert")).evaluate()["eval_loss"] == plain


def test_padding_a_batch_further_changes_nothing() -> None:
    for kind in ("bert", "llama"):
        losses = []
        for more in (0, 5):
            model, batch = still(kind).train(), FewBatches(kind).batch()
            wide = {k: torch.nn.functional.pad(v, (0, more)) for k, v in batch.items() if v.dim() == 2}
            if kind == "llama":
                wide["labels"] = torch.nn.functional.pad(batch["labels"], (0, more), value=-100)
            with riding(model, [Distill(still(kind, seed=1))], None):
                losses.append(model(**{**batch, **wide}).loss)
        torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)


def test_labels_in_another_order_are_permuted(tmp_path: Path) -> None:
    student, teacher = still("bert"), still("bert")
    order = [2, 0, 1]
    student.config.label2id = {"a": 0, "b": 1, "c": 2}
    teacher.config.label2id = {"a": 1, "b": 2, "c": 0}  # the teacher's class 1 is the student's 0
    with torch.no_grad():
        teacher.classifier.weight.copy_(student.classifier.weight[order])
        teacher.classifier.bias.copy_(student.classifier.bias[order])
    with riding(student, [Distill(teacher, alpha=1.0)], None):
        assert student.train()(**FewBatches("bert").batch()).loss.abs() < 1e-6


def refused(message: str, methods: Any, folder: Path, kind: str = "bert", **more: Any) -> None:
    with pytest.raises(CompressionError) as error:
        model = still(kind)
        Trainer(
            model=model, args=arguments(folder, **more), train_dataset=Rows(kind), callbacks=[CompressionCallback(*methods)]
        ).train()
    assert str(error.value) == message


def test_mistakes_of_a_script_have_their_sentence(tmp_path: Path) -> None:
    refused(
        "distill: label_smoothing_factor takes the labels away and would ignore this loss; set it to 0.",
        [Distill()],
        tmp_path,
        label_smoothing_factor=0.1,
    )
    other = still("bert", seed=1, num_labels=5)
    refused(
        "distill: the teacher's labels ['LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3', 'LABEL_4'] are not the student's "
        "['LABEL_0', 'LABEL_1', 'LABEL_2']; take a teacher that was trained on the same labels.",
        [Distill(other)],
        tmp_path,
    )
    small = still("llama", seed=1, vocab_size=100)
    refused(
        "distill: the teacher's vocabulary has 100 tokens and the student's 128; take a teacher with the same tokenizer.",
        [Distill(small)],
        tmp_path,
        kind="llama",
    )
    with pytest.raises(CompressionError, match="is no method; give method objects such as PruneHeads"):
        CompressionCallback(PruneHeads)  # type: ignore[arg-type]


def test_load_best_model_is_refused_while_gates_fade(tmp_path: Path) -> None:
    model = still("bert")
    best = arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=1, eval_steps=1
    )
    with pytest.raises(CompressionError, match="load_best_model_at_end would bring back a checkpoint"):
        Trainer(
            model=model,
            args=best,
            train_dataset=Rows("bert"),
            eval_dataset=Rows("bert"),
            callbacks=[CompressionCallback(PruneHeads(0.5))],
        )
    assert diff(model) == {}


def test_a_callback_serves_one_training(tmp_path: Path) -> None:
    callback = CompressionCallback(PruneHeads(0.5))
    trainer = Trainer(model=still("bert"), args=arguments(tmp_path), train_dataset=Rows("bert"), callbacks=[callback])
    trainer.train()
    with pytest.raises(CompressionError, match="its methods are done after one train"):
        trainer.train()
    with pytest.raises(CompressionError, match="it belongs to one Trainer already"):
        Trainer(model=still("bert"), args=arguments(tmp_path), train_dataset=Rows("bert"), callbacks=[callback])


def test_an_own_loss_in_a_subclass_is_kept_beside(tmp_path: Path) -> None:
    class Halved(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            return (loss / 2, outputs) if return_outputs else loss / 2

    model = still("bert")
    attach(Halved(model=model, args=arguments(tmp_path), train_dataset=Rows("bert")), Distill(still("bert", seed=1))).train()
    halved = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in still("bert").parameters()])
    full = change("bert", tmp_path, "attach", 8, 1)
    assert (halved - start - full / 2).norm() <= 1e-4 * full.norm()


def test_the_saved_folder_is_what_auto_model_reads(tmp_path: Path) -> None:
    model = still("bert")
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=Rows("bert"),
        callbacks=[CompressionCallback(PruneHeads(0.5, ranking="global"))],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "s"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s")
    assert diff(again) == diff(model) != {}
    # a model that was loaded can be trained on: none of its layers is low-bit
    Trainer(model=again, args=arguments(tmp_path), train_dataset=Rows("bert")).train()


def test_the_original_is_the_model_before_any_method_touched_it() -> None:
    """Pruning listed first, or factors put in: the teacher is neither gated nor factored."""
    for methods in ([PruneHeads(0.5), Distill(alpha=1.0)], [LowRank(rank=2), Distill(alpha=1.0)]):
        model = still("bert")
        model.classifier.weight.data *= 100  # so that a small difference inside is a large one outside
        with riding(model, methods, list(torch.utils.data.DataLoader(Rows("bert"), batch_size=8))) as tick:
            tick(1.0)
            assert model.train()(**FewBatches("bert").batch()).loss > 1e-6


def test_a_resumed_training_does_not_choose_other_units(tmp_path: Path) -> None:
    work = arguments(tmp_path, batch=4, max_steps=4, save_strategy="steps", save_steps=2)
    fields = {"args": work, "train_dataset": Rows("bert")}
    Trainer(model=still("bert"), callbacks=[CompressionCallback(PruneHeads(0.5))], **fields).train()
    again = Trainer(model=still("bert"), callbacks=[CompressionCallback(PruneHeads(0.5))], **fields)
    with pytest.raises(CompressionError, match="resume_from_checkpoint: which units fade was chosen when training began"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_resumed_distillation_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    ends = []
    for resume in (False, True):
        model = still("bert")
        work = arguments(tmp_path / str(resume), batch=4, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.1)
        Trainer(model=model, args=work, train_dataset=Rows("bert"), callbacks=[CompressionCallback(Distill())]).train()
        if resume:
            model = still("bert")
            callback = CompressionCallback(Distill())
            trainer = Trainer(model=model, args=work, train_dataset=Rows("bert"), callbacks=[callback])
            trainer.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-2"))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-5)


def test_what_can_not_be_distilled_or_combined_has_its_sentence(tmp_path: Path) -> None:
    one = still("bert", num_labels=1)
    with (
        pytest.raises(
            CompressionError, match=r"kl compares classes, and this Bert.* foretells a number; use terms: \[logits_mse, task\]"
        ),
        riding(one, [Distill()]),
    ):
        pass
    with pytest.raises(CompressionError, match="adapters: can't ride along with prune_heads"):
        CompressionCallback(Adapters(), PruneHeads(0.5))
    with (
        pytest.raises(CompressionError, match="scores: gradient needs calibration data"),
        riding(still("bert"), [PruneHeads(0.5)]),
    ):
        pass
    with riding(still("bert"), [Distill()]) as _, pytest.raises(CompressionError, match="the model was given no labels"):
        model = still("bert")
        with riding(model, [Distill(alpha=0.5)]):
            model.train()(input_ids=FewBatches("bert").batch()["input_ids"])
    trainer = Trainer(
        model=still("bert"), args=arguments(tmp_path), train_dataset=Rows("bert"), compute_loss_func=lambda *a, **k: None
    )
    with pytest.raises(CompressionError, match="compute_loss_func would ignore the distillation loss"):
        attach(trainer, Distill())


def test_labels_given_by_position_are_labels_too() -> None:
    model, batch = still("bert").train(), FewBatches("bert").batch()
    expected = model(**batch).loss
    with riding(model, [Distill(still("bert", seed=1), alpha=0.0)]):
        given = model(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"]).loss
    torch.testing.assert_close(given, expected)


def test_a_second_training_runs_at_the_precision_of_the_first(tmp_path: Path) -> None:
    """accelerate takes a model for prepared once it was: later steps trained in float32, and a resumed run ended elsewhere."""

    class Rowed:
        train_dataset = eval_dataset = Rows("bert")
        collator = processor = original = None
        headline = "accuracy"

    model, seen = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), []
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    step = Train(epochs=1, per_device_train_batch_size=8, learning_rate=1e-3, bf16=True)
    step.run(model, Rowed())
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    step.run(model, Rowed())
    step.run(again, Rowed())
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        model(**FewBatches("bert").batch())
    assert seen[2] == torch.float32, "measured as it is"
