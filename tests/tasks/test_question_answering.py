"""Question answering: SQuAD's scores, spans over windows, answers of every shape, and the methods on such heads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from hfcompress import CompressionError, PruneHeads, PruneNeurons, Quantize, compress, export_model
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.proof import prove
from hfcompress.run.recipe import Recipe
from hfcompress.tasks import read_task
from hfcompress.tasks.question_answering import Window, _best_span
from hfcompress.tasks.squad import exactly, overlap
from tests.tiny import FILLER, TOPICS, tiny_model, tiny_tokenizer

WORDS = [word for some in TOPICS.values() for word in some]


def row(number: int) -> dict[str, Any]:
    """The answer stands behind the word that the question ends with."""
    generator = np.random.default_rng(number)
    context = [str(generator.choice(FILLER)) for _ in range(12)]
    place, answer = int(generator.integers(1, 10)), WORDS[number % len(WORDS)]
    context[place] = answer
    text = " ".join(context)
    start = len(" ".join(context[:place])) + 1
    return {"question": f"which {number % 7} word", "context": text, "answers": {"text": [answer], "answer_start": [start]}}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write(folder / "squad.jsonl", [row(number) for number in range(60)])
    torch.manual_seed(0)
    body = tiny_model("bert", "masked-lm")
    body.save_pretrained(folder / "body")
    config = copy.deepcopy(body.config)
    config.num_labels = 2
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    for name in ("body", "model"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def task_on(place: Path, name: str = "squad.jsonl", **fields: Any) -> Any:
    return read_task({"name": "question-answering", "dataset": str(place / name), "max_length": 48, "stride": 8, **fields})


# ---------------------------------------------------------------- scores


def test_scores_are_those_of_squad() -> None:
    """By the formulas of its evaluation script, worked out by hand."""
    for answer, right, same, shared in (
        ("The Eiffel Tower", "eiffel tower!", 1.0, 1.0),
        ("an eiffel", "the Eiffel Tower", 0.0, 2 / 3),
        ("tower tower", "tower", 0.0, 2 / 3),
        ("Paris", "London", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "Paris", 0.0, 0.0),
        ("the", "", 1.0, 1.0),
        ("in  the\nPark", "in park", 1.0, 1.0),
        ("another", "other", 0.0, 0.0),
    ):
        assert exactly(answer, right) == same, (answer, right)
        assert overlap(answer, right) == pytest.approx(shared), (answer, right)


def test_the_best_span_is_in_order_inside_and_short_enough() -> None:
    source = np.random.default_rng(0)
    for _ in range(50):
        offsets: list[Any] = [None, None, *((at * 3, at * 3 + 2) for at in range(9)), None]
        logits = source.normal(size=(15, 2))  # padded by three
        score, start, end = _best_span(Window(0, offsets), logits, 3)
        pairs = [(a, b) for a in range(2, 11) for b in range(a, min(a + 3, 11))]
        first, last = max(pairs, key=lambda pair: logits[pair[0], 0] + logits[pair[1], 1])
        assert (start, end) == (offsets[first][0], offsets[last][1])
        assert score == pytest.approx(logits[first, 0] + logits[last, 1])
    assert _best_span(Window(0, [None, None]), logits, 3)[0] == -np.inf


class Oracle(torch.nn.Module):
    """Answers with the labels that the task gives."""

    def __init__(self, labels: dict[tuple[int, ...], tuple[int, int]]) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        start, end = torch.zeros(2, *input_ids.shape)
        for place, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            begin, stop = self.labels[tuple(ids[mask.bool()].tolist())]
            start[place, begin], end[place, stop] = 9.0, 9.0
        from transformers.modeling_outputs import QuestionAnsweringModelOutput

        return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


@pytest.mark.parametrize("length", [48, 14])
def test_labels_say_where_the_answers_stand(place: Path, length: int) -> None:
    """A model that says the labels of training scores everything; in windows too, of which some do not hold the answer."""
    task = task_on(place, train_split="train", eval_split="train", deduplicate=False, max_length=length).open(
        str(place / "model")
    )
    data = task.train_dataset
    said = {tuple(one["input_ids"]): (one["start_positions"], one["end_positions"]) for one in data}
    assert (len(data) > 60) == (length == 14) and any(start for start, _ in said.values())
    assert task.score(Oracle(said)) == {"exact_match": 1.0, "f1": 1.0}


def test_batches_and_padding_do_not_tell(place: Path) -> None:
    scores = []
    for size in (1, 7, 64):
        task = task_on(place, eval_batch_size=size, max_length=14)
        scores.append(task.predict(task.load_model(str(place / "model"))))
    for other in scores[1:]:
        for name in ("predictions", "exact", "overlap"):
            np.testing.assert_array_equal(scores[0][name], other[name])


def test_no_answer_is_one_where_the_data_has_such(tmp_path: Path, place: Path) -> None:
    rows = [row(number) for number in range(40)]
    for one in rows[::2]:
        one["answers"] = {"text": [], "answer_start": []}
    write(tmp_path / "two.jsonl", rows)
    task = task_on(tmp_path, "two.jsonl", train_split="train", eval_split="train", deduplicate=False).open(str(place / "model"))
    said = {tuple(one["input_ids"]): (one["start_positions"], one["end_positions"]) for one in task.train_dataset}
    assert sum(pair == (0, 0) for pair in said.values()) == 20
    assert task.score(Oracle(said)) == {"exact_match": 1.0, "f1": 1.0}
    silent = dict.fromkeys(said, (0, 0))
    assert task.score(Oracle(silent)) == {"exact_match": 0.5, "f1": 0.5}


@pytest.mark.parametrize("shape", ["text", "texts", "one of each", "strings and no starts"])
def test_answers_of_every_shape(tmp_path: Path, place: Path, shape: str) -> None:
    rows = []
    for one in map(row, range(30)):
        text, start = one["answers"]["text"][0], one["answers"]["answer_start"][0]
        told: Any = {
            "text": text,
            "texts": [text, text],
            "one of each": {"text": text, "answer_start": start},
            "strings and no starts": {"text": [text]},
        }[shape]
        rows.append({"question": one["question"], "passage": one["context"], "answer": told})
    write(tmp_path / "rows.jsonl", rows)
    task = task_on(tmp_path, "rows.jsonl").open(str(place / "model"))
    for one in task.train_dataset:
        begin, end = one["start_positions"], one["end_positions"]
        assert task.processor.decode(one["input_ids"][begin : end + 1]) in WORDS


# ---------------------------------------------------------------- methods


def test_compressed_heads_reload_and_answer(tmp_path: Path, place: Path) -> None:
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    task.remember(model)
    PruneHeads(0.5, scores="gradient", samples=8).run(model, task)
    PruneNeurons(0.5, scores="activation", samples=8, repair=True).run(model, task)
    Quantize(8, engine="hfcompress", embeddings=8).run(model, task)
    save(model, task.processor, tmp_path / "saved")
    assert prove(model, task.example(4), tmp_path / "saved") < 1e-4
    again = task.load_model(str(tmp_path / "saved"))
    assert task.score(again) == task.score(model) and set(task.score(model)) == {"exact_match", "f1", "agreement"}


def test_a_new_head_learns_and_a_student_from_it(tmp_path: Path, place: Path) -> None:
    train = {"epochs": 2, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    told = {"name": "question-answering", "dataset": str(place / "squad.jsonl"), "max_length": 48, "stride": 8}
    recipe = {"model": str(place / "body"), "task": told, "steps": [{"train": train}]}
    compress(Recipe.from_dict(recipe), tmp_path / "taught")
    steps = [{"student": {"number": 1}}, {"train": {**train, "with": [{"distill": {"terms": ["kl", "task"]}}]}}]
    compress(Recipe.from_dict({**recipe, "model": str(tmp_path / "taught"), "steps": steps}), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["rows"][-1]["score"]) == {"exact_match", "f1", "agreement"}
    assert "AutoModelForQuestionAnswering" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_an_export_answers_the_same(tmp_path: Path, place: Path, to: str) -> None:
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    task.remember(model)
    out = export_model(place / "model", to, output=tmp_path / to, task=task)
    assert task.score(task.load_model(str(out)))["agreement"] > 0.9


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, place: Path) -> None:
    wrong = {**row(3), "answers": {"text": ["elsewhere"], "answer_start": [0]}}
    write(tmp_path / "wrong.jsonl", [row(1), row(2), wrong])
    with pytest.raises(
        CompressionError, match="row 2 has the answer 'elsewhere', which does not stand in its context; mend it"
    ):
        task_on(tmp_path, "wrong.jsonl").open(str(place / "model"))
    with pytest.raises(ValueError, match=r"stride \(48\) is what windows of max_length \(48\) share; make it smaller"):
        task_on(place, stride=48)
    long = {**row(3), "question": " ".join(["cat"] * 200)}
    write(tmp_path / "long.jsonl", [row(1), row(2), long])
    task = task_on(tmp_path, "long.jsonl").open(str(place / "model"))
    read = [task.processor.decode(ids) for ids in task.train_dataset["input_ids"][:] + task.eval_dataset["input_ids"][:]]
    assert max(text.count("cat") for text in read) in range(20, 25), "half of a window, and not refused"
    write(tmp_path / "other.jsonl", [{"question": "a", "context": "b"}])
    with pytest.raises(CompressionError, match="is called answers, answer; name the right one with answers_column"):
        task_on(tmp_path, "other.jsonl").open(str(place / "model"))
