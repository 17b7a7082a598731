"""Which of transformers' architectures each compression works on: docs/COVERAGE.md and docs/coverage.json.

    python scripts/coverage.py --jobs 2 [--fresh] [--only BertForMaskedLM ...]

Every class of the auto mappings in LISTED is built tiny, with random weights, and runs six checks (CHECKS), each on a fresh
model: the edit obeys its law, and the saved model reloads with no difference at all. A row is what happened, in words.
Results are kept a class a line in build/coverage, so that a stopped run goes on; a class that kills its process is a fail.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.quantizer import forget_reading
from hfcompress.layers import holds_codes
from hfcompress.layers.bnb_library import quiet_casts
from hfcompress.layers.low_rank import LowRankLinear
from hfcompress.methods import LowRank, Quantize
from hfcompress.surgery.depth.drop import keep_layers
from hfcompress.surgery.depth.stacks import Stack, layer_stacks
from hfcompress.surgery.depth.trials import permitted, rehearse
from hfcompress.surgery.modules import swap
from hfcompress.surgery.targets import body_linears, codable_tables
from hfcompress.surgery.units.cut import cut
from hfcompress.surgery.units.gates import silenced
from hfcompress.surgery.units.spans import Units
from hfcompress.surgery.units.specimens.inputs import example, set_norms
from hfcompress.surgery.units.specimens.tiny_config import miniature
from hfcompress.surgery.units.verify import proven, units_of
from hfcompress.surgery.vocabulary.embeddings import fixed_tokens, keep_tokens, named_tokens

ROOT = Path(__file__).resolve().parent.parent
LISTED = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "AUDIO_FRAME_CLASSIFICATION",
)
SECONDS = 300  # of computing, a class
TOLERANCE = 1e-5  # of the logits' scale where that is above 1
NONE = "none: the architecture has none"

Answer = dict[str, Tensor]


class Absent(Exception):
    """The architecture has no such part."""


class Wrong(Exception):
    """A law does not hold."""


def listed() -> dict[str, str]:
    """Every class of the mappings, by name, with its model type: of several, the one it is named after."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in LISTED:
        for kind, found in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            for one in [found] if isinstance(found, str) else found:
                kinds[one].append(kind)
    return {one: max(found, key=lambda kind: _named_after(one, kind)) for one, found in kinds.items()}


def _named_after(name: str, kind: str) -> tuple[bool, bool]:
    config = CONFIG_MAPPING_NAMES.get(kind, "").removesuffix("Config")
    return name.startswith(config), config.lower() == re.sub("[-_]", "", kind)


def build(name: str, kind: str, layers: int = 2) -> Any:
    """A tiny random model in eval mode. Fresh biases are zero and fresh norms one, which would hide mistakes: so noise."""
    cls = getattr(transformers, name)
    known = transformers.CONFIG_MAPPING[kind]() if kind in transformers.CONFIG_MAPPING else None
    config = miniature(known if isinstance(known, cls.config_class) else cls.config_class(), layers=layers, heads=4)
    if kind == "reformer":
        config.is_decoder = name == "ReformerModelWithLMHead"
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.dim() == 1 or not parameter.any()):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def answer(model: Any, inputs: dict[str, Tensor]) -> Answer:
    """The logits of a forward, by name; the first tensor of a model that has none."""
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(**inputs)
    if isinstance(out, Tensor):
        return {"0": out}
    named = {key: value for key, value in out.items() if isinstance(value, Tensor) and value.is_floating_point()}
    logits = {key: value for key, value in named.items() if "logit" in key or "score" in key or "log_probs" in key}
    return {key: value.float() for key, value in (logits or dict(list(named.items())[:1])).items()}


def distance(one: Answer, other: Answer) -> float:
    """The largest difference, relative to the scale of `one` where that is above 1; infinite if shapes or finiteness differ."""
    worst = 0.0
    for key, value in one.items():
        if key not in other or value.shape != other[key].shape or not torch.isfinite(other[key]).all():
            return float("inf")
        worst = max(worst, float((value - other[key]).abs().max()) / max(1.0, float(value.abs().max())))
    return worst


def check_same(one: Answer, other: Answer, what: str, tolerance: float = TOLERANCE) -> None:
    off = distance(one, other)
    if not off <= tolerance:
        raise Wrong(f"{what}: logits off by {off:.2g}")


