"""One contestant in a process of its own: reads a question a line on stdin, answers with a line of JSON.

Run by the interpreter of the contestant's environment, so it imports nothing of hfcompress (but of what is served by it) and only
the runtime it was asked for. Questions: {"do": "time", "examples": file, "batch": n, "runs": k}, {"do": "predict", "examples": file,
"to": file}, {"do": "fit", "examples": file}, {"do": "weigh"}, {"do": "memory"}.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray]
Forward = Callable[[Feed], np.ndarray]
"""(batch, tokens) ids and masks, or (batch, channels, height, width) pixels, to (batch, classes) logits."""
BATCH = 32
"""Of scoring."""


class Opened:
    """A model, how it is called, and the bytes that its weights take where they are kept."""

    fixed = False
    """Whether it wants full batches of full length: what is compiled is compiled for one shape."""

    def __init__(self, forward: Forward, bytes_: int) -> None:
        self.forward, self.bytes = forward, bytes_


def loaded(path: str, threads: int, how: dict[str, Any]) -> tuple[Any, int]:
    """A model by the class that its config names, and the bytes of its tensors; `dtype`, `quantize`: int8, nf4 or torchao."""
    import torch

    torch.set_num_threads(threads)
    if how.get("hfcompress"):
        import hfcompress  # noqa: F401  registers its layers
    import transformers

    dtype, kind = getattr(torch, how.get("dtype", "float32")), how.get("quantize")
    given: dict[str, Any] = {"dtype": dtype}
    if kind == "int8":
        given["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif kind == "nf4":
        given["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["classifier", "lm_head"],  # its kernel for AVX512-BF16 fails with so few outputs
        )
    class_name = json.loads((Path(path) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, class_name).from_pretrained(path, **given).eval()
    if kind == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return model, buffer.getbuffer().nbytes


def pytorch(path: str, threads: int, how: dict[str, Any]) -> Opened:
    """A classifier in PyTorch, as `loaded` opens it; `compile`: by torch.compile."""
    import torch

    model, bytes_ = loaded(path, threads, how)
    called = model
    if how.get("compile"):
        import torch._inductor.config

        torch._inductor.config.freezing = True
        called = torch.compile(model)

    def forward(feed: Feed) -> np.ndarray:
        given = {name: torch.from_numpy(value) for name, value in feed.items()}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(model.dtype)
        with torch.no_grad():
            logits: np.ndarray = called(**given).logits.float().numpy()
        return logits

    opened = Opened(forward, bytes_)
    opened.fixed = bool(how.get("compile"))
    return opened


def onnx(path: str, threads: int, how: dict[str, Any]) -> Opened:
    """A file in ONNX Runtime; `output`: which of its outputs, the first if it is not said."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    takes = [one.name for one in session.get_inputs()]
    output = [how["output"]] if "output" in how else None

    def forward(feed: Feed) -> np.ndarray:
        said: np.ndarray = session.run(output, {name: feed[name] for name in takes})[0]
        return said

    return Opened(forward, _weighed(Path(path).parent, (".onnx", ".data")))


def openvino(path: str, threads: int, how: dict[str, Any]) -> Opened:
    """A file in OpenVINO; `precision`: what it multiplies in, its own choice if it is not said."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    wanted = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if "precision" in how:
        wanted["INFERENCE_PRECISION_HINT"] = how["precision"]
    compiled = core.compile_model(model, "CPU", wanted)
    takes = [one.get_any_name() for one in model.inputs]
    request = compiled.create_infer_request()

    def forward(feed: Feed) -> np.ndarray:
        said: np.ndarray = request.infer({name: feed[name] for name in takes})[0]
        return said.copy()

    return Opened(forward, _weighed(Path(path).parent, (".bin",)))


def pooled(path: str, threads: int, how: dict[str, Any]) -> Opened:
    """A sentence embedder in ONNX Runtime, the mean of its tokens, and a logistic regression on it that `fit` finds."""
    opened = onnx(path, threads, how)
    states = opened.forward
    head: dict[str, Any] = {}

    def embed(feed: Feed) -> np.ndarray:
        mask = feed["attention_mask"][..., None]
        means: np.ndarray = (states(feed) * mask).sum(1) / mask.sum(1)
        return means

    def forward(feed: Feed) -> np.ndarray:
        said: np.ndarray = embed(feed) @ head["weight"].T + head["bias"] if head else embed(feed)
        return said

    opened.forward, opened.head, opened.embed = forward, head, embed  # type: ignore[attr-defined]
    return opened


KINDS = {"pytorch": pytorch, "onnx": onnx, "openvino": openvino, "pooled": pooled}


def _weighed(folder: Path, endings: tuple[str, ...]) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in endings)


def batches(file: str, fixed: bool) -> Iterator[Feed]:
    """Those of a file of arrays, 32 examples each, as long as their longest; full ones of full length if that is wanted."""
    arrays = dict(np.load(file))
    arrays.pop("labels")
    count = len(next(iter(arrays.values())))
    for start in range(0, count, BATCH):
        feed = {name: value[start : start + BATCH] for name, value in arrays.items()}
        missing = BATCH - len(next(iter(feed.values())))
        if fixed and missing:
            feed = {name: np.concatenate([value, value[:1].repeat(missing, 0)]) for name, value in feed.items()}
        if not fixed and "attention_mask" in feed:
            longest = int(feed["attention_mask"].sum(1).max())
            feed = {name: np.ascontiguousarray(value[:, :longest]) for name, value in feed.items()}
        yield feed


def answer(opened: Opened, asked: dict[str, Any]) -> dict[str, Any]:
    """What a question is answered with."""
    if asked["do"] == "time":
        feed = {name: value[: asked["batch"]] for name, value in next(batches(asked["examples"], True)).items()}
        taken = []
        for _ in range(asked["runs"]):
            began = time.perf_counter()
            opened.forward(feed)
            taken.append((time.perf_counter() - began) * 1e3)
        return {"ms": min(taken)}
    if asked["do"] == "predict":
        count = len(np.load(asked["examples"])["labels"])
        said = [opened.forward(feed).argmax(-1) for feed in batches(asked["examples"], opened.fixed)]
        np.save(asked["to"], np.concatenate(said)[:count])
        return {}
    if asked["do"] == "fit":
        from sklearn.linear_model import LogisticRegression

        began = time.monotonic()
        embedded = np.concatenate([opened.embed(feed) for feed in batches(asked["examples"], False)])  # type: ignore[attr-defined]
        found = LogisticRegression(max_iter=1000).fit(embedded, np.load(asked["examples"])["labels"])
        opened.head |= {"weight": found.coef_, "bias": found.intercept_}  # type: ignore[attr-defined]
        opened.bytes += found.coef_.nbytes + found.intercept_.nbytes
        return {"seconds": time.monotonic() - began}
    if asked["do"] == "weigh":
        return {"bytes": opened.bytes}
    return {"resident": resident()}


def resident() -> int:
    """Bytes of memory that this process holds now."""
    told = Path("/proc/self/status").read_text()
    return int(told.partition("VmRSS:")[2].split()[0]) * 1024


def serve(kinds: dict[str, Any], answered: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> None:
    """Open what the first argument says, and answer until nobody asks."""
    given = json.loads(sys.argv[1])
    os.environ["OMP_NUM_THREADS"] = str(given["threads"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, those in C too
    opened = kinds[given["kind"]](given["path"], given["threads"], given["how"])
    for line in sys.stdin:
        print(json.dumps(answered(opened, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve(KINDS, answer)
