"""A model as a picture, layer by layer: how many bits are stored for each weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.writing import written
from hfcompress.layers import holds_codes, kind_of, stands_in
from hfcompress.layers.low_rank import LowRankEmbedding, LowRankLinear

BITS = (1, 2, 4, 8, 16, 32)
CELLS = 600
"""Up to how many cells numbers are written into them."""


class Cell(NamedTuple):
    """Layers at one place of a stack: `index` of the layer, None outside of stacks, `place` within it."""

    index: int | None  # type: ignore[assignment]  # not the method of tuples
    place: str
    bits: float
    """Stored for each weight that they compute with, scales included, biases not."""
    weights: int = 0
    """How many they compute with."""
    kind: str = ""
    """What stands in for a dense weight there: codes, factors, or both."""


Place = tuple[int | None, str]


def is_worth_it(model: nn.Module) -> bool:
    """Whether some layers are stored otherwise than the architecture's own."""
    return any(stands_in(module) for module in model.modules())


def cells(model: nn.Module) -> list[Cell]:
    """Every linear layer, table and convolution of a model, in its order; experts of a layer together."""
    sums: dict[Place, list[int]] = {}
    kinds: dict[Place, set[str]] = {}
    for place, module, size in _layers(model):
        both = sums.setdefault(place, [0, 0])
        both[0] += sum(tensor.numel() * tensor.element_size() for tensor in _stored(module))
        both[1] += size
        kinds.setdefault(place, set()).update(_stand_ins(module))
    return [Cell(*place, 8 * stored / size, size, ", ".join(sorted(kinds[place]))) for place, (stored, size) in sums.items()]


def widths(model: nn.Module) -> dict[Place, int]:
    """How many weights the layers of each place compute with; nothing stored is read."""
    found: dict[Place, int] = {}
    for place, _, size in _layers(model):
        found[place] = found.get(place, 0) + size
    return found


def _layers(model: nn.Module) -> Iterator[tuple[Place, nn.Module, int]]:
    within: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(within) or (size := _weights(module)) is None:
            continue
        within = (f"{name}.",)  # factors are parts of their layer
        index = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        place = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
        yield (int(index[1]) if index else None, place), module, size


def _stand_ins(module: nn.Module) -> Iterator[str]:
    if isinstance(module, LowRankLinear | LowRankEmbedding):
        yield "factors"
    if any(holds_codes(part) for part in module.modules()):
        yield "codes"


def _weights(module: nn.Module) -> int | None:
    """How many a layer computes with; None of what is no layer with weights."""
    sizes = (
        ("in_features", "out_features"),
        ("nx", "nf"),
        ("num_embeddings", "embedding_dim"),
    )
    if kind_of(module) is None:
        return None
    if hasattr(module, "kernel_size"):
        return module.in_channels // module.groups * module.out_channels * math.prod(module.kernel_size)  # type: ignore
    return next(getattr(module, a) * getattr(module, b) for a, b in sizes if hasattr(module, a))  # type: ignore[no-any-return]


def _stored(module: nn.Module) -> Iterator[torch.Tensor]:
    for key, value in module.state_dict().items():
        if not key.endswith("bias") and isinstance(value, torch.Tensor):
            yield value


def plot_layers(model: nn.Module, path: str | Path) -> None:
    """Write a PNG: a row for each layer of the stacks, a column for each place in them; colours and numbers are the bits stored
    for each weight. Raises CompressionError without matplotlib or layers, or where it can't be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressionError("plot: matplotlib is not installed; get it with: pip install matplotlib") from error
    found = cells(model)
    if not found:
        raise CompressionError("plot: the model has no linear layer, table or convolution to draw.")
    places = list(dict.fromkeys(cell.place for cell in found))
    outside = [None] if any(cell.index is None for cell in found) else []
    rows: list[int | None] = [*sorted({cell.index for cell in found if cell.index is not None}), *outside]
    grid = [[math.nan] * len(places) for _ in rows]
    for cell in found:
        grid[rows.index(cell.index)][places.index(cell.place)] = cell.bits
    figure = Figure(figsize=(2.6 + 0.55 * len(places), 2.8 + 0.3 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(grid, norm=LogNorm(BITS[0], BITS[-1]), cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(places)), [short_place(place) for place in places], rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), ["–" if row is None else str(row) for row in rows], fontsize=8)
    axes.set_ylabel("layer (–: outside of the stacks)")
    bar = figure.colorbar(image, label="bits stored for each weight")
    bar.set_ticks(list(BITS), labels=[str(bits) for bits in BITS])
    if len(places) * len(rows) <= CELLS:
        _write_numbers(axes, grid)
    with written(path, "the picture of the layers"):
        figure.savefig(path, format="png")


def _write_numbers(axes: Any, grid: list[list[float]]) -> None:
    for y, row in enumerate(grid):
        for x, bits in enumerate(row):
            if not math.isnan(bits):
                axes.text(x, y, f"{bits:.3g}", ha="center", va="center", fontsize=6, color="black" if bits > 6 else "white")


def short_place(place: str) -> str:
    """The last two words of a place."""
    return ".".join([part for part in place.split(".") if part != "*"][-2:])
