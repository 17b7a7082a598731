"""What a model costs and what it is worth: one function counts, weighs, times and scores it.

Scores keep the unit of their metric, `megabytes` are 1e6 bytes, times are milliseconds.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat, NonNegativeInt
from torch import nn

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.layers.bnb_library import quiet_casts
from hfcompress.layers.fast import fast
from hfcompress.layers.kernels import slow_bfloat16
from hfcompress.results.timing import REPETITIONS, Intervals, Latency, device_of, timed, timed_in_turns

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_int8", "amx_bf16")
CURVE = 200
"""At most so many points of a training's loss are kept."""
Curve = Annotated[list[tuple[NonNegativeInt, FiniteFloat]], Field(max_length=CURVE)]
LOW_BIT = ("Linear4bit", "Linear8bitLt", "Embedding4bit", "Embedding8bit")


@dataclass(frozen=True)
class Row:
    """A model after a step.

    `parameters`: weights it computes with, low-bit ones counted as the dense ones they stand for, tied ones once;
    `nonzero`: those of them that are not 0 (low-bit ones all count); `megabytes`: the weights on disk, 1e6 bytes;
    `stored_elements`: elements on disk, a packed byte being one; `peak_memory_megabytes`: the model and what scoring it
    adds, None where it can't be known; `seconds`: what the step took.
    """

    step: str
    parameters: int
    megabytes: float
    latency_ms: Latency
    score: dict[str, float | None]
    headline: str
    higher_is_better: bool = True
    nonzero: int | None = None
    stored_elements: int | None = None
    peak_memory_megabytes: float | None = None
    seconds: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reference_ms: Latency | None = None
    """The reference's times, taken in turns with these: what ratios are told by."""
    control: dict[str, Any] | None = None
    """The same step without its teacher: `score`, `seconds`, and `better` (by how much the teacher's student is) with its
    95 % `interval` over `examples`, None where the metric is no mean over examples."""
    uncompressed: dict[str, Any] | None = None
    """The reference trained the same way: as `control`, `better` being by how much the compressed model is."""
    times_faster: Intervals | None = None
    """The 95 % intervals of how many times faster than the reference it is, by times taken in turns."""
    gains: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A metric to by how much it is `better` than the reference's, positive whichever way the metric runs, with the 95 %
    `interval` of a paired bootstrap over `examples`; without metrics that are no mean over examples."""
    curve: Curve = field(default_factory=list)
    """The loss of a training: the optimizer's step, and the mean since the point before."""


def measure(
    model: nn.Module,
    task: Any,
    step: str,
    seconds: float | None = None,
    score: Callable[[nn.Module], dict[str, float]] | None = None,
    beside: nn.Module | None = None,
    control: dict[str, Any] | None = None,
    faster: bool = False,
) -> Row:
    """Count, weigh, time and score a model, and leave it as it was.

    `task` has `score(model)`, `example(batch_size)`, `headline` and `higher_is_better`. `seconds`: what the step took.
    `score` stands in for the task's own: `task.remember` scores and keeps the predictions. `beside`: the reference, timed in
    turns with the model, so that whatever else the machine does falls on both alike. `control`: see `Row`. `faster`: it is
    switched to inference (`fast`) once it is weighed, and stays so; what it takes in memory then is not told.
    Raises CompressionError where the task doesn't score its own headline.
    """
    count = weigh(model)  # before any forward: a bitsandbytes layer may repack itself there
    notes = ("timed on 4-bit weights that bitsandbytes had already repacked",) if _repacked(model) else ()
    if faster:
        notes = (*notes, "layers of codes were switched to inference (fast) once they were weighed")
        fast(model)
    with undisturbed(model):
        latency, reference, times_faster = _timed(model, task, beside)
        # Timing came first, so that lazily mapped weights are resident before memory is watched.
        scores, growth = _watched(lambda: (score or task.score)(model), device_of(model))
    if task.headline not in scores:
        raise CompressionError(
            f"measure: the task's headline is {task.headline!r}, which its score lacks.{did_you_mean(task.headline, scores)}"
        )
    return Row(
        step=step,
        parameters=count["parameters"],
        megabytes=count["bytes"] / 1e6,
        latency_ms=latency,
        score={name: finite(float(value)) for name, value in scores.items()},
        headline=task.headline,
        higher_is_better=bool(task.higher_is_better),
        nonzero=count["nonzero"],
        stored_elements=count["stored_elements"],
        peak_memory_megabytes=None if growth is None or faster else (count["bytes"] + growth) / 1e6,
        seconds=seconds,
        settings=settings_of(model, task),
        notes=(*notes, *getattr(task, "notes", ())),
        reference_ms=reference,
        control=control,
        times_faster=times_faster,
    )


def _timed(model: nn.Module, task: Any, beside: nn.Module | None) -> tuple[Latency, Latency | None, Intervals | None]:
    if beside is None:
        return timed(model, task, REPETITIONS), None, None
    with undisturbed(beside):
        return timed_in_turns(model, beside, task, REPETITIONS)


