"""The one door to models: where and as what they are loaded, what fits into them; and the metrics that a file may name."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import hfcompress.tasks.pretrained as pretrained
from hfcompress import PruneHeads, Quantize
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.run.cli import _quiet_transformers, app
from hfcompress.tasks import CausalLM, MaskedLM, TextClassification
from hfcompress.tasks.pretrained import open_model, positions
from tests.methods.test_laws import FewBatches
from tests.tiny import WORDS, tiny_checkpoint, tiny_model, tiny_texts, tiny_tokenizer

PACKAGE = Path(pretrained.__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("door")
    tiny_texts(folder / "texts", each=8)
    tiny_checkpoint(folder / "bert", "bert")
    return folder


def calls_of_from_pretrained() -> set[tuple[str, str]]:
    """File, and what it is called on, of every call in the package. The proof's child process is a text, no call."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
                found.add((str(path.relative_to(PACKAGE)), ast.unparse(node.func.value)))
    return found


def test_there_is_one_door_for_models() -> None:
    models = {
        (file, owner)
        for file, owner in calls_of_from_pretrained()
        if not re.search(r"(AutoConfig|AutoTokenizer|AutoImageProcessor)$", owner)
    }
    # whether a folder is whole is asked of a plain load, as a stranger makes it; behind the door, an export opens its own
    exports = ("export/served.py", "ExportedModel")
    assert models == {("tasks/pretrained.py", "kind"), ("checkpoint/verify.py", "auto"), exports}


def test_the_checkpoint_s_dtype_stays_or_the_one_asked_for(place: Path, tmp_path: Path) -> None:
    tiny_model("bert").to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert open_model(tmp_path).dtype == torch.bfloat16
    assert open_model(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert open_model(tmp_path, AutoModelForSequenceClassification, dtype="float16").dtype == torch.float16
    model = open_model(str(place / "bert"), TextClassification(str(place / "texts")), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training


def test_what_it_is_for(place: Path, tmp_path: Path) -> None:
    path = place / "bert"
    assert type(open_model(path)).__name__ == "BertForSequenceClassification"
    assert type(open_model(path, transformers.BertModel)).__name__ == "BertModel"
    model = open_model(str(path), TextClassification(str(place / "texts")))
    assert type(model).__name__ == "BertForSequenceClassification"
    with pytest.raises(CompressionError, match=r"of the weights BertForMaskedLM needs are not in the checkpoint"):
        open_model(path, AutoModelForMaskedLM)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForNothing"]}))
    with pytest.raises(CompressionError) as caught:
        open_model(tmp_path)
    assert str(caught.value) == (
        f"model '{tmp_path}': its config names no class of transformers (BertForNothing); say what it is for with a task."
    )


def test_models_lie_where_they_are_asked_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's device without memory stands for an accelerator."""
    monkeypatch.setattr(pretrained, "place_for", lambda device=None: torch.device(device or "meta"))
    task = TextClassification(str(place / "texts"))
    for model in (open_model(place / "bert"), open_model(place / "bert", task), task.load_model(str(place / "bert"))):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for asked in ({"device": "cpu"}, {"device_map": "cpu"}):
        model = open_model(place / "bert", task, **asked)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}, asked
        assert 0 <= task.score(model)["accuracy"] <= 1


def test_both_models_of_a_comparison_lie_on_one_device(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense one and a low-bit one, by the commands' own way."""
    small = tiny_model("bert")
    Quantize(bits=4).run(small, FewBatches("bert"))
    save(small, tiny_tokenizer(), tmp_path / "low")
    asked = []
    real = open_model

    def watched(path: Any, task: Any = None, device: Any = None, *more: Any, **kwargs: Any) -> Any:
        model = real(path, task, device, *more, **kwargs)
        asked.append((device, next(model.parameters()).device))
        return model

    monkeypatch.setattr(pretrained, "open_model", watched)
    task = f"{{name: text-classification, dataset: {place / 'texts'}, max_length: 16, eval_samples: 4}}"
    run = CliRunner().invoke(app, ["compare", str(place / "bert"), str(tmp_path / "low"), "--task", task])
    assert run.exit_code == 0, run.output
    assert len(asked) == 2 and len(set(asked)) == 1
    run = CliRunner().invoke(app, ["eval", str(tmp_path / "low"), "--task", task])
    assert run.exit_code == 0 and len(set(asked)) == 1, run.output


def test_what_is_offloaded_to_disk_is_scored_and_not_edited(place: Path, tmp_path: Path) -> None:
    task = TextClassification(str(place / "texts"))
    whole = task.score(task.load_model(str(place / "bert")))
    where = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    model = open_model(place / "bert", task, device_map=where, offload_folder=str(tmp_path))
    assert any(parameter.is_meta for parameter in model.parameters())
    assert task.score(model) == whole
    with pytest.raises(
        CompressionError, match=r"is not in memory, as the model is offloaded to disk .*; load it where it fits"
    ):
        PruneHeads(0.5, scores="magnitude").run(model, FewBatches("bert"))


# ---------------------------------------------------------------- what fits

KIN = {
    "camembert": {"pad_token_id": 1},
    "mpnet": {"pad_token_id": 1},
    "longformer": {"pad_token_id": 1, "attention_window": 4},
    "data2vec-text": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "roberta": {"pad_token_id": 0},
    "luke": {"pad_token_id": 1, "entity_vocab_size": 8, "entity_emb_size": 8},
    "electra": {},
}


@pytest.mark.parametrize("kind", KIN)
def test_texts_are_cut_to_the_positions_there_are(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=128, max_position_embeddings=40, bos_token_id=2, eos_token_id=3, num_labels=2, **{**sizes, **KIN[kind]}
    )
    most = positions(config)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    tiny_tokenizer(max_length=10**30).save_pretrained(tmp_path)
    rows = [{"text": " ".join(WORDS * 3)[index:], "label": index % 2} for index in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TextClassification(str(tmp_path / "d.jsonl"), max_length=512)
    task.score(task.load_model(str(tmp_path)))
    assert {len(ids) for ids in task.train_dataset["input_ids"][:]} == {most}
    assert model(input_ids=torch.full((1, most), 7)).logits.isfinite().all(), "so many it reads"
    if kind not in ("longformer", "luke"):  # the first pads itself; the last knows nothing else than words
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 7))


def test_a_limit_of_its_own_name() -> None:
    config = transformers.LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32, d_model=16,
                                    encoder_layers=1, decoder_layers=1, vocab_size=50)  # fmt: skip
    assert positions(config) == 32
    assert positions(transformers.T5Config()) == 10**9


