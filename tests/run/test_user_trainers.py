"""A Trainer as people build it: with an optimizer of theirs, `model_init`, interrupted, in half precision, on several GPUs, of
another library."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMultipleChoice, Trainer, TrainingArguments

from hfcompress import (
    Adapters,
    Cast,
    CompressionCallback,
    CompressionError,
    Distill,
    LowRank,
    PruneHeads,
    PruneLayers,
    PruneNeurons,
    PruneWeights,
    Student,
    Train,
    attach,
    riding,
)
from hfcompress.checkpoint.describe import diff
from hfcompress.methods import METHODS, Method
from tests.methods.test_laws import FewBatches, logits
from tests.methods.test_riding import standing
from tests.run.test_train import Rows, arguments, still
from tests.tiny import TOPICS, tiny_model, tiny_text, tiny_tokenizer


def trainer_of(model: Any, folder: Path, *methods: Method, **more: Any) -> Trainer:
    given = {key: more.pop(key) for key in ("optimizers", "model_init", "eval_dataset") if key in more}
    work = arguments(folder, batch=4, **{"max_steps": 2, "learning_rate": 0.1, **more})
    return Trainer(model, work, train_dataset=Rows("bert"), callbacks=[CompressionCallback(*methods)], **given)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


# ---------------------------------------------------------------- optimizers, models that are made anew


@pytest.mark.parametrize("way", ["callback", "attach"])
@pytest.mark.parametrize(
    "method", [LowRank(rank=4), Adapters(r=2, merge=False), Student(config={"intermediate_size": 64})], ids=str
)
def test_an_optimizer_of_ones_own_trains_what_is_put_in(way: str, method: Method, tmp_path: Path) -> None:
    model = still("bert")
    both = (torch.optim.AdamW(model.parameters(), lr=0.01), None)
    if way == "callback":
        trainer = trainer_of(model, tmp_path, method, optimizers=both)
    else:
        trainer = Trainer(model, arguments(tmp_path, 4, max_steps=2), train_dataset=Rows("bert"), optimizers=both)
        attach(trainer, method)
    before = parameters(model)
    moved: dict[str, bool] = {}
    trainer.train()
    for name, one in model.named_parameters():
        if name in before and before[name].shape == one.shape:
            moved[name] = not torch.equal(before[name], one)
    assert moved and all(moved.values())


def test_a_model_that_train_builds_anew_is_refused_where_something_was_put_in(tmp_path: Path) -> None:
    sentence = (
        "low_rank: Trainer(model_init=...) builds the model anew in train(), without what was put into it; give it "
        "model=model_init() instead."
    )
    trainer = trainer_of(None, tmp_path, LowRank(rank=4), model_init=lambda: still("bert"))
    with pytest.raises(CompressionError) as error:
        trainer.train()
    assert str(error.value) == sentence
    plain = Trainer(model_init=lambda: still("bert"), args=arguments(tmp_path), train_dataset=Rows("bert"))
    with pytest.raises(CompressionError) as error:
        attach(plain, LowRank(rank=4))
    assert str(error.value) == f"attach: {sentence}"


def test_what_only_rides_along_rides_on_every_new_model(tmp_path: Path) -> None:
    trainer = trainer_of(None, tmp_path, Distill(), PruneHeads(0.5, scores="l1"), model_init=lambda: still("bert"))
    first = trainer.model
    for _ in range(2):
        trainer.train()
        assert trainer.model is not first and diff(trainer.model) and not diff(first)
        assert "distill/kl" in {key for logs in trainer.state.log_history for key in logs} or trainer.args.logging_steps > 2


def test_a_callback_that_is_added_later_rides_or_says_why_not(tmp_path: Path) -> None:
    trainer = Trainer(still("bert"), arguments(tmp_path), train_dataset=Rows("bert"))
    trainer.add_callback(CompressionCallback(LowRank(rank=4)))
    with pytest.raises(CompressionError) as error:
        trainer.train()
    assert str(error.value) == (
        "low_rank: the callback was added after the Trainer was built, and the optimizer exists; use attach(trainer, ...) before "
        "train(), or Trainer(..., callbacks=[CompressionCallback(...)])."
    )
    trainer = Trainer(still("bert"), arguments(tmp_path, logging_steps=1), train_dataset=Rows("bert"))
    trainer.add_callback(CompressionCallback(PruneHeads(0.5), Distill()))
    trainer.train()
    assert diff(trainer.model) and "distill/kl" in trainer.state.log_history[0]


def test_attach_hands_over_the_trainers_data(tmp_path: Path) -> None:
    model = still("bert", layers=3)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows("bert"))
    attach(trainer, PruneLayers(number=2, scores="loss")).train()
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 2
    with pytest.raises(CompressionError, match=r"or attach\(trainer, ...\) after, or choose scores: position"):
        trainer_of(still("bert"), tmp_path, PruneLayers(0.5))


# ---------------------------------------------------------------- schedules, errors, interruptions


SCHEDULED = [method for method in METHODS.values() if method.scheduled]
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}


@pytest.mark.parametrize("kind", SCHEDULED, ids=lambda kind: kind.key())
def test_no_earlier_checkpoint_replaces_what_a_schedule_ends_with(kind: Any, tmp_path: Path) -> None:
    model = still("bert")
    with pytest.raises(CompressionError) as error:
        trainer_of(model, tmp_path, kind(0.5), eval_dataset=Rows("bert"), **BEST)
    assert str(error.value) == (
        f"{kind.key()}: load_best_model_at_end would bring back a checkpoint from before its schedule was over; set "
        "load_best_model_at_end=False, or prune before training."
    )
    assert PruneWeights in SCHEDULED


class Breaking(Trainer):
    """Is interrupted after its first step."""

    def training_step(self, *args: Any, **given: Any) -> Any:
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return super().training_step(*args, **given)


def test_what_an_interrupted_training_saves_is_what_it_computes(tmp_path: Path) -> None:
    model = still("bert")
    methods = [PruneHeads(0.5, scores="l1", fade=1.0), PruneNeurons(0.5, scores="l1", fade=1.0)]
    work = arguments(tmp_path, 4, max_steps=2, learning_rate=0.1, save_strategy="steps", save_steps=1)
    trainer = Breaking(model, work, train_dataset=Rows("bert"), callbacks=[CompressionCallback(*methods)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    said = logits(model, "bert")
    for folder in ("saved", "checkpoint-1"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(again, "bert"), said, atol=1e-5, rtol=1e-5)
    with pytest.raises(CompressionError, match=r"prune_heads: .*output.dense still has the gates of another training"):
        PruneHeads(0.5, scores="l1").run(model, None)


def test_an_interrupted_training_keeps_nothing_alive(tmp_path: Path) -> None:
    def interrupted() -> tuple[Any, Any, Any]:
        model, teacher = still("bert"), still("bert", seed=1)
        callback = CompressionCallback(Distill(teacher), PruneHeads(0.5, scores="l1"))
        with pytest.raises(KeyboardInterrupt):
            Breaking(model, arguments(tmp_path, 4, max_steps=2), train_dataset=Rows("bert"), callbacks=[callback]).train()
        return model, weakref.ref(model), weakref.ref(teacher)

    model, known, teacher = interrupted()
    gc.collect()
    assert teacher() is None, "the Trainer is gone, and the teacher with it"
    assert not any(one[1:] != (0, 0, 0) for one in standing(model)[2]), "hooks and gates came off"
    del model
    gc.collect()
    assert known() is None


@pytest.mark.parametrize("moment", ["entering", "training", "finishing"])
def test_an_error_of_a_method_leaves_the_trainers_model_as_it_was(moment: str, tmp_path: Path) -> None:
    class Fails(Cast):
        def applied(self, model: nn.Module, task: Any) -> Any:
            from contextlib import contextmanager

            def tick(_: float) -> None:
                if moment == "training":
                    raise ValueError("stop")

            @contextmanager
            def failing() -> Any:
                if moment == "entering":
                    raise ValueError("stop")
                yield tick
                raise ValueError("stop")

            return failing()

    model = still("bert")
    before = standing(model)
    with pytest.raises(ValueError, match="stop"):
        trainer_of(model, tmp_path, LowRank(rank=4, target_modules=["query"]), PruneNeurons(0.5, scores="l1"), Fails()).train()
    vars(model).pop("_is_accelerate_prepared", None)
    assert standing(model) == before


# ---------------------------------------------------------------- half precision, several GPUs


class Task:
    collator = processor = original = None
    headline = "accuracy"

    def __init__(self) -> None:
        self.train_dataset = self.eval_dataset = Rows("bert")

    def batches(self, model: nn.Module, samples: int, batch_size: int = 8, seed: int = 0) -> Any:
        return FewBatches("bert").batches(model, samples, batch_size, seed)


def test_a_model_of_half_precision_is_trained_in_float32() -> None:
    """And has its dtype again afterwards: the weights are those of a float32 training, rounded once."""
    fields = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-5, "bf16": False, "riders": ()}
    for dtype in (torch.float16, torch.bfloat16):
        half, whole = still("bert").to(dtype), still("bert").to(dtype).float()
        seen: set[torch.dtype] = set()
        half.classifier.register_forward_hook(lambda module, *_, seen=seen: seen.add(module.weight.dtype))
        Train(**fields).run(half, Task())
        Train(**fields).run(whole, Task())
        assert seen == {torch.float32} and {one.dtype for one in half.parameters()} == {dtype}
        mine = dict(half.named_parameters())
        assert mine and all(torch.equal(mine[name], one.to(dtype)) for name, one in whole.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_autocast_with_what_rides_along(dtype: torch.dtype) -> None:
    model = still("bert").to(dtype)
    riders = (Distill(), PruneNeurons(0.5, scores="l1"), LowRank(rank=4, target_modules=["query"]))
    Train(per_device_train_batch_size=8, max_steps=2, bf16=True, riders=riders).run(model, Task())
    assert {one.dtype for one in model.parameters()} == {dtype} and diff(model)
    Train(per_device_train_batch_size=8, max_steps=1, bf16=False, riders=(Cast("float32"),)).run(model, Task())
    assert {one.dtype for one in model.parameters()} == {torch.float32}, "a cast that rides along is not undone"


def test_a_plain_train_step_uses_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    built = TrainingArguments.__post_init__

    def two(self: Any) -> None:
        built(self)
        self._setup_devices  # noqa: B018
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", two)
    model = still("bert")
    before = parameters(model)
    Train(per_device_train_batch_size=8, max_steps=1, learning_rate=0.1, bf16=False).run(model, Task())
    assert any(not torch.equal(before[name], one) for name, one in model.named_parameters())
    assert "train: one of 2 GPUs is used" in caplog.text


def test_the_implicit_loss_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("hfcompress.run.train.check_riders", lambda riders, _: seen.append([one.key() for one in riders]))
    Train(per_device_train_batch_size=8, max_steps=1, bf16=False).run(still("bert"), Task())
    assert seen == [["distill"]]


def test_a_model_with_an_adapter_is_not_trained_beneath_it() -> None:
    from peft import LoraConfig

    model = still("bert")
    model.add_adapter(LoraConfig(target_modules=["query"]))
    with pytest.raises(CompressionError) as error:
        Train(max_steps=1).run(model, Task())
    assert str(error.value) == (
        "train: the model carries an adapter, and its own weights are frozen; merge the adapter first "
        "(PeftModel.merge_and_unload)."
    )


# ---------------------------------------------------------------- other libraries, other tasks


@pytest.mark.parametrize(
    "step", [{"train": {"epochs": 1}}, {"cast": {}}, {"prune_heads": {"ratio": 0.5}}, {"quantize": {}}], ids=str
)
def test_a_folder_with_an_adapter_in_it_is_refused_before_anything_runs(step: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    from hfcompress import Recipe, compress

    model = still("bert")
    model.save_pretrained(tmp_path / "both")
    model.add_adapter(LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path / "both")
    asked = {"model": str(tmp_path / "both"), "task": {"name": "text-classification", "dataset": "nowhere"}, "steps": [step]}
    with pytest.raises(CompressionError) as error:
        compress(Recipe.from_dict(asked), tmp_path / "out")
    assert str(error.value) == (
        f"model {str(tmp_path / 'both')!r}: adapter files (adapter_config.json) lie beside its weights, and a recipe needs one "
        "model; merge the adapter with PEFT's merge_and_unload and save the result, or take its files away."
    )
    assert not (tmp_path / "out.partial").exists()


def test_a_loss_that_a_trainer_makes_of_logits_has_its_own_remedy(tmp_path: Path) -> None:
    from trl import DPOConfig, SFTConfig

    from hfcompress.run.callback import check_riders

    plain = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    with pytest.raises(CompressionError) as error:
        check_riders([Distill()], DPOConfig(**plain))
    assert str(error.value) == (
        "distill: under DPOConfig the Trainer makes its own loss (['sigmoid']) of the logits and would not train on this one; "
        "distil in a training of its own, with Trainer or SFTTrainer, before or after."
    )
    with pytest.raises(CompressionError, match="loss_type 'dft' would weigh this loss once more; set loss_type='nll'"):
        check_riders([Distill()], SFTConfig(loss_type="dft", **plain))


SENTENCES = [
    (PruneHeads(0.5, scores="activation"), PruneNeurons(0.5, scores="l1", repair=True)),
    (LowRank(rank=4),),
    (PruneLayers(number=2),),
    (Adapters(r=2),),
]


@pytest.mark.parametrize("methods", SENTENCES, ids=lambda methods: "+".join(method.key() for method in methods))
def test_a_sentence_transformer_is_compressed_and_loads_as_one(methods: tuple[Method, ...], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    tiny_model("minilm", vocab_size=64).base_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, rng = SentenceTransformer(str(tmp_path / "base"), device="cpu"), random.Random(0)
    pairs = [(tiny_text(topic, rng), tiny_text(topic, rng)) for topic in [*TOPICS] * 4]
    work = SentenceTransformerTrainingArguments(
        **{"output_dir": str(tmp_path), "max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
        save_strategy="no",
        learning_rate=1e-2,
        per_device_train_batch_size=6,
    )
    data = Dataset.from_dict({"anchor": [one for one, _ in pairs], "positive": [other for _, other in pairs]})
    count, words = sum(one.numel() for one in model.parameters()), [one for one, _ in pairs[:3]]
    said = model.encode(words)
    given = {"model": model, "args": work, "train_dataset": data, "loss": MultipleNegativesRankingLoss(model)}
    if len(methods) == 2:
        trainer = SentenceTransformerTrainer(**given, callbacks=[CompressionCallback(*methods)])
    else:
        trainer = attach(SentenceTransformerTrainer(**given), *methods)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (again.encode(words) == model.encode(words)).all() and not (model.encode(words) == said).all()
    smaller = sum(one.numel() for one in again.parameters()) < count
    assert smaller != (methods[0].key() == "adapters")


def test_a_sentence_transformer_has_no_loss_to_replace(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    tiny_model("bert", vocab_size=64).base_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    callback = CompressionCallback(Distill())
    with pytest.raises(CompressionError) as error:
        callback.on_init_end(arguments(tmp_path), None, None, model=SentenceTransformer(str(tmp_path), device="cpu"))  # type: ignore[arg-type]
    assert str(error.value) == (
        "distill: a SentenceTransformer is trained on embeddings, and has no loss of its own to replace; give its Trainer "
        "loss=MSELoss(model) and the teacher's embeddings as labels, and leave distill out."
    )


def test_a_model_of_multiple_choice_is_cut_and_trained(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
    torch.manual_seed(0)
    model = BertForMultipleChoice(BertConfig(**sizes))
    ids = torch.randint(5, 64, (8, 3, 10))
    rows = [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": number % 3} for number, one in enumerate(ids)]
    callback = CompressionCallback(PruneHeads(0.5), PruneNeurons(0.5, repair=True))
    trainer = Trainer(model, arguments(tmp_path, 4, max_steps=2, learning_rate=0.1), train_dataset=rows, callbacks=[callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = BertForMultipleChoice.from_pretrained(tmp_path / "saved").eval()
    assert diff(again) == diff(model) != {} or again.config.intermediate_size == 32
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_bare_loop_frees_everything_when_it_is_interrupted() -> None:
    model, teacher = still("bert"), still("bert", seed=1)
    before, known = standing(model), weakref.ref(teacher)
    with pytest.raises(KeyboardInterrupt), riding(model, [Distill(teacher), PruneHeads(0.5, scores="l1"), Adapters(r=2)][:2]):
        raise KeyboardInterrupt
    del teacher
    gc.collect()
    assert standing(model) == before and known() is None
