"""What each task makes of its data, its scores against a plain loop, and its mistakes; what holds for all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Translation, Value
from PIL import Image
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

import hfcompress.tasks.pretrained
from hfcompress import CompressionError, Recipe, compress
from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.artifact import load
from hfcompress.results.compare import compare
from hfcompress.tasks import TASKS, ImageClassification, MaskedLM, Seq2SeqLM, TokenClassification
from tests.tiny import TOPICS, WORDS, tiny_checkpoint, tiny_images, tiny_model, tiny_texts, tiny_tokenizer

VOCABULARY = tiny_tokenizer().get_vocab()
SENTENCES = [["the", "cat-dog", "of", word] for word in WORDS]  # the tokenizer parts cat-dog into three
TAGS = [["O", "B-PET", "O", "B-ANY" if word in TOPICS["sport"] else "O"] for word in WORDS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """Data and a checkpoint for every task; where there are labels to learn, without a head."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny_texts(folder / "texts", each=12)
    tiny_images(folder / "images")
    write_json(folder / "tagged.jsonl", tokens=SENTENCES, ner_tags=TAGS)
    write_json(
        folder / "pairs.jsonl",
        document=[f"the {word} of the cat and the dog" for word in WORDS],
        summary=[f"a {word}" if word in TOPICS["sport"] else f"{word} was in the bank" for word in WORDS],
    )
    tiny_checkpoint(folder / "masked-lm", "bert", "masked-lm")
    tiny_checkpoint(folder / "seq2seq-lm", "t5")
    tiny_checkpoint(folder / "bart", "bart")
    tiny_checkpoint(folder / "image-classification", "vit")
    tiny_model("vit").vit.save_pretrained(folder / "image-classification")
    for name in ("token-classification", "text-classification"):
        tiny_checkpoint(folder / name, "bert")
        tiny_model("bert").bert.save_pretrained(folder / name)
    tiny_checkpoint(folder / "causal-lm", "llama")
    contexts = [f"the {word} of the cat and the dog" for word in WORDS]
    write_json(folder / "squad.jsonl", question=["what of the cat"] * len(WORDS), context=contexts, answer=WORDS)
    for name in ("sentence-embeddings", "question-answering"):
        tiny_checkpoint(folder / name, "bert", "masked-lm")
    return folder


def write_json(file: Path, **columns: list) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


DATA = {
    "text-classification": {"dataset": "texts", "max_length": 32},
    "token-classification": {"dataset": "tagged.jsonl", "max_length": 32},
    "causal-lm": {"dataset": "texts", "block_size": 16},
    "masked-lm": {"dataset": "texts", "max_length": 32},
    "seq2seq-lm": {"dataset": "pairs.jsonl"},
    "image-classification": {"dataset": "images"},
    "question-answering": {"dataset": "squad.jsonl", "max_length": 32, "stride": 8},
    "sentence-embeddings": {"dataset": "texts", "max_length": 32},
}


def made(place: Path, name: str, **more: Any) -> Any:
    fields = {**DATA[name], **more}
    return TASKS[name](**{**fields, "dataset": str(place / fields["dataset"])})


def headed(folder: Path, kind: str, task: str, *names: str) -> Path:
    labels = dict(enumerate(names))
    return tiny_checkpoint(
        folder, kind, task, num_labels=len(names), id2label=labels, label2id={n: i for i, n in labels.items()}
    )


def said(caught: Any) -> str:
    """The sentence of a task's own mistake, without pydantic's frame."""
    (one,) = caught.value.errors()
    return one["msg"]


# ---------------------------------------------------------------- every task


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_scores_and_gives_examples(name: str, place: Path) -> None:
    task = made(place, name, max_train_samples=9, max_eval_samples=5)
    model = task.load_model(str(place / name))
    assert (len(task.train_dataset), len(task.eval_dataset)) == (9, 5)
    scores = task.remember(model)
    assert (
        list(scores) == [*(name for name in task.metrics if name != "agreement"), "agreement"]
        and scores["agreement"] == 1.0
        and task.score(model) == scores
    )
    said = model(**next(task.batches(model, 4)))
    assert (said.loss if "loss" in said else said.logits).requires_grad
    example = task.example(3)
    assert len(model(**example)[0]) == 3 and "labels" not in example
    assert all(torch.equal(value, task.example(3)[key]) for key, value in example.items())
    other = made(place, name, max_eval_samples=5, eval_batch_size=2).open(str(place / name))
    other.remember(model)
    assert {key: pytest.approx(value, rel=1e-5) for key, value in other.score(model).items()} == scores, "batches don't tell"


