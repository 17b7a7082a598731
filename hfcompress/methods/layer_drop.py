from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.depth.stacks import named_stacks


class LayerDrop(Method):
    """Leave whole layers out by chance while a model is trained, so that it gets used to fewer (structured dropout).

    Needs: a train step to ride along with.
    Buys: nothing by itself: layers that `prune_layers` takes out afterwards cost less.
    Costs: a part of the signal in every step, so longer training.
    Paper: Fan et al. 2020, LayerDrop (arXiv 1909.11556); rates that grow: Huang et al. 2016, Deep Networks with Stochastic
    Depth (arXiv 1603.09382)
    """

    needs_training: ClassVar[bool] = True
    tag: ClassVar[str] = "pruning"

    p: float = Field(default=0.1, gt=0, lt=1, description="How often a layer is left out, for each batch by itself.")
    grows: bool = Field(default=False, description="Whether rates grow with depth, from hardly any in the first layer to p.")
    stack: str = Field(
        default="all",
        description="Which layers are meant: all, encoder, decoder, or a stack by its name, as model.text_model.layers.",
    )

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        handles = []
        for stack in named_stacks(model, self.stack, self.key()):
            for place in range(stack.count):
                rate = self.p * (place + 1) / stack.count if self.grows else self.p
                layer = model.get_submodule(f"{stack.name}.{place}")
                handles.append(layer.register_forward_hook(partial(_skipped, rate), with_kwargs=True))
        try:
            yield None
        finally:
            for handle in handles:
                handle.remove()


def _skipped(rate: float, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """What the layer was given, now and then, instead of what it said; its weights get gradients of zero then, as other
    processes may not have left it out."""
    given = args[0] if args else kwargs.get("hidden_states")
    said = output[0] if isinstance(output, tuple) else output
    if not layer.training or not isinstance(given, Tensor) or not isinstance(said, Tensor) or given.shape != said.shape:
        return output
    if float(torch.rand((), device="cpu")) >= rate:
        return output
    passed = given + 0.0 * said
    return (passed, *output[1:]) if isinstance(output, tuple) else passed
