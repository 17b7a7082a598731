"""What language models are trained on: shares of a mixture, text that the model writes itself, and what is never in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import hfcompress.run.loop as loop
import hfcompress.tasks.own_text as own_text
from hfcompress import CompressionError, Recipe, compress
from hfcompress.run.inputs import local_inputs
from hfcompress.tasks import CausalLM, MaskedLM
from hfcompress.tasks.mixture import shares
from tests.tiny import TOPICS, WORDS, tiny_checkpoint, tiny_model, tiny_texts, tiny_tokenizer

SIZE = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    tiny_texts(folder / "texts", topics=["animals"])
    tiny_texts(folder / "other", topics=["money"], seed=1)
    tiny_texts(folder / "scored", topics=["sport"], each=8, seed=2)
    tiny_checkpoint(folder / "llama", "llama")
    tiny_checkpoint(folder / "gpt2", "gpt2")
    tiny_checkpoint(folder / "bert", "bert", "masked-lm")
    return folder


@pytest.fixture
def writings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences models were asked to write, an entry a time."""
    asked: list[int] = []
    sampled = own_text.sampled

    def counted(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> np.ndarray:
        asked.append(count)
        return sampled(model, tokenizer, count, length, seed)

    monkeypatch.setattr(own_text, "sampled", counted)
    return asked


def task(place: Path, mixture: list[str], kind: str = "llama", **more: Any) -> CausalLM:
    given = {"block_size": SIZE, "max_eval_samples": 4, "also": str(place / "scored"), **more}
    opened = CausalLM(str(place / "texts"), mixture=mixture, **given)
    opened.open(str(place / kind))
    return opened


def sources(opened: Any) -> dict[str, int]:
    """Of how many training blocks the words are those of one topic alone; a random model writes of all."""
    tokenizer = tiny_tokenizer()
    ids = {topic: set(tokenizer.convert_tokens_to_ids(words)) for topic, words in TOPICS.items()}
    found = dict.fromkeys([*TOPICS, "own"], 0)
    for row in opened.train_dataset:
        topics = [topic for topic, tokens in ids.items() if tokens & set(row["input_ids"])]
        found[topics[0] if len(topics) == 1 else "own"] += 1
    return found


# ---------------------------------------------------------------- text of the model's own


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_model_samples_whole_blocks_of_its_own(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    state = torch.get_rng_state()
    ids = own_text.sampled(model, tokenizer, 40, SIZE, seed=0)
    assert torch.equal(torch.get_rng_state(), state), "PyTorch's generator is left as it was"
    assert ids.shape == (40, SIZE) and ids.dtype == np.int64
    assert len(np.unique(ids, axis=0)) == 40
    assert np.array_equal(ids, own_text.sampled(model, tokenizer, 40, SIZE, seed=0))
    assert not np.array_equal(ids, own_text.sampled(model, tokenizer, 40, SIZE, seed=1))
    assert set(ids[:, 0]) <= set(own_text.ordinary_tokens(model, tokenizer))
    assert len(set(ids[:, 0])) > 10, "not all begin alike"
    assert own_text.sampled(model, tokenizer, 3, 1, seed=0).shape == (3, 1)


def test_it_is_sampled_from_the_model_itself_and_does_not_end() -> None:
    """From its own distribution, whatever habits its generation config has; after an end of text it goes on."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    habits = GenerationConfig(do_sample=False, top_k=1, repetition_penalty=3.0, eos_token_id=list(range(128)), max_length=4)
    model.generation_config = habits
    with torch.no_grad():  # nearly every token is the end of a text, and most others the second of three
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[3, 0], model.lm_head.weight[7, 0] = 1.0, 0.9
    ids = own_text.sampled(model, tokenizer, 64, SIZE, seed=0)[:, 1:]
    assert ids.shape == (64, SIZE - 1) and model.generation_config is habits
    probabilities = model(torch.tensor([[5]])).logits.detach()[0, -1].softmax(-1).numpy()
    counts = np.bincount(ids.flatten(), minlength=128) / ids.size
    assert probabilities[3] > probabilities[7] > 0.3
    np.testing.assert_allclose(counts, probabilities, atol=0.05)


def test_special_and_added_tokens_begin_no_text() -> None:
    model, tokenizer = tiny_model("llama", vocab_size=len(WORDS)), tiny_tokenizer()
    tokenizer.add_tokens(["<tool>", "<more>"])
    tokens = own_text.ordinary_tokens(model, tokenizer)
    assert tokens.min() == 5 and tokens.max() == len(WORDS) - 1, "those without a row in the embeddings neither"
    with pytest.raises(CompressionError) as caught:
        own_text.ordinary_tokens(model, tiny_tokenizer([]))
    assert str(caught.value) == (
        "mixture: own needs tokens to begin with, and all of the tokenizer's are special ones; take data or an address."
    )


def test_own_text_is_trained_and_calibrated_on_and_written_once(place: Path, writings: list[int], tmp_path: Path) -> None:
    opened = task(place, ["own"], max_train_samples=8)
    assert writings == [], "it is written when it is asked for"
    rows = opened.train_dataset
    assert len(rows) == 8 and all(len(row["input_ids"]) == SIZE for row in rows)
    assert all(row["labels"] == row["input_ids"] and set(row["attention_mask"]) == {1} for row in rows)
    model = opened.load_model(str(place / "llama"))
    (batch,) = opened.batches(model, 8)
    assert sorted(batch["input_ids"].tolist()) == sorted(row["input_ids"] for row in rows)
    assert writings == [8]
    assert task(place, ["own"], max_train_samples=8).train_dataset[:] == rows[:], "the same model and seed write the same"
    assert task(place, ["own"], max_train_samples=8, seed=1).train_dataset[:] != rows[:]


def test_what_is_kept_is_read_unless_it_is_something_else(place: Path, writings: list[int], tmp_path: Path) -> None:
    opened = task(place, ["own"], max_train_samples=4)
    opened.write_own(tmp_path)
    again = task(place, ["own"], max_train_samples=4)
    again.write_own(tmp_path)
    assert writings == [4] and again.train_dataset[:] == opened.train_dataset[:]
    task(place, ["own"], max_train_samples=5).write_own(tmp_path)
    assert writings == [4, 5]
    opened.write_own(tmp_path / "elsewhere")
    assert own_text.read(tmp_path / "elsewhere", opened._written[0]) is not None, "also what was at hand already"
    (tmp_path / own_text.FILE).write_bytes(b"half of it")
    task(place, ["own"], max_train_samples=5).write_own(tmp_path)
    assert writings == [4, 5, 5] and [path.name for path in tmp_path.glob("*.*")] == [own_text.FILE]


def test_own_text_is_told_in_fewer_tokens_after_prune_vocab(place: Path, writings: list[int]) -> None:
    opened = task(place, ["own"], max_train_samples=8)
    before = len(opened.train_dataset)
    opened.adopt(tiny_tokenizer(WORDS[:20]))
    rows = opened.train_dataset
    assert writings == [8] and 0 < len(rows) <= before
    assert max(token for row in rows for token in row["input_ids"]) < 25


# ---------------------------------------------------------------- mixtures


def test_shares_are_equal_and_count_in_all(place: Path) -> None:
    other = str(place / "other")
    assert sources(task(place, ["data", other], max_train_samples=20)) == {"animals": 10, "money": 10, "sport": 0, "own": 0}
    mixed = sources(task(place, ["data", "own", other], max_train_samples=24))
    assert mixed["animals"] >= 8 and mixed["money"] >= 8 and sum(mixed.values()) == 24 and mixed["own"] > 4
    assert shares(["data", "own", "own", "own"], {"data": 100}, 40) == {"data": 10, "own": 30}
    assert shares(["data", "own"], {"data": 100}, 7) == {"data": 4, "own": 3}, "what is left over goes to the first"
    assert shares(["data", "own"], {"data": 9}, None) == {"data": 9, "own": 9}
    assert shares(["data", "x"], {"data": 9, "x": 4}, 100) == {"data": 4, "x": 4}, "the smallest decides"
    assert shares(["x", "data"], {"data": 100, "x": 3}, 7) == {"x": 3, "data": 3}


def test_a_mixture_changes_nothing_of_what_is_scored(place: Path) -> None:
    plain, mixed = task(place, ["data"]), task(place, ["own", str(place / "other")], max_train_samples=8)
    assert plain.eval_dataset[:] == mixed.eval_dataset[:]
    model = plain.load_model(str(place / "llama"))
    assert plain.score(model) == mixed.score(model)
    assert CausalLM("x").model_dump(exclude_defaults=True) == {"name": "causal-lm", "dataset": "x"}


def test_texts_that_are_scored_are_left_out_of_other_sources(place: Path, tmp_path: Path) -> None:
    texts = [path.read_text() for folder in ("scored", "other") for path in sorted((place / folder).rglob("*.txt"))]
    (tmp_path / "both.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = sources(task(place, [str(tmp_path / "both.jsonl")]))
    assert found["sport"] == 0 and found["money"] > 0
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:8]))
    with pytest.raises(CompressionError) as caught:
        task(place, [str(tmp_path / "same.jsonl")])
    assert str(caught.value) == (
        f"mixture: every text of '{tmp_path / 'same.jsonl'}' is one that is scored, and what was trained on shows nothing; take"
        " it out."
    )


def test_masked_language_models_mix_texts_too(place: Path) -> None:
    mixed = MaskedLM(str(place / "texts"), mixture=["data", str(place / "other")], max_train_samples=10, max_length=32)
    mixed.open(str(place / "bert"))
    assert sources(mixed) == {"animals": 5, "money": 5, "sport": 0, "own": 0}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"mixture": ["data", "their/text/"], "also": "their/text"},
            "mixture: 'their/text/' is also, which is scored, and a text that was trained on shows nothing; take it out of one of"
            " the two",
        ),
        ({"mixture": ["me/text"]}, "mixture: 'me/text' is dataset, a part of which is scored; write data for its train split"),
        ({"mixture": ["own"]}, "mixture: own text has no end; say with max_train_samples how many blocks are wanted"),
    ],
)
def test_a_mistake_in_a_mixture_has_its_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        CausalLM("me/text", **fields)
    assert f"Value error, {sentence} [" in str(caught.value)


def test_mistakes_that_only_the_data_show(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"own is text that a model writes token after token, which models of this task can't;"
    ):
        MaskedLM("me/text", mixture=["own"], max_train_samples=4)
    with pytest.raises(CompressionError) as caught:
        task(place, ["data", str(tmp_path / "absent.txt")])
    assert str(caught.value) == f"dataset '{tmp_path / 'absent.txt'}': there is no such file or folder; check the path."
    (tmp_path / "link").symlink_to(place / "scored")
    with pytest.raises(CompressionError, match=r"link' is also, which is scored, and .* take it out of one of the two$"):
        task(place, [str(tmp_path / "link")])
    with pytest.raises(CompressionError) as caught:
        task(place, ["data", "own"], max_train_samples=1)
    assert str(caught.value) == "mixture: max_train_samples 1 gives not each of data, own an example; raise it to 2 or more."


# ---------------------------------------------------------------- in a run


def test_a_killed_run_finds_its_own_text_again(
    place: Path, writings: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cut and healed on own text with the original's answers alone: the same artifact, and nothing is written twice."""
    about = {"name": "causal-lm", "dataset": str(place / "texts"), "block_size": SIZE, "mixture": ["data", "own"]}
    distil = {"distill": {"teacher": "original", "alpha": 1.0, "temperature": 1.0}}
    raw = {
        "model": str(place / "llama"),
        "task": {**about, "max_train_samples": 16, "max_eval_samples": 4},
        "steps": [
            {"prune_neurons": {"ratio": 0.25, "scores": "obs", "repair": True, "even": True, "samples": 16}},
            {"train": {"epochs": 2, "learning_rate": 1e-3, "bf16": False, "with": [distil]}},
        ],
    }
    compress(Recipe.from_dict(raw), tmp_path / "whole")
    assert writings == [8]
    saved, calls = loop.artifact.save, []

    def dies(*given: Any, **how: Any) -> None:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        saved(*given, **how)

    monkeypatch.setattr(loop.artifact, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(Recipe.from_dict(raw), tmp_path / "killed")
    monkeypatch.setattr(loop.artifact, "save", saved)
    compress(Recipe.from_dict(raw), tmp_path / "killed")
    assert writings == [8, 8], "what the killed run wrote was read"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "killed" / own_text.FILE).exists()


def test_a_run_notes_what_its_mixture_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "own").mkdir(exist_ok=True)
    about = {"name": "causal-lm", "dataset": "texts", "mixture": ["data", "own", "other"], "max_train_samples": 9}
    recipe = Recipe.from_dict({"model": "llama", "task": about, "steps": ["cast"]})
    assert set(local_inputs(recipe)) == {"model", "task.dataset", "task.mixture.2"}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
