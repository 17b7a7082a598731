"""A contestant's process, as this one sees it, and models that are made once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant
from environments import OUT, python_of

from hfcompress import Recipe, compress

HERE = Path(__file__).resolve().parent


class Worker:
    """A contestant in its own process and environment, on as many threads as PyTorch has here, asked by one of our scripts."""

    def __init__(self, script: str, one: Contestant, path: Path | str) -> None:
        (OUT / "logs").mkdir(parents=True, exist_ok=True)
        self._log = (OUT / "logs" / f"{one.name.replace(' ', '-')}.log").open("w")
        given = {"kind": one.kind, "path": str(path), "how": one.how, "threads": torch.get_num_threads()}
        command = [python_of(one.environment), str(HERE / script), json.dumps(given)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)

    def ask(self, do: str, **how: Any) -> dict[str, Any]:
        """Its answer; SystemExit where it has ended."""
        told = ""
        if self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.write(json.dumps({"do": do, **how}) + "\n")
            self._process.stdin.flush()
            told = self._process.stdout.readline()
        if not told:
            raise SystemExit(f"a contestant ended; its last words are in {self._log.name}")
        return dict(json.loads(told))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def made(folder: Path, raw: dict[str, Any]) -> Path:
    """What a recipe makes, once."""
    if not (folder / "report.json").is_file():
        compress(Recipe.from_dict(raw), folder, overwrite=True, tell=print)
    return folder


def seconds_of(folder: Path) -> float:
    """What its steps took, those after the model that it is told against."""
    told = json.loads((folder / "report.json").read_text())
    return float(sum(row["seconds"] for row in told["rows"][told["reference"] + 1 :]))
