"""Sentence embeddings: the numbers of sentence-transformers, its folders in and out, distilled on texts alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import AutoModel

from hfcompress import CompressionError, Distill, PruneHeads, PruneNeurons, Quantize, Student, compress, export_model, riding
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.checksums import check_checksums
from hfcompress.checkpoint.proof import prove
from hfcompress.results.load_snippet import load_code
from hfcompress.run.recipe import Recipe
from hfcompress.tasks import read_task
from hfcompress.tasks.sentence_embeddings import nearest
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_texts, tiny_tokenizer

TEXTS = ["the goal of the match", "a bank and its market", "the striker", "shares fell and fell and fell again"]


def encoder(folder: Path, kind: str = "bert", **config: Any) -> Path:
    """A plain encoder and its tokenizer."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config(kind, initializer_range=0.2, **config)).save_pretrained(folder)  # layers that matter
    tokenizer = tiny_tokenizer()
    if kind == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    tokenizer.save_pretrained(folder)
    return folder


def embedder(folder: Path, *after: Any, kind: str = "bert", **saved: Any) -> Path:
    """A folder of sentence-transformers, with these modules after the encoder."""
    plain = encoder(folder.with_name(f"{folder.name}-plain"), kind)
    transformer = Transformer(str(plain), max_seq_length=24)
    model = SentenceTransformer(modules=[transformer, *(after or [Pooling(64, "mean"), Normalize()])], device="cpu", **saved)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, pairs with and without scores, and an embedder."""
    folder = tmp_path_factory.mktemp("embeddings")
    tiny_texts(folder / "texts")
    lines = [path.read_text() for path in sorted((folder / "texts").glob("*/*.txt"))][:60]
    pairs = [{"anchor": line, "positive": " ".join(line.split()[1:])} for line in lines]
    scored = [{**pair, "score": (number % 5) / 4} for number, pair in enumerate(pairs)]
    for name, rows in (("pairs", pairs), ("scored", scored)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    embedder(folder / "model")
    return folder


def task_on(place: Path, name: str = "texts", **fields: Any) -> Any:
    return read_task({"name": "sentence-embeddings", "dataset": str(place / name), **fields})


def told(model: Any, task: Any, texts: list[str] = TEXTS) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(
            model(**task.processor(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")).logits
        )


@pytest.mark.parametrize(
    "after",
    [
        pytest.param([Pooling(64, "mean"), Normalize()], id="mean, normalised"),
        pytest.param([Pooling(64, "cls")], id="cls"),
        pytest.param([Pooling(64, "max"), Dense(64, 16)], id="max, dense"),
        pytest.param([Pooling(64, ("mean", "cls"))], id="mean and cls"),
    ],
)
def test_embeddings_are_those_of_sentence_transformers(tmp_path: Path, place: Path, after: list[Any]) -> None:
    path = embedder(tmp_path / "model", *after)
    expected = SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    task = task_on(place)
    model = task.load_model(str(path))
    np.testing.assert_allclose(told(model, task), expected, atol=1e-6)
    for text, row in zip(TEXTS, expected, strict=True):  # padding changes nothing
        np.testing.assert_allclose(told(model, task, [text])[0], row, atol=1e-6)
    save(model, task.processor, tmp_path / "saved")
    np.testing.assert_array_equal(SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), expected)
    again = task_on(place).load_model(str(tmp_path / "saved"))
    save(again, task.processor, tmp_path / "twice")
    np.testing.assert_array_equal(SentenceTransformer(str(tmp_path / "twice"), device="cpu").encode(TEXTS), expected)


def test_a_plain_encoder_gets_what_sentence_transformers_gives_it(tmp_path: Path, place: Path) -> None:
    path = encoder(tmp_path / "plain")
    expected = SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    task = task_on(place)
    model = task.load_model(str(path))
    np.testing.assert_allclose(told(model, task), expected, atol=1e-6)
    save(model, task.processor, tmp_path / "saved")
    np.testing.assert_array_equal(SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), expected)


def test_prompts_and_lower_case_are_heeded(tmp_path: Path, place: Path) -> None:
    path = embedder(tmp_path / "model", prompts={"topic": "the goal: "}, default_prompt_name="topic")
    task = task_on(place).open(str(path))
    first = task.processor.decode(task.eval_dataset[0]["input_ids"])
    assert "the goal" in first
    settings = json.loads((path / "sentence_bert_config.json").read_text())
    (path / "sentence_bert_config.json").write_text(json.dumps({**settings, "do_lower_case": True, "max_seq_length": 7}))
    other = task_on(place).open(str(path))
    assert other._sentence_head.written("ABC") == "the goal: abc"
    assert other.example_length == 7 and max(map(len, other.train_dataset["input_ids"][:])) <= 7


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_other_encoders_too(tmp_path: Path, place: Path, kind: str) -> None:
    path = embedder(tmp_path / "model", kind=kind)
    task = task_on(place)
    model = task.load_model(str(path))
    expected = SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(told(model, task), expected, atol=1e-6)


def test_a_pooler_that_is_not_there_is_no_loss(tmp_path: Path, place: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = embedder(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    kept = {name: one for name, one in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    assert task_on(place).load_model(str(path)).config.model_type == "bert"


# ---------------------------------------------------------------- scores


def test_the_nearest_is_found_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.Generator().manual_seed(0)
    one, other = torch.randn(50, 8, generator=source), torch.randn(70, 8, generator=source)
    expected = (one @ other.T).argmax(-1).numpy()
    alone = (one @ one.T).fill_diagonal_(-torch.inf).argmax(-1).numpy()
    monkeypatch.setattr("hfcompress.tasks.sentence_embeddings.ROWS", 16)
    np.testing.assert_array_equal(nearest(one, other), expected)
    np.testing.assert_array_equal(nearest(one, one, but_itself=True), alone)
    one[3] = torch.nan
    assert 3 not in nearest(one, one, but_itself=True)[[0, 1, 2]]


def test_texts_alone_are_scored_by_the_neighbours_of_the_original(place: Path) -> None:
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    with pytest.raises(CompressionError, match="agreement is with an original, and none was remembered"):
        task.score(model)
    assert task.remember(model) == {} or task.remember(model)["agreement"] == 1.0
    texts = [path.read_text() for path in sorted((place / "texts").glob("*/*.txt"))]
    assert len(task.eval_dataset) < len(texts)
    assert task.score(model)["agreement"] == 1.0
    other = task_on(place).load_model(str(place / "model"))
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = task.score(other)["agreement"]
    mine, theirs = task.predict(other), task.reference_columns
    assert found == np.mean(mine["predictions"] == theirs["predictions"]) < 1.0


def test_pairs_are_scored_by_finding_the_partner(place: Path) -> None:
    task = task_on(place, "pairs.jsonl", eval_samples=20)
    model = task.load_model(str(place / "model"))
    st = SentenceTransformer(str(place / "model"), device="cpu")
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    decoded = [task.processor.decode(ids, skip_special_tokens=True) for ids in task.eval_dataset["input_ids"][:]]
    assert len(decoded) == 40 and len(task.train_dataset) == 2 * (len(rows) - 20)
    alike = st.similarity(st.encode(decoded[:20]), st.encode(decoded[20:]))
    expected = float((alike.argmax(-1) == torch.arange(20)).float().mean())
    assert task.score(model) == {"recall_at_1": pytest.approx(expected)}
    small = task_on(place, "pairs.jsonl", eval_samples=20, eval_batch_size=3)
    assert small.score(small.load_model(str(place / "model"))) == task.score(model)


def test_scored_pairs_are_scored_by_correlation(place: Path) -> None:
    task = task_on(place, "scored.jsonl", eval_samples=20)
    model = task.load_model(str(place / "model"))
    columns = task.predict(model)
    assert set(task.score(model)) == {"spearman", "pearson"} and columns["predictions"].dtype.kind == "f"
    assert task.score(model)["pearson"] == pytest.approx(np.corrcoef(columns["predictions"], columns["references"])[0, 1])
    st = SentenceTransformer(str(place / "model"), device="cpu")
    decoded = [task.processor.decode(ids, skip_special_tokens=True) for ids in task.eval_dataset["input_ids"][:]]
    cosine = st.similarity_pairwise(st.encode(decoded[:20]), st.encode(decoded[20:]))
    np.testing.assert_allclose(columns["predictions"], cosine, atol=1e-5)


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize(
    "methods",
    [
        [PruneHeads(0.5, scores="magnitude"), PruneNeurons(0.5, scores="activation", repair=True, samples=16)],
        [Quantize(8, engine="hfcompress", embeddings=8)],
        [Quantize(4)],
    ],
    ids=["cut", "8 bits", "NF4"],
)
def test_what_was_compressed_opens_in_sentence_transformers(tmp_path: Path, place: Path, methods: list[Any]) -> None:
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    for method in methods:
        method.run(model, task)
    save(model, task.processor, tmp_path / "saved")
    assert prove(model, task.example(4), tmp_path / "saved") < 1e-4
    expected, loaded = told(model.eval(), task), SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for module in loaded.modules():  # else bitsandbytes multiplies in bfloat16, where the processor has it
        module.support_avx512bf16_for_cpu = False
    np.testing.assert_allclose(loaded.encode(TEXTS), expected, atol=2e-6)
    assert not np.allclose(expected, told(task.load_model(str(place / "model")), task), atol=1e-4)


def steps(place: Path, **distill: Any) -> dict[str, Any]:
    return {
        "model": str(place / "model"),
        "task": {"name": "sentence-embeddings", "dataset": str(place / "texts")},
        "steps": [
            {"student": {"number": 1}},
            {
                "train": {
                    "epochs": 12,
                    "learning_rate": 1e-2,
                    "per_device_train_batch_size": 16,
                    "with": [{"distill": {"terms": ["embedding"], **distill}}],
                }
            },
        ],
    }


@pytest.mark.parametrize("cached", [False, True])
def test_half_of_the_layers_learn_on_texts_alone(tmp_path: Path, place: Path, cached: bool) -> None:
    more = {"cache": str(tmp_path / "cache")} if cached else {}
    compress(Recipe.from_dict(steps(place, **more)), tmp_path / "out")
    task = task_on(place)
    original, learnt = (task.load_model(str(path)) for path in (place / "model", tmp_path / "out"))
    cut = task.load_model(str(place / "model"))
    Student(number=1).run(cut, task)
    before, after = ((told(original, task) * told(one.eval(), task)).sum(-1) for one in (cut, learnt))
    assert after.min() > 0.8 and after.mean() > before.mean() + 0.1
    snippet = (tmp_path / "out" / "README.md").read_text()
    assert "from sentence_transformers import SentenceTransformer" in snippet and "AutoTokenizer" not in snippet


def test_the_term_is_one_minus_the_cosine_whatever_the_padding(place: Path) -> None:
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    task.keep_original(model)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval()
    batch = task.processor(TEXTS, padding=True, return_tensors="pt")
    expected = 1 - torch.nn.functional.cosine_similarity(
        torch.tensor(told(model, task)), torch.tensor(told(task.original, task))
    )
    for module in model.modules():
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    model.train()
    with riding(model, [Distill(terms=["embedding"])], task) as tick:
        loss = model(**batch)["loss"]
        loss.backward()
        tick(1.0)
    assert float(loss) == pytest.approx(float(expected.mean()), abs=1e-5)
    assert all(one.grad is not None for name, one in model.named_parameters() if "encoder" in name)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (["kl"], r"distill: kl is of classes or labels, and this BertModel tells embeddings; use terms: \[embedding\]."),
        (["task"], r"distill: task is of classes or labels, and this BertModel tells embeddings; use terms: \[embedding\]."),
    ],
)
def test_terms_of_classes_are_refused(place: Path, terms: list[str], said: str) -> None:
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    task.keep_original(model)
    with pytest.raises(CompressionError, match=said), riding(model, [Distill(terms=terms)], task):
        pass


def test_the_term_is_refused_where_there_are_no_embeddings() -> None:
    model = tiny_model("bert")
    with (
        pytest.raises(CompressionError, match="embedding compares embeddings of texts, and this BertForSequenceClassification"),
        riding(model, [Distill(teacher=tiny_model("bert"), terms=["embedding"])], []),
    ):
        pass


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompressionError, match="a t5 is an encoder-decoder, and sentence-embeddings are made by an encoder"):
        task_on(place).open(str(tiny_checkpoint(tmp_path / "t5", "t5")))
    path = embedder(tmp_path / "model")
    listed = json.loads((path / "modules.json").read_text())
    listed[1]["type"] = "evil.Module"
    (path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(
        CompressionError, match=r"its module '1_Pooling' is a 'evil\.Module', code that comes with the checkpoint"
    ):
        task_on(place).open(str(path))
    (path / "modules.json").write_text("[]")
    with pytest.raises(CompressionError, match=r"its modules\.json names no module after an encoder at the top of the folder"):
        task_on(place).open(str(path))
    (path / "modules.json").write_text("{")
    with pytest.raises(CompressionError, match=r"its modules\.json is no JSON"):
        task_on(place).open(str(path))
    with pytest.raises(
        CompressionError, match="control: without its teacher a model has no labels to learn from, as sentence-emb"
    ):
        Recipe.from_dict({**steps(place), "control": True})
    with pytest.raises(
        CompressionError, match="train has no labels to learn from, as sentence-embeddings has none; learn from a"
    ):
        Recipe.from_dict({**steps(place), "steps": [{"train": {"epochs": 1}}]})
    with pytest.raises(CompressionError, match=r"also learns from labels, .* has none; give it terms: \[embedding\]"):
        Recipe.from_dict({**steps(place), "steps": [{"train": {"epochs": 1, "with": ["distill"]}}]})
    with pytest.raises(CompressionError, match="only 'text' was found; name the second one with text_pair_column"):
        (tmp_path / "one.jsonl").write_text("\n".join(json.dumps({"text": f"goal {n}", "score": n}) for n in range(9)))
        task_on(tmp_path, "one.jsonl", score_column="score").open(str(place / "model"))
    with pytest.raises(CompressionError, match="a score to judge by is infinite"):
        rows = [{"text1": f"goal {number}", "text2": "match", "score": float("inf")} for number in range(9)]
        (tmp_path / "inf.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task_on(tmp_path, "inf.jsonl").open(str(place / "model"))
    with pytest.raises(CompressionError, match="2 texts to score on leave no choice of a nearest one; give more"):
        task_on(place, eval_samples=2).open(str(place / "model"))
    with pytest.raises(CompressionError, match="a score is a number, not 'high'; name the right column with score_column"):
        rows = [{"text1": f"goal {number}", "text2": "match", "score": "high"} for number in range(9)]
        (tmp_path / "high.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task_on(tmp_path, "high.jsonl").open(str(place / "model"))
    with pytest.raises(CompressionError, match="metrics: spearman does not fit what this model tells"):
        task_on(place, metrics=["spearman"]).open(str(place / "model"))
    monkeypatch.setattr("hfcompress.checkpoint.sentence_head.find_spec", lambda name: None)
    with pytest.raises(
        CompressionError, match=r"needs sentence-transformers; get it with: pip install 'hfcompress\[sentences\]'"
    ):
        task_on(place).open(str(place / "model"))


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_an_export_tells_embeddings(tmp_path: Path, place: Path, to: str) -> None:
    """Also where a tokenizer's segments are left out, as timing does."""
    folder = tmp_path / "saved"
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    save(model, task.processor, folder)
    out = export_model(folder, to, output=tmp_path / to, task=task)
    served = task_on(place).load_model(str(out))
    inputs = task.processor(TEXTS, padding=True, return_tensors="pt")
    expected = told(model, task)
    assert ((served(**inputs).logits.numpy() * expected).sum(-1) > 0.999).all(), "in bfloat16, where the processor has it"
    del inputs["token_type_ids"]
    assert ((served(**inputs).logits.numpy() * expected).sum(-1) > 0.999).all()
    other = task_on(place).open(str(out))
    assert other.example_length == 24, "what it cuts texts to is kept"
    task.remember(model)
    assert task.score(served)["agreement"] > 0.9


