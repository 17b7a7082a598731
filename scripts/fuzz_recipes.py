"""Random alterations of the shipped recipes: each must be valid, or be refused with a CompressionError.

    python scripts/fuzz_recipes.py --number 3000 --seed 0

Keys, values, types, nesting, the YAML itself and overrides are altered, one to three at a time. What is found: another exception
than CompressionError, a hang of more than 5 seconds, more than 2 GB, a message of more than 10,000 letters, and a valid recipe
that is not the same after it was written and read back. Exit code 1 if anything is.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.fields import Fields
from hfcompress.methods import METHODS
from hfcompress.run.overrides import apply_override
from hfcompress.run.recipe import Recipe, shipped_recipes
from hfcompress.run.safe_yaml import read_yaml
from hfcompress.run.train import training_fields
from hfcompress.tasks import TASKS

SECONDS, MEGABYTES, LETTERS = 5, 2000, 10_000
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e-9, 1e300, float("nan"), float("inf"), 2**31, 2**62, -(2**62), "", " ", "x",
    "original", "none", "ſ²", "\u202e", "\x1b[31m", "a" * 3000, "/", "..", "~", "package://", "package://x/y", "1e-4", "no", "[]",
    [], [[]], [None], ["x", 1], {}, {"x": 1}, {"self": 1}, {"cls": 1, "positional": 2}, {0: [1]}, [0] * 200, {"distill": {}},
    "linear", "adafactor", "epoch", "bfloat16", "query", {"name": "text-classification", "dataset": "x"},
]  # fmt: skip
NUMBERS = [
    "9" * 5000,
    "0x" + "f" * 6000,
    "1:" * 500 + "1",
    "1e999",
    "-.inf",
    ".nan",
    "0o99",
    "0b2",
    "1_0",
    "2024-13-45",
    "²",
    "1e-4",
]
SNIPPETS = [
    "&a [*a]", "!!int x", "!!python/object:os.system x", "!!binary x", "!!set {a}", "*b", "<<: {a: 1}", "<<: [1]", "? [a]", "- -",
    "{a: 1, a: 2}", "[" * 60, "]", "}", "\t", "\x00", "\x07", "---", "...", "%YAML 3.0", "|", ">", "@", "`", "self: 1", "1: 2",
    "null: 1", "true: 1", "é: ü", "#", "'", '"', ":", ",", "&a", "!", "\ufeff", "\u2028", *NUMBERS,
]  # fmt: skip
Way = tuple[Any, ...]


def places(tree: Any, path: Way = ()) -> Iterator[Way]:
    yield path
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def at(tree: Any, path: Way) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def names() -> list[str]:
    """Every word that means something in some recipe."""
    classes: list[type[Fields]] = [*METHODS.values(), *TASKS.values(), Recipe]
    fields = [name for cls in classes for name in cls.model_fields]
    return sorted(
        {*fields, *METHODS, *TASKS, *training_fields(), "train", "with", "epochs", "riders", "self", "num_train_epochs"}
    )


def alter_value(tree: Any, rng: random.Random, pool: list[Any]) -> Any:
    path = rng.choice([path for path in places(tree) if path])
    alike = [value for value in pool if isinstance(value, type(at(tree, path)))]
    at(tree, path[:-1])[path[-1]] = copy.deepcopy(rng.choice(alike if alike and rng.random() < 0.7 else pool))
    return tree


def alter_key(tree: Any, rng: random.Random, pool: list[Any]) -> Any:
    """A key renamed, added, dropped or misspelt."""
    owner = at(tree, rng.choice([path for path in places(tree) if isinstance(at(tree, path), dict)] or [()]))
    if not isinstance(owner, dict):
        return tree
    known = list(owner)
    word: Any = rng.choice([*names(), rng.choice(names())[::-1], "²", "k" * 3000, "\x1b[1m", 0, -3, 10**12])
    kind = rng.randrange(3)
    if kind and known:
        value = owner.pop(key := rng.choice(known))
        if kind == 2:
            owner[word if rng.random() < 0.7 or not isinstance(key, str) else key[:-1]] = value
    else:
        owner[word] = copy.deepcopy(rng.choice(pool))
    return tree


def alter_nesting(tree: Any, rng: random.Random, pool: list[Any]) -> Any:
    """A part wrapped, doubled, moved, or one part in the place of another."""
    path, other = rng.choice(paths := [path for path in places(tree) if path]), rng.choice(paths)
    part, kind = at(tree, path), rng.randrange(5)
    new: Any = [part] if kind == 0 else {rng.choice(names()): part} if kind == 1 else copy.deepcopy(at(tree, other))
    if kind == 3:
        for _ in range(rng.choice([3, 60])):
            new = [new] if rng.random() < 0.5 else {"with": new}
    owner = at(tree, path[:-1])
    if kind == 4 and isinstance(owner, list):
        owner.insert(rng.randrange(len(owner) + 1), copy.deepcopy(part))
        rng.shuffle(owner)
    else:
        owner[path[-1]] = new
    return tree


def alter_text(text: str, rng: random.Random) -> str:
    """The YAML itself: a snippet put in, letters or lines dropped, doubled or swapped, an alias bomb."""
    spot, kind = rng.randrange(len(text) + 1), rng.randrange(6)
    if kind < 2:
        return text[:spot] + rng.choice(SNIPPETS) + text[spot:]
    if kind == 2:
        return text[:spot] + text[spot + rng.randint(1, 8) :]
    lines = text.splitlines()
    if kind == 3:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    elif kind == 4:
        number = rng.randrange(len(lines))
        lines[number] = rng.choice([lines[number].split(":")[0] + ": " + rng.choice(SNIPPETS), " " + lines[number], ""])
    else:
        bomb = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12)]
        merge = [f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 9)}]}}" for i in range(1, 12)]
        lines += ["x0: &x0 [a]", *bomb] if rng.random() < 0.5 else ["x0: &x0 {a: 1}", *merge]
    return "\n".join(lines)


def override(tree: Any, rng: random.Random) -> str:
    """One that fits, is near, or is nonsense."""
    path = [str(key) for key in rng.choice(list(places(tree)))]
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        path.insert(rng.randrange(len(path) + 1), rng.choice([*names(), "²", "9" * 5000, "-1", "99", "", "٣", "k" * 3000]))
    value = rng.choice([*map(str, VALUES), *SNIPPETS, "{a: {b: 1}}", "[1, 2]"])
    return ".".join(path) + rng.choice([*["="] * 9, "", "==", ":"]) + value


ALTERATIONS: list[Callable[[Any, random.Random, list[Any]], Any]] = [alter_value, alter_key, alter_nesting]


@functools.cache
def shipped() -> list[tuple[str, Any]]:
    """The shipped recipes, as text and as data."""
    texts = [path.read_text(encoding="utf-8") for path in shipped_recipes().values()]
    return [(text, yaml.safe_load(text)) for text in texts]


def altered(rng: random.Random) -> tuple[str, list[str]]:
    """The YAML text of a recipe and overrides, altered."""
    pool = VALUES + [at(tree, path) for _, tree in shipped() for path in places(tree)]
    text, tree = copy.deepcopy(rng.choice(shipped()))
    overrides: list[str] = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(6)
        if kind < 3 and isinstance(tree, dict | list) and tree:
            tree = ALTERATIONS[kind](tree, rng, pool)
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        elif kind < 5:
            overrides.append(override(tree, rng))
        else:
            text = alter_text(text, rng)
    return text, overrides


class Hang(BaseException):
    """Not an Exception: nothing on the way may take it for its own."""


def _hang(*_: Any) -> None:
    raise Hang


def outcome(text: str, overrides: list[str]) -> tuple[str, str]:
    """("valid" | "refused" | a fault, more of it)."""
    signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        raw = read_yaml(text.encode("utf-8", "surrogatepass"), "fuzzed.yaml")
        for one in overrides:
            apply_override(raw, one, Recipe.model_fields)
        recipe = Recipe.from_dict(raw, "fuzzed.yaml")
        with contextlib.suppress(CompressionError):  # of this machine
            recipe.check_here()
        again = Recipe.from_dict(read_yaml(recipe.to_yaml(), "again.yaml"))
        return ("valid", "") if again == recipe and again.to_yaml() == recipe.to_yaml() else ("not the same again", "")
    except CompressionError as error:
        said = str(error)
        long = max(map(len, said.splitlines()), default=0) > 3000 or len(said) > LETTERS
        odd = sorted({letter for letter in said if not letter.isprintable() and letter != "\n"})
        return (
            ("message too long", said[:300])
            if long
            else ("message not printable", f"{odd} {said[:300]}")
            if odd
            else ("refused", said)
        )
    except Hang:
        return f"more than {SECONDS} seconds", ""
    except Exception as error:
        return f"raised {type(error).__name__}", "".join(traceback.format_exception(error)[-4:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(number: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and the faults, each with what makes it come again."""
    found: Counter[str] = Counter()
    faults: list[str] = []
    for one in range(number):
        text, overrides = altered(random.Random(f"{seed} {one}"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kind, more = outcome(text, overrides)
        if (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024) > MEGABYTES:
            kind, more = f"more than {MEGABYTES} MB", f"{grown:.0f} MB"
        found[kind if kind in ("valid", "refused") else "fault"] += 1
        if kind not in ("valid", "refused"):
            faults.append(f"--seed {seed} --only {one}: {kind}\n{more}\n{overrides!r:.400}\n")
    return found, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="show this one alteration, and what comes of it")
    given = parser.parse_args()
    if given.only is not None:
        text, overrides = altered(random.Random(f"{given.seed} {given.only}"))
        print(text, overrides, *outcome(text, overrides), sep="\n---\n")
        return 0
    limit = 16 * 2**30  # of addresses, for what would take the machine down before it is noticed
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    started = time.monotonic()
    found, faults = fuzz(given.number, given.seed)
    for fault in faults:
        print(fault)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    print(f"{given.number} altered recipes in {time.monotonic() - started:.0f} s: {told}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
