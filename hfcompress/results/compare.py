"""Which of two models is smaller, faster and better: timed in turns, so that claims hold on a noisy machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hfcompress.layers.fast import fast
from hfcompress.results.measure import finite, machine, settings_of, undisturbed, weigh
from hfcompress.results.table import Fitted, as_count, as_number, as_times, shortened
from hfcompress.results.timing import interval, least_and_median, significant, timed_forward


@dataclass(frozen=True)
class Comparison:
    """Two models, timed in turns.

    `latency_ms` holds per batch size `a` and `b` (least and median, milliseconds), `ratio` (how many times faster b is,
    by least and median), `interval` (95 % for the median ratio of neighbouring runs) and `significant`.
    """

    names: tuple[str, str]
    parameters: tuple[int, int]
    megabytes: tuple[float, float]
    score: tuple[dict[str, float | None], dict[str, float | None]]
    latency_ms: dict[str, dict[str, Any]]
    settings: tuple[dict[str, Any], dict[str, Any]]
    machine: dict[str, Any]

    def verdict(self, batch: str) -> str:
        """What may be claimed: "B is 2.1x faster (1.9x to 2.2x)" or "no significant difference"."""
        told = self._claim(batch)
        return f"{self.names[1]} is {told}" if self.latency_ms[batch]["significant"] else told

    def _claim(self, batch: str) -> str:
        found = self.latency_ms[batch]
        if not found["significant"]:
            return "no significant difference"
        ratio, (low, high), word = found["ratio"]["median"], found["interval"], "faster"
        if ratio < 1:
            ratio, low, high, word = 1 / ratio, 1 / high, 1 / low, "slower"
        return f"{as_times(ratio)} {word} ({as_times(low)} to {as_times(high)})"

    def table(self) -> Fitted:
        """For a console of any width."""
        caption = "Times are least (median), the models taking turns."
        return Fitted((self._cells(most) for most in (None, 40, 24, 16, 10)), caption)

    def _cells(self, most: int | None) -> tuple[list[str], list[list[str]]]:
        """All there is; or names in so many characters, the second of them said above its column only."""
        names = [shortened(name, most) if most else name for name in self.names]
        a, b = self.megabytes
        rows = [
            ["params", *map(as_count, self.parameters), ""],
            ["MB", f"{a:.2f}", f"{b:.2f}", f"{as_times(a / b)} smaller" if b <= a else f"{as_times(b / a)} larger"],
        ]
        for batch, found in self.latency_ms.items():
            times = [f"{found[side]['min']:.2f} ({found[side]['median']:.2f})" for side in ("a", "b")]
            rows.append([f"ms, batch {batch[1:]}", *times, self._claim(batch) if most else self.verdict(batch)])
        for name, then in self.score[0].items():
            now = self.score[1].get(name)
            gain = "" if now is None or then is None else f"{now - then:+.4f}"
            rows.append([name, as_number(then, ".4f"), as_number(now, ".4f"), gain])
        return ["", *names, "difference"], rows

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    task: Any,
    batch_sizes: tuple[int, ...] = (1, 8),
    pairs: int = 15,
    names: tuple[str, str] = ("A", "B"),
    task_b: Any = None,
    faster: bool = False,
) -> Comparison:
    """Score two models and time them in turns, so that whatever else the machine does falls on both alike.

    `task_b`: the task as the second model reads it, if it has another tokenizer. `faster`: both are switched to inference
    (`fast`) once they are weighed, and stay so.
    """
    models, tasks = (model_a, model_b), (task, task_b or task)
    counts = [weigh(model) for model in models]
    for model in models if faster else ():
        fast(model)
    latency = {}
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        for size in batch_sizes:
            latency[f"b{size}"] = _in_turns([timed_forward(*both, size) for both in zip(models, tasks, strict=True)], pairs)
        with torch.no_grad():
            # with nothing but agreement to score, the second is judged by the first
            first = task.remember if task.headline == "agreement" else task.score
            scores = [
                {name: finite(float(value)) for name, value in score(m).items()}
                for score, m in zip((first, tasks[1].score), models, strict=True)
            ]
    return Comparison(
        names=names,
        parameters=(counts[0]["parameters"], counts[1]["parameters"]),
        megabytes=(counts[0]["bytes"] / 1e6, counts[1]["bytes"] / 1e6),
        score=(scores[0], scores[1]),
        latency_ms=latency,
        settings=(settings_of(model_a, task), settings_of(model_b, tasks[1])),
        machine=machine(),
    )


def _in_turns(forwards: list[Callable[[], float]], pairs: int) -> dict[str, Any]:
    """Time two forwards A B, B A, A B, ...: whichever goes second finds other caches, so they change places."""
    slowest = max(min(once() for _ in range(3)) for once in forwards)
    # A sample of a small model is the least of several runs: a single short one is mostly the machine's other work.
    runs = max(3 if slowest < 100 else 1, min(20, math.ceil(20 / slowest)))
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            times[side].append(min(forwards[side]() for _ in range(runs)))
    a, b = least_and_median(times[0]), least_and_median(times[1])
    low, high = interval([x / y for x, y in zip(*times, strict=True)])
    ratio = {kind: a[kind] / b[kind] for kind in ("min", "median")}
    return {"a": a, "b": b, "ratio": ratio, "interval": [low, high], "significant": significant(ratio, low, high)}
