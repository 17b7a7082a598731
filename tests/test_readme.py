"""What README shows runs: its Python on tiny stand-ins, its recipe whole, its commands against the command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, Trainer
from typer.testing import CliRunner

from hfcompress import PruneHeads, Recipe
from hfcompress.checkpoint.artifact import save
from hfcompress.distillation.terms import TERMS
from hfcompress.layers import kind_of
from hfcompress.methods import METHODS
from hfcompress.results.measure import weigh
from hfcompress.results.report import Report
from hfcompress.run.cli import app
from hfcompress.run.loop import compress
from hfcompress.run.recipe import shipped_recipes
from tests.methods.test_laws import FewBatches
from tests.run.test_train import Rows, arguments, still
from tests.tiny import tiny_checkpoint, tiny_model, tiny_texts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_python_block_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = tiny_model("bert")
    PruneHeads(0.5).run(small, FewBatches("bert"))
    save(small, None, tmp_path / "me" / "my-bert-small")
    model, loader = still("bert"), DataLoader(Rows("bert"), batch_size=4)  # type: ignore[arg-type]
    args = arguments(tmp_path / "work", max_steps=2)
    given: dict[str, Any] = {
        "model": model,
        "teacher": still("bert", seed=1),
        "args": args,
        "train_dataset": Rows("bert"),
        "trainer": Trainer(model=model, args=args, train_dataset=Rows("bert")),  # type: ignore[arg-type]
        "loader": loader,
        "optimizer": AdamW(model.parameters(), lr=1e-3),
    }
    exec(blocks("python")[number], given)
    if '("my-bert-small")' in blocks("python")[number]:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my-bert-small")
        assert loaded.num_parameters() == model.num_parameters() < still("bert").num_parameters()


def test_the_recipe_runs(tmp_path: Path) -> None:
    tiny_texts(tmp_path / "texts")
    tiny_checkpoint(tmp_path / "model", "distilbert")
    raw = yaml.safe_load(blocks("yaml")[0])
    assert Recipe.from_dict(raw).task.dataset == "glue/sst2"
    raw |= {"model": str(tmp_path / "model"), "task": {**raw["task"], "dataset": str(tmp_path / "texts")}}
    assert len(compress(Recipe.from_dict(raw), tmp_path / "out").rows) == len(raw["steps"]) + 1


def test_the_distillation_shown_is_read_as_it_is_meant() -> None:
    step = yaml.safe_load(blocks("yaml")[1])
    raw = {"model": "me/bert", "task": {"name": "text-classification", "dataset": "glue/sst2"}, "steps": [step]}
    (rider,) = Recipe.from_dict(raw).steps[0].riders  # type: ignore[attr-defined]
    assert [(term.key, term.weight) for term in rider.terms] == [("kl", 5.0), ("task", 2.0), ("hidden_cosine", 1.0)]
    named = set(re.findall(r"\b[a-z_]+\b", blocks("yaml")[1]))
    assert set(TERMS) <= named, "every term is shown"


def test_the_pruning_shown_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = yaml.safe_load(blocks("yaml")[2])
    raw = {"model": "me/bert", "task": {"name": "text-classification", "dataset": "glue/sst2"}, "steps": steps}
    methods: list[Any] = [step for step in Recipe.from_dict(raw).steps if step.key() not in ("prune_experts", "prune_vocab")]
    assert [method.key() for method in methods] == ["prune_heads", "prune_neurons", "prune_neurons", "prune_layers"]
    model = tiny_model("bert", layers=4)
    for method in methods:
        method.run(model, FewBatches("bert"))
    save(model, None, tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_hidden_layers == 3


def test_the_low_bits_shown_run(tmp_path: Path) -> None:
    steps = yaml.safe_load(blocks("yaml")[3])
    engines = [step["quantize"].get("engine", "bitsandbytes") for step in steps]
    assert engines == ["hfcompress", *["bitsandbytes"] * 2, *["hfcompress"] * 4]
    for number, step in enumerate(steps):
        kind = "vit" if "convolutions" in step["quantize"] else "llama"
        model = tiny_model(kind)
        if "target_megabytes" in step["quantize"]:  # of a model as small as this one
            step["quantize"]["target_megabytes"] = weigh(model)["bytes"] / 2e6
        raw = {"model": "me/llama", "task": {"name": "causal-lm", "dataset": "glue/sst2"}, "steps": [step]}
        Recipe.from_dict(raw).steps[0].run(model, FewBatches("llama"))
        save(model, None, tmp_path / str(number))
        again = type(model).from_pretrained(tmp_path / str(number))
        kinds = {kind_of(module) for module in again.modules()}
        assert kinds >= {"quant_linear", "quant_conv"} if kind == "vit" else kinds & {"quant_linear", "linear_4bit"}
        assert ("linear_4bit" in kinds) == (number in (1, 2))


def test_the_commands_exist() -> None:
    commands = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    assert commands
    for command in commands:
        program, *words = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.M), command
            continue
        assert program == "hfcompress"
        if words[0] == "run":
            Recipe.load(words[1], [word for word in words[2:] if not word.startswith("--")])
        else:
            assert CliRunner().invoke(app, [words[0], "--help"]).exit_code == 0, command


def test_the_table_names_methods_that_exist() -> None:
    assert set(METHODS) >= {
        name for row in re.findall(r"^\| (`[^|]+) \|", README, re.M) for name in re.findall(r"`(\w+)`", row)
    }


def test_the_recipes_that_ship_are_listed() -> None:
    assert sorted(re.findall(r"\(recipes/([\w-]+)\.yaml\)", README)) == sorted(shipped_recipes())


def test_the_table_and_the_picture_are_those_of_a_committed_report() -> None:
    from hfcompress.results.report import Report

    report = Report.load(ROOT / "docs" / "quickstart.json")
    shown = README.partition("<!-- quickstart table -->")[2].partition("<!-- end -->")[0].strip()
    assert shown == report.markdown().partition("\n\n")[0].strip()
    assert (ROOT / "docs" / "quickstart.png").is_file()
    told = json.loads((ROOT / "docs" / "quickstart.json").read_text())
    reference = told["rows"][told["reference"]]
    assert len(told["rows"]) == len(Recipe.load("quickstart").steps) + 1
    assert reference["megabytes"] / told["rows"][-1]["megabytes"] >= 4
    assert "quickstart" in shipped_recipes()


def test_what_is_said_beside_others_was_measured() -> None:
    told, said = json.loads((ROOT / "docs" / "benchmarks.json").read_text()), " ".join(README.split())
    rows, whole = told["bbc-vnni"]["rows"], "PyTorch, float32"
    table = README.partition("<!-- benchmark table -->")[2].partition("<!-- end of it -->")[0].strip().splitlines()[3:]
    for line in table:
        name, faster, megabytes, accuracy = (cell.strip().strip("*") for cell in line.strip("|").split("|"))
        row = rows[name]
        assert faster == "{:.1f} to {:.1f}".format(*row["ms"]["b8"]["faster"]) and megabytes == f"{row['megabytes']:.1f}"
        assert accuracy == "{:.3f} ({:+.3f} to {:+.3f})".format(row["accuracy"], *row["difference"])
        assert row["difference"][1] >= 0, "nothing significant is lost"
    for is_ours in (True, False):  # the fastest at batch 8 that lost nothing significant is shown
        fit = {name: row for name, row in rows.items() if row["is_ours"] == is_ours and row["difference"][1] >= 0}
        name = max((name for name in fit if name != whole), key=lambda name: fit[name]["ms"]["b8"]["faster"][0])
        assert any(line.startswith((f"| **{name}** |", f"| {name} |")) for line in table)
    assert all(row["as_in_pytorch"] >= 0.99 for row in rows.values() if row["as_in_pytorch"] is not None and row["is_ours"])
    plainer = told["bbc-avx2"]["rows"]
    ours, theirs = (
        "{:.1f} to {:.1f} times".format(*plainer[name]["ms"]["b8"]["faster"])
        for name in ("hfcompress fastest, ONNX Runtime, int8", "half of the layers, ONNX Runtime (optimum), int8")
    )
    assert f"`fastest` in int8 is {ours} as fast there, half of the layers in int8 {theirs}" in said


def test_what_is_said_of_low_bits_was_measured() -> None:
    cells, said = json.loads((ROOT / "docs" / "lowbit.json").read_text())["cells"], " ".join(README.split())
    whole, ours = (cells[f"newsgroups/{name}"] for name in ("as it came", "hfcompress, 8 bits, embeddings too"))
    assert f"leave {ours['megabytes']:.1f} of {whole['megabytes']:.1f} MB" in said
    assert f"an accuracy of {ours['accuracy']:.4f} where it was {whole['accuracy']:.4f}" in said
    assert "{:+.4f} to {:+.4f}, over {:,} texts".format(*ours["interval"], ours["examples"]) in said
    faster = ours["ms"]["8"]["as it came"]["min"] / ours["ms"]["8"]["coded"]["min"]
    assert f"are {faster:.2f} times as fast at batch 8" in said
    first, plain, fed = (cells[f"smol/{name}"] for name in ("as it came//0", "NF4//1", "NF4, error feedback/news/1"))

    def over(one: dict[str, Any], key: str) -> float:
        return float(100 * (one[key] / first[key] - 1))

    assert f"is {over(plain, 'perplexity'):.0f} % over float32's" in said
    assert f"is {over(fed, 'perplexity'):.1f} % over it, and {over(fed, 'perplexity_also'):.1f} % on a text of another" in said


def test_what_is_said_of_deep_compression_was_measured() -> None:
    report, said = Report.load(ROOT / "docs" / "deep-compression.json"), " ".join(README.split())
    first, last = report.rows[report.reference], report.rows[-1]
    assert f"from {first.megabytes:.1f} to {last.megabytes:.2f} MB, {report.smaller:.0f} times smaller" in said
    assert f"accuracy {first.score['accuracy']:.3f} to {last.score['accuracy']:.3f}" in said
    low, high = last.gains["accuracy"]["interval"]
    assert f"(95 % of the change: {low:+.3f} to {high:+.3f}, over {last.gains['accuracy']['examples']} articles)" in said
    (folder,) = re.findall(r"The folder takes ([\d.]+) MB", (ROOT / "docs" / "deep-compression.md").read_text())
    assert f"{folder} MB with its tokenizer" in said


def test_what_is_said_of_llama_cpp_was_measured() -> None:
    speeds, said = (
        json.loads((ROOT / "docs" / "benchmarks.json").read_text())["language-avx2"]["rows"],
        " ".join(README.split()),
    )
    cut, file = speeds["hfcompress cpu-llm, llama.cpp, Q4_1"], speeds["llama.cpp, Q4_1, the file as it came"]
    for name in ("write", "read"):
        assert f"{cut[name]['best']:.0f} tokens a second" in said and f"{file[name]['best']:.0f}" in said
    assert f"perplexity of {cut['perplexity_news']:.2f} on news" in said and f"{cut['perplexity_novel']:.2f} on a novel" in said
    assert f"({file['perplexity_news']:.2f} and {file['perplexity_novel']:.2f}" in said
    assert speeds["hfcompress cpu-llm before its codes, llama.cpp, F32"]["same"] == 24, "uneven, and the same tokens"


def test_what_is_said_of_pruning_was_measured() -> None:
    cells = json.loads((ROOT / "docs" / "pruning.json").read_text())["cells"]
    names = ("smol/whole", "smol/obs/True/32", "smol/random/False/32")
    whole, mended, chance = (f"{cells[name]['perplexity']:.2f}" for name in names)
    said = " ".join(README.split())
    assert (
        f"goes from a perplexity of {whole} to {mended}, where units chosen by chance and left alone make it {chance}" in said
    )
    first, *_, last = json.loads((ROOT / "docs" / "llm-prune.json").read_text())["rows"]
    before, after = (row["score"]["perplexity"] for row in (first, last))
    assert f"it has a perplexity of {after:.2f} on news, where the original has {before:.2f}" in said
    other, still = (row["score"]["perplexity_also"] for row in (first, last))
    assert f"{still:.2f} on a novel, where the original has {other:.2f}" in said