@pytest.mark.parametrize("name", TASKS)
def test_a_pass_over_all_training_examples(name: str, place: Path) -> None:
    task = made(place, name)
    model = task.load_model(str(place / name))
    once, again = list(task.batches(model, None, 4)), list(task.batches(model, None, 4))
    key = "pixel_values" if name == "image-classification" else "input_ids"
    assert sum(len(batch[key]) for batch in once) == len(task.train_dataset)
    assert all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(once, again, strict=True))
    if name != "masked-lm":  # the order is the data's
        first = torch.as_tensor(task.train_dataset[0][key])
        assert torch.equal(once[0][key][0][: len(first)], first)


def test_a_pass_over_all_of_a_loader() -> None:
    rows = [{"x": torch.tensor([number])} for number in range(10)]
    model = torch.nn.Linear(1, 1)
    batches = Batches(DataLoader(rows, batch_size=2, shuffle=True))  # type: ignore[arg-type]
    assert [batch["x"].flatten().tolist() for batch in batches.batches(model, None, 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert sum(len(batch["x"]) for batch in batches.batches(model, 5, 4)) == 8


HUB = {
    "imdb": ("text-classification", {"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])}, ["a", 0]),
    "conll2003": (
        "token-classification",
        {"id": Value("string"), "tokens": datasets.List(Value("string")), "ner_tags": datasets.List(ClassLabel(names=["O", "B"]))},
        ["0", ["the", "cat"], [0, 1]],
    ),
    "wikitext": ("masked-lm", {"text": Value("string")}, [" ".join(WORDS)]),
    "xsum": ("seq2seq-lm", {"document": Value("string"), "summary": Value("string"), "id": Value("string")}, ["the cat", "cat", "0"]),
    "cnn_dailymail": ("seq2seq-lm", {"article": Value("string"), "highlights": Value("string")}, ["the cat", "cat"]),
    "samsum": ("seq2seq-lm", {"dialogue": Value("string"), "summary": Value("string")}, ["the cat", "cat"]),
    "opus": ("seq2seq-lm", {"id": Value("string"), "translation": Translation(["en", "fr"])}, ["0", {"en": "the cat", "fr": "a cat"}]),
    "cifar10": ("image-classification", {"img": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])}, [None, 1]),
    "cifar100": (
        "image-classification",
        {"img": datasets.Image(), "fine_label": ClassLabel(names=["cat", "dog"]), "coarse_label": ClassLabel(names=["pet"])},
        [None, 1, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dataset", HUB)
def test_columns_of_well_known_data_are_found(dataset: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, features, row = HUB[dataset]
    if name == "image-classification":
        row = [Image.new("RGB", (8, 8), "red"), *row[1:]]
    rows = Dataset.from_dict({key: [value] * 3 for key, value in zip(features, row, strict=True)}, features=Features(features))
    monkeypatch.setattr("hfcompress.tasks.data.load_dataset", lambda *_: DatasetDict(train=rows, validation=rows))
    languages = {"source_lang": "en", "target_lang": "fr"} if dataset == "opus" else {}
    task = TASKS[name](dataset=f"somebody/{dataset}", **languages)
    task.load_model(str(place / name))
    assert len(task.train_dataset) == len(task.eval_dataset) == 3, "the Hub's own splits, and no row dropped"


# ---------------------------------------------------------------- masked language models


def test_masks_are_fixed_for_scoring_and_drawn_anew_for_training(place: Path) -> None:
    task, twin = made(place, "masked-lm"), made(place, "masked-lm")
    model = task.load_model(str(place / "masked-lm"))
    twin.open(str(place / "masked-lm"))
    assert task.eval_dataset.to_dict() == twin.eval_dataset.to_dict()
    other = made(place, "masked-lm", seed=1, eval_split=None).open(str(place / "masked-lm"))
    assert other.eval_dataset["labels"][:] != task.eval_dataset["labels"][:]
    rows = [task.train_dataset[index] for index in range(20)]
    assert "labels" not in rows[0]
    one, two = task.collator(rows), task.collator(rows)
    assert not torch.equal(one["labels"], two["labels"])
    masked = one["labels"] != -100
    plain = tiny_tokenizer().pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")["input_ids"]
    assert torch.equal(one["labels"][masked], plain[masked]), "the labels are what stood there"
    assert torch.equal(one["input_ids"][~masked], plain[~masked])
    assert not (plain[masked] < 5).any(), "no special token and no pad is masked"
    state = torch.get_rng_state()
    list(task.batches(model, 8))
    assert torch.equal(torch.get_rng_state(), state), "a seeded draw of its own"


def test_the_share_of_masks(place: Path) -> None:
    task = made(place, "masked-lm", mlm_probability=0.5, max_train_samples=None).open(str(place / "masked-lm"))
    batch = task.collator([task.train_dataset[index] for index in range(len(task.train_dataset))])
    words = int((batch["attention_mask"].sum(1) - 2).sum())
    assert 0.35 < int((batch["labels"] != -100).sum()) / words < 0.65


def test_masked_scores_equal_those_of_a_plain_loop(place: Path) -> None:
    task = made(place, "masked-lm")
    model = task.load_model(str(place / "masked-lm"))
    hits, nll = [], []
    for row in task.eval_dataset:
        told = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"]):
            if label != -100:
                hits.append(int(told[position].argmax()) == label)
                nll.append(-float(told[position, label]))
    scores = task.score(model)
    assert scores["accuracy"] == sum(hits) / len(hits)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert task.headline == "perplexity" and not task.higher_is_better


def test_blocks_have_special_tokens_and_one_length(place: Path) -> None:
    task = made(place, "masked-lm", line_by_line=False, max_length=24).open(str(place / "masked-lm"))
    assert {len(ids) for ids in task.train_dataset["input_ids"][:]} == {24}
    joined = [token for ids in task.train_dataset["input_ids"][:] for token in ids]
    assert VOCABULARY["[CLS]"] in joined and VOCABULARY["[SEP]"] in joined
    task.load_model(str(place / "masked-lm"))


def test_mistakes_with_masks(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"a llama model has no head for MaskedLM; choose another model or task\.$"):
        made(place, "masked-lm").load_model(str(place / "causal-lm"))
    with pytest.raises(CompressionError, match=r"of the weights BertForMaskedLM needs are not in the checkpoint"):
        made(place, "masked-lm").load_model(str(place / "text-classification"))
    tiny_checkpoint(tmp_path / "bare", "bert", "masked-lm")
    settings = tmp_path / "bare" / "tokenizer_config.json"
    settings.write_text(
        json.dumps({key: value for key, value in json.loads(settings.read_text()).items() if key != "mask_token"})
    )
    with pytest.raises(CompressionError) as caught:
        made(place, "masked-lm").open(str(tmp_path / "bare"))
    assert str(caught.value) == (
        f"model '{tmp_path}/bare': its tokenizer has no mask token, so nothing can be masked; choose a checkpoint"
        " trained for MaskedLM, or the task causal-lm."
    )
    (tmp_path / "short.txt").write_text("cat\n\ndog")
    with pytest.raises(CompressionError, match=r"none of the few tokens to score on was masked; raise mlm_probability"):
        MaskedLM(dataset=str(tmp_path / "short.txt"), mlm_probability=0.01).open(str(place / "masked-lm"))
    with pytest.raises(ValidationError):
        MaskedLM(dataset="x", mlm_probability=1.5)


# ---------------------------------------------------------------- token classification


def test_the_first_token_of_a_word_counts(place: Path) -> None:
    task = made(place, "token-classification")
    model = task.load_model(str(place / "token-classification"))
    assert task.labels == ("B-ANY", "B-PET", "O") and model.config.id2label[1] == "B-PET"
    for rows in (task.train_dataset, task.eval_dataset):
        for labels in rows["labels"][:]:  # [CLS] the cat - dog of WORD [SEP]
            assert labels[:6] == [-100, 2, 1, -100, -100, 2] and labels[6] in (0, 2) and labels[7] == -100
    batch = next(task.batches(model, 4))
    assert batch["labels"].shape == batch["input_ids"].shape


def test_tagged_scores_equal_those_of_a_plain_loop(place: Path) -> None:
    task = made(place, "token-classification", eval_batch_size=3)
    model = task.load_model(str(place / "token-classification"))
    hits = []
    for row in task.eval_dataset:
        guesses = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        hits += [guess == label for guess, label in zip(guesses, row["labels"], strict=True) if label != -100]
    assert task.score(model)["accuracy"] == sum(hits) / len(hits)
    assert len(hits) == 4 * len(task.eval_dataset)


def test_tags_follow_the_head_s_order(place: Path, tmp_path: Path) -> None:
    path = headed(tmp_path / "other", "bert", "token-classification", "O", "b-any", "B-PET")
    task = made(place, "token-classification").open(str(path))
    assert task.labels == ("O", "b-any", "B-PET") and task.train_dataset[0]["labels"][:3] == [-100, 0, 2]
    task.load_model(str(path))
    wrong = headed(tmp_path / "wrong", "bert", "token-classification", "x", "y", "z")
    with pytest.raises(CompressionError, match=r"labels x, y, z, .*B-ANY, B-PET, O; choose data with these"):
        made(place, "token-classification").open(str(wrong))
    with pytest.raises(CompressionError, match="are in another order"):
        task.load_model(str(headed(tmp_path / "turned", "bert", "token-classification", "B-PET", "O", "b-any")))


def test_tags_of_other_kinds(place: Path, tmp_path: Path) -> None:
    numbers = write_json(tmp_path / "numbers.jsonl", words=[["cat", "dog"]] * 2, tags=[[0, 1], [1, -100]])
    task = TokenClassification(str(numbers), deduplicate=False).open(str(place / "token-classification"))
    assert task.labels == ("LABEL_0", "LABEL_1")
    seen = sorted(task.train_dataset["labels"][:] + task.eval_dataset["labels"][:])
    assert seen == [[-100, 0, 1, -100], [-100, 1, -100, -100]], "-100 is no label"
    signs = write_json(tmp_path / "signs.jsonl", words=[["cat", "dog"]] * 2, tags=[[-1, 1], [1, -1]])
    task = TokenClassification(str(signs), deduplicate=False).open(str(place / "token-classification"))
    assert task.labels == ("-1", "1") and task.train_dataset[0]["labels"][1:3] in ([0, 1], [1, 0]), "-1 beside 1 is a label"
    parted = Dataset.from_dict({"text": ["the cat", "a dog"], "labels": ["O B", "O B"]})
    parted.to_csv(str(tmp_path / "parted.csv"))
    task = TokenClassification(str(tmp_path / "parted.csv")).open(str(place / "token-classification"))
    assert task.labels == ("B", "O") and task.train_dataset[0]["labels"] == [-100, 1, 0, -100]
    kinds = Features(tokens=datasets.List(Value("string")), ner_tags=datasets.List(ClassLabel(names=["O", "X", "B"])))
    Dataset.from_dict({"tokens": SENTENCES[:4], "ner_tags": [[0, 2, 0, 0]] * 4}, features=kinds).to_parquet(
        str(tmp_path / "named.parquet")
    )
    task = TokenClassification(str(tmp_path / "named.parquet")).open(str(place / "token-classification"))
    assert task.labels == ("O", "X", "B"), "a ClassLabel's names stay, also those that don't occur"


def test_byte_level_tokenizers_see_whole_words(tmp_path: Path) -> None:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *symbols, "Ġc"])}
    inner = Tokenizer(BPE(vocab, [("Ġ", "c")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tiny_model("roberta", vocab_size=300, pad_token_id=0).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", model_max_length=64).save_pretrained(
        tmp_path
    )
    tokenizer = TokenClassification("x").load_processor(str(tmp_path))
    assert tokenizer(["c", "c"], is_split_into_words=True)["input_ids"] == [vocab["Ġc"]] * 2


def test_mistakes_with_tags(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, name = str(place / "token-classification"), f"dataset '{tmp_path}/d.jsonl'"

    def opened(**columns: list) -> str:
        with pytest.raises(CompressionError) as caught:
            TokenClassification(str(write_json(tmp_path / "d.jsonl", **columns))).open(path)
        return str(caught.value)

    assert opened(tokens=[["cat"], ["cat", "dog"]], ner_tags=[["O"], ["O"]]) == (
        f"{name}: row 1 has 2 words and 1 labels; mend it, or name the right columns with text_column and label_column."
    )
    assert opened(tokens=[["cat"]], label=[3]) == (
        f"{name}: column 'label' holds one thing a row, not a list with one a word; name the right one with label_column."
    )
    assert opened(tokens=[["cat"]]).endswith("name the right one with label_column.")
    assert opened(sentence_words=[["cat"]], tags=[["O"]]).endswith("name the right one with text_column.")
    assert "labels must be names or whole numbers, not like 0.5" in opened(tokens=[["cat"], ["dog"]], tags=[[0.5]] * 2)
    monkeypatch.setattr("hfcompress.tasks.pretrained.load_tokenizer", lambda path: SimpleNamespace(is_fast=False))
    with pytest.raises(CompressionError, match=r"does not tell which word a token came from; choose a checkpoint with a fast"):
        TokenClassification("x").load_processor("model")


# ---------------------------------------------------------------- sequence to sequence


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_targets_are_scored_under_teacher_forcing(kind: str, place: Path, tmp_path: Path) -> None:
    path = str(place / ("seq2seq-lm" if kind == "t5" else kind))
    task = made(place, "seq2seq-lm", eval_batch_size=3)
    model = task.load_model(path)
    hits, nll = [], []
    for row in task.eval_dataset:
        start = [model.config.decoder_start_token_id, *row["labels"][:-1]]
        told = (
            model(input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=torch.tensor([start])).logits[0].log_softmax(-1)
        )
        hits += [int(told[i].argmax()) == label for i, label in enumerate(row["labels"])]
        nll += [-float(told[i, label]) for i, label in enumerate(row["labels"])]
    scores = task.score(model)
    assert scores["accuracy"] == sum(hits) / len(hits)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    batch = next(task.batches(model, 8))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}
    assert (batch["labels"] == -100).any() and not (batch["labels"] == 0).any(), "pads of labels are not scored"
    alone = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    assert torch.equal(model(**batch).logits, model(**alone).logits), "moved on as the model itself does it"


def test_examples_have_decoder_inputs_of_their_own_length(place: Path) -> None:
    task = made(place, "seq2seq-lm", max_source_length=40, max_target_length=6).open(str(place / "seq2seq-lm"))
    assert {name: tuple(value.shape) for name, value in task.example(2).items()} == {
        "input_ids": (2, 40),
        "attention_mask": (2, 40),
        "decoder_input_ids": (2, 6),
    }
    assert task.example(1, length=4)["decoder_input_ids"].shape == (1, 4)
    assert all(len(ids) <= 6 for ids in task.train_dataset["labels"][:])


def test_the_prefix_and_the_languages(place: Path, tmp_path: Path) -> None:
    task = made(place, "seq2seq-lm", source_prefix="sheep race ").open(str(place / "seq2seq-lm"))
    assert task.train_dataset[0]["input_ids"][1:3] == [VOCABULARY["sheep"], VOCABULARY["race"]]
    file = write_json(tmp_path / "t.jsonl", translation=[{"en": f"cat {word}", "de": f"dog {word}"} for word in WORDS[:4]])
    task = Seq2SeqLM(str(file), source_lang="de", target_lang="en").open(str(place / "seq2seq-lm"))
    assert task.train_dataset[0]["input_ids"][1] == VOCABULARY["dog"]
    assert task.train_dataset[0]["labels"][1] == VOCABULARY["cat"]
    two = write_json(tmp_path / "two.jsonl", body=["cat", "cat", "dog", ""], title=["bank", "tax", "", "goal"])
    task = Seq2SeqLM(str(two), text_column="body", deduplicate=False, eval_samples=1).open(str(place / "seq2seq-lm"))
    assert len(task.train_dataset) + len(task.eval_dataset) == 2, "an empty text makes no pair"


def test_mistakes_with_pairs(place: Path, tmp_path: Path) -> None:
    path = str(place / "seq2seq-lm")
    file = write_json(tmp_path / "t.jsonl", translation=[{"en": "cat", "de": "dog"}] * 2)
    name = f"dataset '{file}'"
    with pytest.raises(CompressionError) as caught:
        Seq2SeqLM(str(file), source_lang="en").open(path)
    assert str(caught.value) == f"{name}: its texts are in en and de; name both source_lang and target_lang."
    with pytest.raises(CompressionError) as caught:
        Seq2SeqLM(str(file), source_lang="en", target_lang="fr").open(path)
    assert str(caught.value) == f"target_lang: {name} has no 'fr'. Possible: de, en."
    with pytest.raises(CompressionError) as caught:
        made(place, "seq2seq-lm", source_lang="en").open(path)
    assert str(caught.value) == (
        f"source_lang: dataset '{place}/pairs.jsonl' has no column 'translation' with languages in it; name its columns with"
        " text_column and target_column instead."
    )
    with pytest.raises(CompressionError, match=r"none of its columns \(summary\) .*name the right one with text_column\.$"):
        Seq2SeqLM(str(write_json(tmp_path / "s.jsonl", summary=["cat"])), target_column="summary").open(path)
    with pytest.raises(CompressionError, match=r"target_column: dataset .* has no column 'summry'. Did you mean 'summary'\?"):
        made(place, "seq2seq-lm", target_column="summry").open(path)
    with pytest.raises(CompressionError, match=r"a bert model has no head for Seq2SeqLM; choose another model or task\.$"):
        made(place, "seq2seq-lm").open(str(place / "masked-lm"))


# ---------------------------------------------------------------- image classification


def test_images_are_opened_when_they_are_asked_for(place: Path, tmp_path: Path) -> None:
    tiny_images(tmp_path / "some", each=4)
    task = ImageClassification(str(tmp_path / "some"), eval_samples=3, deduplicate=False).open(
        str(place / "image-classification")
    )
    for file in (tmp_path / "some").rglob("*.png"):
        file.write_bytes(b"no image")
    assert len(task.train_dataset) == 9 and task.labels == ("blue", "green", "red")
    with pytest.raises(
        CompressionError, match=r"an image can't be read \(cannot identify image file .*\); mend it, or take it out"
    ):
        task.train_dataset[0]


def test_pixels_are_those_of_the_checkpoint_s_processor(place: Path) -> None:
    task = made(place, "image-classification")
    model = task.load_model(str(place / "image-classification"))
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    processor = AutoImageProcessor.from_pretrained(place / "image-classification")
    files = {name: sorted((place / "images" / name).glob("*.png")) for name in task.labels}
    row = task.train_dataset[0]
    known = [processor(Image.open(file), return_tensors="pt")["pixel_values"][0] for file in files[task.labels[row["labels"]]]]
    assert any(torch.equal(row["pixel_values"], one) for one in known)
    hits = [int(model(pixel_values=one["pixel_values"][None]).logits.argmax()) == one["labels"] for one in task.eval_dataset]
    assert task.score(model)["accuracy"] == sum(hits) / len(hits)


def test_image_folders(place: Path, tmp_path: Path) -> None:
    path = str(place / "image-classification")
    tiny_images(tmp_path / "split" / "train", each=4)
    tiny_images(tmp_path / "split" / "validation", each=2, colours=["red"], seed=9)
    (tmp_path / "split" / "train" / "red" / "notes.txt").write_text("not an image")
    Image.new("L", (20, 20)).save(tmp_path / "split" / "train" / "red" / "grey.JPG")
    task = ImageClassification(str(tmp_path / "split")).open(path)
    assert len(task.train_dataset) == 13 and [row["labels"] for row in task.eval_dataset] == [2, 2]
    assert all(row["pixel_values"].shape == (3, 16, 16) for row in task.train_dataset), "grey ones too"
    twice = tiny_images(tmp_path / "twice", each=3)
    for file in list(twice.rglob("*.png")):
        (file.parent / f"copy-{file.name}").write_bytes(file.read_bytes())
    task = ImageClassification(str(twice)).open(path)
    assert len(task.train_dataset) + len(task.eval_dataset) == 9, "a copy would leak"


def test_image_files_in_tables(place: Path, tmp_path: Path) -> None:
    path = str(place / "image-classification")
    files = [str(file) for file in sorted((place / "images").rglob("*.png"))]
    rows = {"photo": files, "class": [Path(file).parent.name for file in files]}
    Dataset.from_dict(rows).to_csv(str(tmp_path / "paths.csv"))
    inside = Dataset.from_dict({"image": files, "label": [0] * 18 + [1] * 18}).cast_column("image", datasets.Image())
    inside.to_parquet(str(tmp_path / "inside.parquet"))
    task = ImageClassification(str(tmp_path / "paths.csv")).open(path)
    assert task.labels == ("blue", "green", "red") and task.train_dataset[0]["pixel_values"].shape == (3, 16, 16)
    task = ImageClassification(str(tmp_path / "inside.parquet")).open(path)
    assert task.labels == ("LABEL_0", "LABEL_1") and len(task.train_dataset) + len(task.eval_dataset) == 36
    assert task.train_dataset[0]["pixel_values"].shape == (3, 16, 16)


def test_mistakes_with_images(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(place / "image-classification")
    with pytest.raises(CompressionError, match="neither class folders with image files nor files of a known kind"):
        made(place, "image-classification", dataset="texts").open(path)
    with pytest.raises(CompressionError, match=r"its image processor can't be loaded"):
        made(place, "image-classification").open(str(place / "text-classification"))
    with pytest.raises(CompressionError) as caught:
        file = write_json(tmp_path / "d.jsonl", image=[3, 4], label=[0, 1])
        ImageClassification(str(file)).open(path)
    assert str(caught.value) == (
        f"dataset '{file}': column 'image' holds neither images nor paths of images; name the right one with image_column."
    )
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "1.png")
    with pytest.raises(
        CompressionError, match=r"none of its columns \(image\) is called label.*name the right one with label_column"
    ):
        ImageClassification(str(flat)).open(path)
    monkeypatch.setattr(hfcompress.tasks.pretrained, "find_spec", lambda name: None)
    with pytest.raises(CompressionError) as caught:
        made(place, "image-classification").open(path)
    assert str(caught.value) == "task: images can't be read for want of Pillow; get it with: pip install pillow"


# ---------------------------------------------------------------- data without labels


@pytest.fixture(scope="module")
def unlabelled(place: Path, tmp_path_factory: Any) -> Path:
    """Data without labels, and models with heads."""
    folder = tmp_path_factory.mktemp("unlabelled")
    write_json(folder / "text.jsonl", text=[f"the {word} of the dog" for word in WORDS])
    write_json(folder / "token.jsonl", tokens=SENTENCES)
    (folder / "images").mkdir()
    for number, file in enumerate(sorted((place / "images").rglob("*.png"))):
        (folder / "images" / f"{number}.png").write_bytes(file.read_bytes())
    for kind, task in (("bert", "text-classification"), ("bert", "token-classification"), ("vit", "image-classification")):
        headed(folder / task, kind, task, "x", "y", "z")
    return folder


SILENT = {
    "text-classification": "text.jsonl",
    "token-classification": "token.jsonl",
    "image-classification": "images",
}


@pytest.mark.parametrize("name", SILENT)
def test_without_labels_agreement_is_scored(name: str, unlabelled: Path) -> None:
    task = TASKS[name](dataset=str(unlabelled / SILENT[name]), labelled=False)
    assert task.metrics == ["agreement"] and task.higher_is_better
    model = task.load_model(str(unlabelled / name))
    assert task.labels == ("x", "y", "z")
    assert "labels" not in task.train_dataset[0] and "labels" not in next(task.batches(model, 4))
    with pytest.raises(CompressionError, match=r"metrics: agreement is with an original, and none was remembered"):
        task.score(model)
    assert task.remember(model) == {"agreement": 1.0}
    with torch.no_grad():  # the order of the logits turns, so that another one is the largest
        for parameter in model.classifier.parameters():
            parameter.neg_()
    assert task.score(model)["agreement"] == 0.0
    report = compare(model, task.load_model(str(unlabelled / name)), task, batch_sizes=(1,), pairs=1)
    assert report.score == ({"agreement": 1.0}, {"agreement": 0.0})


@pytest.mark.parametrize("name", SILENT)
def test_mistakes_without_labels(name: str, place: Path, unlabelled: Path) -> None:
    data = str(unlabelled / SILENT[name])
    with pytest.raises(ValidationError) as caught:
        TASKS[name](dataset=data, labelled=False, metrics=["agreement", "accuracy"])
    assert said(caught).endswith("accuracy needs labels, and labelled is false; leave metrics out, or give labelled data")
    with pytest.raises(ValidationError) as caught:
        TASKS[name](dataset=data, labelled=False, label_column="label")
    assert said(caught).endswith("label_column names labels, and labelled is false; leave one of the two out")
    kind = {"text-classification": "Sequence", "token-classification": "Token", "image-classification": "Image"}[name]
    with pytest.raises(CompressionError) as one:
        TASKS[name](dataset=data, labelled=False).open(str(place / name))
    assert str(one.value) == (
        f"model '{place / name}': it has no head for {kind}Classification, and labelled: false gives none to learn; choose a"
        " checkpoint that was trained for this task, or give labelled data."
    )


def test_a_recipe_without_labels_is_checked_whole(unlabelled: Path) -> None:
    task = {"name": "text-classification", "dataset": "x", "labelled": False}
    with pytest.raises(CompressionError) as caught:
        Recipe.from_dict(
            {
                "model": "m",
                "task": task,
                "steps": [
                    {"train": {"epochs": 1}},
                    {"prune_heads": {"ratio": 0.5, "scores": "gradient"}},
                    {"train": {"with": ["distill"]}},
                    {"train": {"with": [{"distill": {"terms": ["kl"]}}]}},
                ],
            }
        )
    assert str(caught.value).splitlines() == [
        "recipe: steps.0: train has no labels to learn from, as task.labelled is false; learn from a teacher: with: [{distill:"
        " {alpha: 1}}].",
        "recipe: steps.1: scores: gradient of prune_heads needs labels, and task.labelled is false; choose scores: "
        "activation or magnitude.",
        "recipe: steps.2: distill also learns from labels, and task.labelled is false; set alpha: 1, or leave the term task out.",
    ]
    with pytest.raises(CompressionError) as caught:
        Recipe.from_dict({"model": "m", "task": {**task, "metrics": ["f1"]}, "steps": ["cast"]})
    assert str(caught.value) == (
        "recipe: task: f1 needs labels, and labelled is false; leave metrics out, or give labelled data."
    )
    recipe = Recipe.from_dict({"model": "m", "task": task, "steps": ["cast"]})
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.task.metrics == ["agreement"]


# ---------------------------------------------------------------- whole runs

TRAIN = {"max_steps": 4, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "bf16": False}
LOW_RANK = {"low_rank": {"ratio": 0.5}}
RUNS = {
    # batches of like lengths need input_ids alone: the Trainer takes a column of lengths away before it looks for one
    "masked-lm": [{"train": {**TRAIN, "train_sampling_strategy": "group_by_length"}}, LOW_RANK],
    "token-classification": [{"train": TRAIN}, LOW_RANK],
    "seq2seq-lm": [{"train": {**TRAIN, "label_smoothing_factor": 0.1}}, LOW_RANK],
    "image-classification": [{"train": TRAIN}, LOW_RANK],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_and_its_artifact(name: str, place: Path, tmp_path: Path) -> None:
    task = {**made(place, name).model_dump(exclude_defaults=True), "name": name}
    recipe = Recipe.from_dict({"model": str(place / name), "task": task, "steps": RUNS[name]})
    report = compress(recipe, tmp_path / "out", tell=lambda line: None)
    before, trained, after = (row.score for row in report.rows)
    assert trained != before and trained["agreement"] == 1.0 and report.rows[2].megabytes < report.rows[1].megabytes
    again = Recipe.load(str(tmp_path / "out" / "recipe.yaml")).task
    model = load(again.open(str(tmp_path / "out")), tmp_path / "out")
    scores = again.score(model)
    assert {key: pytest.approx(value, rel=1e-5) for key, value in scores.items()} == {
        key: value for key, value in after.items() if key != "agreement"
    }
    card = (tmp_path / "out" / "README.md").read_text()
    auto = TASKS[name].auto_class.__name__
    assert f"model = {auto}.from_pretrained(" in card
    assert ("processor = AutoImageProcessor" if name == "image-classification" else "tokenizer = AutoTokenizer") in card


def test_a_whole_run_without_labels(unlabelled: Path, tmp_path: Path) -> None:
    task = {"name": "text-classification", "dataset": str(unlabelled / "text.jsonl"), "labelled": False, "max_length": 32}
    steps = [LOW_RANK, {"train": {**TRAIN, "with": [{"distill": {"alpha": 1}}]}}]
    recipe = Recipe.from_dict({"model": str(unlabelled / "text-classification"), "task": task, "steps": steps})
    report = compress(recipe, tmp_path / "out", tell=lambda line: None)
    assert [set(row.score) for row in report.rows] == [{"agreement"}] * 3
    assert report.rows[0].score["agreement"] == 1.0 and report.rows[0].headline == "agreement"
    assert "agreement" in (tmp_path / "out" / "README.md").read_text()
