"""A recipe from end to end, on tiny models: the artifact, resuming, several processes, bad input, the command line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoTokenizer, pipeline

import hfcompress.run.loop as loop
from hfcompress import CompressionError, Recipe, compress
from hfcompress.checkpoint.artifact import load
from hfcompress.results.report import Report
from hfcompress.run.recipe import shipped_recipes
from tests import fresh
from tests.export.models import VOCABULARY, byte_tokenizer
from tests.tiny import TOPICS, WORDS, tiny_checkpoint, tiny_config, tiny_images, tiny_model, tiny_texts, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TRAIN = {"epochs": 3, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "bf16": False, "logging_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A tiny encoder, a tiny decoder and a folder of texts."""
    folder = tmp_path_factory.mktemp("place")
    tiny_texts(folder / "texts")
    tiny_checkpoint(folder / "bert", "bert")
    tiny_model("bert").bert.save_pretrained(folder / "bert")  # no head yet: the data gives its labels
    tiny_checkpoint(folder / "distilbert", "distilbert", layers=4)
    tiny_checkpoint(folder / "llama", "llama")
    return folder


@pytest.fixture(scope="module")
def families(place: Path) -> Path:
    """Deeper models of every family a recipe is for, images, and pairs of texts."""
    tiny_checkpoint(place / "bert-12", "bert", "masked-lm", layers=12)
    tiny_checkpoint(place / "bert-4", "bert", layers=4)
    tiny_checkpoint(place / "llama-4", "llama", layers=4)
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(place / "llama-bytes")
    byte_tokenizer().save_pretrained(place / "llama-bytes")
    tiny_checkpoint(place / "t5", "t5", layers=4)
    tiny_checkpoint(place / "vit", "vit", layers=4)
    tiny_images(place / "images")
    rows = [
        {"document": f"the {word} of the cat and the {other}", "summary": f"a {word} for {other}"}
        for word in WORDS
        for other in WORDS[:3]
    ]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [
        {"question": "what of the cat", "context": f"the {word} of the cat", "answers": {"text": [word], "answer_start": [4]}}
        for word in WORDS
    ]
    (place / "squad.jsonl").write_text("\n".join(map(json.dumps, questions)))
    config = tiny_config("bert", layers=4, num_labels=2)
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(place / "bert-answers")
    tiny_tokenizer().save_pretrained(place / "bert-answers")
    return place


def recipe(place: Path, kind: str = "bert", **change: Any) -> Recipe:
    task = {"name": "text-classification", "max_length": 32} if kind != "llama" else {"name": "causal-lm", "block_size": 32}
    steps = [
        {"train": TRAIN},
        {"prune_heads": {"ratio": 0.5, "ranking": "global", "samples": 32}},
        {"train": {**TRAIN, "with": ["distill", {"prune_neurons": {"ratio": 0.5, "samples": 32}}]}},
        {"quantize": {"bits": 8}},
    ]
    raw = {"model": str(place / kind), "task": {**task, "dataset": str(place / "texts")}, "steps": steps}
    return Recipe.from_dict({**raw, **change})


def digest(folder: Path) -> str:
    """Of what a run leaves behind but for the report, whose times differ."""
    names = ("config.json", "model.safetensors", "recipe.yaml", "tokenizer.json")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    compress(recipe(place), place / "done")
    return place / "done"


def test_the_artifact_is_whole(done: Path) -> None:
    files = {path.name for path in done.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "recipe.yaml",
        "report.json",
        "report.html",
        "report.md",
        "report.png",
        "layers.png",
        "README.md",
    } <= files
    assert not done.with_name("done.partial").exists()
    assert Recipe.load(str(done / "recipe.yaml")).to_yaml() == (done / "recipe.yaml").read_text()


