from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_here
from hfcompress.surgery.targets import parts_of

log = logging.getLogger("hfcompress")


class Heal(Method):
    """Train only norms, biases or embeddings: what stays dense when everything else is codes, and is a thousandth of it.

    Needs: training around it. Layers may be codes; a model that was loaded with such is healed in a recipe or a loop of your
    own, as transformers' Trainer refuses it.
    Buys: a part of what quantising or cutting lost, at no byte more; norms and biases alone can't forget much.
    Costs: what training costs, as gradients pass through all layers; less is won back than by training every weight.
    Paper: Ben Zaken et al. 2021, BitFit (arXiv 2106.10199); Frankle et al. 2020 (arXiv 2003.00152); Li et al. 2023, Norm
    Tweaking (arXiv 2309.02784)
    """

    # An optimizer holds what could be trained when it was built: biases of low-bit layers could not.
    adds_parameters: ClassVar[bool] = True
    chooses_trained: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True

    parts: list[Literal["norms", "biases", "embeddings"]] = Field(
        default=["norms", "biases"],
        min_length=1,
        description="What is trained: weights and biases of norms; biases, those of norms and of low-bit layers included; "
        "tables of tokens and positions, and with them an output layer that is tied to one. All else is frozen meanwhile.",
    )

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        check_here(model, self.key())
        found = parts_of(model)
        chosen = {id(parameter) for part in self.parts for parameter in found[part].values()}
        if not chosen:
            there = " and ".join(part for part, parameters in found.items() if parameters)
            raise CompressionError(
                f"{self.key()}: {type(model).__name__} has no {' and no '.join(self.parts)} to train; "
                + (f"possible parts here are {there}; name one." if there else "train without heal, or add adapters.")
            )
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        self._tell_tied(model, chosen)
        yield None
        # what another method took out meanwhile is gone, and what it put in keeps what it was given
        for parameter, was_trained in before:
            parameter.requires_grad_(was_trained)

    def _tell_tied(self, model: nn.Module, chosen: set[int]) -> None:
        """A tensor with several names is trained for all of them."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in chosen:
                names.setdefault(id(parameter), []).append(name)
        for first, *others in names.values():
            if others:
                log.info("heal: %s is trained, and so is %s, which is the same tensor", first, " and ".join(others))
