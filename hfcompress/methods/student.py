from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from hfcompress.anatomy import anatomy
from hfcompress.errors import CompressionError
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery import keep_layers


class Student(Method):
    """Make the student of a distillation: the same model with some of its layers.

    Needs: a family in the anatomy; distillation after it.
    Buys: parameters and time of the layers left out; the result is a plain transformers model.
    Costs: what the layers left out did; a teacher helps the others learn it.
    Paper: Sanh et al. 2019, DistilBERT (arXiv 1910.01108): every second layer
    """

    every: int | None = Field(None, ge=2, description="Keep every n-th layer, the first included.")
    layers: list[int] | None = Field(None, min_length=1, description="The layers to keep, counted from 0, ascending.")

    @model_validator(mode="after")
    def _one_choice(self) -> Student:
        if (self.every is None) == (self.layers is None):
            raise ValueError("give exactly one of every and layers")
        if self.layers is not None and self.layers != sorted(set(self.layers)):
            raise ValueError("layers must ascend without repeats")
        return self

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        where = anatomy(model)
        count = len(where.layers)
        keep = list(range(0, count, self.every)) if self.every else list(self.layers or [])
        if keep[0] < 0 or keep[-1] >= count or len(keep) == count:
            raise CompressionError(
                f"student: layers {keep} of a model that has {count}; possible are some, not all, of 0 to {count - 1}."
            )
        keep_layers(model, where, keep)
        yield None
