"""Distillation plugged into training that people have already: any Trainer, its flags, its logs, its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import safe_open
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hfcompress import CompressionCallback, CompressionError, Distill, PruneHeads, attach, riding
from tests.distillation.lessons import LESSONS, Rows, batch, pupil
from tests.run.test_train import arguments
from tests.tiny import tiny_tokenizer


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Tracker(TrainerCallback):
    """Sends logs off as it finds them, as those that `report_to` names do: they stand before the callbacks of a script."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.sent.append(dict(logs))


@pytest.mark.parametrize("way", ["callback", "attach"])
def test_terms_are_logged_to_any_tracker(way: str, tmp_path: Path) -> None:
    student, teacher, tracker = pupil("sequence"), pupil("sequence", seed=1), Tracker()
    method = Distill(teacher, terms=[{"kl": 0.5}, {"task": 0.5}])
    given = {
        "args": arguments(tmp_path, 4, max_steps=4, learning_rate=1e-9, logging_steps=2),
        "train_dataset": Rows("sequence"),
    }
    if way == "callback":
        trainer = Trainer(model=student, callbacks=[tracker, CompressionCallback(method)], **given)
    else:
        trainer = attach(Trainer(model=student, callbacks=[tracker], **given), method)
    trainer.train()
    sent = [logs for logs in tracker.sent if "loss" in logs]
    assert len(sent) == 2
    for logs, kept in zip(sent, trainer.state.log_history, strict=False):
        assert 0.5 * logs["distill/kl"] + 0.5 * logs["distill/task"] == pytest.approx(logs["loss"], abs=1e-3)
        assert kept["distill/kl"] == logs["distill/kl"]
    assert not any(name.startswith("distill") for name in trainer.evaluate(Rows("sequence")))


def test_a_loss_that_is_not_trained_on_is_an_error(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    for kind, more in (
        (Own, {}),
        (Trainer, {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.square().mean()}),
    ):
        callback = CompressionCallback(Distill(pupil("sequence", seed=1), alpha=1.0))
        trainer = kind(
            model=pupil("sequence"), args=arguments(tmp_path), train_dataset=Rows("sequence"), callbacks=[callback], **more
        )
        with pytest.raises(CompressionError) as error:
            trainer.train()
        assert str(error.value) == (
            "distill: the loss it put into the model's output was not the one that was trained on; a compute_loss of your own "
            "must return outputs.loss, and compute_loss_func must not be set."
        )


def trained(lesson: str, folder: Path, *methods: Any, **more: Any) -> tuple[Any, Trainer]:
    model = pupil(lesson)
    fields = {"max_steps": 3, "learning_rate": 0.1, **more}
    trainer = Trainer(model=model, args=arguments(folder, 4, **fields), train_dataset=Rows(lesson), eval_dataset=Rows(lesson))
    attach(trainer, *methods).train()
    return model, trainer


@pytest.mark.parametrize("lesson", ["sequence", "causal-lm", "t5"])
def test_gradient_checkpointing_changes_nothing(lesson: str, tmp_path: Path) -> None:
    terms = ["kl", "task", "hidden_mse", "attention_mse", *(["relations"] if lesson != "t5" else [])]
    ends = [
        weights(trained(lesson, tmp_path, Distill(pupil(lesson, seed=1), terms=terms), gradient_checkpointing=on)[0])
        for on in (False, True)
    ]
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lesson", ["sequence", "images"])
def test_the_best_model_is_brought_back(lesson: str, tmp_path: Path) -> None:
    keep = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 100.0}
    model, trainer = trained(lesson, tmp_path, Distill(pupil(lesson, seed=1)), load_best_model_at_end=True, **keep)
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("checkpoint-3"), "at this learning rate the last is not the best"
    kept = type(model).from_pretrained(best)
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in model.state_dict().items())
    if lesson == "sequence":  # a ViT is saved under older names
        with safe_open(f"{best}/model.safetensors", "pt") as file:
            assert set(file.keys()) == set(model.state_dict())


def test_torch_compile_gives_the_same_weights(tmp_path: Path) -> None:
    ends = [
        weights(
            trained("sequence", tmp_path, Distill(pupil("sequence", seed=1), terms=["kl", "task", "hidden_mse"]), **more)[0]
        )
        for more in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    ]
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=1e-4)


