from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers.base import is_conv1d
from hfcompress.layers.fake_quantized import dense_again, fake_quantise
from hfcompress.layers.quantized import QuantEmbedding, QuantLinear, mismatch
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable, swap
from hfcompress.surgery.targets import codable, codable_tables, matching

log = logging.getLogger("hfcompress")


class QuantizeAware(Method):
    """Train a model as the codes that it will be stored in: weights are rounded in every forward, and their steps learned.

    Needs: a train step to ride along with; the better with `distill` beside it.
    Buys: codes of 1 to 4 bits that have had a training to make up for the rounding, where `quantize` only chooses them well.
    Costs: rounding all weights in every forward; the layers are `engine: hfcompress`', which need the import.
    Paper: Esser et al. 2020, LSQ (arXiv 1902.08153); Jain et al. 2020, TQT (arXiv 1903.08066); 2 bits: Zhu et al. 2017, Trained
    Ternary Quantization (arXiv 1612.01064); 1 bit: Rastegari et al. 2016 (arXiv 1603.05279)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"codes"})
    needs_dense: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    adds_parameters: ClassVar[bool] = True
    holds_layers: ClassVar[bool] = True
    tag: ClassVar[str] = "quantization"

    bits: int = Field(default=4, ge=1, le=8, description="Bits a weight: 2 are -1, 0 and 1 times a step, 1 is -1 and 1.")
    group_size: int | None = Field(
        default=None, ge=2, description="Columns that share a step; a row from 5 bits on, 64 columns in fewer, if absent."
    )
    embeddings: int | None = Field(
        default=None, ge=2, le=8, description="Bits of input and output embeddings, tied or not; dense if absent."
    )
    target_modules: list[str] | None = Field(default=None, description="Suffixes of module names; all linear layers if absent.")
    skip_modules: list[str] = Field(default=[], description="Suffixes of linear layers to leave alone.")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="The share of the steps before weights are rounded.")

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_editable(model, "quantize_aware")
        names, tables = self._linears(model), self._tables(model)
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        for name, layer in layers.items():
            fake_quantise(layer, self.bits, self._group(name, layer, self.bits))
        for alike in tables:
            first: Any = None
            for name in alike:
                layers[name] = layer = model.get_submodule(name)
                fake_quantise(layer, self.embeddings or 0, self._group(name, layer, self.embeddings or 0), shared=first)
                first = first or layer

        def tick(progress: float) -> None:
            for layer in layers.values():
                layer.is_rounded = progress >= self.warmup

        tick(0.0)
        yield tick
        found = {name: (*layer.codes(), layer.bits, layer.group_size) for name, layer in layers.items()}
        coded = {name: _coded(dense_again(layers[name]), *one) for name, one in found.items()}
        for alike in tables:
            for name in alike:
                coded[name].weight = coded[alike[0]].weight
        for name, new in coded.items():
            swap(model, name, new)

    def _linears(self, model: nn.Module) -> list[str]:
        possible = codable(model)
        if not possible:
            raise CompressionError("quantize_aware: no dense linear layer is left; list it before quantize.")
        chosen = possible if self.target_modules is None else matching(model, self.target_modules, possible, "quantize_aware")
        skipped = matching(model, self.skip_modules, possible, "quantize_aware") if self.skip_modules else []
        if set(skipped).issuperset(chosen):
            raise CompressionError("quantize_aware: skip_modules leaves no layer to quantise; take some out of it.")
        return [name for name in chosen if name not in skipped]

    def _tables(self, model: nn.Module) -> list[list[str]]:
        if self.embeddings is None:
            return []
        found, bits = [], self.embeddings
        for names in codable_tables(model):
            first: Any = model.get_submodule(names[0])
            columns = first.weight.shape[1]
            if all(mismatch(columns, bits, group) for group in (self.group_size, None)):
                log.info("quantize_aware: %s left dense: %s", names[0], mismatch(columns, bits, None))
            else:
                found.append(list(names))
        if not found:
            raise CompressionError(
                "quantize_aware: embeddings: the model has no dense table that can become codes; leave embeddings out."
            )
        return found

    def _group(self, name: str, layer: Any, bits: int) -> int | None:
        columns = layer.weight.shape[0 if is_conv1d(layer) else 1]
        group = self.group_size or (None if bits > 4 else 64)
        wrong = mismatch(columns, bits, group)
        if wrong and (self.group_size is None or isinstance(layer, nn.Embedding)):  # nobody asked for it: a step a row then
            group, wrong = None, mismatch(columns, bits, None)
        if wrong:
            raise CompressionError(f"quantize_aware: {name}: {wrong}; choose that, or leave the layer out by skip_modules.")
        return group


@torch.no_grad()
def _coded(dense: Any, codes: Tensor, step: Tensor, bits: int, group: int | None) -> nn.Module:
    """The very codes that a layer computed with."""
    if not isinstance(dense, nn.Embedding):
        return QuantLinear.from_codes(dense, codes, step, None, bits, group)
    new = QuantEmbedding.from_dense(dense, bits, group)
    new.set_codes(codes, step, None)
    return new
