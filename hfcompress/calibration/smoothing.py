"""Scales of columns moved into what comes before them, so that rounding hurts less and the model computes the same.

A layer reads x, which a norm or another projection says: W x = (W diag(s)) (x / s), and x / s is said by a norm whose weight is
divided by s, or by a projection whose rows are. Columns that matter get a larger s, and finer steps with it (AWQ: Lin et al.
2023, arXiv 2306.00978); inputs that stand out become smaller before they are rounded (SmoothQuant: Xiao et al. 2022, arXiv
2211.10438). The s are powers of two: dividing by them and multiplying again gives the very same numbers.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating, given, singles, told
from hfcompress.calibration.formats import Format
from hfcompress.calibration.processes import agreed
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import KINDS, features, kind_of
from hfcompress.layers.base import is_conv1d

log = logging.getLogger(__name__)
STRENGTHS = tuple(step / 10 for step in range(1, 10))
"""Powers to which sizes of columns are raised in the search; no scales at all are tried too, so that nothing gets worse."""
ROWS, OUTPUTS = 128, 512
"""Tokens, and rows of a weight, that a choice is judged by."""
TOKENS = 32
"""Of the text that a place is tried on."""
INPUT_STEPS = 127
"""To either side of zero, of inputs that are rounded to 8 bits."""
Place = tuple[int, int]
"""Where a tensor lies in memory, and its elements: what is read there is what was said there."""


@dataclass(frozen=True)
class Fold:
    """`readers` read what `source` says and nothing else does; the proof is that scales between them change no output."""

    source: str
    readers: tuple[str, ...]
    how: Literal["scale", "one plus"] = "scale"
    """Whether what `source` says grows with its tensors, or, as in Gemma's norms, with one plus its weight."""

    @property
    def pattern(self) -> str:
        """The same for the same place in every layer: equal numbers are equal letters."""
        numbers: dict[str, str] = {}
        told = f"{self.source} {self.readers} {self.how}"
        return re.sub(r"\d+", lambda found: numbers.setdefault(found[0], f"<{len(numbers)}>"), told)


@torch.no_grad()
def smooth(model: Any, formats: Mapping[str, Format], batches: MakeBatches | None, asked: str) -> dict[Fold, Tensor]:
    """Scale the columns of these layers as is best before they are stored so; the scales (columns,) that are not all one.

    Judged by what the layers say on samples when they are rounded plainly, and their inputs too where the format does that.
    CompressionError where the model has no place for scales.
    """
    with evaluating(model):
        folds = [fold for fold in provable(model, next(iter(given(batches, asked)))) if formats.keys() & fold.readers]
        if not folds:
            raise CompressionError(
                f"{asked}: {type(model).__name__} has no place for scales, as what its layers read goes elsewhere too, or is "
                f"read by several layers in turn; possible are models like Llama, GPT-2, BERT and ViT; leave smooth out."
            )
        seen = _seen(model, folds, batches, asked)
    found: dict[Fold, Tensor] = {}
    before, after = 0.0, 0.0
    for fold in folds:
        scales, was, becomes = _best(model, fold, formats, seen.get(fold))
        scales = agreed(scales).to(scales.device)  # whatever tokens a process saw
        before, after = before + was, after + becomes
        if bool((scales != 1).any()):
            scale(model, fold, scales)
            found[fold] = scales
    line = (
        "%s: scales moved in %d of %d places; rounded plainly, outputs are off by %.3g of their mean square, and were by %.3g."
    )
    log.info(line, asked, len(found), len(folds), after / len(folds), before / len(folds))
    return found


def scale(model: nn.Module, fold: Fold, scales: Tensor) -> None:
    """Divide what the source says by `scales` (columns,), and multiply the readers' columns by them."""
    source: Any = model.get_submodule(fold.source)
    for leaf, value in list(source.named_parameters(recurse=False)):
        over = scales.to(value)
        if value.dim() == 2 and not is_conv1d(source):
            over = over[:, None]
        _put(source, leaf, value / over if fold.how == "scale" else (1 + value) / over - 1)
    for name in fold.readers:
        reader: Any = model.get_submodule(name)
        over = scales.to(reader.weight)
        _put(reader, "weight", reader.weight * (over[:, None] if is_conv1d(reader) else over))


def _put(module: Any, leaf: str, value: Tensor) -> None:
    """In a parameter of its own, so that what was there can be given back."""
    setattr(module, leaf, nn.Parameter(value.contiguous(), requires_grad=getattr(module, leaf).requires_grad))


