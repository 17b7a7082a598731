"""Latency: forwards timed in turns, and what may be claimed of their ratio."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import nn
from typing_extensions import TypedDict


class Times(TypedDict):
    """The least and the median of several runs, milliseconds."""

    min: float
    median: float


Latency = dict[str, Times]
"""By batch size: {"b1": {"min": x, "median": y}, "b8": {...}}."""

Intervals = dict[str, list[float]]
"""{"b1": [low, high], "b8": [...]}: the 95 % interval of how many times faster one model is than another."""

REPETITIONS = {1: 20, 8: 8}
"""How often a batch of a size is timed."""


def device_of(model: nn.Module) -> torch.device:
    """Where its inputs go; an export, which has no parameters, reads them on the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def room_for(megabytes: float, device: torch.device) -> bool:
    """Whether a second model of this size can be loaded beside the first. A load may hold its weights twice for a while."""
    told = get_max_memory()
    free = told.get(device.type, told.get(device.index or 0, 0))
    if device.type == "cuda":  # what PyTorch keeps for itself is free as well
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 2e6 * megabytes < free


def timed_forward(model: nn.Module, task: Any, batch_size: int) -> Callable[[], float]:
    """One forward, timed in milliseconds."""
    device = device_of(model)
    inputs = {name: tensor.to(device) for name, tensor in task.example(batch_size).items()}

    def once() -> float:
        start = time.perf_counter()
        with torch.no_grad():  # as pipelines and Trainers run it
            model(**inputs)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # kernels run behind Python's back
        return (time.perf_counter() - start) * 1e3

    return once


def timed(model: nn.Module, task: Any, repetitions: dict[int, int]) -> Latency:
    """The times of one model."""
    found: Latency = {}
    for size, times in repetitions.items():
        once = timed_forward(model, task, size)
        for _ in range(3):
            once()
        found[f"b{size}"] = least_and_median(_repeat(lambda _: once(), times, seconds=2.5))  # noqa: B023
    return found


def timed_in_turns(
    model: nn.Module, reference: nn.Module, task: Any, repetitions: dict[int, int]
) -> tuple[Latency, Latency, Intervals]:
    """The times of two models that take turns, A B, B A, ..., so that whatever else the machine does falls on both alike; and
    how many times faster the first is."""
    found: tuple[Latency, Latency, Intervals] = ({}, {}, {})
    for size, times in repetitions.items():
        forwards = [timed_forward(one, task, size) for one in (model, reference)]
        for _ in range(3):
            for once in forwards:
                once()
        turns = _repeat(partial(_pair, forwards), times, seconds=5.0)
        mine, theirs = zip(*turns, strict=True)
        found[0][f"b{size}"], found[1][f"b{size}"] = least_and_median(mine), least_and_median(theirs)
        found[2][f"b{size}"] = list(interval([other / one for one, other in turns]))
    return found


def _pair(forwards: list[Callable[[], float]], turn: int) -> tuple[float, float]:
    """The times of both. Whichever goes second finds other caches, so they change places."""
    if turn % 2:
        second = forwards[1]()
        return forwards[0](), second
    return forwards[0](), forwards[1]()


def _repeat(once: Callable[[int], Any], times: int, seconds: float) -> list[Any]:
    """Up to `times` results within about `seconds`, never fewer than 3."""
    end = time.perf_counter() + seconds
    found: list[Any] = []
    while len(found) < 3 or (len(found) < times and time.perf_counter() < end):
        found.append(once(len(found)))
    return found


def least_and_median(milliseconds: Sequence[float]) -> Times:
    return {"min": min(milliseconds), "median": median(milliseconds)}


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median of ratios; the same for the same ratios."""
    values = torch.tensor(ratios, dtype=torch.float64)
    draws = torch.randint(len(ratios), (2000, len(ratios)), generator=torch.Generator().manual_seed(0))
    medians = values[draws].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def significant(ratio: dict[str, float], low: float, high: float) -> bool:
    """Whether the interval lies over 2 % off 1, as neighbouring runs of one model never do, and the leasts agree."""
    return (low > 1.02 and ratio["min"] > 1.02) or (high < 1 / 1.02 and ratio["min"] < 1 / 1.02)
