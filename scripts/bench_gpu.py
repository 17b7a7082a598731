"""The measured tables of docs/gpu.md: what compression does to size, speed and memory on one CUDA GPU, and what it costs to do.

Random weights of real shapes, nothing downloaded: BERT-base, Llamas of 1.1 and 6.7 billion parameters, in bfloat16. Every form of
a model takes turns with the bfloat16 model itself, forward by forward. A row is written as soon as it is measured; the text is
made of docs/gpu.json, which keeps what was measured before. All of it takes over ten minutes on one H200.

    python scripts/bench_gpu.py [encoder] [1b] [7b] [compiled] [costs] [teachers] [--out docs]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from hfcompress import Distill, LowRank, PruneHeads, PruneLayers, PruneNeurons, Quantize, fast, riding
from hfcompress.layers import features
from hfcompress.layers.bnb_library import quiet_casts
from hfcompress.layers.low_rank import LowRankLinear
from hfcompress.results.measure import machine, weigh
from hfcompress.results.timing import least_and_median, timed_in_turns
from hfcompress.surgery.modules import swap
from hfcompress.surgery.targets import body_linears

ROOT = Path(__file__).resolve().parent.parent
TIMES = {1: 10, 8: 6, 32: 4}
LENGTH, PROMPT, WRITTEN, ROUNDS = 128, 64, 24, 3


class RandomFactors:
    """Factors of half the size that approximate nothing: the singular values of hundreds of matrices of thousands of rows are the
    work of many minutes, and no layer is faster for them."""

    def run(self, model: Any, task: Any) -> None:
        for name in body_linears(model):
            layer = model.get_submodule(name)
            into, out = features(layer)
            like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
            swap(model, name, LowRankLinear(into, out, into * out // (2 * (into + out)), layer.bias is not None, **like))


CUT = [PruneHeads(0.5, scores="magnitude"), PruneNeurons(0.5, scores="magnitude")]
FORMS: dict[str, list[Any]] = {
    "half of the heads and neurons": CUT,
    "factors of half the size": [LowRank(ratio=0.5)],
    "bitsandbytes int8": [Quantize(8)],
    "bitsandbytes NF4": [Quantize(4)],
    "half of the heads and neurons, NF4": [*CUT, Quantize(4)],
    "our 8 bits": [Quantize(8, engine="hfcompress")],
    "our 4 bits, groups of 64": [Quantize(4, engine="hfcompress", group_size=64)],
    "our 4 bits, groups of 64, fast": [Quantize(4, engine="hfcompress", group_size=64)],
}
MODELS: dict[str, tuple[str, Any]] = {
    "encoder": ("BERT-base, 128 tokens", BertConfig()),
    "1b": (
        "Llama, 1.1 billion, 128 tokens",
        LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
        ),
    ),
    "7b": ("Llama, 6.7 billion, 128 tokens", LlamaConfig()),
}
INSTEAD: dict[str, dict[str, list[Any]]] = {key: {"factors of half the size": [RandomFactors()]} for key in ("1b", "7b")}
COMPILED: dict[str, list[Any]] = {
    "bfloat16, compiled": [],
    "half of the heads and neurons, compiled": CUT,
    "factors of half the size, compiled": [LowRank(ratio=0.5)],
    "our 8 bits, compiled": [Quantize(8, engine="hfcompress")],
}
COMPILED_TIMES = {8: 10, 128: 6}


class Texts:
    """Labelled random tokens on the GPU, as a task gives them."""

    original = processor = None

    def __init__(self, vocabulary: int, length: int = LENGTH, labels: int | None = None) -> None:
        self.vocabulary, self.length, self.labels = vocabulary, length, labels

    def example(self, size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, self.vocabulary, (size, self.length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids.cuda(), "attention_mask": torch.ones_like(ids).cuda()}

    def batches(self, model: Any, samples: int, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(-(-samples // batch_size)):
            batch = self.example(batch_size, seed + number)
            labels = batch["input_ids"]
            yield {**batch, "labels": labels if self.labels is None else labels[:, 0] % self.labels}


def made(config: Any) -> Any:
    """Random weights, made on the GPU. A cut writes into the model's config, so each has one of its own."""
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if config.model_type == "bert" else AutoModelForCausalLM
    with torch.device("cuda"):
        return kind.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()


def texts_for(config: Any) -> Texts:
    return Texts(config.vocab_size, labels=2 if config.model_type == "bert" else None)


