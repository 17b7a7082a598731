"""What every format of exports tells of itself: its card and fields, what it needs here, and how a model is written in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.fields import Named

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """What is exported: a model that is ours to take apart, and what its task knows of it."""

    model: Any
    processor: Any
    example: Callable[[int, int | None], Batch]
    """A batch without labels of so many examples, of so many tokens where inputs are texts; None: as long as the task's."""
    samples: Callable[[int], Iterable[Batch]]
    """So many examples of the training data, in batches without labels, to calibrate on."""
    has_length: bool = True
    """Whether inputs are of any length."""


class Format(Named):
    """A format of exports. Its fields are what a recipe, or the command line, may ask of it."""

    packages: ClassVar[dict[str, str]] = {}
    """What must be importable, and what pip calls it."""
    answers: ClassVar[bool] = True
    """Whether its runtime is there and gives logits of batches: else nothing is compared and measured."""

    @property
    def place(self) -> str:
        """What its folder beside the weights is called."""
        return self.key()

    def check_here(self) -> None:
        """CompressionError where a package is missing that it writes with."""
        self.require(self.packages)

    def require(self, packages: Mapping[str, str]) -> None:
        missing = [name for module, name in packages.items() if find_spec(module) is None]
        if missing:
            raise CompressionError(
                f"export to {self.key()}: {' and '.join(missing)} can't be imported here; get it with: pip install "
                f"{' '.join(missing)}, or all that exports need with: pip install '.[export]' in a checkout."
            )

    def write(self, source: Source, folder: Path) -> dict[str, Any]:
        """Put the model into the folder; what is worth telling of how it was done."""
        raise NotImplementedError

    def snippet(self, name: str, told: dict[str, Any]) -> str:
        """Python that loads the folder, called `name`, with the runtime alone, and computes on `inputs` of a tokenizer; `told`:
        what `exported.json` holds."""
        raise NotImplementedError
