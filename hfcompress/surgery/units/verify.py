"""Proves where the units of an architecture are, on a small random model of it, before the user's own model is touched.

What `reader` found is a guess, and so is what a forward counts. The proof: units cut out equal units silenced, unevenly in all
layers, `generate` goes on as the silenced model would, and the structure can be told and rebuilt. What is not proven is refused
by name.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hfcompress.checkpoint.describe import diff
from hfcompress.checkpoint.errors import CompressionError, first_line
from hfcompress.checkpoint.integers import CONFIG_COUNTS, OWN_COUNTS, WIDTH_COUNTS, largest
from hfcompress.checkpoint.structure import rebuild, twin
from hfcompress.surgery.units.cut import cut
from hfcompress.surgery.units.discover import read
from hfcompress.surgery.units.gates import silenced
from hfcompress.surgery.units.rescale import fitted
from hfcompress.surgery.units.spans import Counter, Segment, Span, Units
from hfcompress.surgery.units.specimens.inputs import example, set_norms
from hfcompress.surgery.units.specimens.tiny_config import miniature

KINDS = ("heads", "neurons")
log = logging.getLogger("hfcompress")
SMALL = 2_000_000
"""Parameters up to which a model is its own specimen."""


@dataclass(frozen=True)
class Proof:
    """What holds for an architecture: proven units of a specimen, and why a kind has none."""

    specimen: nn.Module
    units: dict[str, list[Units]]
    refusals: dict[str, str]
    absent: frozenset[str]
    """Kinds that the architecture does not have."""
    left: dict[str, str]
    """Why some units of a kind are left alone where others are proven."""


def units_of(model: nn.Module, kind: str, instead: str = "choose what needs no units") -> list[Units]:
    """All units of a kind, heads or neurons, first layer first, as the model stands. CompressionError without a proof, which
    advises `instead`."""
    proof = proven(model)
    if kind in proof.refusals:
        raise CompressionError(f"{type(model).__name__}: {proof.refusals[kind]}; {instead}.")
    if kind in proof.left:
        log.info("%s: some %s are left alone: %s", type(model).__name__, kind, proof.left[kind])
    described = twin(model, _plain_config(model))
    return [fitted(units, proof.specimen, described, model, instead) for units in proof.units[kind]]


def proven(model: Any) -> Proof:
    """The proof for this class and config, made once in a process."""
    config = _plain_config(model)
    key = (type(model), config.to_json_string(use_diff=False))
    if key not in _PROOFS:
        while len(_PROOFS) >= 16:
            del _PROOFS[next(iter(_PROOFS))]
        _PROOFS[key] = _prove(type(model), config)
    return _PROOFS[key]


_PROOFS: dict[tuple[type, str], Proof] = {}


def _prove(kind: Any, config: PreTrainedConfig) -> Proof:
    specimen, batch, found, fault = nn.Module(), {}, [], ""
    try:
        specimen = _specimen(kind, config)
        batch = example(specimen)
        set_norms(specimen, batch)
        found = read(copy.deepcopy(specimen), batch)  # some models keep what they computed, with its history
    except Exception as error:  # transformers raises whatever it likes
        fault = f"a small random model of it does not run ({first_line(error)}), so where its units are can't be proven"
    units: dict[str, list[Units]] = {}
    whys: dict[str, str] = {}
    for part in KINDS:
        units[part], why = _prove_all(specimen, batch, [one for one in found if one.kind == part])
        whys[part] = fault or why
    missing = [part for part in KINDS if not units[part]]
    absent = frozenset(part for part in missing if hasattr(specimen, "config") and _has_none(specimen, part))
    refusals = {part: _refusal(part, part in absent, whys[part]) for part in missing}
    return Proof(specimen, units, refusals, absent, {part: why for part, why in whys.items() if why and part not in missing})


def _plain_config(model: Any) -> PreTrainedConfig:
    """The config without what makes no other architecture: how it is stored, what it answers, which kernel attends.

    Under eager attention every count that a forward could read is read; sdpa may leave groups of keys and values to its kernel.
    """
    config = copy.deepcopy(model.config)
    config.quantization_config = None
    del config.quantization_config
    config._attn_implementation = "eager"
    config.output_hidden_states = config.output_attentions = False
    config.return_dict = True
    return config


def _specimen(kind: Any, config: PreTrainedConfig) -> nn.Module:
    """A small random model of the class in float32, with biases and norms that are not neutral."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        specimen: Any = kind(config if size <= SMALL else miniature(config)).float().eval()
        for parameter in specimen.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
                if sum(length > 1 for length in parameter.shape) < 2:
                    parameter += 0.01 * torch.randn_like(parameter)
                elif parameter.any() and parameter.isfinite().all():
                    parameter *= 3  # so that ReLUs follow their input and not the noise
                else:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    return specimen


