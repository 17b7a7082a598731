"""The measured table of docs/few-bits.md: `python scripts/bench_few_bits.py`.

What 3 bits, 2 and one a weight cost a fine-tuned encoder (MiniLM on BBC News): rounded at once with error feedback, trained as the
codes it becomes (`quantize_aware`), and, of 2 bits, trained on as it was for as long and rounded then. Everything comes from
packages, nothing from the Hub. About half an hour on two cores; what is done is kept in out/bench-few-bits.

    python scripts/bench_few_bits.py [--bits 3 2 1]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench_prune import Kept, fine_tuned
from demo import CLASSIFY, sentence

from hfcompress import Recipe, compress
from hfcompress.results.measure import machine

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = ROOT / "out" / "bench-few-bits", ROOT / "docs"
EPOCHS, EMBEDDINGS, SAMPLES = 3, 4, 64
DISTILL = {"distill": {"teacher": "original", "temperature": 2.0, "alpha": 0.7}}
TRAIN = {"epochs": EPOCHS, "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}


def train(*riders: Any) -> dict[str, Any]:
    return {"train": {**TRAIN, "per_device_train_batch_size": 32, "with": [DISTILL, *riders]}}


def ways(bits: int) -> dict[str, list[dict[str, Any]]]:
    fields = {
        "bits": bits,
        "engine": "hfcompress",
        "group_size": 64,
        "embeddings": EMBEDDINGS,
        "calibrate": "feedback",
        "samples": SAMPLES,
    }
    rounded = {"quantize": fields}
    aware = {"quantize_aware": {"bits": bits, "group_size": 64, "embeddings": EMBEDDINGS}}
    found = {"rounded": [rounded], "trained as codes": [train(aware)]}
    return found | ({"trained, then rounded": [train(), rounded]} if bits == 2 else {})


def measured(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    raw = {"model": fine_tuned(), "task": CLASSIFY, "steps": steps, "storage": "packed"}
    report = compress(Recipe.from_dict(raw), OUT / name.replace("/", "-").replace(" ", "-"), overwrite=True, tell=print)
    first, (*_, codes, packed) = report.rows[0], report.rows
    return {
        "megabytes": codes.megabytes,
        "packed": packed.megabytes,
        "before": first.score["accuracy"],
        "accuracy": codes.score["accuracy"],
        **{key: codes.gains["accuracy"][key] for key in ("better", "interval", "examples")},
        "minutes": sum(row.seconds or 0 for row in report.rows) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The measured table of docs/few-bits.md.")
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 2, 1], choices=[1, 2, 3, 4])
    given = parser.parse_args()
    kept = Kept(OUT / "cells.json")
    for bits in given.bits:
        for way, steps in ways(bits).items():
            kept.once(f"{bits}/{way}", lambda bits=bits, way=way, steps=steps: measured(f"{bits}/{way}", steps))
    found = {"cells": kept.cells, "machine": machine()}
    (DOCS / "few-bits.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (DOCS / "few-bits.md").write_text(page(found), encoding="utf-8")


def page(found: dict[str, Any]) -> str:
    cells = found["cells"]
    first = next(iter(cells.values()))
    lines = [
        "# Few bits, measured",
        "",
        f"`python scripts/bench_few_bits.py` writes this page. {sentence(found['machine'])}",
        "",
        f"MiniLM, fine-tuned on BBC News: accuracy {first['before']:.4f} on {first['examples']} articles, 90.9 MB. Codes in groups of"
        f" 64 columns, all layers; tables of tokens and positions in {EMBEDDINGS} bits. *rounded*: at once, by error feedback on"
        f" {SAMPLES} articles, 2 bits being any four steps; *trained as codes*: {EPOCHS} epochs beside the original with"
        " `quantize_aware`, whose 2 bits are -1, 0 and 1; *trained, then rounded*: as long without it. *packed*: on disk with"
        " `storage: packed`.",
        "",
        "| bits | way | MB | packed | accuracy | 95 % interval of the change | minutes |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in cells.items():
        bits, way = name.split("/")
        change = " to ".join(f"{end:+.4f}" for end in one["interval"])
        lines.append(
            f"| {bits} | {way} | {one['megabytes']:.2f} | {one['packed']:.2f} | {one['accuracy']:.4f} | {change} | {one['minutes']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
