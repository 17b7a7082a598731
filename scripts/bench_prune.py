"""The measured tables of docs/pruning.md: `python scripts/bench_prune.py`, or a part of it by its name.

Which score finds the heads and neurons that can go, and what repair and training win back (MiniLM on BBC News, half of the heads
and half of the neurons, every score against chance, three seeds)? How much faster is what is left? What does repair do for a
language model (SmolLM2-135M without a quarter of its neurons), and which layers can go? Everything comes from packages, nothing
from the Hub. About two hours on two cores; what is done is kept in out/bench-prune, and a run that was stopped goes on from there.

    python scripts/bench_prune.py [scores] [speed] [smol] [layers] [--seeds 1 2 3] [--only fisher random] [--samples 32]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from demo import CLASSIFY, MINILM, NEWS, SMOL, sentence

from hfcompress import PruneHeads, PruneLayers, PruneNeurons, Recipe, compress
from hfcompress.checkpoint.artifact import load
from hfcompress.results.measure import machine
from hfcompress.results.timing import least_and_median, timed_forward
from hfcompress.run.recipe import task_from
from hfcompress.run.train import Train

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = ROOT / "out" / "bench-prune", ROOT / "docs"
WRITE = {"name": "causal-lm", "dataset": NEWS, "block_size": 512, "max_eval_samples": 16}
SCORES = ("random", "l1", "l2", "activation", "obs", "taylor", "fisher", "gradient")
ON_DATA = ("activation", "obs", "taylor", "fisher", "gradient")
RATIO, SMOL_RATIO, STEPS = 0.5, 0.25, 24
Cells = dict[str, dict[str, Any]]


class Kept:
    """Finished cells, a name to its figures, in a file that is written after each."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.cells: Cells = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def once(self, name: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.cells:
            self.cells[name] = measured()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self.cells, indent=2) + "\n", encoding="utf-8")
            print(name, self.cells[name], flush=True)
        return self.cells[name]


def fine_tuned() -> str:
    """MiniLM fine-tuned on BBC News as the quickstart does it, once; a folder may be put there."""
    folder = OUT / "fine-tuned"
    if not (folder / "config.json").is_file():
        step = {"train": {"epochs": 1, "learning_rate": 1e-4, "per_device_train_batch_size": 32}}
        raw = {"model": MINILM, "task": CLASSIFY, "steps": [step]}
        compress(Recipe.from_dict(raw), folder, overwrite=True, tell=print)
    return str(folder)


def cut(model: Any, task: Any, score: str, seed: int, repair: bool) -> None:
    for method in (PruneHeads, PruneNeurons):
        method(RATIO, scores=score, seed=seed, repair=repair).run(model, task)


def scores(kept: Kept, given: argparse.Namespace) -> None:
    """Seeds change what random draws, the articles that scores and repair look at, and the order of training."""
    task: Any = task_from(CLASSIFY).open(fine_tuned())
    kept.once("scores/whole", lambda: task.score(load(task, fine_tuned())))
    for seed in given.seeds:
        for score in given.only or SCORES:
            for repair in (False, True):
                kept.once(f"scores/{score}/{repair}/{seed}", partial(cell, task, score, seed, repair))


def cell(task: Any, score: str, seed: int, repair: bool) -> dict[str, Any]:
    model = load(task, fine_tuned())
    began = time.monotonic()
    cut(model, task, score, seed, repair)
    seconds = time.monotonic() - began
    found = task.score(model)["accuracy"]
    Train(max_steps=STEPS, learning_rate=2e-4, per_device_train_batch_size=32, seed=seed).run(model, task)
    return {"cut": found, "trained": task.score(model)["accuracy"], "seconds": seconds}


def speed(kept: Kept, given: argparse.Namespace) -> None:
    """The cut model and the whole one, in turns."""
    task: Any = task_from(CLASSIFY).open(fine_tuned())

    def measured() -> dict[str, Any]:
        whole, small = load(task, fine_tuned()), load(task, fine_tuned())
        cut(small, task, "random", 1, False)
        ways = {name: timed_forward(model, task, 8) for name, model in (("whole", whole), ("cut", small))}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(33):
            for name, once in ways.items():
                value = once()
                if number > 2:
                    times[name].append(value)
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in (("whole", whole), ("cut", small))}
        return {"batch": 8, "parameters": sizes, **{name: least_and_median(values) for name, values in times.items()}}

    kept.once("speed", measured)