# ---------------------------------------------------------------- what a user of it met


def test_coded_embeddings_are_saved_again_and_counted_alike(tmp_path: Path, place: Path) -> None:
    """sentence-transformers sees them as a buffer; whoever opens them here sees parameters, and compresses further."""
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    Quantize(8, engine="hfcompress", embeddings=8).run(model, task)
    count = sum(one.numel() for one in model.parameters())
    save(model, task.processor, tmp_path / "once")
    again = task.load_model(str(tmp_path / "once"))
    assert sum(one.numel() for one in again.parameters()) == count
    save(again, task.processor, tmp_path / "twice")
    opened = SentenceTransformer(str(tmp_path / "twice"), device="cpu")
    np.testing.assert_allclose(opened.encode(TEXTS), told(again, task), atol=2e-6)
    opened.save_pretrained(str(tmp_path / "thrice"))
    np.testing.assert_array_equal(
        SentenceTransformer(str(tmp_path / "thrice"), device="cpu").encode(TEXTS), opened.encode(TEXTS)
    )


def test_an_adapter_that_was_kept_is_put_on_as_the_card_says(tmp_path: Path, place: Path) -> None:
    wanted = steps(place)
    with_ = [{"adapters": {"r": 4, "merge": False}}, {"distill": {"terms": ["embedding"]}}]
    wanted["steps"] = [{"train": {"epochs": 2, "learning_rate": 5e-2, "per_device_train_batch_size": 16, "with": with_}}]
    wanted["steps"].insert(0, {"student": {"number": 1}})
    out = tmp_path / "out"
    compress(Recipe.from_dict(wanted), out)
    task = task_on(place)
    expected = told(task.load_model(str(out)), task)
    code, _ = load_code(out, str(out))
    names: dict[str, Any] = {}
    exec(code, names)
    np.testing.assert_allclose(names["model"].encode(TEXTS), expected, atol=1e-5)
    assert not np.allclose(SentenceTransformer(str(out), device="cpu").encode(TEXTS), expected, atol=1e-3)


