"""Recipes named after a paper: their losses are the paper's formulas, written out, on batches where both weigh alike."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForMaskedLM, BertForSequenceClassification

from hfcompress import Distill, Student, Train, riding
from hfcompress.run.recipe import Recipe, shipped_recipes
from hfcompress.surgery.depth.stacks import layer_stacks
from tests.distillation.lessons import VOCAB, batch, pupil
from tests.tiny import TOPICS, tiny_checkpoint, tiny_model, tiny_texts


def trained(recipe: str) -> list[Train]:
    return [step for step in Recipe.load(recipe).steps if isinstance(step, Train)]


def distilled(step: Train, teacher: Any, **change: Any) -> Distill:
    """The recipe's own terms, from this teacher."""
    (rider,) = step.riders
    assert isinstance(rider, Distill)
    return Distill(teacher, rider.temperature, terms=rider.terms, **change)


def even_texts(count: int = 6, length: int = 10, masked: int = 3) -> dict[str, Tensor]:
    """No padding and as many masked tokens in every text: a mean over texts is then a mean over tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCAB, (count, length), generator=generator)
    chosen = torch.stack([torch.randperm(length, generator=generator) < masked for _ in range(count)])
    return {
        "input_ids": ids.masked_fill(chosen, 4),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~chosen, -100),
    }


def loss_of(student: Any, given: dict[str, Tensor], method: Distill) -> Tensor:
    with riding(student, [method]):
        return student(**given).loss


def same(mine: Tensor, paper: Tensor) -> None:
    assert paper > 1e-2, "or the law says nothing"
    assert abs(float(mine / paper) - 1) < 1e-6


def test_distilbert_is_its_authors_weighted_loss() -> None:
    """5 * KL over all tokens * T^2 + 2 * cross-entropy of masked tokens + cosine of last hidden states, T = 2."""
    student: BertForMaskedLM = pupil("masked-lm").double()
    teacher, given = pupil("masked-lm", seed=1).double().eval(), even_texts()
    mine = loss_of(student, given, distilled(trained("distilbert")[0], teacher))
    with torch.no_grad():
        s, t = (model(**given, output_hidden_states=True) for model in (student, teacher))
    q, p = (torch.softmax(out.logits.flatten(0, 1) / 2.0, dim=-1) for out in (s, t))
    ce = (p * (p / q).log()).sum(dim=-1).mean() * 2.0**2
    masked = given["labels"] != -100
    mlm = -s.logits.log_softmax(dim=-1)[masked].gather(-1, given["labels"][masked][:, None]).mean()
    a, b = (out.hidden_states[-1].flatten(0, 1) for out in (s, t))
    cos = (1 - (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    same(mine, 5.0 * ce + 2.0 * mlm + 1.0 * cos)


def test_distilbert_is_trained_with_its_authors_settings(tmp_path: Path) -> None:
    recipe = Recipe.load("distilbert")
    arguments = trained("distilbert")[0].arguments(str(tmp_path))
    assert recipe.steps[0] == Student(layers=[0, 2, 4, 7, 9, 11])
    assert arguments.get_warmup_steps(1000) == 50
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (5e-4, 0.0, 5.0)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 250
    assert arguments.train_sampling_strategy == "group_by_length" and arguments.num_train_epochs == 3


def test_tinybert_is_the_papers_sum_over_layers_and_then_its_soft_cross_entropy() -> None:
    """Student layer m learns from teacher layer 3m, the embeddings from the embeddings; equations 7 to 10."""
    student: BertForSequenceClassification = pupil("sequence", num_hidden_layers=4).double()
    teacher, given = pupil("sequence", seed=1, num_hidden_layers=12).double().eval(), even_texts()
    given["labels"] = torch.tensor([0, 1, 2, 0, 1, 2])
    first, second = trained("tinybert")
    asked: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        s, t = (model(**given, **asked) for model in (student, teacher))
    layers = sum(F.mse_loss(s.hidden_states[m], t.hidden_states[3 * m]) for m in range(5))
    maps = sum(F.mse_loss(s.attentions[m - 1], t.attentions[3 * m - 1]) for m in range(1, 5))
    same(loss_of(student, given, distilled(first, teacher)), layers + maps)
    answers = -(t.logits.softmax(dim=-1) * s.logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    same(loss_of(student, given, distilled(second, teacher)), answers)


def test_minilm_is_the_kl_of_query_key_and_value_relations_of_the_last_layer() -> None:
    """Equations 4 to 6, with 8 relation heads where these models are too narrow for 48."""
    student = pupil("masked-lm", hidden_size=16, num_attention_heads=2, intermediate_size=24).double()
    teacher, given = pupil("masked-lm", seed=1, num_hidden_layers=3).double().eval(), even_texts()
    (asked,) = distilled(trained("minilm")[0], teacher).summands
    assert asked.heads == 48  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in [*student.named_parameters(), *teacher.named_parameters()]:
            parameter.mul_(4.0 if ".attention.self." in name else 1.0)
    mine = loss_of(student, given, Distill(teacher, terms=[asked.model_copy(update={"heads": 8})]))

    def relation(model: Any, kind: str) -> Tensor:
        with torch.no_grad():
            before = model(**given, output_hidden_states=True).hidden_states[-2]
            layer: nn.Linear = getattr(model.bert.encoder.layer[-1].attention.self, kind)
            heads = layer(before).view(*before.shape[:2], 8, -1).transpose(1, 2)
            return torch.softmax(heads @ heads.mT / math.sqrt(heads.shape[-1]), dim=-1)

    kinds = []
    for kind in ("query", "key", "value"):
        p, q = relation(teacher, kind), relation(student, kind)
        kinds.append((p * (p / q).log()).sum(dim=-1).mean())
    same(mine, torch.stack(kinds).sum())


def test_what_distil_t5_does_is_done_to_whisper_too() -> None:
    model, teacher, given = pupil("whisper", decoder_layers=4), pupil("whisper", decoder_layers=4), batch("whisper")
    student = Recipe.load("distil-t5").steps[0]
    student.run(model, None)
    assert [stack.count for stack in layer_stacks(model)] == [2, 3]
    loss_of(model, given, distilled(trained("distil-t5")[0], teacher)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".layers." in name and "k_proj.bias" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_tinybert_from_a_general_one_learns_layers_first_and_answers_then(tmp_path: Path) -> None:
    """What the recipe's first lines say: no student, a small model, and the teacher by its name."""
    names = dict(enumerate(sorted(TOPICS)))
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    tiny_texts(tmp_path / "texts", each=12)
    tiny_checkpoint(tmp_path / "teacher", "bert", layers=4, hidden_size=128, **labels)
    tiny_checkpoint(tmp_path / "general", "bert")
    tiny_model("bert").bert.save_pretrained(tmp_path / "general")  # no head
    raw = yaml.safe_load(shipped_recipes()["tinybert"].read_text())
    raw |= {"model": str(tmp_path / "general"), "steps": raw["steps"][1:]}
    raw["task"]["dataset"] = str(tmp_path / "texts")
    for step in raw["steps"]:
        step["train"] |= {"epochs": 3, "bf16": False}
        step["train"]["with"][0]["distill"]["teacher"] = str(tmp_path / "teacher")
    recipe = Recipe.from_dict(raw)
    model = recipe.task.load_model(recipe.model)

    def weights() -> list[Tensor]:
        return [model.classifier.weight.clone(), model.bert.encoder.layer[-1].output.dense.weight.clone()]

    seen = [weights()]
    for step in recipe.steps:
        step.run(model, recipe.task)
        seen.append(weights())
    told = [[torch.equal(*pair) for pair in zip(one, other, strict=True)] for one, other in itertools.pairwise(seen)]
    assert told == [[True, False], [False, False]]