def test_the_report_says_what_happened(done: Path) -> None:
    told = json.loads((done / "report.json").read_text())
    assert told["format"] == 1 and told["reference"] == 1
    steps = ["as it came", "train", "prune_heads 0.5", "train + distill + prune_neurons", "quantize 8"]
    assert [row["step"] for row in told["rows"]] == steps
    sizes = [row["megabytes"] for row in told["rows"]]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3] > sizes[4]
    assert told["rows"][1]["score"]["agreement"] == 1.0
    assert told["rows"][0]["score"]["accuracy"] < 0.6 < told["rows"][-1]["score"]["accuracy"], "it learns; a third is chance"
    assert "agreement" not in told["rows"][0]["score"]
    for row in told["rows"]:
        assert row["latency_ms"]["b1"]["min"] <= row["latency_ms"]["b1"]["median"]
    weights = (done / "model.safetensors").stat().st_size
    header = int.from_bytes((done / "model.safetensors").read_bytes()[:8], "little") + 8
    assert round(sizes[-1] * 1e6) == weights - header
    assert len(told["rows"]) > 1 and all(
        f"{row['score']['accuracy']:.4f}" in (done / "README.md").read_text() for row in told["rows"]
    )


def test_the_page_shows_what_happened(done: Path, place: Path) -> None:
    told, page = Report.load(done / "report.json"), (done / "report.html").read_text()
    assert [len(row.curve) > 1 for row in told.rows] == [False, True, False, True, False]
    assert all(step < after for row in told.rows for (step, _), (after, _) in pairwise(row.curve))
    assert page.count('class="loss"') == 2 and told.verdict() in page and "50 % of its weights left, codes" in page
    assert str(place) not in page + (done / "report.md").read_text() and "bert" in page


FRESH = """
import sys, torch, hfcompress
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
told = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]))("the goal of the team")
print("LABEL", told[0]["label"], sorted(name for name in sys.modules if name.startswith("hfcompress.")))
"""


def test_a_fresh_process_loads_it_with_one_import(done: Path) -> None:
    run = fresh.run([sys.executable, "-c", FRESH, str(done)])
    assert run.stdout.split()[1] in TOPICS, run.stderr[-800:]
    assert "hfcompress.methods" not in run.stdout


def test_without_the_import_it_raises(done: Path) -> None:
    run = fresh.run([sys.executable, "-c", FRESH.replace(", hfcompress", ""), str(done)])
    assert run.returncode and "LABEL" not in run.stdout and "mismatch" in run.stderr


def test_the_same_recipe_and_seed_give_the_same_artifact(place: Path, done: Path) -> None:
    compress(recipe(place), place / "again")
    assert digest(place / "again") == digest(done)


def test_a_finished_run_is_not_run_again(done: Path, place: Path) -> None:
    lines: list[str] = []
    before = digest(done)
    assert compress(recipe(place), done, tell=lines.append).to_dict() == Report.load(done / "report.json").to_dict()
    assert lines == [f"{done} holds the finished result of this very recipe; --overwrite runs it again"]
    assert digest(done) == before