def _prove_all(specimen: Any, batch: dict[str, Tensor], candidates: list[Units]) -> tuple[list[Units], str]:
    """The candidates that hold, alone and together, and why the others do not."""
    if not candidates:
        return [], ""
    for some in (candidates, _with_tables(specimen, candidates) if candidates[0].kind == "heads" else []):
        for guess in _guesses(specimen, some):
            if _fails(specimen, batch, guess) is None:
                return guess, ""
    proven, why = [], ""
    for alike in _alike(candidates):
        failures: list[str] = []
        for guess in (guess for some in (alike, _as_one(alike)) for guess in _guesses(specimen, some)):
            failure = _fails(specimen, batch, guess)
            if failure is None:
                proven += guess
                break
            failures.append(f"{alike[0].name}: {failure}")
        else:
            why = why or failures[0]
    if proven and (failure := _fails(specimen, batch, proven)) is not None:
        return [], f"cut in several sorts of layers at once, {failure}"
    return sorted(proven, key=_order(candidates)), why


def _with_tables(specimen: nn.Module, candidates: list[Units]) -> list[Units]:
    """Heads of all layers as one decision, with the tables of relative positions that are read without a gradient."""
    counts = {units.count for units in candidates}
    tables = tuple(
        Span(name, axis, (Segment(1),))
        for name, parameter in specimen.named_parameters()
        for axis, length in enumerate(parameter.shape)
        if "rel" in name and {length} == counts and not any(span.tensor == name for one in candidates for span in one.inputs)
    )
    return [replace(one, inputs=one.inputs + tables) for one in _as_one(candidates)] if tables else []


def _as_one(units: list[Units]) -> list[Units]:
    """One decision for several layers that hand each other something of the units' number: T5's cross attentions."""
    inputs = tuple(span for one in units for span in one.inputs)
    outputs = tuple(span for one in units for span in one.outputs)
    return [replace(units[0], inputs=inputs, outputs=outputs)] if units[0].kind == "heads" and units[0].lanes == 1 else []


def _order(candidates: list[Units]) -> Callable[[Units], int]:
    places = {one.outputs[0]: number for number, one in enumerate(candidates)}
    return lambda units: places[units.outputs[0]]


def _alike(candidates: list[Units]) -> list[list[Units]]:
    """Candidates that differ in nothing but the layer's number."""
    groups: dict[Any, list[Units]] = {}
    for one in candidates:
        sizes = tuple(span.segments for span in (*one.inputs, *one.outputs))
        groups.setdefault((re.sub(r"\.\d+", "", one.name), one.count, one.lanes, sizes), []).append(one)
    return list(groups.values())


def _guesses(specimen: nn.Module, candidates: list[Units]) -> Iterator[list[Units]]:
    """The candidates with what their modules may count: the units, then widths as well, then nothing."""
    seen: list[list[Units]] = []
    groups = ("num_key_value_groups",)
    more = (WIDTH_COUNTS, groups, (*WIDTH_COUNTS, *groups), CONFIG_COUNTS)
    if not candidates:
        return
    for names in (OWN_COUNTS, *((*OWN_COUNTS, *extra) for extra in more), WIDTH_COUNTS, ()):
        guess = [replace(units, counters=_counters(specimen, units, names)) for units in candidates]
        if guess not in seen:
            seen.append(guess)
            yield guess


