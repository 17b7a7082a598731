"""The measured tables of docs/lowbit.md: `python scripts/bench_lowbit.py`, or a part of it by its name.

How much smaller and faster does `encoder-int8` make a fine-tuned encoder, and what does it cost (MiniLM, on BBC News and on 20
Newsgroups)? What do 4 bits cost a language model, and how much of it do scales, error feedback and rounding that look at data
take away (SmolLM2-135M, taken off the 4-bit grid that its file holds, on news and on a text of another source)? How fast does it
write then? Everything comes from packages, nothing from the Hub. About two hours on two cores; what is
done is kept in out/bench-lowbit.

    python scripts/bench_lowbit.py [bbc] [newsgroups] [smol] [writing] [--only "NF4, smooth (AWQ)"] [--seeds 1 2 3]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_prune import Cells, Kept, fine_tuned
from demo import CLASSIFY, MINILM, NEWS, NOVEL, SMOL, posts, sentence

from hfcompress import Quantize, Recipe, compress, fast
from hfcompress.checkpoint.artifact import load
from hfcompress.results.measure import machine, weigh
from hfcompress.results.timing import least_and_median, timed_forward
from hfcompress.run.recipe import task_from
from hfcompress.tasks.metrics import gain

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = ROOT / "out" / "bench-lowbit", ROOT / "docs"
INT8 = {"bits": 8, "engine": "hfcompress", "embeddings": 8}
BATCHES = (1, 8, 32)
WINDOWS = 64
ENCODERS: dict[str, dict[str, Any]] = {
    "hfcompress, 8 bits, embeddings too": INT8,
    "bitsandbytes, 8 bits": {"bits": 8},
    "bitsandbytes, NF4": {"bits": 4},
}
PLAIN = {"bits": 4, "quant_type": "nf4", "use_double_quant": True}
OURS = {"engine": "hfcompress", "calibrate": "feedback"}
LANGUAGE: dict[str, dict[str, Any]] = {
    "NF4": PLAIN,
    "NF4, error feedback": {**PLAIN, "calibrate": "feedback"},
    "NF4, scales searched (no data)": {**PLAIN, "calibrate": "scales"},
    "NF4, smooth (AWQ)": {**PLAIN, "smooth": True},
    "NF4, smooth, error feedback": {**PLAIN, "smooth": True, "calibrate": "feedback"},
    "hfcompress, 8 bits, embeddings too": INT8,
    "hfcompress, 8 bits, embeddings too, smooth (SmoothQuant)": {**INT8, "smooth": True},
    "hfcompress, 4 bits, groups of 64 (4.25 bits)": {**OURS, "bits": 4, "group_size": 64, "samples": 32},
    "hfcompress, 4 and 8 bits, groups of 128, target_bits: 4.25": {
        **OURS,
        "group_size": 128,
        "target_bits": 4.25,
        "samples": 32,
    },
    "NF4, error feedback and rounding": {**PLAIN, "calibrate": "rounding"},
    "NF4, scales weighted by the data": {**PLAIN, "calibrate": "diagonal"},
}
WRITING: dict[str, dict[str, Any] | None] = {
    "as it came": None,
    "bitsandbytes, NF4": PLAIN,
    "hfcompress, 8 bits, embeddings too": INT8,
    "hfcompress, 4 bits, embeddings in 8": {**INT8, "bits": 4},
}
SEVERAL = "NF4, error feedback"
"""What is calibrated on each source, with every seed."""
PROMPT, WRITTEN, ROUNDS = 64, 24, 5


def encoder(kept: Kept, part: str, task: Any, path: str) -> None:
    """Size, predictions and times of a fine-tuned encoder and of what its codes make of it, the times in turns."""
    whole = load(task, path).eval()
    predicted: dict[str, Any] = {}

    def row(name: str, model: Any, minutes: float) -> dict[str, Any]:
        columns = predicted[name] = task.predict(model)
        right = columns["predictions"] == columns["references"]
        told: dict[str, Any] = {"megabytes": weigh(model)["bytes"] / 1e6, "accuracy": float(right.mean()), "minutes": minutes}
        told["examples"] = len(right)
        if name != "as it came":
            first = predicted["as it came"]
            apart = gain("accuracy", columns, first)
            assert apart is not None
            told["interval"] = list(apart.interval)
            told["agreement"] = float((columns["predictions"] == first["predictions"]).mean())
            times = {batch: in_turns(whole, model, task, batch) for batch in BATCHES}
            told["ms"] = {str(batch): found for batch, found in times.items()}
        return told

    kept.cells.pop(f"{part}/as it came", None)  # its predictions are what the others are told beside
    kept.once(f"{part}/as it came", lambda: row("as it came", whole, 0.0))
    for name, fields in ENCODERS.items():

        def measured(name: str = name, fields: dict[str, Any] = fields) -> dict[str, Any]:
            model = load(task, path).eval()
            began = time.monotonic()
            Quantize(**fields).run(model, None)
            return row(name, model, (time.monotonic() - began) / 60)

        kept.once(f"{part}/{name}", measured)


def in_turns(whole: Any, coded: Any, task: Any, batch: int, rounds: int = 20) -> dict[str, Any]:
    """Least and median milliseconds of both."""
    once = {"as it came": timed_forward(whole, task, batch), "coded": timed_forward(coded, task, batch)}
    times: dict[str, list[float]] = {name: [] for name in once}
    for number in range(rounds + 3):
        for name, forward in once.items():
            value = forward()
            if number > 2:
                times[name].append(value)
    return {name: least_and_median(values) for name, values in times.items()}


def bbc(kept: Kept, given: argparse.Namespace) -> None:
    task: Any = task_from(CLASSIFY).open(fine_tuned())
    encoder(kept, "bbc", task, fine_tuned())


def newsgroups(kept: Kept, given: argparse.Namespace) -> None:
    """MiniLM, fine-tuned for an epoch on the posts of the training split, scored on those of the test split."""
    raw = {"name": "text-classification", "dataset": str(posts()), "max_length": 128}
    folder = OUT / "newsgroups-tuned"
    if not (folder / "config.json").is_file():
        step = {"train": {"epochs": 1, "learning_rate": 1e-4, "per_device_train_batch_size": 32}}
        compress(Recipe.from_dict({"model": MINILM, "task": raw, "steps": [step]}), folder, overwrite=True, tell=print)
    encoder(kept, "newsgroups", task_from(raw).open(str(folder)), str(folder))


def off_grid() -> str:
    """SmolLM2, two hundred steps of plain fine-tuning away from the 4-bit grid of its file, once; a folder may be put there."""
    folder = OUT / "off-grid"
    if not (folder / "config.json").is_file():
        step = {"train": {"max_steps": 200, "learning_rate": 1e-4, "per_device_train_batch_size": 2, "warmup_steps": 10}}
        task = {"name": "causal-lm", "dataset": NEWS, "block_size": 128, "max_eval_samples": 4}
        compress(Recipe.from_dict({"model": SMOL, "task": task, "steps": [step]}), folder, overwrite=True, tell=print)
    return str(folder)


def smol(kept: Kept, given: argparse.Namespace) -> None:
    """Perplexity on the news it was taken off its grid with (held-out articles), and on a novel."""
    task: Any = task_from(
        {"name": "causal-lm", "dataset": NEWS, "also": NOVEL, "block_size": 512, "max_eval_samples": WINDOWS}
    ).open(off_grid())
    raw = {"name": "causal-lm", "dataset": str(posts()), "text_column": "text", "block_size": 512, "max_eval_samples": 4}
    sources = {"news": task, "posts": task_from(raw).open(off_grid())}
    kept.once("smol/as it came//0", lambda: scored(task, load(task, off_grid()), 0.0))

    def one(name: str, source: str, seed: int) -> None:
        told = f"smol/{name}/{source}/{seed}"
        kept.once(told, lambda: coded(task, LANGUAGE[name], sources[source or "news"], seed, given.samples))

    for name, fields in LANGUAGE.items():
        if given.only is None or name in given.only:
            one(name, "news" if reads_data(fields) else "", given.seeds[0])
    for source in sources if given.only is None else ():
        for seed in given.seeds:
            one(SEVERAL, source, seed)


def reads_data(fields: dict[str, Any]) -> bool:
    return fields.get("calibrate", "scales") != "scales" or bool(fields.get("smooth"))


def coded(task: Any, fields: dict[str, Any], data: Any, seed: int, samples: int) -> dict[str, Any]:
    model = load(task, off_grid())
    began = time.monotonic()
    with_data = {"samples": samples} if reads_data(fields) else {}
    Quantize(**{**with_data, **fields}).run(model, Shuffled(data, seed) if with_data else None)
    return scored(task, model, (time.monotonic() - began) / 60)


class Shuffled:
    """A task whose calibration batches are drawn by another seed."""

    original = None

    def __init__(self, task: Any, seed: int) -> None:
        self._task, self._seed = task, seed

    def batches(self, model: Any, samples: int, batch_size: int = 8, seed: int = 0) -> Any:
        return self._task.batches(model, samples, batch_size, seed=self._seed)


def scored(task: Any, model: Any, minutes: float) -> dict[str, Any]:
    megabytes = weigh(model)["bytes"] / 1e6
    return {**task.score(fast(model)), "megabytes": megabytes, "minutes": minutes}


def writing(kept: Kept, given: argparse.Namespace) -> None:
    """Tokens a second, one at a time, after a prompt: all in turns, in float32 and in bfloat16."""
    task: Any = task_from({"name": "causal-lm", "dataset": NEWS, "block_size": 512, "max_eval_samples": 1}).open(off_grid())
    prompt = task.example(1)["input_ids"][:, :PROMPT]

    def all_in_turns() -> dict[str, Any]:
        models = {}
        for dtype in ("float32", "bfloat16"):
            for name, fields in WRITING.items():
                models[f"{name}, {dtype}"] = model = load(task, off_grid()).to(getattr(torch, dtype)).eval()
                if fields:
                    Quantize(**fields).run(model, None)
        speeds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(ROUNDS + 1):
            for name, model in models.items():
                began = time.perf_counter()
                model.generate(prompt, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
                if turn:
                    speeds[name].append(WRITTEN / (time.perf_counter() - began))
        weights = {name: weigh(model)["bytes"] / 1e6 for name, model in models.items()}
        return {name: {"speeds": sorted(found), "megabytes": weights[name]} for name, found in speeds.items()}

    kept.once("writing", all_in_turns)


def told_encoder(part: str, title: str) -> Callable[[Cells], str]:
    def tell(cells: Cells) -> str:
        rows = {name.partition("/")[2]: one for name, one in cells.items() if name.startswith(f"{part}/")}
        if len(rows) < 2:
            return ""
        lines = [
            f"| {title}, {next(iter(rows.values()))['examples']:,} texts | MB | accuracy | 95 % interval of the change | agreement | times faster at batch 1 / 8 / 32 |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, one in rows.items():
            change = agreed = faster = ""
            if "ms" in one:
                change = " to ".join(f"{end:+.4f}" for end in one["interval"])
                agreed = f"{one['agreement']:.1%}"
                faster = " / ".join(
                    f"{one['ms'][str(b)]['as it came']['min'] / one['ms'][str(b)]['coded']['min']:.2f}" for b in BATCHES
                )
            lines.append(f"| {name} | {one['megabytes']:.1f} | {one['accuracy']:.4f} | {change} | {agreed} | {faster} |")
        return "\n".join(lines) + "\n"

    return tell


def told_smol(cells: Cells) -> str:
    rows = [(name.split("/")[1:], one) for name, one in cells.items() if name.startswith("smol/")]
    if not rows:
        return ""
    first = rows[0][1]
    lines = [
        "| SmolLM2-135M, off its grid | calibrated on | MB | perplexity on news | on a novel | minutes |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (name, source, seed), one in rows:
        told = [f"{one[key]:.2f} ({one[key] / first[key] - 1:+.1%})" for key in ("perplexity", "perplexity_also")]
        by = f"{source}, seed {seed}" if source else ""
        lines.append(f"| {name} | {by} | {one['megabytes']:.0f} | {told[0]} | {told[1]} | {one['minutes']:.1f} |")
    return "\n".join(lines) + "\n"


def told_writing(cells: Cells) -> str:
    if "writing" not in cells:
        return ""
    rows = cells["writing"]
    first = rows["as it came, float32"]["speeds"]
    lines = [
        f"| SmolLM2-135M writes {WRITTEN} tokens after {PROMPT} | MB | tokens a second, most (median) | times float32's |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, one in rows.items():
        most, median = one["speeds"][-1], one["speeds"][len(one["speeds"]) // 2]
        lines.append(f"| {name} | {one['megabytes']:.0f} | {most:.1f} ({median:.1f}) | {most / first[-1]:.2f} |")
    return "\n".join(lines) + "\n"


PARTS: dict[str, tuple[Callable[[Kept, argparse.Namespace], None], Callable[[Cells], str]]] = {
    "bbc": (bbc, told_encoder("bbc", "MiniLM on BBC News")),
    "newsgroups": (newsgroups, told_encoder("newsgroups", "MiniLM on 20 Newsgroups")),
    "smol": (smol, told_smol),
    "writing": (writing, told_writing),
}


def main(argv: list[str] | None = None) -> None:
    """Measure the parts asked for, keep the figures of the others, and write the page from all."""
    parser = argparse.ArgumentParser(description="The measured tables of docs/lowbit.md.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all if none is named")
    parser.add_argument("--only", nargs="+", choices=list(LANGUAGE), help="rows of the language model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens that calibrate looks at")
    given = parser.parse_args(argv)
    kept = Kept(OUT / "cells.json")
    for name in given.parts or list(PARTS):
        PARTS[name][0](kept, given)
    path = DOCS / "lowbit.json"
    known: Cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    write({**known, **kept.cells}, given.samples)


def write(cells: Cells, samples: int) -> None:
    found: dict[str, Any] = {"cells": cells, "machine": machine(), "samples": samples}
    (DOCS / "lowbit.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    pages = [page for _, tell in PARTS.values() if (page := tell(cells))]
    head = f"# Low bits, measured\n\n`python scripts/bench_lowbit.py` writes this page. {sentence(found['machine'])}\n\n"
    how = (
        "Times are of eager PyTorch, in turns, least of twenty; what is scored of language models is switched to `fast` before, and "
        "may have been on another processor. Agreement: the same prediction as before. Perplexity "
        f"of {WINDOWS} held-out windows of 512 tokens; calibration looks at {samples} windows of other texts.\n\n"
    )
    (DOCS / "lowbit.md").write_text(head + how + "\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