def test_more_tokens_than_embeddings(place: Path, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m", "bert", vocab_size=30)  # the tokenizer has 43
    with pytest.raises(CompressionError) as caught:
        TextClassification(str(place / "texts")).open(str(path))
    last = len(tiny_tokenizer()) - 1
    assert str(caught.value) == (
        f"model '{path}': its tokenizer makes token {last} ('{WORDS[-1]}'), and its embeddings have 30 rows; save it anew after"
        f" model.resize_token_embeddings({last + 1}), or give it the tokenizer it was trained with."
    )
    (tmp_path / "few.csv").write_text("text,label\nthe,0\nand,1\nof,0\n")
    TextClassification(str(tmp_path / "few.csv")).open(str(path))  # none of these texts has such a token


# ---------------------------------------------------------------- whose code runs


def test_a_file_names_built_in_metrics_only(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, **_: Any) -> Any:
        loaded.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr("evaluate.load", load)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {place / 'bert'}\ntask: {{name: text-classification, dataset: {place / 'texts'}, metrics: [./evil.py]}}\n"
        f"steps: [cast]\noutput_dir: {tmp_path / 'out'}\n"
    )
    (place / "bert" / "recipe.yaml").write_text(recipe.read_text())
    task = TextClassification(str(place / "texts"), metrics=["./evil.py"])
    sentence = (
        "metrics: './evil.py' is not built in, and one from elsewhere is code that would run here; name a built-in one, or allow"
        " it on the command line with --trust-metrics (in Python: task.trust_metrics())."
        " Possible: accuracy, agreement, exact_match, f1, f1_macro, f1_micro, mse, pearson, perplexity, perplexity_also, recall_at_1, spearman."
    )
    with pytest.raises(CompressionError) as caught:
        task.open(str(place / "bert"))
    assert str(caught.value) == sentence
    commands = [
        ["validate", str(recipe)],
        ["run", str(recipe)],
        ["eval", str(place / "bert")],
        ["compare", str(place / "bert"), str(place / "bert")],
    ]
    for command in commands:
        run = CliRunner().invoke(app, command)
        assert isinstance(run.exception, CompressionError) and str(run.exception) == sentence, command
    assert not loaded and not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, ["validate", str(recipe), "--trust-metrics"]).exit_code == 0
    run = CliRunner().invoke(app, ["eval", str(place / "bert"), "--trust-metrics"])
    assert loaded == ["./evil.py"], run.output
    (place / "bert" / "recipe.yaml").unlink()


