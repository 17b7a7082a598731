"""The measured table of docs/sparse.md: `python scripts/bench_sparse.py`.

What half of a language model's weights cost it (SmolLM2-135M, taken off the 4-bit grid that its file holds), single ones and 2
of every 4: by magnitude, by Wanda, by SparseGPT, each with the other weights as they were and solved anew, on news and on a text
of another source. Everything comes from packages, nothing from the Hub. About two hours on two cores; what is done is kept in
out/bench-sparse.

    python scripts/bench_sparse.py [--only sparsegpt] [--samples 128]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench_lowbit import off_grid
from bench_prune import Kept
from demo import NEWS, NOVEL, sentence

from hfcompress import PruneWeights
from hfcompress.checkpoint.artifact import load
from hfcompress.results.measure import machine
from hfcompress.run.recipe import task_from

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = ROOT / "out" / "bench-sparse", ROOT / "docs"
WINDOWS = 32
PATTERNS: dict[str, dict[str, Any]] = {"half of all": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
SCORES = ("magnitude", "wanda", "sparsegpt")
WHOLE = "as it came"


def main() -> None:
    parser = argparse.ArgumentParser(description="The measured table of docs/sparse.md.")
    parser.add_argument("--only", nargs="+", choices=SCORES, default=SCORES)
    parser.add_argument("--samples", type=int, default=128, help="windows of 512 tokens that scores and repair look at")
    given = parser.parse_args()
    kept = Kept(OUT / "cells.json")
    raw = {"name": "causal-lm", "dataset": NEWS, "also": NOVEL, "block_size": 512, "max_eval_samples": WINDOWS}
    task: Any = task_from(raw).open(off_grid())
    kept.once(WHOLE, lambda: {**task.score(load(task, off_grid())), "minutes": 0.0})
    for score in given.only:
        for pattern, fields in PATTERNS.items():
            for repair in (False, True):
                reads = repair or score != "magnitude"
                method = PruneWeights(scores=score, repair=repair, **fields, **({"samples": given.samples} if reads else {}))
                kept.once(f"{pattern}/{score}/{repair}", lambda method=method: pruned(task, method))
    found = {"cells": kept.cells, "machine": machine(), "samples": given.samples}
    (DOCS / "sparse.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (DOCS / "sparse.md").write_text(page(found), encoding="utf-8")


def pruned(task: Any, method: PruneWeights) -> dict[str, Any]:
    model = load(task, off_grid())
    began = time.monotonic()
    method.run(model, task)
    minutes = (time.monotonic() - began) / 60
    return {**task.score(model), "minutes": minutes}


def page(found: dict[str, Any]) -> str:
    cells = found["cells"]
    lines = [
        "# Sparse weights, measured",
        "",
        f"`python scripts/bench_sparse.py` writes this page. {sentence(found['machine'])}",
        "",
        f"SmolLM2-135M, fine-tuned off the 4-bit grid of its file. Perplexity of {WINDOWS} held-out windows of 512 tokens;"
        f" what looks at data sees {found['samples']} windows of other news. Zeros make nothing faster in PyTorch.",
        "",
        "| zeros | chosen by | the others | perplexity on news | on a novel | minutes |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    whole = cells[WHOLE]
    for name, one in cells.items():
        pattern, score, repair = name.split("/") if "/" in name else (name, "", "")
        others = {"True": "solved anew", "False": "taking over" if score == "sparsegpt" else "as they were", "": ""}[repair]
        told = [f"{one[key]:.2f} ({one[key] / whole[key] - 1:+.0%})" for key in ("perplexity", "perplexity_also")]
        lines.append(f"| {pattern} | {score} | {others} | {told[0]} | {told[1]} | {one['minutes']:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