def test_weights_of_modules_are_verified(tmp_path: Path, place: Path) -> None:
    path = embedder(tmp_path / "model", Pooling(64, "mean"), Dense(64, 16))
    task = task_on(place)
    save(task.load_model(str(path)), task.processor, tmp_path / "saved")
    file = tmp_path / "saved" / "2_Dense" / "model.safetensors"
    altered = bytearray(file.read_bytes())
    altered[-3] ^= 1
    file.write_bytes(altered)
    with pytest.raises(CompressionError, match=r"2_Dense/model\.safetensors"):
        check_checksums(tmp_path / "saved")


def test_masks_by_position_and_tuples_are_heeded(place: Path) -> None:
    task = task_on(place)
    model = task.load_model(str(place / "model"))
    batch = task.processor(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(batch["input_ids"], batch["attention_mask"], token_type_ids=batch["token_type_ids"]).logits
        np.testing.assert_allclose(found, told(model, task), atol=1e-6)
        assert isinstance(model(**batch, return_dict=False), tuple)


def test_weighted_layers_are_given_all_of_them(tmp_path: Path, place: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling

    path = embedder(tmp_path / "model", WeightedLayerPooling(64, num_hidden_layers=2, layer_start=1), Pooling(64, "mean"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "output_hidden_states": True}))
    task = task_on(place)
    expected = SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(told(task.load_model(str(path)), task), expected, atol=1e-5)


def test_pooling_without_the_prompt_is_refused(tmp_path: Path, place: Path) -> None:
    pooling = Pooling(64, "mean", include_prompt=False)
    path = embedder(tmp_path / "model", pooling, prompts={"topic": "the goal: "}, default_prompt_name="topic")
    with pytest.raises(CompressionError, match="its pooling leaves out the tokens of its default prompt"):
        task_on(place).open(str(path))


def test_equal_second_texts_are_one_and_labels_are_texts_or_scores(tmp_path: Path, place: Path) -> None:
    rows = [{"query": f"goal {number}", "passage": f"the {TEXTS[number % 3]}"} for number in range(12)]
    (tmp_path / "shared.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = task_on(tmp_path, "shared.jsonl", eval_samples=6)
    columns = task.predict(task.load_model(str(place / "model")))
    passages = [task.processor.decode(ids) for ids in task.eval_dataset["input_ids"][6:]]
    for said, right in zip(columns["predictions"], columns["references"], strict=True):
        assert passages.index(passages[said]) == said and passages.index(passages[right]) == right
    rows = [{"sentence1": f"goal {number}", "sentence2": "the match", "label": number / 8} for number in range(12)]
    (tmp_path / "stsb.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert task_on(tmp_path, "stsb.jsonl").open(str(place / "model")).scored_by == ["spearman", "pearson"]
    rows = [{"label": f"goal {number}"} for number in range(40)]
    (tmp_path / "named.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert task_on(tmp_path, "named.jsonl", text_column="label").open(str(place / "model")).scored_by == ["agreement"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_of_another_width_is_refused(tmp_path: Path, place: Path, cached: bool) -> None:
    narrow = embedder(tmp_path / "narrow", Pooling(64, "mean"), Dense(64, 16))
    task = task_on(place)
    more = {"cache": str(tmp_path / "cache")} if cached else {}  # one for both: their encoders are the same, their modules not
    for student, teacher in ((place / "model", narrow), (narrow, place / "model")):
        model = task_on(place).load_model(str(student)).train()
        with (
            pytest.raises(CompressionError, match=r"wide and the student's|was recorded with teachers"),
            riding(model, [Distill(str(teacher), terms=["embedding"], **more)], task.open(str(student))),
        ):
            model(**next(task.batches(model, 8)))
