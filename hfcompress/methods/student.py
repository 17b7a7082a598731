from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import nn

from hfcompress.anatomy import Stack, layer_stacks
from hfcompress.architecture import from_scratch
from hfcompress.depth import keep_layers
from hfcompress.errors import CompressionError
from hfcompress.layers import blank
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery import become, check_no_adapter
from hfcompress.width import narrow


class Student(Method):
    """Make the student of a distillation in place: fewer layers, narrower ones, or another architecture from scratch.

    Needs: distillation after it. Any architecture for fewer layers; for narrower ones a family in the anatomy, or unfused
    projections.
    Buys: parameters and time of what is left out; the result is a plain transformers model.
    Costs: what the layers left out did, and most of it when narrower or from scratch; a teacher helps the others learn it.
    Paper: Sanh et al. 2019, DistilBERT (arXiv 1910.01108): every second layer; Shleifer, Rush 2020 (arXiv 2010.13002) and
    Gandhi et al. 2023, Distil-Whisper (arXiv 2311.00430): decoders; Samragh et al. 2023, weight subcloning (arXiv 2312.09299)
    """

    # It replaces the very parameters that an optimizer would hold.
    adds_parameters: ClassVar[bool] = True

    every: int | None = Field(None, ge=2, description="Keep every n-th layer, the first included.")
    layers: list[int] | None = Field(None, min_length=1, description="The layers to keep, counted from 0, ascending.")
    number: int | None = Field(None, ge=1, description="Keep so many layers, spread evenly from the first to the last.")
    stack: str = Field(
        "all", description="Which layers are meant: all, encoder, decoder, or a stack by its name, as model.text_model.layers."
    )
    config: dict[str, int] | None = Field(
        None, min_length=1, description="Smaller sizes, as the model's config names them: {hidden_size: 256, ...}."
    )
    architecture: str | dict[str, Any] | None = Field(
        None,
        description="Another model's config, with random weights: a folder, a config.json, a Hub id, or {model_type: ...}.",
    )
    seed: int = Field(0, ge=0, description="Of an architecture's random weights.")

    @model_validator(mode="after")
    def _one_choice(self) -> Student:
        chosen = [name for name in ("every", "layers", "number") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are several ways to choose layers; give one of them")
        if self.architecture is not None and (chosen or self.config is not None):
            raise ValueError("an architecture comes with its own layers and sizes; give it alone")
        if not chosen and self.config is None and self.architecture is None:
            raise ValueError("give one of every, layers and number, or config, or architecture")
        if not chosen and self.stack != "all":
            raise ValueError("stack tells where layers are chosen; give one of every, layers and number with it")
        if self.architecture is None and self.seed:
            raise ValueError("seed is for the weights of an architecture, and nothing else is random; take it out")
        if self.layers is not None and self.layers != sorted(set(self.layers)):
            raise ValueError("layers must ascend without repeats")
        return self

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_no_adapter(model, self.key())
        if self.architecture is not None:
            become(model, from_scratch(model, self.architecture, self.seed))
        cuts = self._cuts(model)
        if cuts:  # what can't be done is refused before the first layer goes
            rehearsal = blank(model)
            for name, keep in cuts.items():
                keep_layers(rehearsal, name, keep)
        if self.config is not None:
            narrow(model, self.config)
        for name, keep in cuts.items():
            keep_layers(model, name, keep)
        yield None

    def _cuts(self, model: nn.Module) -> dict[str, list[int]]:
        """A stack's name -> the layers to keep, of every stack that loses any."""
        if self.every is None and self.layers is None and self.number is None:
            return {}
        stacks = self._stacks(model)
        cuts = {stack.name: self._kept(stack) for stack in stacks}
        fewer = {stack.name: cuts[stack.name] for stack in stacks if len(cuts[stack.name]) < stack.count}
        if not fewer:
            raise CompressionError(f"{self} keeps every layer of {' and of '.join(map(_told, stacks))}; keep fewer.")
        return fewer

    def _stacks(self, model: nn.Module) -> list[Stack]:
        stacks = layer_stacks(model)
        if not stacks:
            raise CompressionError(
                f"student: {type(model).__name__} has no stack of layers to choose from (ALBERT uses one layer many times, "
                f"some older models have no layer class); possible are config and architecture."
            )
        meant = [one for one in stacks if self.stack in ("all", one.side, one.name)]
        if not meant:
            raise CompressionError(
                f"student: stack {self.stack!r} is none of {type(model).__name__}'s; possible are all, "
                f"{', '.join(dict.fromkeys(name for one in stacks for name in (one.side, one.name) if name))}."
            )
        return meant

    def _kept(self, stack: Stack) -> list[int]:
        """Ascending indices; `number` rounds halves up: 12 layers to 6 keep 0, 2, 4, 7, 9, 11."""
        last = stack.count - 1
        if self.every:
            return list(range(0, stack.count, self.every))
        if self.layers is not None:
            if self.layers[0] < 0 or self.layers[-1] > last:
                raise CompressionError(f"student: layers {self.layers} of {_told(stack)}; possible are 0 to {last}.")
            return self.layers
        number = self.number or 1
        if number > stack.count:
            raise CompressionError(f"student: number {number} of {_told(stack)}; possible are 1 to {stack.count}.")
        return [(2 * i * last + number - 1) // (2 * (number - 1)) for i in range(number)] if number > 1 else [0]


def _told(stack: Stack) -> str:
    return f"{stack.name}, which has {stack.count}"
