"""Random alterations of saved models: every one is refused, or the model computes what it did. `make fuzz`, or

    python scripts/fuzz_artifacts.py [alterations] [seed]

Each is tried in a child that is watched: it may neither crash nor take 5 s nor 2 GB. `tests/checkpoint/test_fuzz.py` runs a few.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from hfcompress import CompressionError, LowRank, PruneHeads, PruneNeurons, Quantize
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.verify import verify

SECONDS, BYTES = 5.0, 2 << 30
ABSURD: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 63, 65, 127, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        True,
        False,
        None,
        "",
        "x",
        "nf4",
        "fp4",
        "linear",
        "counts",
        "float16",
        "../../etc",
        "\x1b[2J",
        "é" * 1000,
        [],
        [1],
        {},
        {"a": 1},
    ),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def artifacts(place: Path) -> dict[str, Path]:
    """One folder a kind of artifact, each of a tiny model."""
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        num_labels=3,  # type: ignore[call-arg]  # a field that every config takes
        initializer_range=0.2,
    )
    recipes: dict[str, list[Any]] = {
        "uneven": [
            PruneHeads(0.5, scores="magnitude", ranking="global"),
            PruneNeurons(0.4, scores="magnitude", ranking="global"),
        ],
        "low-rank": [LowRank(rank=4), LowRank(rank=8, target_modules=["word_embeddings"])],
        "low-rank-4bit": [LowRank(rank=4, target_modules=["query"]), Quantize(4)],
        "low-rank-8bit": [LowRank(rank=4, target_modules=["query"]), Quantize(8)],
        "plain-4bit": [Quantize(4, use_double_quant=False)],
        "plain-8bit": [Quantize(8)],
    }
    for name, methods in recipes.items():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
        for method in methods:
            method.run(model, None)
        save(model, None, place / name)
    return {name: place / name for name in recipes}


# Alterations: each gets the folder and a source of chance, and says what it did.


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [spot for key, part in inner for spot in ((*path, key), *spots(part, (*path, key)))]


def in_config(folder: Path, chance: random.Random) -> str:
    """Something of the structure, or of the config around it, is another value, gone, or renamed."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    where = chance.choice(
        [spot for spot in spots(config) if spot[0] == "quantization_config" or chance.random() < 0.2] or [("architectures",)]
    )
    inside = config
    for key in where[:-1]:
        inside = inside[key]
    key, what = where[-1], chance.randrange(4)
    if what == 0:
        del inside[key]
    elif what == 1 and isinstance(inside, dict):
        inside[chance.choice(["x", "kind", "__class__", f"{key}.x", ""])] = inside.pop(key)
    elif what == 2 and isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
        inside[key] = chance.choice([inside[key] + 1, inside[key] - 1, -inside[key], inside[key] * 1000])
    else:
        inside[key] = copy.deepcopy(chance.choice(ABSURD))
    file.write_text(json.dumps(config))
    return f"config {'.'.join(map(str, where))}: {what}"


def in_edits(folder: Path, chance: random.Random) -> str:
    """Edits change places, or a layer gets the edit of another, or of a new kind."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edits = config.get("quantization_config", {}).get("modules")
    if not edits:
        return in_config(folder, chance)
    one, other = chance.choice(list(edits)), chance.choice(list(edits))
    what = chance.randrange(3)
    if what == 0:
        edits[one], edits[other] = edits[other], edits[one]
    elif what == 1:
        edits[one] = {**edits[other], **edits[one], "kind": edits[other]["kind"]}
    else:
        edits[chance.choice(["bert", "bert.encoder", "", "bert.embeddings.LayerNorm", "classifier", "bert.pooler.dense"])] = (
            edits[one]
        )
    file.write_text(json.dumps(config))
    return f"edits {one}, {other}: {what}"


def in_bytes(folder: Path, chance: random.Random) -> str:
    """The file of weights is cut off, longer, or has other bytes, most often in its header."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    what = chance.randrange(5)
    if what == 0:
        del data[chance.randrange(len(data)) :]
    elif what == 1:
        data += chance.randbytes(chance.randrange(1, 100))
    elif what == 2:
        data[:8] = struct.pack("<Q", chance.choice([0, 1, size - 1, size + 1, size * 2, 2**40, 2**63]))
    else:
        for _ in range(chance.randrange(1, 5)):
            data[chance.randrange(8, 8 + size) if what == 3 else chance.randrange(len(data))] = chance.randrange(256)
    file.write_bytes(data)
    return f"bytes {what}"