def test_the_console_has_no_advice_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    try:
        monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
        transformers.logging.set_verbosity_warning()  # as it is where transformers was imported before we could say otherwise
        _quiet_transformers()
        advice = transformers.logging.get_logger("transformers.generation.utils")
        assert not advice.isEnabledFor(logging.WARNING) and advice.isEnabledFor(logging.ERROR)
        assert not transformers.logging.is_progress_bar_enabled()
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")  # who wants to hear it does
        _quiet_transformers()
        assert advice.isEnabledFor(logging.INFO)
    finally:
        transformers.logging.set_verbosity(before[0])
        if before[1]:
            transformers.logging.enable_progress_bar()


# ---------------------------------------------------------------- a second text


@pytest.mark.parametrize(("task", "kind"), [(CausalLM, "llama"), (MaskedLM, "bert")])
def test_a_second_text_is_scored_as_the_first(task: Any, kind: str, place: Path, tmp_path: Path) -> None:
    name = {"llama": "causal-lm", "bert": "masked-lm"}[kind]
    path = str(tiny_checkpoint(tmp_path / "m", kind, name))
    other = tiny_texts(tmp_path / "other", each=5, seed=5)
    length = {"block_size": 16} if kind == "llama" else {"max_length": 16}
    both = task(str(place / "texts"), also=str(other), max_eval_samples=6, **length)
    model = both.load_model(path)
    scores = both.remember(model)
    assert list(scores) == [*both.metrics, "perplexity_also", "agreement"] and both.headline == "perplexity"
    single = task(str(place / "texts"), max_eval_samples=6, **length)
    single.open(path)
    assert single.score(model)["perplexity"] == scores["perplexity"], "the first is scored as without it"
    # the second is scored as where it is the text to score on
    rows = [{"text": file.read_text()} for file in sorted(other.rglob("*.txt"))]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "split").mkdir()
    (tmp_path / "test.jsonl").rename(tmp_path / "split" / "test.jsonl")
    (tmp_path / "split" / "train.jsonl").write_text(json.dumps({"text": "the cat"}))
    alone = task(str(tmp_path / "split"), max_eval_samples=6, **length)
    assert alone.open(path).score(model)["perplexity"] == pytest.approx(scores["perplexity_also"], rel=1e-6)
    columns = both.predict(model)
    assert len(columns["nll_also"]) == len(columns["tokens_also"]) == 6
    assert both.reference_columns is not None and set(both.reference_columns) == set(columns)


def test_mistakes_with_a_second_text(place: Path, tmp_path: Path) -> None:
    path = str(tiny_checkpoint(tmp_path / "m", "llama"))
    with pytest.raises(ValueError, match=r"also is the same text as dataset, and would show the same; name a text of another"):
        CausalLM("texts", also="texts/")
    with pytest.raises(ValueError, match=r"perplexity_also is of a second text, and there is none; name one with also"):
        CausalLM("texts", metrics=["perplexity_also"])
    (tmp_path / "link").symlink_to(place / "texts")
    with pytest.raises(CompressionError) as caught:
        CausalLM(str(place / "texts"), also=str(tmp_path / "link")).open(path)
    assert str(caught.value) == f"also: '{tmp_path / 'link'}' is where dataset is; name a text of another source."
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(CompressionError, match=r"no text is left of .*empty\.txt'; give one that has some\.$"):
        CausalLM(str(place / "texts"), also=str(tmp_path / "empty.txt")).open(path)


def test_the_text_that_ships(place: Path, tmp_path: Path) -> None:
    path = str(tiny_checkpoint(tmp_path / "m", "llama"))
    task = CausalLM(str(place / "texts"), also="package://hfcompress/tasks/alice.txt", block_size=32, max_eval_samples=3)
    assert task.score(task.load_model(path))["perplexity_also"] > 1
    assert 90_000 < (PACKAGE / "tasks" / "alice.txt").stat().st_size < 110_000