def smol(kept: Kept, given: argparse.Namespace) -> None:
    """SmolLM2-135M without a quarter of its neurons, repaired or not."""
    task: Any = task_from(WRITE).open(SMOL)
    kept.once("smol/whole", lambda: task.score(load(task, SMOL)))

    def measured(score: str, repair: bool) -> dict[str, Any]:
        model = load(task, SMOL)
        began = time.monotonic()
        PruneNeurons(SMOL_RATIO, scores=score, samples=given.samples, repair=repair).run(model, task)
        minutes = (time.monotonic() - began) / 60
        tokens = given.samples * 512 if score in ON_DATA or repair else 0
        return {**task.score(model), "tokens": tokens, "minutes": minutes}

    for score in given.only or ("random", "l2", "activation", "obs"):
        for repair in (False, True):
            kept.once(f"smol/{score}/{repair}/{given.samples}", partial(measured, score, repair))


def layers(kept: Kept, given: argparse.Namespace) -> None:
    """A quarter of the layers dropped by what they do to the hidden states, or by where they stand."""
    task: Any = task_from(WRITE).open(SMOL)
    kept.once("smol/whole", lambda: task.score(load(task, SMOL)))

    def measured(score: Any) -> dict[str, Any]:
        model = load(task, SMOL)
        began = time.monotonic()
        PruneLayers(0.25, scores=score, samples=given.samples).run(model, task)
        minutes, tokens = (time.monotonic() - began) / 60, 0 if score == "position" else given.samples * 512
        left = {"layers": model.config.num_hidden_layers, "tokens": tokens, "minutes": minutes}
        return {**task.score(model), **left}

    for score in ("position", "block_influence", "angular"):
        kept.once(f"layers/{score}", partial(measured, score))


# ---------------------------------------------------------------- the page


def spread(values: Iterable[float], digits: int = 4) -> str:
    """The mean, and the range where there are several."""
    some = list(values)
    if not some:
        return ""
    span = f" ({min(some):.{digits}f} to {max(some):.{digits}f})" if len(some) > 1 else ""
    return f"{mean(some):.{digits}f}{span}"


def of(cells: Cells, score: str, repair: bool) -> list[dict[str, Any]]:
    return [value for name, value in sorted(cells.items()) if name.startswith(f"scores/{score}/{repair}/")]


