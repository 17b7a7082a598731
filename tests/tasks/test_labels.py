"""Labels as data files have them: what is missing, what is a number, which of a head's labels is meant; several a text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pydantic import ValidationError
from sklearn.metrics import f1_score
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks import ImageClassification, MaskedLM, TextClassification, TokenClassification
from tests.tiny import TOPICS, WORDS, tiny_checkpoint, tiny_images, tiny_model, tiny_tokenizer

MULTI = "multi_label_classification"
VOCABULARY = tiny_tokenizer().get_vocab()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: Any) -> Path:
    """A BERT without a head."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("bare"), "bert")
    tiny_model("bert").bert.save_pretrained(folder)
    return folder


@pytest.fixture
def said(caplog: Any) -> Any:
    """What our logger says."""
    caplog.set_level(logging.INFO, logger="hfcompress")
    return caplog


def headed(folder: Path, *names: str, kind: str = "bert", task: str = "text-classification", **more: Any) -> Path:
    labels = dict(enumerate(names))
    label2id = {name: index for index, name in labels.items()}
    return tiny_checkpoint(folder, kind, task, num_labels=len(names), id2label=labels, label2id=label2id, **more)


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def write_json(file: Path, **columns: list) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return write(file, "\n".join(map(json.dumps, rows)))


def opened(file: Path, model: Path, **more: Any) -> TextClassification:
    return TextClassification(str(file), **{"deduplicate": False, "eval_samples": 1, **more}).open(str(model))  # type: ignore[return-value]


def given(task: Any) -> list[tuple[str, Any]]:
    """The first word of each text of the task, and its label, both splits together."""
    words = {index: word for word, index in VOCABULARY.items()}
    rows = [*task.train_dataset, *task.eval_dataset]
    return sorted((words[row["input_ids"][1]], row["labels"]) for row in rows)


class Oracle(nn.Module):
    """Knows the label of a text by its first word: `answers` are the logits for each word."""

    def __init__(self, answers: dict[str, list[float]]) -> None:
        super().__init__()
        size = len(next(iter(answers.values())))
        self.table = nn.Parameter(torch.zeros(len(VOCABULARY), size))
        for word, logits in answers.items():
            self.table.data[VOCABULARY[word]] = torch.tensor(logits, dtype=torch.float32)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids[:, 1]])


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_only_an_empty_cell_is_missing(kind: str, tmp_path: Path, bare: Path, said: Any) -> None:
    mark = {"csv": ",", "tsv": "\t"}[kind]
    rows = [("cat", "NA"), ("dog", "null"), ("None", "NA"), ("nan", "null"), ("", "NA"), ("cow", "")]
    file = write(tmp_path / f"d.{kind}", "\n".join(mark.join(row) for row in [("text", "label"), *rows]))
    task = opened(file, bare)
    assert task.labels == ("NA", "null") and len(task.train_dataset) + len(task.eval_dataset) == 4
    assert [label for _, label in given(task)] == [0, 1, 0, 1], "cat, dog, and two words unknown to the tokenizer: None, nan"
    assert f"dataset '{file}', train: 2 of 6 rows left out for want of a text or a label" in said.messages


def test_numbers_are_texts(tmp_path: Path, bare: Path) -> None:
    table = write(tmp_path / "d.csv", "text,label\n1984,a\n007,b\n")
    assert opened(table, bare)._read()["train"]["text"][:] == ["1984", "007"], "as they are written"
    rows = write_json(tmp_path / "d.jsonl", text=[1984, None, 3], label=["a", "a", "b"])
    assert opened(rows, bare)._read()["train"]["text"][:] == ["1984", "3"]
    assert MaskedLM(str(rows))._read()["train"]["text"][:] == ["1984", "3"]
    lists = write_json(tmp_path / "l.jsonl", text=[["a"], ["b"]], label=[0, 1])
    with pytest.raises(CompressionError) as caught:
        opened(lists, bare)
    assert str(caught.value) == (
        f"dataset '{lists}': column 'text' holds lists, not texts; name the right one with text_column."
    )