def in_header(folder: Path, chance: random.Random) -> str:
    """The header tells other types, shapes or places of a tensor."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = chance.choice([key for key in header if key != "__metadata__"])
    field = chance.choice(["dtype", "shape", "data_offsets"])
    values: dict[str, list[Any]] = {
        "dtype": ["F32", "F16", "I8", "U8", "I64", "F64", "BOOL", "F8_E4M3", "x", 1],
        "shape": [[], [0], [1], [2**40], [-1], [64, 64, 64], "x"],
    }
    values["data_offsets"] = [
        [0, 0],
        [0, 4],
        [0, 2**50],
        [8, 0],
        [-1, 1],
        header[chance.choice(list(header)[1:])].get("data_offsets"),
    ]
    header[name][field] = chance.choice(values[field])
    told = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(told)) + told + data[8 + size :])
    return f"header {name}: {field}"


def in_tensors(folder: Path, chance: random.Random) -> str:
    """A tensor is gone, renamed, in another's place, of another type or size, or holds other values."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    beside = [name for name in tensors if ".weight." in name or name.endswith("SCB")]
    name = chance.choice(beside if beside and chance.random() < 0.6 else list(tensors))
    tensor, what = tensors[name], chance.randrange(9)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[chance.choice([f"{name}.x", name.replace("0", "1"), name.upper(), "x"])] = tensors.pop(name)
    elif what == 2:
        other = chance.choice([one for one in tensors if one != name])
        tensors[name], tensors[other] = tensors[other], tensor
    elif what == 3:
        tensors[name] = tensor.to(
            chance.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool])
        )
    elif what == 4:
        tensors[name] = tensor.flatten()[: chance.randrange(tensor.numel() + 1)]
    elif what == 5:
        tensors[name] = torch.cat([tensor.flatten()] * 2)
    elif what == 6:
        tensors[name] = tensor[..., None] if chance.random() < 0.5 else tensor[None]
    elif what == 7:
        tensors[name] = (
            torch.full_like(tensor, chance.choice([0, 1]))
            if not tensor.is_floating_point()
            else tensor * chance.choice([float("nan"), float("inf"), 0, -1])
        )
    else:
        tensors[name] = state(tensor, chance) if "quant_state" in name else tensor.flip(0)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"format": "pt"})
    return f"tensor {name}: {what}"