def test_a_seq2seq_trainer_distils_and_generates(tmp_path: Path) -> None:
    student, teacher = pupil("t5"), pupil("t5", seed=1)
    work = Seq2SeqTrainingArguments(
        **{"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True},
        predict_with_generate=True,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model=student, args=work, train_dataset=Rows("t5"), eval_dataset=Rows("t5"))
    attach(trainer, Distill(teacher)).train()
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert logged and all("distill/kl" in logs for logs in logged)
    assert len(trainer.predict(Rows("t5")).predictions) == 8


def test_a_subclass_keeps_its_own_evaluate(tmp_path: Path) -> None:
    class Owned(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {"eval_mine": 1.0}

    student = pupil("sequence")
    trainer = Owned(model=student, args=arguments(tmp_path), train_dataset=Rows("sequence"))
    attach(trainer, Distill(pupil("sequence", seed=1))).train()
    assert trainer.evaluate() == {"eval_mine": 1.0} and trainer.model is student


def test_trls_sft_trainer_distils(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_dict({"text": ["the cat was on the market", "a bank and a dog", "team score", "price of fish"] * 4})
    ends, tokenizer = [], tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    for size, accumulate in ((8, 1), (2, 4)):
        student, teacher = pupil("causal-lm", vocab_size=64), pupil("causal-lm", seed=1, vocab_size=64)
        work = SFTConfig(
            **{"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            logging_steps=1,
            max_length=16,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            disable_tqdm=True,
            gradient_checkpointing=False,
            save_strategy="no",
        )
        trainer = SFTTrainer(
            model=student,
            args=work,
            train_dataset=texts,
            processing_class=tokenizer,
            callbacks=[CompressionCallback(Distill(teacher, terms=["skewed_kl", "task"]))],
        )
        before = weights(student)
        trainer.train()
        assert "distill/skewed_kl" in trainer.state.log_history[0]
        ends.append(weights(student) - before)
    assert ends[0].norm() > 1e-3 and (ends[0] - ends[1]).norm() <= 1e-5 * ends[0].norm()


def test_the_original_under_trl_is_not_the_student_in_disguise(tmp_path: Path) -> None:
    """SFTTrainer puts a forward on the model that calls the model's own: a copy would call that of the student."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    work = SFTConfig(
        **{"output_dir": str(tmp_path), "max_steps": 3, "report_to": "none", "use_cpu": True, "bf16": False},
        logging_steps=1,
        learning_rate=0.1,
        optim="sgd",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=pupil("causal-lm", vocab_size=64),
        args=work,
        train_dataset=Dataset.from_dict({"text": ["the cat was on the market"] * 8}),
        processing_class=tokenizer,
    )
    attach(trainer, Distill(alpha=0.5)).train()
    kl = [logs["distill/kl"] for logs in trainer.state.log_history if "loss" in logs]
    assert kl[0] < 1e-6 < 1e-4 < kl[-1], "it begins as the student was, and stays there"


def test_a_bare_accelerate_loop_distils() -> None:
    student, teacher = pupil("causal-lm"), pupil("causal-lm", seed=1)
    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(Rows("causal-lm", 16), batch_size=4)
    model, optimizer, loader = accelerator.prepare(student, torch.optim.SGD(student.parameters(), 0.5), loader)
    told = []
    with riding(student, [Distill(teacher, alpha=1.0)]) as tick:
        for _ in range(5):
            for step, given in enumerate(loader, start=1):
                accelerator.backward(model(**given).loss)
                optimizer.step()
                optimizer.zero_grad()
                told.append(float(tick(step / 20)["distill/kl"]))
    assert sum(told[-4:]) < 0.9 * sum(told[:4])
    assert not student._forward_hooks and not student._forward_pre_hooks


@pytest.mark.parametrize("lesson", LESSONS)
def test_learning_without_labels_is_pure_imitation(lesson: str) -> None:
    student, given = pupil(lesson), batch(lesson)
    terms = {"number": ["logits_mse"], "embeddings": ["embedding"]}.get(lesson, ["kl"])
    with riding(student, [Distill(pupil(lesson, seed=1), terms=terms)]):
        expected = student(**given).loss
        if lesson in ("t5", "bart", "whisper"):
            given["decoder_input_ids"] = given["labels"].clamp_min(0)
        unlabelled = {key: value for key, value in given.items() if key not in ("labels", "start_positions", "end_positions")}
        loss = student(**unlabelled).loss
    assert loss > 0
    if lesson in ("sequence", "several-labels", "number", "answers", "images", "embeddings"):
        torch.testing.assert_close(loss, expected)


def test_mistakes_have_their_sentence(tmp_path: Path) -> None:
    def refused(sentence: str, *methods: Any, model: Any = None, **more: Any) -> None:
        with pytest.raises(CompressionError) as error:
            Trainer(
                model=model or pupil("sequence"),
                args=arguments(tmp_path, **more),
                train_dataset=Rows("sequence"),
                eval_dataset=Rows("sequence"),
                callbacks=[CompressionCallback(*methods)],
            ).train()
        assert str(error.value) == sentence

    teacher = pupil("sequence", seed=1)
    refused(
        "distill: label_smoothing_factor takes the labels away and would ignore this loss; set it to 0.",
        Distill(teacher),
        label_smoothing_factor=0.1,
    )
    refused(
        "distill: attention_kl needs attention maps, and attn_implementation 'sdpa' returns none; load the model with "
        "attn_implementation='eager' or call model.set_attn_implementation('eager'), or take relations instead.",
        Distill(teacher, terms=["attention_kl"]),
        model=pupil("sequence", attn_implementation="sdpa"),
    )
    student = pupil("sequence")
    refused(
        "distill: the teacher is the student itself, which would be frozen; give 'original' for a copy of it.",
        Distill(student),
        model=student,
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CompressionError,
        match=r"distill: teacher '.*empty' can't be loaded: .*; give 'original', a folder, a Hub id or a model\.$",
    ):
        Trainer(
            model=pupil("sequence"),
            args=arguments(tmp_path),
            train_dataset=Rows("sequence"),
            callbacks=[CompressionCallback(Distill(str(tmp_path / "empty")))],
        ).train()
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    refused(
        "prune_heads: load_best_model_at_end would bring back a checkpoint from before its schedule was over; "
        "set load_best_model_at_end=False, or prune before training.",
        Distill(teacher),
        PruneHeads(0.5),
        **best,
    )
    refused(
        "distill: hidden_mse: layers 0: 7, but the student has layers 0 to 1 and the teacher 0 to 1; "
        "choose among these, or write layers: even.",
        Distill(teacher, terms=[{"hidden_mse": {"layers": {0: 7}}}]),
    )
    refused(
        "distill: attention_mse: attention maps have 4 heads in the student's layer 1 and 2 in the teacher's layer 1; "
        "take relations, where heads may differ.",
        Distill(pupil("sequence", num_attention_heads=2), terms=["attention_mse"]),
    )
    refused(
        "distill: relations: 5 heads don't divide the widths 32 (student) and 32 (teacher); choose a divisor of 32.",
        Distill(teacher, terms=[{"relations": {"heads": 5}}]),
    )


def test_a_student_wrapped_by_peft_distils(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    student = pupil("causal-lm")
    base = {name: value.clone() for name, value in student.state_dict().items()}
    wrapped = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    work = arguments(tmp_path, 4, max_steps=4, learning_rate=0.5, logging_steps=1, save_strategy="steps", save_steps=4)
    trainer = attach(Trainer(model=wrapped, args=work, train_dataset=Rows("causal-lm")), Distill(pupil("causal-lm", seed=1)))
    trainer.train()
    kl = [logs["distill/kl"] for logs in trainer.state.log_history if "loss" in logs]
    assert kl[2] < kl[0], "the same rows come again at the third step"
    merged = wrapped.unload().state_dict()
    assert base and all(torch.equal(base[name], merged[name]) for name in base), "nothing but the adapter learnt"
    with safe_open(tmp_path / "checkpoint-4" / "adapter_model.safetensors", "pt") as file:
        assert {key.split(".")[-2] for key in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118 (not a dict)


def test_an_interrupted_training_leaves_nothing_that_counts(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    student, teacher, asked = pupil("sequence"), pupil("sequence", seed=1), []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    given = {"args": arguments(tmp_path, 4, max_steps=2), "train_dataset": Rows("sequence")}
    with pytest.raises(KeyboardInterrupt):
        attach(Trainer(model=student, callbacks=[Interrupt()], **given), Distill(teacher)).train()
    asked.clear()
    attach(Trainer(model=student, **given), Distill(pupil("sequence", seed=2))).train()
    assert not asked and not student._forward_hooks
    with pytest.raises(CompressionError, match="distill: it is listed twice, and a model has one loss"):
        CompressionCallback(Distill(teacher), Distill(teacher))


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    work = arguments(tmp_path)
    work._n_gpu = 2
    with pytest.raises(CompressionError) as error:
        CompressionCallback(Distill(pupil("sequence"))).on_init_end(work, None, None, model=pupil("sequence"))  # type: ignore[arg-type]
    assert str(error.value) == (
        "distill: one process with 2 GPUs (DataParallel) has one teacher for all; start a process a GPU with "
        "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"terms": ["kll"]}, "there is no term 'kll'. Did you mean 'kl'?"),
        ({"terms": [{"kl": {"wieght": 1}}]}, "kl: unknown key 'wieght'. Did you mean 'weight'?"),
        ({"terms": [{"kl": True}]}, "kl: give its weight or a mapping of fields, not True"),
        ({"terms": [{"kl": -1}]}, "kl.weight = -1: input should be greater than or equal to 0"),
        ({"terms": "kl"}, "terms is a list, as in [kl: 0.7, task: 0.3]"),
        ({"terms": [{"kl": 1, "task": 1}]}, "a term is a name, name: weight or name: {fields}, not {'kl': 1, 'task': 1}"),
        ({"terms": ["kl", {"kl": 2}]}, "kl is listed twice; add up the weights"),
        (
            {"terms": ["kl"], "alpha": 0.5},
            "alpha weighs kl and task, and terms have weights of their own; remove one of the two",
        ),
    ],
)
def test_terms_are_read_strictly(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as error:
        Distill(**fields)
    assert sentence in str(error.value)