@pytest.mark.parametrize("killed_after", [0, 1, 2, 3, 4])
def test_a_killed_run_goes_on_to_the_same_artifact(
    killed_after: int, place: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place / f"killed-{killed_after}"
    saved = loop.artifact.save
    calls = []

    def dies(model: Any, processor: Any, folder: Path, **how: Any) -> None:
        calls.append(folder)
        if len(calls) > killed_after:
            raise KeyboardInterrupt
        saved(model, processor, folder, **how)

    monkeypatch.setattr(loop.artifact, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(place), out)
    assert not out.exists(), "nothing half-written is left looking finished"
    monkeypatch.undo()
    lines: list[str] = []
    compress(recipe(place), out, tell=lines.append)
    assert any(line.startswith(f"going on after step {killed_after}") for line in lines) == (killed_after > 0)
    assert digest(out) == digest(done)
    rows = [Report.load(folder / "report.json").rows for folder in (out, done)]
    assert [(row.step, row.score, row.megabytes) for row in rows[0]] == [
        (row.step, row.score, row.megabytes) for row in rows[1]
    ]


@pytest.mark.parametrize("merge", [True, False])
def test_a_killed_run_with_adapters_on_codes_goes_on_too(merge: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {"adapters": {"r": 2, "merge": merge}}
    steps = [{"quantize": {"bits": 4}}, {"train": {**TRAIN, "epochs": 1, "with": [adapters]}}, "cast"]
    chosen = recipe(place, "llama", steps=steps)
    compress(chosen, place / f"whole-{merge}")
    for killed_after in (1, 2):
        saved, calls, out = loop.artifact.save, [], place / f"codes-{merge}-{killed_after}"

        def dies(
            model: Any,
            processor: Any,
            folder: Path,
            calls: list = calls,
            saved: Any = saved,
            most: int = killed_after,
            **how: Any,
        ) -> None:
            calls.append(folder)
            if len(calls) > most:
                raise KeyboardInterrupt
            saved(model, processor, folder, **how)

        monkeypatch.setattr(loop.artifact, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            compress(chosen, out)
        monkeypatch.undo()
        compress(chosen, out)
        assert digest(out) == digest(place / f"whole-{merge}")


def test_two_processes_train_write_once_and_report_once(place: Path) -> None:
    file = place / "two.yaml"
    file.write_text(recipe(place).to_yaml())
    words = ["-m", "hfcompress", "run", file, f"output_dir={place / 'two'}"]
    run = fresh.two_processes(*words, env={**os.environ, "COLUMNS": "120"}, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("step 4 of 4") == 1
    assert run.stdout.count("Everything lies in") == 1
    assert len(Report.load(place / "two" / "report.json").rows) == 5
    model = load(recipe(place).task, place / "two")
    assert model(**recipe(place).task.open(str(place / "bert")).example(2)).logits.shape == (2, 3)


TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("bert", {"steps.1.prune_layers.number": 1, "steps.5.train.epochs": 1, "steps.4.low_rank.rank": 8}),
    "bert-cpu": ("distilbert", {"steps.2.train.epochs": 1}),
    "encoder-int8": ("distilbert", {}),
    "vit-int8": ("vit", {}),
    "llm-4bit": (
        "llama",
        {"task.block_size": 32, "task.mixture": "[data, own]", "task.max_train_samples": 16, "steps.0.quantize.samples": 8},
    ),
    "distil-half": ("distilbert", {"steps.1.train.epochs": 1}),
    "distil-task": ("distilbert", {"steps.1.train.epochs": 1}),
    "distilbert": ("bert-12", {"steps.1.train.epochs": 0.5, "steps.1.train.gradient_accumulation_steps": 4}),
    "minilm": (
        "bert-12",
        {
            "task.line_by_line": False,
            "steps.0.student.config": "{hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}",
            "steps.1.train.with.0.distill.terms.0.relations.heads": 8,
            "steps.1.train.max_steps": 3,
            "steps.1.train.gradient_accumulation_steps": 2,
        },
    ),
    "tinybert": (
        "bert-4",
        {
            "steps.0.student.architecture": "{model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, "
            "intermediate_size: 48}",
            "steps.1.train.epochs": 1,
            "steps.2.train.epochs": 1,
        },
    ),
    "deep-compression": (
        "bert-4",
        {
            "steps.1.prune_vocab.tokens": 60,
            "steps.3.prune_heads.ratio": 0.5,
            "steps.4.prune_neurons.round_to": 16,
            "steps.4.prune_neurons.ratio": 0.5,
            "steps.5.low_rank.rank": 8,
            "steps.6.train.epochs": 1,
            "steps.7.quantize.group_size": 8,
            "goal.smaller": 2,
        },
    ),
    "ternary": ("bert-4", {"steps.0.train.epochs": 1, "steps.0.train.with.1.quantize_aware.group_size": 8, "goal.smaller": 2}),
    "sparse-llm": ("llama", {"task.block_size": 32, "task.mixture": "[data, own]", "task.max_train_samples": 32}),
    "fastest": ("bert-4", {"steps.3.train.epochs": 1, "steps.2.prune_neurons.round_to": 8}),
    "cpu-llm": (
        "llama-bytes",
        {
            "task.block_size": 32,
            "task.max_train_samples": 32,
            "task.max_eval_samples": 8,
            "steps.1.train.epochs": 1,
            "steps.2.quantize.samples": 4,
        },
    ),
    "distil-llm": ("llama-4", {"task.block_size": 32, "steps.0.student.number": 3}),
    "distil-vit": (
        "vit",
        {"steps.0.student.number": 2, "steps.1.train.epochs": 1, "steps.1.train.per_device_train_batch_size": 8},
    ),
    "distil-t5": ("t5", {"steps.0.student.number": 2, "steps.1.train.epochs": 1}),
    "llm-nf4": ("llama", {"task.block_size": 32}),
    "distil-qa": (
        "bert-answers",
        {"task.max_length": 32, "task.stride": 8, "steps.0.student.number": 2, "steps.1.train.epochs": 1},
    ),
    "sentence-embeddings": ("bert-4", {"steps.0.student.number": 2, "steps.1.train.epochs": 1}),
    "small-vocab": ("distilbert", {}),
    "llm-low-rank": ("llama", {"task.block_size": 32}),
    "llm-prune": (
        "llama",
        {
            "task.block_size": 32,
            "task.mixture": "[data, own]",
            "task.max_train_samples": 32,
            "steps.0.prune_neurons.round_to": 8,
        },
    ),
}
DATA = {"image-classification": "images", "seq2seq-lm": "pairs.jsonl", "question-answering": "squad.jsonl"}


def tiny_recipe(name: str, families: Path) -> Recipe:
    """A shipped recipe as it is, but for the model, the data, and sizes and lengths to match."""
    kind, changes = TINY[name]
    task = Recipe.load(name).task.name  # type: ignore[attr-defined]
    data = f"task={{name: {task}, dataset: {families / DATA.get(task, 'texts')}}}"
    return Recipe.load(name, [f"model={families / kind}", data, *(f"{key}={value}" for key, value in changes.items())])


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_runs_on_a_tiny_model_of_its_family(name: str, families: Path) -> None:
    chosen, out = tiny_recipe(name, families), families / "recipes" / name
    report = compress(chosen, out)
    served = sum(one.answers for one in chosen.export)  # llama.cpp can't be timed here beside the others
    assert len(report.rows) == len(chosen.steps) + 1 + served + (chosen.storage is not None)
    assert all((out / one.place).is_dir() for one in chosen.export)
    model = chosen.task.auto_class.from_pretrained(out)
    steps = {step.key() for step in chosen.steps}
    if "student" in steps and "quantize" not in steps:
        assert model.num_parameters() == report.rows[-1].parameters < report.rows[0].parameters
        assert "quantization_config" not in json.loads((out / "config.json").read_text()), "plain transformers loads it"
        untrained = chosen.task.load_model(chosen.model)
        chosen.steps[0].run(untrained, chosen.task)
        assert any(not torch.equal(one, other) for one, other in zip(untrained.parameters(), model.parameters(), strict=True))
    if chosen.task.auto_class is AutoModelForCausalLM:
        text = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(out))
        assert text("the goal of", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("the goal of")


def test_a_kept_adapter_is_one_that_peft_loads(place: Path) -> None:
    from peft import PeftModel

    out = place / "kept"
    steps = [{"quantize": {"bits": 4}}, {"train": {**TRAIN, "with": [{"adapters": {"r": 2, "merge": False}}]}}]
    chosen = recipe(place, "llama", steps=steps)
    compress(chosen, out)
    ids = chosen.task.example(1, 8)["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(out).eval()
    plain = calm(base)(ids).logits
    with_adapter = calm(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out / "adapter").eval())(
        ids
    ).logits
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    loaded.load_adapter(str(out / "adapter"))
    assert torch.equal(calm(loaded)(ids).logits, with_adapter)
    assert not torch.equal(plain, with_adapter)


def calm(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


# Bad input: each with its one sentence.


def refused(place: Path, out: str = "refused", **change: Any) -> str:
    with pytest.raises(CompressionError) as error:
        compress(recipe(place, **change), place / out)
    assert not (place / out).is_dir() or out == "taken"
    return str(error.value)


def test_an_output_folder_that_holds_something_else_is_not_touched(place: Path) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "thesis.tex").write_text("years of work")
    assert refused(place, "taken") == (
        f"output_dir '{place / 'taken'}': something else lies there; choose another output_dir=..., or pass --overwrite to "
        f"replace it."
    )
    assert (place / "taken" / "thesis.tex").read_text() == "years of work"


def test_an_unfinished_run_of_another_recipe_is_not_overwritten(place: Path) -> None:
    refused(place, "other", steps=["cast", {"low_rank": {"rank": 4, "target_modules": ["qwery"]}}])
    assert refused(place, "other") == (
        f"{place / 'other.partial'}: an unfinished run of another recipe lies there, 1 steps done; finish it, choose another "
        f"output_dir, or pass --overwrite."
    )
    lines: list[str] = []
    mended = recipe(place, steps=["cast", {"low_rank": {"rank": 4, "target_modules": ["query"]}}])
    compress(mended, place / "other", tell=lines.append)
    assert "going on after step 1, where an earlier run stopped" in lines, "what was right of the recipe is not done again"


def test_a_folder_that_is_no_model(place: Path) -> None:
    assert "config.json" in refused(place, model=str(place / "texts"))


def test_a_missing_model(place: Path) -> None:
    assert "nowhere" in refused(place, model=str(place / "nowhere"))


def test_a_model_without_a_hub_connection(place: Path) -> None:
    assert "me/never-seen" in refused(place, model="me/never-seen")


def test_a_missing_data_set(place: Path) -> None:
    task = {"name": "text-classification", "dataset": str(place / "nothing.csv")}
    assert "nothing.csv" in refused(place, task=task)


def test_an_empty_data_set(place: Path) -> None:
    (place / "empty.csv").write_text("text,label\n")
    assert "empty.csv" in refused(place, task={"name": "text-classification", "dataset": str(place / "empty.csv")})


def test_a_task_the_model_has_no_head_for(place: Path) -> None:
    said = refused(place, task={"name": "causal-lm", "dataset": str(place / "texts")})
    assert said.endswith("a bert model has no head for CausalLM; choose another model or task.")


def test_labels_that_do_not_fit(place: Path) -> None:
    rows = "".join(f"some text {i},{'yes' if i % 2 else 'no'}\n" for i in range(20))
    (place / "other.csv").write_text("text,label\n" + rows)
    said = refused(place, task={"name": "text-classification", "dataset": str(place / "other.csv")}, model=str(place / "done"))
    assert "yes" in said and "sport" in said


def test_a_step_that_can_do_nothing_says_which(place: Path) -> None:
    assert refused(place, steps=[{"low_rank": {"rank": 4, "target_modules": ["qwery"]}}]) == (
        "step 1 of 1, low_rank: low_rank: target_modules 'qwery' matches no layer of BertForSequenceClassification. "
        "Did you mean 'query'?"
    )


def test_what_an_architecture_does_not_have_is_said_in_one_sentence(place: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)).save_pretrained(
        place / "ssm"
    )
    AutoTokenizer.from_pretrained(place / "llama").save_pretrained(place / "ssm")
    task = {"name": "causal-lm", "dataset": str(place / "texts"), "block_size": 32}
    said = refused(place, model=str(place / "ssm"), task=task, steps=[{"prune_heads": {"ratio": 0.5}}])
    assert said == (
        "step 1 of 1, prune_heads: MambaForCausalLM: the architecture has no heads; adapters, cast, distill, heal, layer_drop, "
        "low_rank, prune_experts, prune_layers, prune_vocab, prune_weights, quantize, quantize_aware, quantize_cache and student "
        "need no units."
    )
    compress(recipe(place, model=str(place / "ssm"), task=task, steps=[{"low_rank": {"rank": 2}}, "cast"]), place / "ssm-small")


# The command line.


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return fresh.run([sys.executable, "-m", "hfcompress", *words], env={**os.environ, "COLUMNS": "250"})


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    """As `cli`, in this process: an import of everything takes seconds."""
    from transformers.utils import logging as transformers_logging

    from hfcompress.run.cli import console, main

    said, complaint, code = io.StringIO(), io.StringIO(), 0
    level = transformers_logging.get_verbosity()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(complaint):
        patch.setattr(sys, "argv", ["hfcompress", *words])
        patch.setattr(console, "_width", 250)
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            transformers_logging.set_verbosity(level)
    return subprocess.CompletedProcess(words, code, said.getvalue(), complaint.getvalue())


def test_run_from_the_command_line_shows_progress_and_not_library_noise(place: Path) -> None:
    file = place / "cli.yaml"
    file.write_text(yaml.safe_dump(recipe(place, steps=[{"prune_heads": {"ratio": 0.5}}, "quantize"]).to_dict()))
    command = [sys.executable, "-m", "hfcompress", "run", str(file), "seed=1", f"output_dir={place / 'cli'}"]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "250"}
    )  # with all that imports say
    assert run.returncode == 0, run.stderr
    assert "step 1 of 2: prune_heads (ratio: 0.5)" in run.stdout
    assert "prune_heads 0.5" in run.stdout and "from_pretrained" in run.stdout
    assert "Warning" not in run.stdout + run.stderr
    assert "MatMul8bitLt" not in run.stdout + run.stderr and "kernels" not in run.stderr