def check_reload(model: Any, inputs: dict[str, Tensor]) -> None:
    """As `artifact.save` does, and loaded again: no difference at all."""
    model.eval()
    before = answer(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        describe(model)
        forget_reading(model)
        model.save_pretrained(folder)
        # Out of the mapped file: where a tensor's place is not aligned, a kernel may sum in another order.
        again = copy.deepcopy(type(model).from_pretrained(folder).eval())
    after = answer(again, inputs)
    if before.keys() != after.keys() or not all(torch.equal(before[key], after[key]) for key in before):
        raise Wrong(f"reload: logits off by {distance(before, after):.2g}")


def generated(model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """Four more tokens, where the class and these inputs can be generated from."""
    if not model.can_generate():
        return None
    given = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def generates(model: Any, inputs: dict[str, Tensor]) -> bool:
    try:
        return generated(model, inputs) is not None
    except Exception:
        return False


# the six checks


def check_reached(name: str, kind: str, dense: Answer) -> None:
    """Absent, if the linear layers of the body have no say in the logits, or there are none."""
    model = build(name, kind)
    for part in body_linears(model):
        nn.init.zeros_(model.get_submodule(part).weight)
    if distance(dense, answer(model, example(model))) == 0:
        raise Absent


def low_rank(name: str, kind: str) -> None:
    model = build(name, kind)
    inputs = example(model)
    dense = answer(model, inputs)
    check_reached(name, kind, dense)
    method = LowRank(ratio=0.5)
    for part in body_linears(model):
        old: Any = model.get_submodule(part)
        matrix = old.weight.detach().T if type(old).__name__ == "Conv1D" else old.weight.detach()
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        swap(model, part, LowRankLinear.from_dense(old, right * values.sqrt()[:, None], left * values.sqrt()))
    check_same(dense, answer(model, inputs), "full rank against dense", 1e-4)
    model = build(name, kind)
    method.run(model, None)
    if distance(dense, answer(model, inputs)) == 0:
        raise Wrong("half of the parameters: the logits do not change")
    check_reload(model, inputs)


def quantize(name: str, kind: str) -> None:
    """Of either engine; ours with the embeddings, where there are any."""
    for engine in ("bitsandbytes", "hfcompress"):
        model = build(name, kind)
        inputs = example(model)
        dense = answer(model, inputs)
        check_reached(name, kind, dense)
        coded = Quantize(8, engine=engine, embeddings=8 if engine == "hfcompress" and codable_tables(model) else None)
        coded.run(model, None)
        off = distance(dense, answer(model, inputs))
        if not any(holds_codes(module) for module in model.modules()) or not off < 0.5:
            raise Wrong(f"8 bits of {engine} against dense: logits off by {off:.2g}")
        check_reload(model, inputs)


def passed(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """What a layer was given, in the form of its own output; some hand on more than the hidden states."""
    tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    kind = type(layer).__name__
    if "Reformer" in kind:
        return output._replace(attn_output=kwargs["prev_attn_output"], hidden_states=kwargs["hidden_states"])
    if isinstance(output, Tensor):
        return tensors[0]
    if isinstance(output, dict):
        return {**output, next(iter(output)): tensors[0]}
    second = next((place for name, place in (("LxmertX", 2), ("XLNet", 1), ("Lilt", 1), ("Zaya", 1)) if name in kind), None)
    rest = list(output[1:]) if second is None else [args[second], *output[2:]]
    if carried := [key for key in kwargs if key.startswith("prev_")]:  # hyper-connections
        rest[-1] = kwargs[carried[0]]
    return type(output)([tensors[0], *rest])


@contextmanager
def skipped(model: Any, stack: Stack, keep: list[int]) -> Iterator[None]:
    """The layers that are not kept give back what they were given."""
    members: Any = model.get_submodule(stack.name)
    calls = [0]

    def skipping(layer: Any, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            is_kept = stack.repeats and (calls[0] - 1) % stack.count in keep
            output = forward(*args, **kwargs)
            return output if is_kept else passed(layer, args, kwargs, output)

        return run

    chosen = list(members) if stack.repeats else [members[i] for i in range(stack.count) if i not in keep]
    if stack.name.endswith(".attentions"):  # XLM keeps the parts of its layers side by side
        with silenced_beside(model, stack, keep):
            yield
        return
    for one in chosen:  # no hooks: SqueezeBERT calls forward itself
        one.forward = skipping(one, one.forward)
    try:
        yield
    finally:
        for one in chosen:
            del one.forward


@contextmanager
def silenced_beside(model: Any, stack: Stack, keep: list[int]) -> Iterator[None]:
    """Attentions and feed-forwards that add nothing, and norms that pass on what they are given."""

    def nothing(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    base = model.get_submodule(stack.name.rpartition(".")[0])
    handles = []
    for index in set(range(stack.count)) - set(keep):
        handles += [one[index].register_forward_hook(nothing, with_kwargs=True) for one in (base.attentions, base.ffns)]
        norms = (base.layer_norm1, base.layer_norm2)
        handles += [one[index].register_forward_hook(passed, with_kwargs=True) for one in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers(name: str, kind: str) -> None:
    """Every stack by itself: half of its layers, or as many as its config can tell."""
    model, dense, depth = deep(name, kind)
    inputs = example(model)
    talks = generates(copy.deepcopy(model), inputs)
    stacks = [stack for stack in layer_stacks(model) if stack.count > 1]
    if not stacks:
        raise Absent
    refusal: CompressionError | None = None
    done = 0
    for stack in stacks:
        cutting = build(name, kind, layers=depth)
        scores = torch.tensor([(index % 2 == 0) - index * 1e-3 for index in range(stack.count)])
        try:
            keep = fewest(cutting, stack, scores)
        except CompressionError as error:
            refusal = refusal or error
            continue
        with skipped(cutting, stack, keep):
            expected = answer(cutting, inputs)
        if distance(dense, expected) == 0:  # a stack that these inputs do not reach
            continue
        keep_layers(cutting, {stack.name: keep}, "coverage")
        check_same(expected, answer(cutting, inputs), f"layers {keep} of {stack.name} against skipping the others")
        check_reload(cutting, inputs)
        if talks:  # last, as a short text makes another model of BigBird
            generated(cutting, inputs)
        done += 1
    if not done and refusal is not None:
        raise refusal
    if not done:
        raise Absent


def deep(name: str, kind: str) -> tuple[Any, Answer, int]:
    """A model of four layers, or of two where its own cache wants as many layers in the encoder as in the decoder."""
    for depth in (4, 2):
        model = build(name, kind, layers=depth)
        try:
            return model, answer(model, example(model)), depth
        except IndexError:
            continue
    raise AssertionError("it ran when it was listed")


def fewest(model: Any, stack: Stack, scores: Tensor) -> list[int]:
    """Layers to keep: half, or more where the config can't tell so few."""
    half = (stack.count + 1) // 2
    numbers = list(dict.fromkeys((half, *range(half + 1, stack.count))))
    for number in numbers:
        try:
            keep = permitted(model, stack, scores, number, "coverage")
            rehearse(model, {stack.name: keep}, "coverage")
            return keep
        except CompressionError as error:
            if number == numbers[-1]:
                raise error
    raise AssertionError("a stack has at least two layers")


def vocab(name: str, kind: str) -> None:
    model = build(name, kind)
    inputs = example(model)
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        raise Absent from None
    ids = {key: value for key, value in inputs.items() if value.dtype == torch.long and key.endswith("input_ids")}
    if not isinstance(table, nn.Embedding) or not ids:
        raise Absent
    size, used = table.num_embeddings, set(torch.cat([value.flatten() for value in ids.values()]).tolist())
    special = {token for token in range(size) if token not in used and (token < 8 or token > size - 8)}
    keep = sorted(used | special | set(range(0, size, 3)) | named_tokens(model) | set(range(fixed_tokens(model))))
    before, talks = answer(model, inputs), generates(copy.deepcopy(model), inputs)
    keep_tokens(model, keep)
    place = torch.zeros(size, dtype=torch.long)
    place[keep] = torch.arange(len(keep))
    mapped = {key: place[value] if key in ids else value for key, value in inputs.items()}
    expected = {key: value[..., keep] if value.shape[-1] == size else value for key, value in before.items()}
    check_same(expected, answer(model, mapped), "kept tokens against all")
    check_reload(model, mapped)
    if talks:
        generated(model, mapped)


def some(units: Units, number: int) -> Tensor:
    """About half of the units, other ones and another number in every layer; kernels for experts want eights."""
    half = units.count // 2
    size = half - half % 8 if units.lanes > 1 and half >= 8 else max(1, half - number % 2)
    torch.manual_seed(number)
    chosen = [torch.randperm(units.count)[:size].sort().values for _ in range(units.lanes)]
    return torch.stack(chosen) if units.lanes > 1 else chosen[0]


def units(which: str) -> Callable[[str, str], None]:
    """Heads or neurons: cutting a unit equals silencing it."""

    def check(name: str, kind: str) -> None:
        model = build(name, kind)
        inputs = example(model)
        set_norms(model, inputs)  # or units of deep convolutions would hardly be felt
        dense, talks = answer(model, inputs), generates(copy.deepcopy(model), inputs)
        if which in proven(model).absent:
            raise Absent
        found = units_of(model, which)
        keeps = [some(one, number) for number, one in enumerate(found)]
        with silenced(model, list(zip(found, keeps, strict=True))):
            expected = answer(model, inputs)
        if distance(dense, expected) == 0:
            raise Wrong("silencing half of the units is not felt")
        for one, keep in zip(found, keeps, strict=True):
            cut(model, one, keep)
        check_same(expected, answer(model, inputs), "cut against silenced")
        check_reload(model, inputs)
        if talks:
            generated(model, inputs)

    return check


CHECKS: dict[str, Callable[[str, str], None]] = {
    "heads": units("heads"),
    "neurons": units("neurons"),
    "layers": layers,
    "vocab": vocab,
    "low_rank": low_rank,
    "quantize": quantize,
}


# running


def told(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def row(check: Callable[[str, str], None], name: str, kind: str, debug: bool) -> str:
    try:
        check(name, kind)
    except Absent:
        return NONE
    except CompressionError as error:
        return NONE if "the architecture has none" in str(error) else f"refused: {told(error)}"
    except TimeoutError:
        raise
    except Wrong as error:
        return f"fail: wrong result, {told(error)}"
    except Exception as error:
        if debug:
            traceback.print_exc()
        return f"fail: {type(error).__name__}: {told(error)}"
    return "pass"


def examine(name: str, kind: str, only: list[str], debug: bool) -> dict[str, Any]:
    """The class's row, or the reason why it was not built."""
    found: dict[str, Any] = {"class": name, "model_type": kind}
    try:
        model = build(name, kind)
        inputs = example(model)
        first, second = answer(model, inputs), answer(model, inputs)
        if not all(torch.isfinite(value).all() for value in first.values()):
            return {**found, "not_built": "its logits are not finite"}
        if distance(first, second) != 0:
            return {**found, "not_built": "its forward is not deterministic in eval mode"}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = copy.deepcopy(type(model).from_pretrained(folder).eval())  # as in check_reload
        if distance(first, answer(again, inputs)) != 0:
            return {**found, "not_built": "the untouched tiny model is another one after save_pretrained and from_pretrained"}
    except Exception as error:
        if debug:
            traceback.print_exc()
        return {**found, "not_built": f"{type(error).__name__}: {told(error)}"}
    for title, check in CHECKS.items():
        if not only or title in only:
            found[title] = row(check, name, kind, debug)
    return found


def late(*_: Any) -> None:
    raise TimeoutError


def work(folder: Path, shard: str, names: list[str], checks: list[str], debug: bool) -> None:
    """Every class of the shard that has no line yet."""
    number, of = (int(part) for part in shard.split("/"))
    done, file = results(folder), folder / f"{number}-of-{of}.jsonl"
    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    for index, (name, kind) in enumerate(sorted(listed().items())):
        if index % of != number - 1 or name in done or (names and name not in names and kind not in names):
            continue
        mark = folder / f"{name}.started"
        mark.touch()
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(10 * SECONDS)  # waiting for nothing
        try:
            found = examine(name, kind, checks, debug)
        except TimeoutError:
            found = failed(name, kind, f"fail: no answer within {SECONDS} seconds of computing")
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({**found, "seconds": round(time.monotonic() - began, 1)}) + "\n")
        mark.unlink()


def failed(name: str, kind: str, why: str) -> dict[str, Any]:
    return {"class": name, "model_type": kind, **dict.fromkeys(CHECKS, why)}


def results(folder: Path) -> dict[str, dict[str, Any]]:
    rows = (json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines())
    return {one["class"]: one for one in rows}


def drive(folder: Path, jobs: int, names: list[str], checks: list[str]) -> None:
    """A process a shard, started again after a crash; the class it died on is a fail."""
    more = [*(["--only", *names] if names else []), *(["--checks", *checks] if checks else [])]
    running: dict[int, subprocess.Popen[bytes]] = {}
    left = set(range(1, jobs + 1))
    while left:
        for number in sorted(left):
            if number not in running:
                command = [sys.executable, __file__, "--work", str(folder), "--shard", f"{number}/{jobs}", *more]
                log = (folder / f"{number}.log").open("ab")
                running[number] = subprocess.Popen(command, stdout=log, stderr=log)
            code = running[number].poll()
            if code == 0:
                left.discard(number)
            elif code is not None:
                bury(folder, number, jobs, code)
                del running[number]
        time.sleep(1)
    print(f"{len(results(folder))} of {len(listed())} classes")


def bury(folder: Path, number: int, of: int, code: int) -> None:
    mine = [name for index, name in enumerate(sorted(listed())) if index % of == number - 1]
    marks = [name for name in mine if (folder / f"{name}.started").exists()]
    if not marks:
        raise SystemExit(f"shard {number} ended with {code}; see {folder / f'{number}.log'}")
    with (folder / f"{number}-of-{of}.jsonl").open("a", encoding="utf-8") as lines:
        for name in marks:
            lines.write(json.dumps(failed(name, listed()[name], f"fail: the process ended with {code}")) + "\n")
            (folder / f"{name}.started").unlink()


# telling


def verdict(text: str) -> str:
    return text.partition(":")[0]


def write(folder: Path, out: Path) -> None:
    found = results(folder)
    built = sorted((one for one in found.values() if "not_built" not in one), key=lambda one: (one["model_type"], one["class"]))
    keys = ("class", "model_type", *CHECKS)
    classes = [{key: one[key] for key in keys if key in one} for one in built]
    report = {"classes": classes, "listed": len(listed())}
    out.mkdir(parents=True, exist_ok=True)
    (out / "coverage.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    missing = sorted((one["model_type"], one["class"], one["not_built"]) for one in found.values() if "not_built" in one)
    (out / "COVERAGE.md").write_text("\n".join(markdown(classes, missing)) + "\n", encoding="utf-8")


def markdown(classes: list[dict[str, str]], missing: list[tuple[str, str, str]]) -> Iterator[str]:
    types = {one["model_type"] for one in classes}
    yield "# Coverage\n"
    yield (
        f"The auto mappings of transformers {transformers.__version__} for {', '.join(LISTED).lower().replace('_', ' ')} list "
        f"{len(listed())} classes. {len(classes)} of them, over {len(types)} model types, were built tiny (2 layers, 4 heads, "
        f"random weights) and run here, with torch {torch.__version__}, by `python scripts/coverage.py --jobs 2`; "
        f"{len(missing)} could not be built or run, for the reasons at the end.\n"
    )
    yield (
        "A pass: the edit obeys its law on the logits (cutting heads or neurons equals silencing them, cutting layers equals "
        "skipping them, cutting tokens leaves the others' logits, full rank equals dense, 8 bits stay close), the saved model "
        "reloads through `from_pretrained` with no difference at all, and a class that generates still does.\n"
    )
    yield "| | with the part | pass | refused | fail |\n|---|---:|---:|---:|---:|"
    for check in CHECKS:
        count = Counter(verdict(one[check]) for one in classes if check in one)
        having = sum(count.values()) - count["none"]
        shares = " | ".join(f"{count[key]} ({count[key] / max(1, having):.1%})" for key in ("pass", "refused", "fail"))
        yield f"| {check} | {having} | {shares} |"
    yield "\n## By model type\n"
    yield "A mark holds for every class of the line: ✓ pass, r refused, ✗ fail, – no such part.\n"
    yield f"| model type | classes | {' | '.join(CHECKS)} |\n|---|---|{':-:|' * len(CHECKS)}"
    signs = {"pass": "✓", "refused": "r", "fail": "✗", "none": "–"}
    lines: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for one in classes:
        marks = [signs[verdict(one[check])] if check in one else " " for check in CHECKS]
        lines[(one["model_type"], *marks)].append(one["class"])
    for (kind, *marks), names in lines.items():
        yield f"| {kind} | {', '.join(names)} | {' | '.join(marks)} |"
    yield "\n## Why not\n"
    for check in CHECKS:
        reasons: dict[str, list[str]] = defaultdict(list)
        for one in classes:
            if verdict(one.get(check, "pass")) in ("refused", "fail"):
                reasons[one[check]].append(one["class"])
        if reasons:
            yield f"### {check}\n"
            yield from (f"- {', '.join(names)}: {why}" for why, names in sorted(reasons.items()))
            yield ""
    yield "## Not built\n"
    yield from (f"- {name} ({kind}): {why}" for kind, name, why in missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--only", nargs="+", default=[], help="classes or model types")
    parser.add_argument("--checks", nargs="+", default=[], choices=list(CHECKS), help="some of the checks")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "coverage", help="where finished classes are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where the report goes")
    parser.add_argument("--shard", help="one shard in this process, such as 1/2; writes no report")
    parser.add_argument("--debug", action="store_true", help="tracebacks, with --shard")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.shard:
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(1)
        with quiet_casts():
            return work(args.work, args.shard, args.only, args.checks, args.debug)
    if args.fresh:
        for file in args.work.iterdir():
            file.unlink()
    drive(args.work, args.jobs, args.only, args.checks)
    write(args.work, args.out)


if __name__ == "__main__":
    main()
