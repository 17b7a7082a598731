from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.depth.drop import keep_layers
from hfcompress.surgery.depth.stacks import Stack, chosen, named_stacks, spread
from hfcompress.surgery.depth.trials import rehearse
from hfcompress.surgery.from_config import from_scratch
from hfcompress.surgery.modules import become, check_editable
from hfcompress.surgery.width import narrow


class Student(Method):
    """Make the student of a distillation in place: fewer layers, narrower ones, or another architecture from scratch.

    Needs: distillation after it. Any architecture for fewer layers; for narrower ones proven heads and neurons, or unfused
    projections.
    Buys: parameters and time of what is left out; the result is a plain transformers model.
    Costs: what the layers left out did, and most of it when narrower or from scratch; a teacher helps the others learn it.
    Paper: Sanh et al. 2019, DistilBERT (arXiv 1910.01108): every second layer; Shleifer, Rush 2020 (arXiv 2010.13002) and
    Gandhi et al. 2023, Distil-Whisper (arXiv 2311.00430): decoders; Samragh et al. 2023, weight subcloning (arXiv 2312.09299)
    """

    # It replaces the very parameters that an optimizer would hold.
    edits: ClassVar[frozenset[str]] = frozenset({"layers", "units"})
    adds_parameters: ClassVar[bool] = True
    tag: ClassVar[str] = "distillation"

    every: int | None = Field(default=None, ge=2, description="Keep every n-th layer, the first included.")
    layers: list[int] | None = Field(default=None, min_length=1, description="The layers to keep, counted from 0, ascending.")
    number: int | None = Field(default=None, ge=1, description="Keep so many layers, spread evenly from the first to the last.")
    stack: str = Field(
        default="all",
        description="Which layers are meant: all, encoder, decoder, or a stack by its name, as model.text_model.layers.",
    )
    config: dict[str, int] | None = Field(
        default=None, min_length=1, description="Smaller sizes, as the model's config names them: {hidden_size: 256, ...}."
    )
    architecture: str | dict[str, Any] | None = Field(
        default=None,
        description="Another model's config, with random weights: a folder, a config.json, a Hub id, or {model_type: ...}.",
    )
    seed: int = Field(default=0, ge=0, description="Of an architecture's random weights.")

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
        check_editable(model, self.key())
        if self.architecture is not None:
            become(model, from_scratch(model, self.architecture, self.seed))
        cuts = self._cuts(model)
        rehearse(model, cuts, self.key())  # what can't be done is refused before the first layer goes
        if self.config is not None:
            narrow(model, self.config)
        keep_layers(model, cuts, self.key())
        yield None

    def _cuts(self, model: nn.Module) -> dict[str, list[int]]:
        """A stack's name -> the layers to keep, of every stack that loses any."""
        if self.every is None and self.layers is None and self.number is None:
            return {}
        stacks = named_stacks(model, self.stack, self.key())
        cuts = {stack.name: self._kept(stack) for stack in stacks}
        fewer = {stack.name: cuts[stack.name] for stack in stacks if len(cuts[stack.name]) < stack.count}
        if not fewer:
            raise CompressionError(f"{self} keeps every layer of {' and of '.join(map(str, stacks))}; keep fewer.")
        return fewer

    def _kept(self, stack: Stack) -> list[int]:
        if self.every:
            return list(range(0, stack.count, self.every))
        if self.layers is not None:
            return chosen(stack, self.layers, self.key())
        return spread(stack, self.number or 1, self.key())