def test_an_error_is_one_sentence_and_no_traceback(place: Path) -> None:
    run = cli("run", "quickstart", "model=/nowhere/at/all", f"output_dir={place / 'e'}")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr and len(run.stderr.strip().splitlines()) == 1
    assert "/nowhere/at/all" in run.stderr


def test_lines_in_a_log_are_not_folded() -> None:
    alone = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    listed = fresh.run([sys.executable, "-m", "hfcompress", "list"], env=alone).stdout
    assert len(listed.splitlines()) == 1 + len(shipped_recipes()), "a line a recipe"


def test_list_copy_validate_schema(tmp_path: Path) -> None:
    listed = cli("list").stdout
    assert len(shipped_recipes()) > 10 and all(name in listed for name in shipped_recipes())
    assert typed("copy", "quickstart", str(tmp_path / "mine.yaml")).returncode == 0
    assert (tmp_path / "mine.yaml").read_bytes() == shipped_recipes()["quickstart"].read_bytes()
    assert "exists; choose another name" in typed("copy", "quickstart", str(tmp_path / "mine.yaml")).stderr
    assert typed("validate", str(tmp_path / "mine.yaml"), "seed=3").stdout.startswith("valid: 7 steps")
    bad = typed("validate", str(tmp_path / "mine.yaml"), "sead=3", "steps.2.prune_heads.ratio=3")
    assert bad.returncode == 1 and len(bad.stderr.strip().splitlines()) == 2
    assert json.loads(typed("schema").stdout)["title"] == "hfcompress recipe"