def told_scores(cells: Cells) -> str:
    if "scores/whole" not in cells:
        return ""
    lines = [
        "| score | seeds | cut | cut, repaired | cut, trained | repaired, trained | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for score in SCORES:
        plain, mended = of(cells, score, False), of(cells, score, True)
        figures = [spread(one[key] for one in some) for key in ("cut", "trained") for some in (plain, mended)]
        seconds = " / ".join(f"{mean(one['seconds'] for one in some):.0f}" for some in (plain, mended) if some)
        lines.append(f"| {score} | {len(plain)} / {len(mended)} | {' | '.join(figures)} | {seconds} |")
    chance, known = of(cells, "random", False), [one for score in ON_DATA for one in of(cells, score, False)]
    verdict = ""
    if chance and known:
        gain = mean(one["cut"] for one in known) - mean(one["cut"] for one in chance)
        every = min(one["cut"] for one in known) > max(one["cut"] for one in chance)
        verdict = (
            f"\n\nScores on data ({', '.join(ON_DATA)}) keep {gain:+.4f} more accuracy than chance on average, before training; "
            f"{'the worst of them is better than the best draw' if every else 'their ranges overlap'}."
        )
    return (
        "## Which score?\n\n"
        f"MiniLM fine-tuned for one epoch on BBC News ({cells['scores/whole']['accuracy']:.4f} on 500 held-out articles) loses "
        f"half of the heads and half of the neurons of every layer (`prune_heads: {{ratio: {RATIO}}}`, then `prune_neurons`), by "
        f"each score on 256 articles, with `repair: true` or without, and with {STEPS} steps of training (batch 32, 2e-4, no teacher: half an epoch) or without. "
        "Mean and range over seeds (how many without / with repair), which change the articles, what random draws and the order of "
        "training; seconds of scoring and cutting without / with repair, on one thread or two and beside other work: rough.\n\n"
        + "\n".join(lines)
        + verdict
        + "\n"
    )


def told_speed(cells: Cells) -> str:
    if "speed" not in cells:
        return ""
    found = cells["speed"]
    ratio = {kind: found["whole"][kind] / found["cut"][kind] for kind in ("min", "median")}
    before, after = (found["parameters"][name] / 1e6 for name in ("whole", "cut"))
    return (
        "## How much faster?\n\n"
        f"The same cut, {before:.1f} to {after:.1f} million parameters (11.7 of them embeddings), batch {found['batch']} of 128 "
        "tokens in float32, whole and cut in turns, milliseconds.\n\n"
        "| | least | median |\n| --- | ---: | ---: |\n"
        f"| whole | {found['whole']['min']:.1f} | {found['whole']['median']:.1f} |\n"
        f"| cut | {found['cut']['min']:.1f} | {found['cut']['median']:.1f} |\n"
        f"| times faster | {ratio['min']:.2f} | {ratio['median']:.2f} |\n"
    )


def told_smol(cells: Cells) -> str:
    if "smol/whole" not in cells:
        return ""
    lines = [
        "| score | repaired | perplexity | calibration tokens | minutes |",
        "| --- | --- | ---: | ---: | ---: |",
        f"| as it came | | {cells['smol/whole']['perplexity']:.2f} | | |",
    ]
    for name, one in cells.items():
        if name.startswith("smol/") and name != "smol/whole":
            _, score, repair, _ = name.split("/")
            told = "yes" if repair == "True" else "no"
            lines.append(f"| {score} | {told} | {one['perplexity']:.2f} | {one['tokens']:,} | {one['minutes']:.1f} |")
    return (
        "## What does repair do for a language model?\n\n"
        f"SmolLM2-135M-Instruct (from a Q4_1 file: its weights lie on a 4-bit grid before anything is done) loses "
        f"{SMOL_RATIO:.0%} of the neurons of every layer, untrained. Perplexity of {WRITE['max_eval_samples']} held-out windows "
        "of 512 tokens of BBC News; scores and repair look at other articles. Minutes of scoring, cutting and repairing, on one thread: rough.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def told_layers(cells: Cells) -> str:
    rows = [(name.removeprefix("layers/"), one) for name, one in cells.items() if name.startswith("layers/")]
    if not rows:
        return ""
    lines = [
        "| layers dropped by | layers left of 30 | perplexity | calibration tokens | minutes |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {one['layers']} | {one['perplexity']:.2f} | {one['tokens']:,} | {one['minutes']:.1f} |"
        for name, one in rows
    ]
    return (
        "## Which layers?\n\n"
        f"SmolLM2-135M, {cells['smol/whole']['perplexity']:.2f} as it came, untrained after the cut, the same windows.\n\n"
        + "\n".join(lines)
        + "\n"
    )


PARTS: dict[str, tuple[Callable[[Kept, argparse.Namespace], None], Callable[[Cells], str]]] = {
    "scores": (scores, told_scores),
    "speed": (speed, told_speed),
    "smol": (smol, told_smol),
    "layers": (layers, told_layers),
}


def main(argv: list[str] | None = None) -> None:
    """Measure the parts asked for, keep the figures of the others, and write the page from all."""
    parser = argparse.ArgumentParser(description="The measured tables of docs/pruning.md.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all if none is named")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=SCORES, help="these scores alone")
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens that smol looks at")
    parser.add_argument("--cells", type=Path, default=OUT / "cells.json", help="where finished figures are kept")
    given = parser.parse_args(argv)
    kept = Kept(given.cells)
    for name in given.parts or list(PARTS):
        PARTS[name][0](kept, given)
    write(kept.cells)


def write(cells: Cells) -> None:
    found = {"cells": cells, "machine": machine()}
    (DOCS / "pruning.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    pages = [page for _, tell in PARTS.values() if (page := tell(cells))]
    head = f"# Pruning, measured\n\n`python scripts/bench_prune.py` writes this page. {sentence(found['machine'])}\n\n"
    (DOCS / "pruning.md").write_text(head + "\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
