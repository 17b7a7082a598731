"""Kill a recipe's run at random moments, start it again, and compare what it leaves with a run that nobody killed.

    python scripts/kill_test.py --kills 20 --seed 0

SIGKILL, SIGINT and SIGTERM by turns, also while it saves, proves and pushes, on tiny random models and a Hub on the loopback. Each
kill hits a run in a folder of its own, or, with --chain, one run is killed again and again until it is done. Exit code 1 if
a hash differs, a run does not come to its end, or the push was not made up.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.results.hub_server import WRITE, HubServer

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
MOMENTS = ("reading", "loading", "step 1 of 2", "step 2 of 2", "saving", "pushing")
"""Words of the progress lines after which a kill may fall."""
FILES = ("config.json", "model.safetensors", "recipe.yaml", "tokenizer.json")
RECIPE = """\
model: {place}/bert
task: {{name: text-classification, dataset: {place}/texts, max_length: 32, max_eval_samples: 8}}
steps:
  - train: {{epochs: 1, learning_rate: 3.0e-3, per_device_train_batch_size: 8, bf16: false, with: [{{prune_heads: {{ratio: 0.5, samples: 8}}}}]}}
  - quantize: {{bits: 8}}
push_to: me/{name}
"""
# Imports once; then forks a run for each line it reads: a recipe, an output folder and a file for what it says.
NURSERY = """
import os, sys
from pathlib import Path
import hfcompress.run.loop
from hfcompress.run import cli
from tests.tiny import tiny_checkpoint, tiny_texts
tiny_texts(Path(sys.argv[1]) / "texts", each=8)
tiny_checkpoint(Path(sys.argv[1]) / "bert", "bert")
print("ready", flush=True)
for line in sys.stdin:
    recipe, out, said = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ["hfcompress", "run", recipe, "output_dir=" + out]
        cli.main()
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """A process that has imported everything and starts runs quickly."""

    def __init__(self, place: Path, hub: HubServer) -> None:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": WRITE,
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(place / "home"), "COLUMNS": "120"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.said = place / "said.txt"
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, recipe: Path, out: Path) -> int:
        """A run; returns its process's number."""
        self.said.unlink(missing_ok=True)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{recipe}\t{out}\t{self.said}\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """How the run ended, as os.waitpid tells it."""
        return int(self._line())

    def words(self) -> str:
        return self.said.read_text(errors="replace") if self.said.exists() else ""

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def killed(nursery: Nursery, recipe: Path, out: Path, moment: str, delay: float, with_signal: int, limit: float = 300) -> bool:
    """Start a run and kill it so many seconds after it said a word; False if it was done before."""
    process, started = nursery.start(recipe, out), time.monotonic()
    while moment not in (words := nursery.words()) and "Everything lies in" not in words and "error" not in words:
        if time.monotonic() - started > limit:
            raise TimeoutError(f"{moment!r} never came: {words[-500:]}")
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(process, with_signal)  # it is not reaped before it is asked for: no other process has its number
    return nursery.wait() != 0


def digest(folder: Path) -> str:
    """Of what a run leaves but for the report, whose times differ, and for where it lies."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in FILES).replace(bytes(folder), b"OUT")).hexdigest()


def finish(nursery: Nursery, recipe: Path, out: Path) -> str:
    """Let it come to its end; what is wrong then, or nothing."""
    nursery.start(recipe, out)
    return "" if nursery.wait() == 0 else nursery.words()[-1500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", action="store_true", help="one run, killed at every moment in turn")
    given = parser.parse_args()
    rng, faults = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory(prefix="hfcompress-kills-") as folder, HubServer() as hub:
        place = Path(folder)
        nursery, recipe = Nursery(place, hub), place / "recipe.yaml"
        recipe.write_text(RECIPE.format(place=place, name="small"))
        if wrong := finish(nursery, recipe, place / "whole"):
            print(wrong)
            return 1
        wanted, weights = digest(place / "whole"), (place / "whole" / "model.safetensors").read_bytes()
        rounds = [range(given.kills)] if given.chain else [range(number, number + 1) for number in range(given.kills)]
        for numbers in rounds:
            del hub.repos["me/small"]
            out, told = place / f"out-{numbers[0]}", []
            for number in numbers:
                moment = MOMENTS[(number - given.kills) % len(MOMENTS)] if given.chain else rng.choice(MOMENTS)
                delay, one = rng.choice([0, rng.uniform(0, 0.2), rng.uniform(0, 4)]), SIGNALS[number % len(SIGNALS)]
                hit = killed(nursery, recipe, out, moment, delay, one)
                told.append(f"{signal.Signals(one).name} {delay:.2f} s after {moment!r}{'' if hit else ' (it was done)'}")
            wrong = finish(nursery, recipe, out)
            if not wrong and digest(out) != wanted:
                wrong = "another hash"
            if not wrong and hub.files("me/small").get("model.safetensors") != weights:
                wrong = "the push was not made up"
            if not wrong and (left := [path.name for path in place.glob("*.partial")]):
                wrong = f"left over: {left}"
            faults += bool(wrong)
            print(f"{'; '.join(told)}: {wrong or 'the same'}", flush=True)
        nursery.close()
    print(f"{given.kills} kills, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