def state(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """What bitsandbytes notes of a 4-bit tensor, with a field that says something else."""
    told = json.loads(bytes(tensor.tolist()))
    field = chance.choice(list(told))
    told[field] = chance.choice([*ABSURD, 64, 128, 4096, [64, 64], [10**9, 10**9], "float32", "int8", "load", "Tensor"])
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


ALTERATIONS: list[Callable[[Path, random.Random], str]] = [
    in_config,
    in_config,
    in_edits,
    in_bytes,
    in_header,
    in_tensors,
    in_tensors,
    in_tensors,
]


def computed(folder: Path) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model(input_ids=IDS).logits


def outcome(folder: Path, expected: torch.Tensor, is_ours: bool) -> str:
    """How an altered folder ends: what `verify` says, then what a plain load does.

    What is altered in config.json outside of what we put there is for transformers to bear: `verify` alone must notice.
    """
    try:
        verify(folder)
        passed = True
    except CompressionError as error:
        passed = False
        if len(str(error).splitlines()) != 1 or "\x1b" in str(error) or len(str(error)) > 1000:
            return f"WRONG: no sentence: {str(error)[:300]!r}"
    if not is_ours:
        return "passed" if passed else "refused by verify"
    try:
        found = computed(folder)
    except CompressionError as error:
        told = str(error)
        return "refused in a sentence" if len(told) < 1000 and "\x1b" not in told else f"WRONG: no sentence: {told[:300]!r}"
    except Exception as error:  # transformers' own, torch's and safetensors' errors are for what is not ours
        return f"WRONG: verify passed what a load refuses: {error}" if passed else f"refused by {type(error).__name__}"
    same = found.shape == expected.shape and bool(torch.allclose(found, expected, atol=1e-5))
    if passed and not same:
        return "WRONG: verify passed another model"
    return "unchanged" if same else "another model, which verify refuses"


def ours(folder: Path, original: Path) -> bool:
    """Whether all of the config that differs is what we wrote there."""
    try:
        one, other = (json.loads((place / "config.json").read_text()) for place in (folder, original))
        changed = {key for key in {**one, **other} if one.get(key) != other.get(key)}
        plain = (other.get("quantization_config") or {}).get("quant_method") != "hfcompress"
        still = (one.get("quantization_config") or {}).get("quant_method") == "hfcompress"
        return not changed or (changed == {"quantization_config"} and still and not plain)
    except (ValueError, AttributeError):
        return False


def work(jobs: Any, results: Any, folders: dict[str, Path]) -> None:
    """A child: tries the alterations that it is sent, one after another."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115  bitsandbytes tells every cast
    expected = {name: computed(folder) for name, folder in folders.items()}
    results.put(None)
    while (job := jobs.get()) is not None:
        seed = job
        chance = random.Random(seed)
        name = chance.choice(sorted(folders))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            shutil.copytree(folders[name], folder)
            did = f"{name}: {chance.choice(ALTERATIONS)(folder, chance)}"
            if chance.random() < 0.5:
                (folder / "checksums.json").unlink()
                did += ", without checksums"
            started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            results.put((seed, did, None))
            is_ours = ours(folder, folders[name])
            # A config that was changed and has no checksums is just another config.
            ended = outcome(folder, expected[name], is_ours) if is_ours or (folder / "checksums.json").is_file() else "not ours"
            if ended == "WRONG: verify passed another model" and not (folder / "checksums.json").is_file():
                ended = "another model, without checksums"
            took = time.monotonic() - started
            grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if took > SECONDS or grew > BYTES:
                ended = f"WRONG: it took {took:.1f} s and {grew >> 20} MB more"
            results.put((seed, did, ended))


def fuzz(seeds: list[int], place: Path, tell: Callable[[str], None] = lambda line: None) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and what went wrong, with the seed that shows it again."""
    folders, context = artifacts(place), multiprocessing.get_context("fork")
    counts, wrong, waiting = Counter[str](), [], list(seeds)
    child: Any = None
    jobs: Any = None
    results: Any = None
    while waiting:
        if child is None:
            jobs, results = context.Queue(), context.Queue()
            child = context.Process(target=work, args=(jobs, results, folders), daemon=True)
            child.start()
            results.get(timeout=120)
        seed, did, ended = waiting.pop(), "", None
        jobs.put(seed)
        limit = time.monotonic() + 10 * SECONDS
        while ended is None:
            try:
                _, did, ended = results.get(timeout=0.5)
            except Exception:  # queue.Empty: does it still live?
                if not child.is_alive():
                    ended = f"WRONG: the process crashed ({child.exitcode})"
                elif time.monotonic() > limit:
                    ended = "WRONG: it hangs"
                    child.kill()
                if ended:
                    child = None
        counts[ended.partition(":")[0]] += 1
        if ended.startswith("WRONG"):
            wrong.append(f"seed {seed}: {did}: {ended}")
            tell(wrong[-1])
    if child is not None:
        jobs.put(None)
        child.join(10)
    return counts, wrong


if __name__ == "__main__":
    total, first = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as place:
        counted, failed = fuzz(list(range(first, first + total)), Path(place), lambda line: print(line, flush=True))
    for kind, number in counted.most_common():
        print(f"{number:6} {kind}")
    sys.exit(1 if failed else 0)