@torch.no_grad()
def provable(model: Any, batch: dict[str, Tensor]) -> list[Fold]:
    """Where scales change nothing, found by trying them on one example of a batch: for each tensor that Linear or Conv1D layers
    read, by the norm that says it, or by a projection of the same width a little before."""
    writes = model.config.is_encoder_decoder and "decoder_input_ids" not in batch  # then its decoder is given the labels
    example = _short(next(singles(model, {name: value for name, value in batch.items() if writes or name != "labels"})))
    before, places = _places(model, example)
    alike: dict[str, bool] = {}
    proven: list[Fold] = []
    while places := [place for place in places if place]:
        tried = [place.pop(0) for place in places]
        for fold in tried:  # what does not hold in the first layer is not tried in the others
            if fold.pattern not in alike:
                alike[fold.pattern] = bool(_holding(model, example, before, [fold]))
        holding = _holding(model, example, before, [fold for fold in tried if alike[fold.pattern]])
        proven += holding
        places = [place for fold, place in zip(tried, places, strict=True) if fold not in holding]
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted(proven, key=lambda fold: order[fold.readers[0]])


def _short(example: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first tokens of a text are enough, padding left out."""
    ids = example.get("input_ids")
    if ids is None or ids.dim() != 2:
        return example
    mask = example.get("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        return example
    kept = mask[0].nonzero().flatten()[:TOKENS]
    return {name: value[:, kept] if value.shape == ids.shape else value for name, value in example.items()}


def _holding(model: Any, example: dict[str, Tensor], before: _Answers, folds: list[Fold]) -> list[Fold]:
    """Those after which readers read what they did, over the scales, and the model says what it did: all at once if they are
    so, else by halves."""
    if not folds:
        return []
    chance = torch.Generator().manual_seed(len(folds))
    with _given_back(model, folds):
        expected = _Answers(before.said)
        for fold in folds:
            scales = 2.0 ** torch.randint(-2, 3, (features(model.get_submodule(fold.readers[0]))[0],), generator=chance)
            scale(model, fold, scales)
            expected.read[fold.readers[0]] = before.read[fold.readers[0]] / scales.to(before.said)
        found = _Answers.of(model, example, [fold.readers[0] for fold in folds])
    if found.are(expected):
        return folds
    half = len(folds) // 2
    parts = (folds[:half], folds[half:]) if half else ()
    return [fold for part in parts for fold in _holding(model, example, before, part)]


@dataclass
class _Answers:
    """What a model says, logits or the first tensor of its output, and what some of its layers read on the way."""

    said: Tensor
    read: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, example: dict[str, Tensor], names: Iterable[str]) -> _Answers:
        read: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in names:
                hook = model.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, name=name: read.update({name: args[0]} if args else {})
                )
                stack.callback(hook.remove)
            said = model(**example)
        return cls(said.logits if getattr(said, "logits", None) is not None else said[0], read)

    def are(self, others: _Answers) -> bool:
        """Whether they are the same, but for rounding. Powers of two leave none, one plus a weight does."""
        allowed = 1e-5 if self.said.dtype in (torch.float32, torch.float64) else 1e-3
        pairs = [(self.said, others.said), *((self.read[name], others.read[name]) for name in others.read)]
        return all(bool((one - other).abs().max() <= allowed * other.abs().max()) for one, other in pairs)


@contextmanager
def _given_back(model: Any, folds: list[Fold]) -> Iterator[None]:
    """The parameters that were there are there again afterwards."""
    names = dict.fromkeys(name for fold in folds for name in (fold.source, *fold.readers))
    kept = [(module := model.get_submodule(name), dict(module._parameters)) for name in names]
    try:
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)


def _places(model: Any, example: dict[str, Tensor]) -> tuple[_Answers, list[list[Fold]]]:
    """What is read and said; and for each tensor that layers read once, who could have said it, the likeliest first."""
    alive: list[Tensor] = []  # or another tensor would lie where one was
    read: dict[Place, list[str]] = {}
    spoken: dict[Place, str] = {}
    ran: Counter[str] = Counter()
    held = Counter(id(one) for module in model.modules() for one in module._parameters.values() if one is not None)

    def place(tensor: Tensor) -> Place:
        alive.append(tensor)
        return tensor.untyped_storage().data_ptr(), tensor.numel()

    def heard(name: str, module: nn.Module, args: tuple[Any, ...], said: Any) -> None:
        ran[name] += 1
        if _is_linear(module):
            if args:  # one that is given its input by name is no reader, and what it reads then takes no scales
                read.setdefault(place(args[0]), []).append(name)
        elif isinstance(said, Tensor):
            spoken[place(said)] = name

    with ExitStack() as stack:
        for name, module in model.named_modules():
            own = [one for one in module._parameters.values() if one is not None]
            is_norm = bool(own) and all(one.dim() == 1 for one in module.parameters())
            if (is_norm or _is_linear(module)) and all(held[id(one)] == 1 for one in own):
                stack.callback(module.register_forward_hook(partial(heard, name)).remove)
        linears = [name for name, module in model.named_modules() if _is_linear(module)]
        answers = _Answers.of(model, example, linears)
    order = list(ran)
    return answers, [
        _sources(model, tuple(readers), spoken.get(tensor), order)
        for tensor, readers in read.items()
        if all(ran[name] == 1 for name in readers)
    ]


def _sources(model: Any, readers: tuple[str, ...], norm: str | None, order: list[str]) -> list[Fold]:
    if norm is not None:
        return [Fold(norm, readers), Fold(norm, readers, "one plus")]
    width, block = features(model.get_submodule(readers[0]))[0], readers[0].rsplit(".", 2)[0]  # BERT's value is a step away
    before = order[: order.index(readers[0])]
    near = [name for name in reversed(before) if name.startswith(f"{block}.") and _is_linear(model.get_submodule(name))]
    return [Fold(name, readers) for name in near if features(model.get_submodule(name))[1] == width]


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


@dataclass
class _Read:
    """What layers read on the samples: some of the rows (rows, columns), and of all of them the largest and the mean square."""

    rows: Tensor
    peaks: Tensor
    squares: Tensor
    tokens: int = 0

    def add(self, rows: Tensor) -> None:
        most = max(0, min(ROWS - len(self.rows), ROWS // 8, len(rows)))
        some = torch.linspace(0, len(rows) - 1, most).long().to(rows.device)  # the first token too, which is unlike the others
        self.rows = torch.cat([self.rows, rows[some]])
        self.peaks = torch.maximum(self.peaks, rows.abs().amax(0))
        self.squares = self.squares + rows.square().sum(0)
        self.tokens += len(rows)


def _seen(model: Any, folds: list[Fold], batches: MakeBatches | None, asked: str) -> dict[Fold, _Read]:
    """By fold, where tokens came to it at all."""
    found: dict[Fold, _Read] = {}

    def see(fold: Fold, batch: dict[str, Tensor], _: nn.Module, args: tuple[Any, ...]) -> None:
        rows = told(model, batch, fold.readers[0], args[0]).float()
        if not bool(rows.isfinite().all()):
            raise CompressionError(
                f"{asked}: what {fold.readers[0]} reads on the calibration data is infinite or no number; load the model in "
                f"float32 or bfloat16, or leave smooth out."
            )
        if len(rows):
            nothing = rows.new_zeros(rows.shape[1])
            found.setdefault(fold, _Read(rows[:0], nothing, nothing)).add(rows)

    for batch in given(batches, asked):
        with ExitStack() as stack:
            for fold in folds:
                module = model.get_submodule(fold.readers[0])
                stack.callback(module.register_forward_pre_hook(partial(see, fold, batch)).remove)
            model(**batch)
    return found


def _best(model: Any, fold: Fold, formats: Mapping[str, Format], seen: _Read | None) -> tuple[Tensor, float, float]:
    """Scales (columns,), and what plain rounding is off by without and with them, as a share of the outputs' mean square; ones
    where no token came."""
    if seen is None:
        reader: Any = model.get_submodule(fold.readers[0])
        return reader.weight.new_ones(features(reader)[0], dtype=torch.float32), 0.0, 0.0
    layers = {name: model.get_submodule(name) for name in fold.readers if name in formats}
    weights = {name: _some_rows(layer) for name, layer in layers.items() if not formats[name].misfit(layer)}
    spread = (seen.squares / seen.tokens).sqrt()
    ways = [torch.ones_like(spread)]
    if weights:
        largest = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0).clamp_min(1e-12)
        for strength in STRENGTHS:
            ways += [_powers(spread**strength), _powers(seen.peaks**strength / largest ** (1 - strength))]
    tried = list({tuple(scales.tolist()): scales for scales in ways}.values())
    expected = {name: seen.rows @ weight.T for name, weight in weights.items()}
    errors = [
        sum(_off(weight, formats[name], seen.rows, expected[name], scales) for name, weight in weights.items())
        for scales in tried
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    return tried[best], errors[0] / max(1, len(weights)), errors[best] / max(1, len(weights))


def _powers(sizes: Tensor) -> Tensor:
    """Powers of two near these sizes about their middle, and no more than 2^8 off it."""
    logs = sizes.clamp_min(1e-12).log2()
    return 2.0 ** (logs - logs.median()).round().clamp(-8, 8)


def _some_rows(layer: Any) -> Tensor:
    """(out, in), float32: rows of a weight, as many as judge a choice."""
    weight = KINDS[kind_of(layer) or ""].dequantised(layer)
    step = max(1, len(weight) // OUTPUTS)
    return weight[::step][:OUTPUTS].float() if step > 1 else weight.float()


def _off(weight: Tensor, storing: Format, rows: Tensor, expected: Tensor, scales: Tensor) -> float:
    """Mean square of what the outputs of `rows` are off by from those `expected`, as a share of these."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=False, device=weight.device)
    layer.weight = nn.Parameter(weight * scales, requires_grad=False)
    stored: Any = storing.rounded(layer)
    read = rows / scales
    if storing.rounds_inputs:
        step = read.abs().amax(1, keepdim=True).clamp_min(1e-12) / INPUT_STEPS
        read = (read / step).round() * step
    found = read @ KINDS[kind_of(stored) or ""].dequantised(stored).to(read).T
    return float((found - expected).square().sum() / expected.square().sum().clamp_min(1e-30))
