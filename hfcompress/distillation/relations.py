"""Self-attention relations (MiniLMv2): hooks that collect queries, keys and values of a student and its teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.units.spans import roles
from hfcompress.surgery.units.verify import units_of


@dataclass(frozen=True)
class RelationStates:
    """Queries, keys and values of a student and one teacher: layer to kind to (B, T, H)."""

    student: dict[int, dict[str, Tensor]]
    teacher: dict[int, dict[str, Tensor]]
    layers: tuple[int, int]
    heads: int
    """The teacher's attention heads."""


class RelationHooks:
    """Watches queries, keys and values of the layers that terms ask for, in a student and a teacher."""

    def __init__(self, student: nn.Module, teacher: nn.Module, terms: list[Any]) -> None:
        for model in (student, teacher):
            if not isinstance(model, PreTrainedModel):
                raise CompressionError(
                    f"distill: relations: a {type(model).__name__} is no transformers model, and which of its layers are "
                    f"attention is not known; take another term, such as kl."
                )
        mine, theirs = units_of(student, "heads"), units_of(teacher, "heads")
        self._layers = (len(mine), len(theirs))
        self._heads = theirs[0].count
        pairs = [pair for term in terms for pair in term.pairs(*self._layers)]
        self._expected = {pair[0] for pair in pairs}
        self._seen: tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, Tensor]]] = ({}, {})
        self._handles: list[Any] = []
        self.is_watching = False
        for side, (model, where) in enumerate(((student, mine), (teacher, theirs))):
            if not all(map(roles, where)):
                raise CompressionError(
                    f"distill: relations: which projections of {type(model).__name__} make queries, keys and values is not "
                    f"known; take another term, such as hidden_mse or attention_mse."
                )
            for layer in {pair[side] for pair in pairs}:
                for name, kinds in roles(where[layer]):
                    self._handles.append(model.get_submodule(name).register_forward_hook(self._watch(side, layer, kinds)))

    def _watch(self, side: int, layer: int, kinds: tuple[str, ...]) -> Any:
        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            if side or (self.is_watching and torch.is_grad_enabled()):  # backward runs checkpointed layers once more
                self._seen[side].setdefault(layer, {}).update(zip(kinds, output.chunk(len(kinds), dim=-1), strict=True))

        return watch

    def seen(self) -> RelationStates:
        self.is_watching = False
        if self._expected - set(self._seen[0]):
            raise CompressionError(
                "distill: relations: gradient checkpointing with use_reentrant hides the layers; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        related = RelationStates(dict(self._seen[0]), dict(self._seen[1]), self._layers, self._heads)
        for side in self._seen:
            side.clear()
        return related

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
