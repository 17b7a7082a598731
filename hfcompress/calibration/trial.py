"""A model whose layers are stored in one way and in another, to see what its loss says, and that is given back as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn

from hfcompress.calibration.batches import MakeBatches, mean_loss
from hfcompress.calibration.formats import Format
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.modules import swap


class Trial:
    """`groups`: names of layers that are stored alike, in a format told by its bits, or dense for bits that have none. Dense
    layers are kept meanwhile. A context manager: on leaving it they are back."""

    def __init__(
        self,
        model: Any,
        groups: Sequence[Sequence[str]],
        formats: Mapping[int, Format],
        batches: MakeBatches | None,
        asked: str,
    ) -> None:
        self._model, self._groups, self._formats = model, groups, formats
        self._batches, self._asked = batches, asked
        self._dense: dict[str, nn.Module] = {}
        self._bits: dict[str, int] = {}

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, layer in self._dense.items():
            swap(self._model, name, layer)

    def loss(self, bits: Sequence[int]) -> float:
        """The mean loss on the batches, with so many bits for each of the groups."""
        for group, own in zip(self._groups, bits, strict=True):
            for name in group:
                self._put(name, own)
        found = mean_loss(self._model, self._batches, self._asked, self._asked, "bits for all layers alike")
        if found is None:
            raise CompressionError(f"{self._asked} needs labels, and no calibration batch has one; add them, or choose bits.")
        return found

    def _put(self, name: str, bits: int) -> None:
        if self._bits.get(name) == bits:
            return
        dense = self._dense.setdefault(name, self._model.get_submodule(name))
        self._bits[name] = bits
        swap(self._model, name, self._formats[bits].rounded(dense) if bits in self._formats else dense)