def weigh(model: nn.Module) -> dict[str, int]:
    """`parameters`, `nonzero`, `stored_elements` and `bytes` (of the unique tensors a save writes); see `Row`. An export tells
    them itself."""
    if (told := getattr(model, "weight_count", None)) is not None:
        return {"stored_elements": told["parameters"], **told}
    seen: set[Any] = set()
    parameters = nonzero = 0
    for module in model.modules():
        codes = _codes(module)
        others = [tensor for name, tensor in module.named_parameters(recurse=False) if codes is None or name != "weight"]
        for tensor in others if codes is None else [codes, *others]:
            if (key := _identity(tensor)) in seen:
                continue
            seen.add(key)
            dense = _dense_size(module) if tensor is codes else tensor.numel()
            parameters += dense
            if tensor is codes or tensor.is_meta:
                nonzero += dense
            else:
                nonzero += int(torch.count_nonzero(tensor.detach()))
    # Reading the state of a repacked 4-bit layer unpacks it in place, with loss: read it off a copy.
    state = (copy.deepcopy(model) if _repacked(model) else model).state_dict(keep_vars=True)
    stored = {_identity(tensor): tensor for tensor in state.values() if isinstance(tensor, torch.Tensor)}.values()
    return {
        "parameters": parameters,
        "nonzero": nonzero,
        "stored_elements": sum(tensor.numel() for tensor in stored),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored),
    }


def _identity(tensor: torch.Tensor) -> Any:
    """Equal for tied tensors. Meta and empty tensors have no address."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.data_ptr() else id(tensor)


def _codes(module: nn.Module) -> torch.Tensor | None:
    """The low-bit weight a module holds itself, told without importing bitsandbytes; None for any other module."""
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    if hasattr(module, "in_channels") and "packed" in module._buffers:
        return module._buffers["packed"]
    if weight is None or not weight.numel():
        return None
    named = any(base.__name__ in LOW_BIT for base in type(module).__mro__)
    sized = hasattr(module, "in_features") or hasattr(module, "num_embeddings")
    return weight if named or (sized and not weight.is_floating_point()) else None


def has_codes(model: nn.Module) -> bool:
    """Whether a layer of the model is low-bit."""
    return any(_codes(module) is not None for module in model.modules())


def _dense_size(module: Any) -> int:
    if hasattr(module, "in_features"):
        return module.in_features * module.out_features  # type: ignore[no-any-return]
    if hasattr(module, "in_channels"):
        return math.prod((module.out_channels, module.in_channels // module.groups, *module.kernel_size))
    return module.num_embeddings * module.embedding_dim


def _repacked(model: nn.Module) -> bool:
    states = (getattr(_codes(module), "quant_state", None) for module in model.modules())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def settings_of(model: nn.Module, task: Any) -> dict[str, Any]:
    example = task.example(1)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), getattr(model, "dtype", None))
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_of(model).type,
        "threads": torch.get_num_threads(),
        "inputs": {name: list(tensor.shape[1:]) for name, tensor in example.items()},
    }
    return settings | ({"length": example["input_ids"].shape[1]} if "input_ids" in example else {})


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every layer as it was.

    On CPUs with AVX512-BF16, `Linear4bit` repacks its weights in place at the first evaluation, and what is saved,
    merged or dequantised after that is wrong. So that path is off while measuring: the time is that of the unpacked
    path, the one an artifact runs on. A bitsandbytes forward also casts biases and settles the compute type, which is
    undone here, and logs every cast, which would be part of the time.
    """
    training = [module for module in model.modules() if module.training]
    kept: list[tuple[Any, dict[str, Any], torch.Tensor | None]] = []
    for module in model.modules():
        if _codes(module) is not None:
            names = ("support_avx512bf16_for_cpu", "compute_dtype", "compute_type_is_set")
            bias: Any = module._parameters.get("bias")
            kept.append(
                (
                    module,
                    {name: module.__dict__[name] for name in names if name in module.__dict__},
                    None if bias is None else bias.data,
                )
            )
            if hasattr(module, "support_avx512bf16_for_cpu") and not getattr(module, "is_fast", False):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.eval()
    try:
        with quiet_casts():
            yield
    finally:
        for layer, values, data in kept:
            layer.__dict__.update(values)
            if data is not None:
                layer.bias.data = data
        for module in training:
            module.training = True


def _watched(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What `run` returns, and the bytes by which memory grew at its peak; None where that can't be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with suppress(OSError, AttributeError):  # give freed memory back, or it would be used again unseen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    resettable = True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
        before = _resident()["VmRSS"]
    except (OSError, KeyError):
        resettable, before = False, _highest() or 0
    with torch.no_grad():  # not inference mode: a task may keep tensors for training
        result = run()
    after = _resident()["VmHWM"] if resettable else _highest() or 0
    # A high-water mark that can't be reset and didn't move says nothing.
    return result, max(0, after - before) if resettable or after > before else None


def _resident() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in lines}


def _highest() -> int | None:
    """Bytes this process ever held; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def finite(value: Any) -> Any:
    """None for NaN and infinities, anywhere inside: JSON has no word for them, and the Hub refuses them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fast_dtype() -> str:
    """The floating dtype that this processor multiplies fastest."""
    return "float32" if slow_bfloat16() else "bfloat16"


def machine() -> dict[str, Any]:
    """What figures are measured on: processor, threads, flags, versions; nothing naming a person, host or folder."""
    told: dict[str, list[str]] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip().split())
    packages = ("torch", "transformers", "bitsandbytes", "hfcompress")
    versions: dict[str, str] = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "cpu": " ".join(told.get("model name", [])) or platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_flags": [flag for flag in FLAGS if flag in told.get("flags", [])],
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }
    return found | ({"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
