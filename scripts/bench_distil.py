"""The measured tables of docs/distillation.md: `make bench`, or a part of it by its name.

Does a teacher help (MiniLM on BBC News, a student of three layers, three seeds), what does it cost a training step (online,
cached, none), and what does it heal in a language model (SmolLM2-135M without a third of its layers)? Everything comes from
packages, nothing from the Hub. About 40 minutes on two cores.

    python scripts/bench_distil.py [helps] [costs] [heals]
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from demo import CLASSIFY, MINILM, NEWS, SMOL, sentence

from hfcompress import Distill, Recipe, compress, riding
from hfcompress.checkpoint.artifact import load
from hfcompress.distillation.terms import TERMS
from hfcompress.methods import Student
from hfcompress.results.measure import machine
from hfcompress.results.report import Report
from hfcompress.run.recipe import task_from
from hfcompress.run.train import has_bf16

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = ROOT / "out" / "bench-distil", ROOT / "docs"
SEEDS = (1, 2, 3)
# Two-sided 95 % quantile of Student's t with two degrees of freedom: three seeds.
T_OF_THREE = 4.303


def run(name: str, **raw: Any) -> Any:
    return compress(Recipe.from_dict(raw), OUT / name, overwrite=True, tell=print)


def teacher() -> str:
    """MiniLM fine-tuned on BBC News, once."""
    folder = OUT / "teacher"
    if not (folder / "report.json").is_file():
        fine = {"train": {"epochs": 2, "learning_rate": 1e-4, "per_device_train_batch_size": 32}}
        run("teacher", model=MINILM, task=CLASSIFY, steps=[fine])
    return str(folder)


def helps() -> dict[str, Any]:
    """The same student, the same data order, with and without its teacher; three seeds of order and dropout."""
    rows = []
    for seed in SEEDS:
        fields = {"epochs": 1, "learning_rate": 2e-4, "per_device_train_batch_size": 32, "seed": seed}
        terms = [{"kl": 0.7}, {"task": 0.3}, {"hidden_mse": {"layers": "even"}}]
        distill = {"teacher": teacher(), "temperature": 2.0, "terms": terms}
        steps = [{"student": {"number": 3}}, {"train": {**fields, "with": [{"distill": distill}]}}]
        report = run(f"helps-{seed}", model=MINILM, task=CLASSIFY, steps=steps, control=True, seed=seed)
        _, cut, row = report.rows
        whole = Report.load(Path(teacher()) / "report.json").rows[-1]
        rows.append(
            {
                "seed": seed,
                "teacher": whole.score["accuracy"],
                "cut": cut.score["accuracy"],
                "with": row.score["accuracy"],
                **{key: row.control[key] for key in ("better", "interval", "examples")},
                "without": row.control["score"]["accuracy"],
                "smaller": report.smaller,
                "faster": report.faster,
            }
        )
    return {"rows": rows}


def told_helps(found: dict[str, Any]) -> str:
    rows = found["rows"]
    gains = [row["better"] for row in rows]
    half = T_OF_THREE * stdev(gains) / math.sqrt(len(gains))
    low, high = mean(gains) - half, mean(gains) + half
    sure = "significant over these seeds" if low > 0 or high < 0 else "no significant difference over these seeds"
    lines = [
        "| seed | teacher | without a teacher | with it | better by (95 % over articles) |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['seed']} | {row['teacher']:.4f} | {row['without']:.4f} | {row['with']:.4f} | "
            f"{row['better']:+.4f} ({row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}) |"
            for row in rows
        ),
    ]
    first = rows[0]
    return (
        "## Does the teacher help?\n\n"
        "The teacher is MiniLM, six layers, fine-tuned for two epochs on BBC News. The student is MiniLM as it came with three of "
        "its layers (`student: {number: 3}`) and a new head; it trains for one epoch at 2e-4, batches of 32, with `distill: "
        "{temperature: 2, terms: [kl: 0.7, task: 0.3, hidden_mse: {layers: even}]}` or without it: the same weights at the start, "
        "the same order of the data; seeds change the order and dropout. Accuracy on 500 held-out articles.\n\n"
        + "\n".join(lines)
        + f"\n\nOver the three seeds the teacher is worth {mean(gains):+.4f} (95 % {low:+.4f} to {high:+.4f} by Student's t: {sure}). "
        f"The student is {first['smaller']:.2f} times smaller than its teacher and "
        f"{first['faster']['b1']:.2f} / {first['faster']['b8']:.2f} times faster at batch 1 / 8.\n"
    )


def costs(rounds: int = 8, steps: int = 4) -> dict[str, Any]:
    """One training step of batch 32 x 128 tokens, as the train step runs it (bf16 where the processor has it), in turns."""
    task: Any = task_from(CLASSIFY).open(teacher())
    student, whole = load(task, teacher()), load(task, teacher())
    Student(number=3).run(student, task)
    cache = OUT / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    ways = {
        "none": Distill(terms=(TERMS["task"](),)),
        "cached": Distill(whole, cache=str(cache)),
        "online": Distill(whole),
    }
    began = time.monotonic()
    with riding(student, [ways["cached"]], task):
        recorded = time.monotonic() - began
    batches = list(task.batches(student, 32 * steps, batch_size=32))
    cast: Callable[[], Any] = lambda: torch.autocast("cpu", torch.bfloat16) if has_bf16() else nullcontext()  # noqa: E731
    found: dict[str, list[float]] = {name: [] for name in (*ways, "teacher forward")}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    student.train()
    for _ in range(rounds):
        for name, way in ways.items():
            with riding(student, [way], task) as tick:
                for number, batch in enumerate(batches[:1] + batches):
                    start = time.perf_counter()
                    with cast():
                        loss = student(**batch).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    tick(0.5)
                    if number:
                        found[name].append(time.perf_counter() - start)
        for batch in batches:
            with cast():  # between steps of the student, as it runs when it teaches: its weights have left the caches
                student(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            start = time.perf_counter()
            with torch.no_grad(), cast():
                whole(**{key: value for key, value in batch.items() if key != "labels"})
            found["teacher forward"].append(time.perf_counter() - start)
    least = {name: min(values) for name, values in found.items()}
    middle = {name: median(values) for name, values in found.items()}
    return {"least": least, "median": middle, "recorded_seconds": recorded, "examples": len(task.train_dataset)}


def told_costs(found: dict[str, Any]) -> str:
    plain = {kind: found[kind]["none"] for kind in ("least", "median")}
    share = {kind: found[kind]["teacher forward"] / plain[kind] for kind in plain}

    def ratio(name: str) -> str:
        return f"{found['least'][name] / plain['least']:.3f} ({found['median'][name] / plain['median']:.3f})"

    return (
        "## What does a teacher cost a training step?\n\n"
        "The student of three layers, its teacher of six, batches of 32 x 128 tokens; the ways take turns. Times of a step "
        "without a teacher, least (median).\n\n"
        "| teacher | times a plain step |\n| --- | ---: |\n"
        f"| none | 1 ({plain['least'] * 1e3:.0f} ms, median {plain['median'] * 1e3:.0f} ms) |\n"
        f"| cached | {ratio('cached')} |\n"
        f"| online | {ratio('online')} |\n"
        f"| bound: 1 + the teacher's forward alone, between steps | {1 + share['least']:.3f} ({1 + share['median']:.3f}) |\n\n"
        f"Recording the answers to {found['examples']} articles took {found['recorded_seconds']:.0f} seconds, once.\n"
    )


def heals(steps: int = 64) -> dict[str, Any]:
    """SmolLM2-135M keeps 20 of 30 layers, and learns on text with and without its teacher."""
    task = {"name": "causal-lm", "dataset": NEWS, "block_size": 256, "max_train_samples": 4 * steps, "max_eval_samples": 16}
    fields = {"epochs": 1, "learning_rate": 2e-4, "per_device_train_batch_size": 4, "warmup_steps": 4}
    terms = [{"kl": {"weight": 0.7, "temperature": 1.0}}, {"task": 0.3}]
    chain = [{"student": {"number": 20}}, {"train": {**fields, "with": [{"distill": {"terms": terms}}]}}]
    report = run("heals", model=SMOL, task=task, steps=chain, control=True)
    whole, cut, row = report.rows
    return {
        "before": whole.score["perplexity"],
        "cut": cut.score["perplexity"],
        "with": row.score["perplexity"],
        "without": row.control["score"]["perplexity"],
        **{key: row.control[key] for key in ("better", "interval", "examples")},
        "steps": steps,
        "tokens": 4 * steps * 256,
        "minutes": {"with": (row.seconds - row.control["seconds"]) / 60, "without": row.control["seconds"] / 60},
        "parameters": [whole.parameters, row.parameters],
        "faster": report.faster,
    }


def told_heals(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    before, after = (count / 1e6 for count in found["parameters"])
    return (
        "## What does it heal in a language model?\n\n"
        f"SmolLM2-135M-Instruct (from a Q4_1 file: its weights lie on a 4-bit grid before anything is done) keeps 20 of its 30 "
        f"layers, the first and the last among them, {before:.0f} to {after:.0f} million parameters, and trains on BBC News for "
        f"{found['steps']} steps of 4 x 256 tokens ({found['tokens']:,} tokens) at 2e-4, with "
        f"`terms: [kl: 0.7 at temperature 1, task: 0.3]` or without the teacher. Perplexity of "
        f"{found['examples']} held-out blocks of 256 tokens.\n\n"
        "| | perplexity | minutes |\n| --- | ---: | ---: |\n"
        f"| as it came | {found['before']:.2f} | |\n"
        f"| 20 layers, untrained | {found['cut']:,.2f} | |\n"
        f"| healed without a teacher | {found['without']:.2f} | {found['minutes']['without']:.1f} |\n"
        f"| healed with it | {found['with']:.2f} | {found['minutes']['with']:.1f} |\n\n"
        f"With the teacher perplexity is lower by {found['better']:.2f} (95 % {low:.2f} to {high:.2f} over examples, one seed); "
        f"{found['faster']['b1']:.2f} / {found['faster']['b8']:.2f} times faster than the whole model at batch 1 / 8.\n"
    )


PARTS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "helps": (helps, told_helps),
    "costs": (costs, told_costs),
    "heals": (heals, told_heals),
}


def main(names: list[str]) -> None:
    """Measure the parts asked for, keep the figures of the others, and write the page from all."""
    OUT.mkdir(parents=True, exist_ok=True)
    kept = DOCS / "distillation.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name in names or list(PARTS):
        found[name] = PARTS[name][0]()
    found["machine"] = machine()
    kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    pages = [PARTS[name][1](found[name]) for name in PARTS if name in found]
    head = f"# Distillation, measured\n\n`python scripts/bench_distil.py` writes this page. {sentence(found['machine'])}\n\n"
    (DOCS / "distillation.md").write_text(head + "\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