def test_minus_one_is_a_label_beside_others(tmp_path: Path, bare: Path) -> None:
    file = write_json(tmp_path / "d.jsonl", text=["cat", "dog", "cow", "bank"], label=[-1, 1, 1, -1])
    task = opened(file, bare)
    assert task.labels == ("-1", "1") and given(task) == [("bank", 0), ("cat", 0), ("cow", 1), ("dog", 1)]
    three = write(tmp_path / "t.csv", "text,label\ncat,-1\ndog,0\ncow,1\n")
    assert opened(three, bare).labels == ("-1", "0", "1")


def test_minus_one_hides_a_whole_split_or_where_the_feature_says_so(
    tmp_path: Path, bare: Path, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.csv", "text,label\ncat,0\ndog,1\ncow,0\nbank,1\n")
    write(tmp_path / "d" / "test.csv", "text,label\ntax,-1\ngoal,-1\n")
    task = opened(tmp_path / "d", bare)
    assert given(task) == [("bank", 1), ("cat", 0), ("cow", 0), ("dog", 1)]
    assert f"dataset '{tmp_path}/d': test has no text with all of label, text: not used" in said.messages
    kinds = Features(text=Value("string"), label=ClassLabel(names=["a", "b"]))
    rows = Dataset.from_dict({"text": ["cat", "dog", "cow"], "label": [0, -1, 1]}, features=kinds)
    monkeypatch.setattr("hfcompress.tasks.data.load_dataset", lambda *_: DatasetDict(train=rows, validation=rows))
    hub = TextClassification("somebody/data").open(str(bare))
    assert len(hub.train_dataset) == 2 and hub.labels == ("a", "b")


def test_one_missing_label_among_integers(tmp_path: Path, bare: Path) -> None:
    for file in (
        write(tmp_path / "a.csv", "text,label\ncat,0\ndog,\ncow,1\n"),
        write(tmp_path / "b.csv", "text,label\ncat,0.0\ndog,\ncow,1.0\n"),  # as pandas writes them then
        write_json(tmp_path / "c.jsonl", text=["cat", "dog", "cow"], label=[0.0, None, 1.0]),
        write_json(tmp_path / "d.jsonl", text=["cat", "dog", "cow"], label=[0, None, 1]),
    ):
        task = opened(file, bare)
        assert task.labels == ("LABEL_0", "LABEL_1") and given(task) == [("cat", 0), ("cow", 1)], file


def test_a_test_file_without_labels_is_not_scored_on(tmp_path: Path, bare: Path, said: Any) -> None:
    write(tmp_path / "train.csv", "id,text,category,label\n1,cat,x,yes\n2,dog,y,no\n3,cow,x,yes\n4,bank,y,no\n")
    write(tmp_path / "test.csv", "id,text,category\n5,tax,x\n6,goal,y\n")  # category is no label, though its name could be
    write(tmp_path / "sample_submission.csv", "id,label\n5,yes\n6,yes\n")
    task = opened(tmp_path, bare)
    assert task.labels == ("no", "yes") and len(given(task)) == 4
    assert f"dataset '{tmp_path}': sample_submission.csv left out, as other files are named for training" in said.messages
    assert f"dataset '{tmp_path}': test has no text with all of label, text: not used" in said.messages
    with pytest.raises(CompressionError) as caught:
        opened(tmp_path, bare, eval_split="test")
    assert str(caught.value) == (
        f"eval_split: 'test' of dataset '{tmp_path}' has no label, which 'train' has; name another split, or leave eval_split out."
    )


def test_tables_of_different_columns_are_no_one_table(tmp_path: Path, bare: Path) -> None:
    write(tmp_path / "a.csv", "text,label\ncat,0\n")
    write(tmp_path / "b.csv", "sentence,label\ndog,1\n")
    with pytest.raises(CompressionError) as caught:
        opened(tmp_path, bare)
    assert str(caught.value) == (
        f"dataset '{tmp_path}': a.csv and b.csv have different columns; name one file, or keep one kind."
    )


def test_duplicates_are_counted(tmp_path: Path, bare: Path, said: Any) -> None:
    file = write(tmp_path / "d.csv", "text,label\ncat,0\ncat,0\ndog,1\ncow,1\n")
    opened(file, bare, deduplicate=True)
    assert f"dataset '{file}', train: 1 of 4 rows left out as duplicates" in said.messages


# ---------------------------------------------------------------- numbers and names


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_are_in_the_order_of_numbers(kind: str, tmp_path: Path) -> None:
    labels = [str(index) for index in range(11)]
    words = WORDS[:11]
    if kind == "csv":
        file = write(tmp_path / "d.csv", "\n".join(["text,label", *map(",".join, zip(words, labels, strict=True))]))
    else:
        file = write_json(tmp_path / "d.jsonl", text=words, label=labels)
    model = headed(tmp_path / "m", *(f"LABEL_{index}" for index in range(11)))
    assert given(opened(file, model)) == sorted(zip(words, range(11), strict=True)), "10 is not the third"
    turned = headed(tmp_path / "t", *map(str, reversed(range(11))))
    assert given(opened(file, turned)) == sorted(zip(words, reversed(range(11)), strict=True)), "by name where there are names"


def test_a_large_number_makes_no_large_head(tmp_path: Path, bare: Path) -> None:
    file = write_json(tmp_path / "d.jsonl", text=["cat", "dog", "cow"], label=[100002, 7, 100002])
    task = TextClassification(str(file))
    model = task.load_model(str(bare))
    assert task.labels == ("7", "100002") and model.config.num_labels == 2


def test_stars_are_no_places_from_nought(tmp_path: Path, bare: Path) -> None:
    file = write(tmp_path / "d.csv", "\n".join(["text,label", *(f"{word},{i + 1}" for i, word in enumerate(WORDS[:5]))]))
    assert opened(file, bare).labels == ("1", "2", "3", "4", "5")
    unnamed = headed(tmp_path / "m", *(f"LABEL_{index}" for index in range(5)))
    assert given(opened(file, unnamed)) == sorted(zip(WORDS[:5], range(5), strict=True))


def test_a_guess_is_said(tmp_path: Path, said: Any) -> None:
    file = write_json(tmp_path / "d.jsonl", text=["cat", "dog", "cow", "bank"], label=["yes", "no", "yes", "no"])
    task = opened(file, headed(tmp_path / "m", "LABEL_0", "LABEL_1"))
    assert task.labels == ("no", "yes")
    (line,) = [record.getMessage() for record in said.records if record.levelno == logging.WARNING]
    assert line == (
        f"dataset '{file}': no name tells which label the model means by which of its outputs, so this is guessed: 0 is 'no', 1"
        " is 'yes'; if that is wrong, put the names into id2label of the model's config.json."
    )
    said.clear()
    opened(file, headed(tmp_path / "named", "yes", "no"))
    opened(write_json(tmp_path / "n.jsonl", text=["cat", "dog"], label=[0, 1]), headed(tmp_path / "u", "LABEL_0", "LABEL_1"))
    assert not [record for record in said.records if record.levelno == logging.WARNING]


def test_an_original_far_below_chance_raises(tmp_path: Path) -> None:
    words = [word for topic in TOPICS.values() for word in topic]
    labels = ["b" if word in TOPICS["animals"] else "a" for word in words]
    file = write_json(tmp_path / "d.jsonl", text=words, label=labels)
    model = headed(tmp_path / "m", "LABEL_0", "LABEL_1")
    task = opened(file, model, eval_samples=12)
    knows = {word: [1.0, 0.0] if label == "b" else [0.0, 1.0] for word, label in zip(words, labels, strict=True)}
    with pytest.raises(CompressionError) as caught:
        task.remember(Oracle(knows))  # its first label is b, which the data's order makes a
    rows = task.eval_dataset["labels"][:]
    chance = 2 * np.mean(rows) * (1 - np.mean(rows))
    assert str(caught.value) == (
        f"model '{model}': it is right in 0.000 of 12 cases of dataset '{file}', where chance would be in {chance:.3f}, so its"
        " labels must stand in another order than the data's; correct id2label in its config.json (a, b), or the labels of the"
        " data."
    )
    right = {word: logits[::-1] for word, logits in knows.items()}
    assert task.remember(Oracle(right))["accuracy"] == 1.0
    always = {word: [1.0, 0.0] for word in words}
    task.remember(Oracle(always))  # as bad as it may be, it is not below chance


def test_a_single_label_is_nothing_to_choose(tmp_path: Path, bare: Path) -> None:
    file = write(tmp_path / "d.csv", "text,label\ncat,a\ndog,a\n")
    with pytest.raises(CompressionError) as caught:
        opened(file, bare)
    assert str(caught.value) == (
        f"dataset '{file}': a is its only label, so there is nothing to choose; give data with more labels, or name the right"
        " column with label_column."
    )


# ---------------------------------------------------------------- several labels a text


def several(tmp_path: Path, form: str) -> dict[str, Any]:
    """The same data in every form: words of each topic, and "match", which is of two."""
    words = [*TOPICS["animals"], *TOPICS["money"], *TOPICS["sport"]]
    names = {word: [topic for topic in TOPICS if word in TOPICS[topic]] for word in words}
    names["match"], names["the"] = ["money", "sport"], []
    words.append("the")
    order = list(TOPICS)
    rows = [[int(topic in names[word]) for topic in order] for word in words]
    if form == "names":
        return {"dataset": str(write_json(tmp_path / "n.jsonl", text=words, labels=[names[word] for word in words]))}
    if form == "vectors":
        return {"dataset": str(write_json(tmp_path / "v.jsonl", text=words, labels=rows))}
    lines = [",".join([word, *map(str, row)]) for word, row in zip(words, rows, strict=True)]
    return {"dataset": str(write(tmp_path / "c.csv", "\n".join([",".join(["text", *order]), *lines]))), "label_columns": order}


@pytest.mark.parametrize("form", ["names", "vectors", "columns"])
def test_several_labels_a_text(form: str, tmp_path: Path, bare: Path) -> None:
    task = TextClassification(**several(tmp_path, form), eval_samples=12, eval_batch_size=5)
    model = task.load_model(str(bare))
    assert task.labels == (("LABEL_0", "LABEL_1", "LABEL_2") if form == "vectors" else tuple(TOPICS))
    assert model.config.problem_type == MULTI and model.config.num_labels == 3
    found = dict(given(task))
    assert found["match"] == [0.0, 1.0, 1.0] and found["cat"] == [1.0, 0.0, 0.0] and found["the"] == [0.0, 0.0, 0.0]
    batch = next(task.batches(model, 4))
    assert batch["labels"].dtype == torch.float32 and model(**batch).loss.requires_grad
    scores = task.remember(model)
    assert list(scores) == ["f1_micro", "f1_macro", "agreement"] and scores["agreement"] == 1.0
    assert task.headline == "f1_micro" and task.higher_is_better
    guesses = []
    for row in task.eval_dataset:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        guesses.append((logits.sigmoid() > 0.5).int().tolist())
    truth = np.array(task.eval_dataset["labels"][:]).astype(int)
    assert scores["f1_micro"] == pytest.approx(f1_score(truth, guesses, average="micro"))
    assert scores["f1_macro"] == pytest.approx(f1_score(truth, guesses, average="macro", zero_division=0))
    with torch.no_grad():
        model.classifier.weight.neg_()
        model.classifier.bias.neg_()
    assert task.score(model)["agreement"] == 0.0


def test_several_labels_are_put_in_the_head_s_order(tmp_path: Path) -> None:
    model = headed(tmp_path / "m", "Sport", "animals", "money", problem_type=MULTI)
    task = opened(Path(several(tmp_path, "names")["dataset"]), model)
    assert dict(given(task))["match"] == [1.0, 0.0, 1.0]
    one = write_json(tmp_path / "one.jsonl", text=["cat", "bank"], label=["animals", "money"])
    assert given(opened(one, model)) == [("bank", [0.0, 0.0, 1.0]), ("cat", [0.0, 1.0, 0.0])], "one label is several too"


def test_a_head_of_another_kind_is_no_partner(tmp_path: Path) -> None:
    file = write_json(tmp_path / "one.jsonl", text=["cat", "bank"], label=["a", "b"])
    task = opened(file, headed(tmp_path / "m", "a", "b"))
    other = headed(tmp_path / "o", "a", "b", problem_type=MULTI)
    with pytest.raises(CompressionError) as caught:
        task.load_model(str(other))
    assert str(caught.value) == (
        f"model '{other}': its head is for {MULTI}, and the task was opened for single_label_classification; open a task of its"
        " own for it, or set problem_type."
    )


def test_hidden_labels_of_columns(tmp_path: Path, bare: Path) -> None:
    file = write(tmp_path / "d.csv", "text,a,b\ncat,1,0\ndog,-1,-1\ncow,0,\nbank,0,1\n")
    assert given(opened(file, bare, label_columns=["a", "b"])) == [("bank", [0.0, 1.0]), ("cat", [1.0, 0.0])]
    wrong = write(tmp_path / "w.csv", "text,a,b\ncat,1,0\ndog,2,0\n")
    with pytest.raises(CompressionError) as caught:
        opened(wrong, bare, label_columns=["a", "b"])
    assert (
        str(caught.value) == f"dataset '{wrong}': row 1 has 2, 0 under a, b, not 0 or 1; mend it, or name other label_columns."
    )
    with pytest.raises(CompressionError, match=r"label_columns: dataset .* has no column 'c'"):
        opened(file, bare, label_columns=["a", "c"])


def test_mistakes_with_several_labels(tmp_path: Path, bare: Path) -> None:
    file = Path(several(tmp_path, "names")["dataset"])
    with pytest.raises(CompressionError) as caught:
        opened(file, bare, problem_type="single_label_classification")
    assert str(caught.value) == (
        f"dataset '{file}': its texts have lists of labels, which is {MULTI}, and here single_label_classification is asked for,"
        " by problem_type or by the checkpoint's config; set problem_type, or name another label_column."
    )
    with pytest.raises(CompressionError) as caught:
        opened(file, bare, metrics=["accuracy"])
    assert str(caught.value) == (
        "metrics: accuracy does not fit what this model tells (one of several answers, several labels a text, or a number);"
        " possible here are agreement, f1_macro, f1_micro."
    )
    for fields, line in (
        ({"label_column": "x"}, "label_columns and label_column exclude each other; leave one of the two out"),
        ({"labelled": False}, "label_columns and labelled: false exclude each other; leave one of the two out"),
        ({"problem_type": "regression"}, f"label_columns are for {MULTI}, not regression; leave one of the two out"),
    ):
        with pytest.raises(ValidationError, match=line):
            TextClassification("x", label_columns=["a", "b"], **fields)


# ---------------------------------------------------------------- numbers


def test_a_number_a_text(tmp_path: Path, bare: Path) -> None:
    values = [round(0.37 * index, 2) for index in range(len(WORDS))]
    file = write(tmp_path / "d.csv", "\n".join(["text,label", *(f"{w},{v}" for w, v in zip(WORDS, values, strict=True))]))
    task = TextClassification(str(file), problem_type="regression", eval_samples=9)
    model = task.load_model(str(bare))
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    known = dict(zip(WORDS, values, strict=True))
    assert all(label == pytest.approx(known[word]) for word, label in given(task))
    assert model(**next(task.batches(model, 4))).loss.requires_grad
    scores = task.remember(model)
    assert list(scores) == ["pearson", "spearman", "agreement"] and scores["agreement"] == pytest.approx(1)
    perfect = task.score(Oracle({word: [value] for word, value in known.items()}))
    assert perfect["pearson"] == pytest.approx(1) and perfect["spearman"] == pytest.approx(1)
    words = write(tmp_path / "w.csv", "text,label\ncat,0.5\ndog,much\n")
    with pytest.raises(CompressionError) as caught:
        opened(words, bare, problem_type="regression")
    assert str(caught.value) == (
        f"dataset '{words}': a label of regression is a number, not 'much'; name the right column with label_column, or leave"
        " problem_type out."
    )
    with pytest.raises(CompressionError, match=r"its head has 2 outputs, which is not regression; choose another checkpoint"):
        opened(file, headed(tmp_path / "m", "a", "b"), problem_type="regression")


# ---------------------------------------------------------------- heads without labels in the data


@pytest.fixture(scope="module")
def plain_texts(tmp_path_factory: Any) -> Path:
    return write_json(tmp_path_factory.mktemp("plain") / "t.jsonl", text=[f"{word} of the dog" for word in WORDS])


def test_one_logit_is_compared_as_a_number(plain_texts: Path, tmp_path: Path) -> None:
    path = headed(tmp_path, "score")
    task = TextClassification(str(plain_texts), labelled=False)
    model = task.load_model(str(path))
    assert task.remember(model) == {"agreement": 1.0}
    with torch.no_grad():
        model.classifier.bias += 1
    assert task.score(model)["agreement"] < 0.5, "shifted answers are other answers"
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert task.score(model)["agreement"] == pytest.approx(0, abs=1e-6), "one answer to everything agrees with nothing"


def test_each_label_is_compared_without_labels(plain_texts: Path, tmp_path: Path) -> None:
    task = TextClassification(str(plain_texts), labelled=False)
    model = task.load_model(str(headed(tmp_path, "a", "b", "c", problem_type=MULTI)))
    assert task.remember(model) == {"agreement": 1.0}
    with torch.no_grad():
        model.classifier.weight[1].neg_()
        model.classifier.bias[1].neg_()
    assert task.score(model)["agreement"] == pytest.approx(2 / 3), "one label of three is told otherwise"


def test_images_of_such_heads(tmp_path: Path) -> None:
    tiny_images(tmp_path / "images", each=4)
    task = ImageClassification(str(tmp_path / "images"), labelled=False)
    model = task.load_model(str(headed(tmp_path / "one", "beauty", kind="vit", task="image-classification")))
    task.remember(model)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert task.score(model)["agreement"] == pytest.approx(0, abs=1e-6)
    many = headed(tmp_path / "many", "blue", "green", "red", kind="vit", task="image-classification", problem_type=MULTI)
    with pytest.raises(CompressionError) as caught:
        ImageClassification(str(tmp_path / "images")).open(str(many))
    assert str(caught.value) == (
        f"model '{many}': its head tells of each label whether it holds (problem_type {MULTI}), where image-classification"
        " chooses one of several labels; choose another checkpoint."
    )


def test_tokens_of_such_heads_are_refused(tmp_path: Path) -> None:
    file = write_json(tmp_path / "d.jsonl", tokens=[["the", word] for word in WORDS])
    path = headed(tmp_path / "m", "score", task="token-classification")
    with pytest.raises(CompressionError) as caught:
        TokenClassification(str(file), labelled=False).open(str(path))
    assert str(caught.value) == (
        f"model '{path}': its head tells a number (problem_type regression), where token-classification chooses one of several"
        " labels; choose another checkpoint."
    )