def freed() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def watched(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and the gigabytes on the GPU at the peak, the model's own among them."""
    freed()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9


def peak(model: Any, task: Texts, size: int) -> float:
    """Gigabytes that a forward of this batch needs beside the weights, at its peak."""
    freed()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model(**task.example(size))
    return (torch.cuda.max_memory_allocated() - before) / 1e9


@torch.no_grad()
def written(model: Any, task: Texts) -> float:
    """Tokens a second of greedy generation, one text."""
    ids = task.example(1)["input_ids"][:, :PROMPT]
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    return WRITTEN / (time.perf_counter() - start)


def decoded(model: Any, reference: Any, task: Texts) -> dict[str, Any]:
    """Of both, in turns: the median, and the ratio of medians."""
    for one in (model, reference):
        written(one, task)
    turns = [(written(model, task), written(reference, task)) for _ in range(ROUNDS)]
    mine, theirs = (least_and_median(list(one))["median"] for one in zip(*turns, strict=True))
    return {"tokens_a_second": mine, "reference": theirs, "ratio": mine / theirs}


def speeds(kept: Kept, part: str) -> None:
    """Every form of one model, in turns with the model itself."""
    config = MODELS[part][1]
    task, reference = texts_for(config), made(config)
    held = torch.cuda.memory_allocated() / 1e9
    base = {"megabytes": weigh(reference)["bytes"] / 1e6, "peak": peak(reference, task, 8), "held": held}
    kept.put(part, "bfloat16, as it is", base)
    for name, methods in FORMS.items():
        if not kept.has(part, name):
            kept.put(part, name, measured(name, INSTEAD.get(part, {}).get(name, methods), reference, task))


def compiled(kept: Kept, part: str) -> None:
    """BERT-base through torch.compile, whose CUDA graphs launch all kernels at once, in turns with the model as it is."""
    config = MODELS["encoder"][1]
    task, reference = texts_for(config), made(config)
    for name, methods in COMPILED.items():
        if not kept.has(part, name):
            kept.put(part, name, measured(name, methods, reference, task, COMPILED_TIMES))
            torch._dynamo.reset()


def measured(name: str, methods: list[Any], reference: Any, task: Texts, times: dict[int, int] = TIMES) -> dict[str, Any]:
    """What these methods make of a copy of the reference, beside the reference."""
    freed()
    before = torch.cuda.memory_allocated()
    model = copy.deepcopy(reference)
    seconds, _ = watched(lambda: [method.run(model, task) for method in methods])
    model.eval()
    row: dict[str, Any] = {"megabytes": weigh(model)["bytes"] / 1e6, "seconds": seconds}
    if name.endswith("fast"):
        fast(model)
    if name.endswith("compiled"):
        model = torch.compile(model, mode="reduce-overhead", dynamic=False)
    mine, theirs, intervals = timed_in_turns(model, reference, task, times)
    row |= {
        **({} if name.endswith("compiled") else {"peak": peak(model, task, 8)}),  # CUDA graphs have memory of their own
        "held": (torch.cuda.memory_allocated() - before) / 1e9,
        "latency_ms": mine,
        "reference_ms": theirs,
        "times_faster": {size: theirs[size]["median"] / mine[size]["median"] for size in mine},
        "interval": intervals,
    }
    return row | ({"writing": decoded(model, reference, task)} if task.labels is None else {})


COSTS: dict[str, Any] = {
    "cut half of the neurons, by magnitude": PruneNeurons(0.5, scores="magnitude"),
    "cut half of the neurons, by Fisher scores": PruneNeurons(0.5, scores="fisher", samples=16),
    "cut half of the heads, by Taylor scores": PruneHeads(0.5, scores="taylor", samples=16),
    "leave out 8 of 32 layers, by angles": PruneLayers(number=8, scores="angular", samples=16),
    "cut half of the neurons by activations, and repair": PruneNeurons(0.5, scores="activation", repair=True, samples=16),
    "NF4": Quantize(4),
    "NF4, calibrated by error feedback": Quantize(4, calibrate="feedback", samples=16),
}


def costs(kept: Kept, part: str) -> None:
    """What is done to the larger Llama: seconds, and gigabytes at the peak. A text is 512 tokens, sixteen of them."""
    for name, method in COSTS.items():
        if not kept.has(part, name):
            kept.put(part, name, cost(method, MODELS["7b"][1]))


def cost(method: Any, config: Any) -> dict[str, float]:
    freed()
    model, task = made(config), Texts(config.vocab_size, 512)
    weights = torch.cuda.memory_allocated() / 1e9
    seconds, highest = watched(lambda: method.run(model, task))
    return {"seconds": seconds, "weights": weights, "peak": highest}


WAYS: dict[str, dict[str, Any] | None] = {
    "no teacher": None,
    "a teacher beside it": {},
    "a teacher in 8 bits": {"teacher_bits": 8},
    "a teacher in 4 bits": {"teacher_bits": 4},
    "its answers, kept on the disk": {"cache": "answers"},
}


def teachers(kept: Kept, part: str) -> None:
    """A step of distillation, half of the layers learning from the whole 1.1 billion: 8 texts of 256 tokens, bfloat16."""
    config = MODELS["1b"][1]
    with tempfile.TemporaryDirectory() as folder:
        made(config).save_pretrained(f"{folder}/teacher")
        for name, fields in WAYS.items():
            if not kept.has(part, name):
                more = {**fields, "cache": f"{folder}/answers"} if fields and "cache" in fields else fields or {}
                distill = [] if fields is None else [Distill(f"{folder}/teacher", alpha=1.0, **more)]
                kept.put(part, name, step(distill, config))


def step(methods: list[Any], config: Any) -> dict[str, Any]:
    """Milliseconds of a whole step of AdamW, and gigabytes at the peak."""
    freed()
    student, task = made(config), Texts(config.vocab_size, 256)
    PruneLayers(number=11, scores="angular", samples=8).run(student, task)
    data, milliseconds = list(task.batches(student, 32)), []
    student.train()
    freed()
    with riding(student, methods, data) as tick:
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
        for number in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            student(**data[number % 4]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            milliseconds.append((time.perf_counter() - start) * 1e3)
            tick((number + 1) / 12)
    # the first four load the teacher, and write what is kept of it
    return {"step_ms": least_and_median(milliseconds[4:]), "peak": torch.cuda.max_memory_allocated() / 1e9}


class Kept:
    """What was measured, in a file that is written at every row."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "gpu.json"
        self.told: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.told["machine"] = machine()

    def has(self, part: str, name: str) -> bool:
        return name in self.told.get(part, {})

    def put(self, part: str, name: str, row: dict[str, Any]) -> None:
        self.told.setdefault(part, {})[name] = row
        self.file.write_text(json.dumps(self.told, indent=1) + "\n", encoding="utf-8")
        print(f"{part}: {name}: {json.dumps(row)}", flush=True)


def text(told: dict[str, Any]) -> str:
    """docs/gpu.md."""
    versions = ", ".join(f"{name} {version}" for name, version in told["machine"]["versions"].items())
    parts = [
        "# On a GPU",
        f"`python scripts/bench_gpu.py` on one {told['machine']['device']} ({versions}). Random weights of real shapes, in bfloat16. "
        "Each form took turns with the bfloat16 model, forward by forward; *x faster* is the ratio of medians, and below 1 the form "
        "is slower. *held* is what the model takes on the GPU, *beside* what a forward of 8 texts needs beside it, at its peak. Quality is not measured here.",
    ]
    for part in MODELS:
        if part in told:
            parts += [f"## {MODELS[part][0]}", _speeds(told[part], TIMES)]
    if "compiled" in told:
        more = 'Each through `torch.compile(model, mode="reduce-overhead")`, in turns with the bfloat16 model as it is, not compiled.'
        parts += ["## BERT-base, 128 tokens, compiled", more, _speeds(told["compiled"], COMPILED_TIMES)]
    if "costs" in told:
        head = "| the 6.7 billion Llama, 16 texts of 512 tokens | seconds | GB at the peak | of that weights |\n|---|---|---|---|\n"
        rows = [f"| {k} | {v['seconds']:.1f} | {v['peak']:.1f} | {v['weights']:.1f} |" for k, v in told["costs"].items()]
        parts += ["## What it costs to do", head + "\n".join(rows)]
    if "teachers" in told:
        head = "| half of the layers learn from 1.1 billion, 8 x 256 tokens | a step, least ms | median | GB at the peak |\n|---|---|---|---|\n"
        rows = [
            f"| {k} | {v['step_ms']['min']:.0f} | {v['step_ms']['median']:.0f} | {v['peak']:.1f} |"
            for k, v in told["teachers"].items()
        ]
        parts += ["## What a teacher costs", head + "\n".join(rows)]
    return "\n\n".join([*parts, *(["## Notes"] if told.get("notes") else []), *told.get("notes", [])]) + "\n"


def _speeds(rows: dict[str, Any], times: dict[int, int]) -> str:
    generates = any("writing" in row for row in rows.values())
    head = [
        "",
        "MB on disk",
        "GB held",
        "GB beside",
        *(f"batch {size}, ms (x faster)" for size in times),
        *(["tokens/s (x faster)"] * generates),
    ]
    lines = [head, ["---"] * len(head)]
    measured = [row for row in rows.values() if "latency_ms" in row]
    for name, row in rows.items():
        line = [name, f"{row['megabytes']:.0f}", *(f"{row[key]:.2f}" if key in row else "" for key in ("held", "peak"))]
        for size in times:
            key = f"b{size}"
            if "latency_ms" in row:
                line.append(f"{row['latency_ms'][key]['median']:.1f} ({row['times_faster'][key]:.2f})")
            else:
                line.append(f"{min(one['reference_ms'][key]['median'] for one in measured):.1f}" if measured else "")
        if generates and "writing" in row:
            line.append(f"{row['writing']['tokens_a_second']:.0f} ({row['writing']['ratio']:.2f})")
        elif generates:
            line.append(f"{max(one['writing']['reference'] for one in measured if 'writing' in one):.0f}")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PARTS: dict[str, Callable[[Kept, str], None]] = {
    **dict.fromkeys(MODELS, speeds),
    "compiled": compiled,
    "costs": costs,
    "teachers": teachers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The measured tables of docs/gpu.md.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu: there is no CUDA device here, so nothing was measured; run it on a machine with a GPU.")
    kept = Kept(asked.out)
    with quiet_casts():
        for part in asked.parts or PARTS:
            PARTS[part](kept, part)
    (asked.out / "gpu.md").write_text(text(kept.told), encoding="utf-8")


if __name__ == "__main__":
    main()