def _counters(specimen: nn.Module, units: Units, names: tuple[str, ...]) -> tuple[Counter, ...]:
    """Integers with these names that the units divide, in the modules around the projections."""
    owners: dict[str, None] = {}
    for span in (*units.inputs, *units.outputs):
        parent = span.module.rpartition(".")[0]
        owners |= dict.fromkeys((span.module, parent))
    found = []
    for owner in owners:
        for key in names:
            value = largest(specimen.get_submodule(owner), key)
            if value and value % units.count == 0:
                found.append(Counter(owner, key, value // units.count))
    return tuple(found)


def _fails(specimen: Any, batch: dict[str, Tensor], units: list[Units]) -> str | None:
    """None if cutting some of each equals silencing them; else what went wrong."""
    # With two of a kind, layers lose one or none in turns: both turns, as one head of a first layer would fit any number.
    turns = (0, 1) if any(one.count == 2 for one in units) else (0,)
    return next((why for turn in turns if (why := _fails_in(specimen, batch, units, turn)) is not None), None)


def _fails_in(specimen: Any, batch: dict[str, Tensor], units: list[Units], turn: int) -> str | None:
    groups = [[(one, _some(one, number + turn)) for number, one in enumerate(alike)] for alike in _alike(units)]
    plain = answers(specimen, batch)
    try:
        for group in groups:
            with silenced(specimen, group):
                if any(keep.shape[-1] < one.count for one, keep in group) and all(map(close, answers(specimen, batch), plain)):
                    return "silencing units is not felt, so a proof would say nothing"
        pairs = [pair for group in groups for pair in group]
        with silenced(specimen, pairs):
            expected, said = answers(specimen, batch), spoken(copy.deepcopy(specimen), batch)  # BigBird becomes another
    except Exception as error:
        return f"the units can't be silenced ({first_line(error)})"
    smaller, inside = copy.deepcopy(specimen), list[str]()
    try:
        for one, keep in pairs:
            cut(smaller, one, keep)
        with _noting(smaller, inside):
            got = answers(smaller, batch)
    except Exception as error:
        where = f"{inside[-1] or 'the model'} ({type(smaller.get_submodule(inside[-1])).__name__})" if inside else "the model"
        return f"{where} is written for all of them, and does not run with some cut out ({first_line(error)})"
    for mine, theirs in zip(got, expected, strict=True):
        if mine.shape != theirs.shape or not close(mine, theirs):
            return "cutting is not the same as silencing"
    try:
        rebuild(twin(smaller), diff(smaller))
    except CompressionError as error:
        return f"what is left can't be saved ({first_line(error)})"
    if said is not None and not _says(smaller, batch, said):
        return "generate does not go on as the silenced model would"
    return None


@contextmanager
def _noting(model: nn.Module, inside: list[str]) -> Iterator[None]:
    """The names of the modules that a forward is in, the innermost last; they stay where it fails."""

    def leave(*_: Any) -> None:
        inside.pop()

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _some(units: Units, number: int) -> Tensor:
    """Units to keep, other ones in every layer, and another number in the next layer of its sort."""
    if units.lanes > 1:
        fewer = 8 if units.count > 8 else 1  # kernels for stacked experts want multiples of eight
        start = [(lane + number) % (units.count - fewer) for lane in range(units.lanes)]
        return torch.stack([torch.tensor([i for i in range(units.count) if not s <= i < s + fewer]) for s in start])
    fewer = min(units.count - 1, 1 + max(1, units.count // 4) * (number % 2)) if units.count > 2 else 1 - number % 2
    pruned = {(number + 2 * i) % units.count for i in range(fewer)}
    return torch.tensor([i for i in range(units.count) if i not in pruned])


def close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal but for rounding, measured against the largest entry where that is above one."""
    scale = max(1.0, float(theirs.abs().max()))
    return bool((mine - theirs).abs().max() <= tolerance * scale)


@torch.no_grad()
def answers(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Every floating tensor that the model answers with, in float32."""
    torch.manual_seed(0)
    output = model(**batch)
    values = output.values() if hasattr(output, "values") else output
    return [value.float() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


@torch.no_grad()
def spoken(model: Any, batch: dict[str, Tensor]) -> Tensor | None:
    """A few tokens of greedy decoding; None where the model does not generate."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return None
    prompt = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    try:
        return model.generate(**prompt, max_new_tokens=3, do_sample=False, num_beams=1)
    except Exception:
        return None


def _says(model: Any, batch: dict[str, Tensor], expected: Tensor) -> bool:
    said = spoken(model, batch)
    return said is not None and torch.equal(said, expected)


def _has_none(specimen: Any, kind: str) -> bool:
    """Whether the architecture has nothing of the kind, as far as the names of its classes and of its config's fields tell."""
    words = {"heads": ("attention", "attn"), "neurons": ("mlp", "feedforward", "ffn", "intermediate", "ff", "experts")}[kind]
    names = {type(module).__name__.lower() for module in specimen.modules()}
    if kind == "heads" and not re.search(r'"\w*heads?"', specimen.config.to_json_string(use_diff=False)):
        return True
    return not any(word in name for name in names for word in words)


def _refusal(kind: str, is_absent: bool, why: str) -> str:
    if is_absent:
        return f"the architecture has no {kind}"
    return why or f"its {kind} depend on each other (a norm or a mixture over all of them), so none can be cut alone"