def test_show_eval_compare(done: Path, place: Path) -> None:
    shown = typed("show", str(done)).stdout
    assert "bert.encoder.layer.0.attention.self.query" in shown and "linear_8bit" in shown and "quantize 8" in shown
    task = f"{{name: text-classification, dataset: {place / 'texts'}, max_length: 32}}"
    assert "accuracy" in typed("eval", str(done), "--task", task).stdout
    compared = typed("compare", str(done), str(done))
    assert "no significant difference" in compared.stdout, compared.stderr
    assert "say it: --task" in typed("eval", str(place / "bert")).stderr
    assert "no config.json" in typed("show", str(place / "texts")).stderr


def test_a_control_is_trained_beside_and_changes_nothing(done: Path, place: Path) -> None:
    """The student that learnt without a teacher is in the report; the one that learnt with it is the same as ever."""
    report = compress(recipe(place, control=True), place / "controlled")
    control = report.rows[3].control
    assert control is not None and [row.control for row in report.rows if row is not report.rows[3]] == [None] * 4
    assert control["examples"] == 24 and 0.3 < control["score"]["accuracy"] <= 1
    assert control["better"] == pytest.approx(report.rows[3].score["accuracy"] - control["score"]["accuracy"])
    assert (place / "controlled" / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()
    assert "with the teacher accuracy is" in (place / "controlled" / "README.md").read_text()
    with pytest.raises(CompressionError, match=r"control: no train step has a teacher to do without; add distill under with"):
        recipe(place, control=True, steps=[{"train": TRAIN}, "cast"])


def test_a_random_head_is_no_teacher(place: Path) -> None:
    with pytest.raises(CompressionError) as error:
        compress(recipe(place, steps=[{"train": {**TRAIN, "with": ["distill"]}}]), place / "noise")
    assert str(error.value) == (
        f"distill: the original, {place / 'bert'}, has no head for this task yet, and a random one teaches noise; "
        f"put a train step first, or name a fine-tuned teacher."
    )
