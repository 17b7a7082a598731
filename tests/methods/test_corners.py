"""Corners of distillation: what is easily silently wrong, one test each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from hfcompress import (
    CompressionCallback,
    CompressionError,
    Distill,
    PruneHeads,
    PruneNeurons,
    Quantize,
    attach,
    riding,
)
from hfcompress.calibration.batches import Batches
from hfcompress.distillation import teacher_cache as signals
from hfcompress.distillation.teachers import fitting
from hfcompress.methods.riding import check_together
from hfcompress.run.recipe import Recipe
from hfcompress.run.train import Train
from hfcompress.surgery.modules import copied
from tests.distillation.lessons import SIZES, batch, padded, pupil
from tests.tiny import tiny_checkpoint, tiny_texts


class Given(Dataset):
    def __init__(self, rows: dict[str, torch.Tensor]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(next(iter(self._rows.values())))

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {key: value[row] for key, value in self._rows.items()}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    fields = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), disable_tqdm=True, **{**fields, "logging_steps": 1, **more})


def loss(student: Any, given: dict[str, torch.Tensor], method: Distill, task: Any = None) -> float:
    with riding(student, [method], task or [given]):
        return float(student(**given).loss)


def at_the_left(given: dict[str, torch.Tensor], more: int = 0) -> dict[str, torch.Tensor]:
    """The same right-padded batch, padded on the left, and so many positions further."""
    counts = given["attention_mask"].sum(dim=1).tolist()
    wide = {
        key: torch.nn.functional.pad(value, (more, 0), value=-100 if key == "labels" else 0) for key, value in given.items()
    }
    length = given["input_ids"].shape[1]
    rows = {
        key: torch.stack(
            [
                row.roll(length - count) if more == 0 else _rolled(row, more, count)
                for row, count in zip(value, counts, strict=True)
            ]
        )
        for key, value in wide.items()
    }
    return {**rows, "position_ids": (rows["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)}


def _rolled(row: torch.Tensor, more: int, count: int) -> torch.Tensor:
    return torch.cat([row[:more], row[more:].roll(len(row) - more - count)])


# ---------------------------------------------------------------- labels


def test_labels_told_by_id2label_alone_are_permuted() -> None:
    def made(names: dict[int, str]) -> Any:
        return BertForSequenceClassification(BertConfig(**SIZES, id2label=names))

    student, teacher = made({0: "neg", 1: "pos"}), made({0: "pos", 1: "neg"})
    columns = fitting(student, teacher, teacher, None)
    assert columns is not None and columns.tolist() == [1, 0]
    with pytest.raises(CompressionError, match="labels"):
        fitting(student, made({0: "cat", 1: "dog"}), None, None)


def test_labels_in_a_column_are_labels() -> None:
    student, teacher, given = pupil("sequence"), pupil("sequence", 1), batch("sequence")
    column = {**given, "labels": given["labels"][:, None]}
    assert loss(student, column, Distill(teacher)) == loss(student, given, Distill(teacher))


@pytest.mark.parametrize("terms", [["hidden_mse"], [{"kl": {"positions": "all"}}]], ids=str)
def test_a_step_without_any_label_harms_nothing(terms: Any, tmp_path: Path) -> None:
    student, given = pupil("causal-lm"), batch("causal-lm")
    given["labels"] = torch.full_like(given["labels"], -100)
    callback = CompressionCallback(Distill(pupil("causal-lm", 1), terms=terms))
    Trainer(student, arguments(tmp_path), train_dataset=Given(given), callbacks=[callback]).train()
    assert all(parameter.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("term", ["kl", "task", "hidden_mse"])
@pytest.mark.parametrize("lesson", ["causal-lm", "gpt2"])
def test_padding_on_the_left_changes_nothing(lesson: str, term: str) -> None:
    student, given, method = pupil(lesson), batch(lesson), Distill(pupil(lesson, 1), terms=[term])
    expected = loss(student, given, method)
    for more in (0, 3):
        assert loss(student, at_the_left(given, more), method) == pytest.approx(expected, rel=1e-5)


def test_a_classifier_s_decoder_has_padding_too() -> None:
    config = pupil("bart").config
    config.num_labels = 3
    student, teacher, given = (
        BartForSequenceClassification(config).train(),
        BartForSequenceClassification(config),
        batch("sequence"),
    )
    ends = given["attention_mask"].sum(dim=1) - 1
    given["input_ids"][torch.arange(8), ends] = config.eos_token_id
    method = Distill(teacher, terms=["hidden_mse"])
    assert loss(student, padded(given, 4), method) == pytest.approx(loss(student, given, method), rel=1e-5)


def test_the_texts_of_a_packed_row_are_as_apart_for_the_student_as_for_the_teacher() -> None:
    student = pupil("causal-lm", attn_implementation="sdpa")
    ids = torch.randint(5, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    labels, positions = ids.clone(), torch.cat([torch.arange(8), torch.arange(12)])[None]
    labels[0, 8] = -100
    given = {"input_ids": ids, "position_ids": positions, "labels": labels}
    assert loss(student, given, Distill(copied(student), alpha=1.0)) == pytest.approx(0, abs=1e-6)


def test_a_mixture_of_experts_keeps_its_balance() -> None:
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
    student = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=10.0)).train()
    given = batch("causal-lm")
    assert loss(student, given, Distill(alpha=0.0)) == pytest.approx(float(student(**given).loss), rel=1e-4)


# ---------------------------------------------------------------- teachers


def test_an_ensemble_s_vocabularies_may_be_padded_differently() -> None:
    student = pupil("causal-lm", vocab_size=64)
    teachers = [pupil("causal-lm", 1, vocab_size=64), pupil("causal-lm", 2, vocab_size=60)]

    class Words:
        def get_vocab(self) -> dict[str, int]:
            return {}

        def __len__(self) -> int:
            return 60

    given = batch("causal-lm")
    assert loss(student, given, Distill(teachers), Batches([given], processor=Words())) > 0


def test_a_teacher_of_another_dtype_hears_too() -> None:
    student, teacher, given = pupil("whisper").bfloat16(), pupil("whisper", 1), batch("whisper")
    given["input_features"] = given["input_features"].bfloat16()
    assert loss(student, given, Distill(teacher)) > 0
    assert teacher.dtype == torch.float32


def test_a_teacher_gets_its_attention_implementation_back() -> None:
    student, teacher = pupil("sequence"), pupil("sequence", 1, attn_implementation="sdpa")
    assert loss(student, batch("sequence"), Distill(teacher, terms=["attention_kl"])) > 0
    assert teacher.config._attn_implementation == "sdpa"


def test_a_current_teacher_does_not_fade_with_the_student() -> None:
    student, given = pupil("sequence"), batch("sequence")
    riders = [PruneHeads(ratio=0.5, scores="magnitude"), Distill("current", alpha=1.0)]
    with riding(student, riders, [given]) as tick:
        student(**given).loss.backward()
        tick(1.0)
        assert float(student(**given).loss.detach()) > 1e-7


def test_a_projection_outlives_an_overflow() -> None:
    student, given = pupil("sequence"), batch("sequence")
    with riding(student, [Distill(pupil("sequence", 1, hidden_size=64), terms=["hidden_mse"])], [given]) as tick:
        before = float(student(**given).loss.detach())
        (student(**given).loss * float("inf")).backward()
        student.zero_grad()
        tick(0.5)
        assert float(student(**given).loss.detach()) == pytest.approx(before)


def test_relations_see_no_second_pass_of_gradient_checkpointing() -> None:
    given, teacher = batch("sequence"), pupil("sequence", 1)
    for reentrant in (False, True):
        student = pupil("sequence")
        student.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with riding(student, [Distill(teacher, terms=["relations"])], [given]):
            if reentrant:
                with pytest.raises(CompressionError, match="use_reentrant"):
                    student(**given)
                continue
            student(**given).loss.backward()
            distilling = next(iter(student._forward_hooks.values())).__self__
            assert not distilling._relations[0]._seen[0]


# ---------------------------------------------------------------- the cache


def loader(given: dict[str, torch.Tensor]) -> Batches:
    return Batches(DataLoader(Given(given), batch_size=4))


def named(names: str, seed: int) -> Any:
    return pupil("sequence", seed, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def test_a_cache_knows_whose_order_of_classes_it_holds(tmp_path: Path) -> None:
    teacher, given = named("abc", 1), batch("sequence")
    method = Distill(teacher, cache=str(tmp_path / "answers"))
    loss(named("abc", 0), given, method, loader(given))
    with pytest.raises(CompressionError, match="was recorded with labels"):
        loss(named("bca", 0), given, method, loader(given))


def test_a_cache_answers_for_examples_that_get_their_label_later(tmp_path: Path) -> None:
    student, given = pupil("sequence"), batch("sequence")
    some = {**given, "labels": given["labels"].clone()}
    some["labels"][::2] = -100
    teacher = pupil("sequence", 1)
    method = Distill(teacher, cache=str(tmp_path / "answers"))
    assert loss(student, some, method, loader(some)) == pytest.approx(loss(student, some, Distill(teacher)), rel=1e-5)
    assert loss(student, given, method, loader(given)) == pytest.approx(loss(student, given, Distill(teacher)), rel=1e-5)


def test_a_cache_answers_whoever_is_padded_on_the_left_beside_whom(tmp_path: Path) -> None:
    student, teacher, given = pupil("gpt2"), pupil("gpt2", 1), batch("gpt2")
    rows = [
        {key: value[row][:count] for key, value in given.items()}
        for row, count in enumerate(given["attention_mask"].sum(dim=1))
    ]

    def collate(some: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def pad(key: str) -> torch.Tensor:
            columns = [row[key].flip(0) for row in some]
            fill = -100 if key == "labels" else 0
            return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=fill).flip(1)

        made = {key: pad(key) for key in some[0]}
        return {**made, "position_ids": (made["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)}

    task = Batches(DataLoader(rows, batch_size=8, collate_fn=collate))
    for start in (0, 2, 4):
        some = collate(rows[start : start + 2])
        cached = loss(student, some, Distill(teacher, cache=str(tmp_path / "answers")), task)
        assert cached == pytest.approx(loss(student, some, Distill(teacher)), rel=1e-5)


def test_keys_tell_where_the_text_ends() -> None:
    def one(text: list[int], target: list[int]) -> list[bytes]:
        given = {
            "input_ids": torch.tensor([text]),
            "attention_mask": torch.ones(1, len(text)),
            "labels": torch.tensor([target]),
        }
        return signals.keys(pupil("t5"), given)

    assert one([7, 8], [9, 10]) != one([7, 8, 9], [10])


@pytest.mark.parametrize("name", ["signals-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("left", [b"", b"[]", b'{"shards": "x"}'], ids=str)
def test_a_damaged_cache_has_its_sentence(name: str, left: bytes, tmp_path: Path) -> None:
    student, given, method = pupil("sequence"), batch("sequence"), Distill(pupil("sequence", 1), cache=str(tmp_path))
    before = loss(student, given, method, loader(given))
    (tmp_path / name).write_bytes(left)
    with pytest.raises(CompressionError, match=r"damaged file|no readable manifest"):
        loss(student, given, method, loader(given))
    if name.startswith("signals"):
        (tmp_path / name).unlink()
        assert loss(student, given, method, loader(given)) == pytest.approx(before)


def test_two_runs_may_record_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, write, started = batch("sequence"), signals.save_file, []
    method = Distill(pupil("sequence", 1), cache=str(tmp_path / "answers"))

    def slow(*args: Any) -> None:
        write(*args)
        if not started:
            started.append(True)
            loss(pupil("sequence"), given, method, loader(given))

    monkeypatch.setattr(signals, "save_file", slow)
    assert loss(pupil("sequence"), given, method, loader(given)) > 0


# ---------------------------------------------------------------- trainers


class Interrupted(Trainer):
    error: type[BaseException] = KeyboardInterrupt

    def training_step(self, *args: Any, **given: Any) -> Any:
        if self.state.global_step == 1 and self.error:
            error, self.error = self.error, None  # type: ignore[assignment]
            raise error("CUDA out of memory.")
        return super().training_step(*args, **given)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_an_interrupted_training_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    student, rows = pupil("sequence"), Given(batch("sequence"))
    before = hooks(student)
    first = CompressionCallback(Distill(pupil("sequence", 1), terms=["kl", "relations"]), PruneHeads(ratio=0.5, fade=1.0))
    with pytest.raises(KeyboardInterrupt):
        Interrupted(student, arguments(tmp_path), train_dataset=rows, callbacks=[first]).train()
    assert hooks(student) > before
    second = CompressionCallback(Distill(pupil("sequence", 2)))
    Trainer(student, arguments(tmp_path), train_dataset=rows, callbacks=[second]).train()
    assert hooks(student) == before


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    callback = CompressionCallback(Distill(pupil("sequence", 1)))
    given = arguments(tmp_path, auto_find_batch_size=True)
    trainer = Interrupted(pupil("sequence"), given, train_dataset=Given(batch("sequence")), callbacks=[callback])
    trainer.error = RuntimeError
    trainer.train()
    assert trainer.state.global_step == 2 and "distill/kl" in trainer.state.log_history[0]


def test_a_second_teacher_does_not_silence_the_first(tmp_path: Path) -> None:
    trainer = Trainer(pupil("sequence"), arguments(tmp_path), train_dataset=Given(batch("sequence")))
    for seed in (1, 2):
        attach(trainer, Distill(pupil("sequence", seed)))
    with pytest.raises(CompressionError, match="listed twice"):
        trainer.train()


def test_what_is_never_logged_is_not_kept(tmp_path: Path) -> None:
    callback = CompressionCallback(Distill(pupil("sequence", 1)))
    given = arguments(tmp_path, max_steps=5, logging_strategy="no")
    Trainer(pupil("sequence"), given, train_dataset=Given(batch("sequence")), callbacks=[callback]).train()
    assert callback._told and all(value.numel() == 1 for value in callback._told.values())


def test_quantize_may_not_finish_before_what_cuts() -> None:
    with pytest.raises(CompressionError, match="list quantize first"):
        check_together([PruneNeurons(ratio=0.5), Quantize(bits=8)])
    check_together([Quantize(bits=8), PruneNeurons(ratio=0.5)])


# ---------------------------------------------------------------- recipes


def recipe(distill: Any, **more: Any) -> Recipe:
    task = {"name": "text-classification", "dataset": "texts.csv"}
    riders = distill if isinstance(distill, list) else [{"distill": distill}]
    return Recipe.from_dict({"model": "me/my-bert", "task": task, "steps": [{"train": {"with": riders}}], **more})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"teacher": []}, "a teacher is original"),
        ({"teacher": None}, "a teacher is original"),
        ({"teacher": 5}, "a teacher is original"),
        ({"teacher": ["original", {}]}, "a teacher is original"),
        ({"cache": ""}, "at least 1 character"),
        ({"terms": [{"kl": 0}]}, "every term has weight 0"),
        ({"terms": [{"kl": float("inf")}]}, "finite"),
        ({"temperature": float("inf")}, "finite"),
        ({"terms": [{"hidden_mse": {"layers": {}}}]}, "no layers are named"),
        ([{"distill": {}}, {"distill": {}}], "listed twice"),
        ([{"prune_heads": {"ratio": 0.5}}, {"distill": {}}, {"quantize": {"bits": 8}}], "list quantize first"),
    ],
    ids=str,
)
def test_mistakes_that_a_run_would_find_out_late(fields: Any, says: str) -> None:
    with pytest.raises(CompressionError, match=says) as error:
        recipe(fields)
    assert len(str(error.value).splitlines()) == 1


def test_the_recipe_s_seed_decides_order_and_dropout(tmp_path: Path) -> None:
    from hfcompress.run.loop import compress

    model, texts = tiny_checkpoint(tmp_path / "model", layers=1), tiny_texts(tmp_path / "texts", each=8)
    task = {"name": "text-classification", "dataset": str(texts)}
    steps = [{"train": {"max_steps": 2, "bf16": False, "with": ["distill"]}}]
    found = []
    for seed in (1, 2):
        fields = {"model": str(model), "task": task, "steps": steps, "seed": seed}
        done = compress(Recipe.from_dict(fields), tmp_path / f"out-{seed}")
        assert done.rows
        found.append(BertForSequenceClassification.from_pretrained(tmp_path / f"out-{seed}").classifier.weight)
    assert not torch.equal(*found)
    assert Train(seed=7).seeded(1) == Train(seed=7)
    assert Train().seeded(3).model_extra == {"seed": 3}
