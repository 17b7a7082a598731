"""The measured table of docs/embeddings.md: MiniLM as a model of sentence-transformers, compressed on texts without labels.

Everything comes from packages, nothing from the Hub. About an hour on two cores; what is done is kept in out/bench-embeddings,
and a run that was stopped goes on from there.

    python scripts/bench_embeddings.py [codes] [layers] [units]
"""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from demo import MINILM, NEWS, OUT, posts, sentence

from hfcompress import Recipe, compress
from hfcompress.results.report import Report
from hfcompress.tasks.data import read_splits

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT, POSTS, WORDS = 425, 8000, 120
"""Articles to score on; posts to learn from beside the other articles, and how much of each."""
CODES = {"quantize": {"bits": 8, "engine": "hfcompress", "embeddings": 8}}
HALF = {"ratio": 0.5, "scores": "obs", "repair": True, "samples": 256}
EPOCHS = 4
TRAIN = {
    "train": {
        "epochs": EPOCHS, "learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_train_batch_size": 32,
        "with": [{"distill": {"terms": ["embedding"], "cache": str(OUT / "bench-embeddings" / "answers")}}],
    }
}  # fmt: skip
RUNS: dict[str, tuple[str, list[Any]]] = {
    "codes": ("8-bit codes", [CODES]),
    "layers": ("half of the layers", [{"student": {"number": 3}}, TRAIN, CODES]),
    "units": ("half of the heads and neurons", [{"prune_heads": HALF}, {"prune_neurons": HALF}, TRAIN, CODES]),
}


def texts() -> Path:
    """BBC's articles, their paragraphs, and posts of 20 Newsgroups to learn from; other articles to score on."""
    folder = OUT / "embeddings"
    if not (folder / "test.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        articles = list(dict.fromkeys(read_splits(NEWS)[0]["train"]["text"][:]))
        random.Random(0).shuffle(articles)
        parts = [part.strip() for article in articles[HELD_OUT:] for part in article.splitlines() if len(part.split()) > 8]
        with (posts() / "train.csv").open(encoding="utf-8", newline="") as file:
            csv.field_size_limit(10**9)
            written = [re.sub(r"\s+", " ", row["text"]) for row in csv.DictReader(file)]
        beside = [" ".join(post.split()[:WORDS]) for post in written if len(post.split()) > 8][:POSTS]
        for name, lines in (("train", articles[HELD_OUT:] + parts + beside), ("test", articles[:HELD_OUT])):
            rows = "\n".join(json.dumps({"text": line}) for line in lines)
            (folder / f"{name}.jsonl").write_text(rows + "\n", encoding="utf-8")
    return folder


def measured(name: str) -> Report:
    task = {"name": "sentence-embeddings", "dataset": str(texts()), "max_length": 64}
    recipe = Recipe.from_dict({"model": MINILM, "task": task, "steps": RUNS[name][1]})
    folder = OUT / "bench-embeddings" / name
    if not (folder / "report.json").is_file():
        compress(recipe, folder, tell=print)
    return Report.load(folder / "report.json")


def page(reports: dict[str, Report]) -> str:
    """docs/embeddings.md."""
    parts = [
        "# Embeddings, measured",
        f"`python scripts/bench_embeddings.py` writes this page. {sentence(next(iter(reports.values())).machine)}",
        f"MiniLM (all-MiniLM-L6-v2), as sentence-transformers has it, learns for {EPOCHS} epochs to embed as the original does, on "
        f"articles of BBC News, their paragraphs and {POSTS:,} posts of 20 Newsgroups, without labels, 64 tokens of each. *agreement*: "
        f"of {HELD_OUT} other articles, how many have the same nearest neighbour among them as with the original, which is hard: "
        "what is nearest by a hair may change.",
    ]
    for name, report in reports.items():
        parts += [f"## {RUNS[name][0].capitalize()}", report.markdown()]
    return "\n\n".join(parts) + "\n"


def main(names: list[str]) -> None:
    for name in names or list(RUNS):
        measured(name)
    done = [name for name in RUNS if (OUT / "bench-embeddings" / name / "report.json").is_file()]
    (ROOT / "docs" / "embeddings.md").write_text(page({name: measured(name) for name in done}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
