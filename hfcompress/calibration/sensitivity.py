"""The empirical Fisher information of what layers say: how much the loss feels an error of one, whatever its direction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.batches import MakeBatches, evaluating, given
from hfcompress.calibration.processes import agreed
from hfcompress.calibration.replay import lean


def output_sensitivity(model: Any, names: Sequence[str], batches: MakeBatches | None, asked: str) -> dict[str, float] | None:
    """Of each layer, the sum over tokens of the mean squared gradient of the loss with respect to its output; None where the
    model gives no loss on these batches, or none that is finite.

    An error e of the outputs (mean |e|^2 over tokens) then costs about sensitivity x |e|^2 of the loss, in one unit for all
    layers: the Hessian replaced by the Fisher information, and that by its mean over outputs (Theis et al. 2018, arXiv
    1801.05787). No gradient of a weight is made.
    """
    found = dict.fromkeys(names, 0.0)
    probe = torch.zeros((), requires_grad=True)

    def feel(name: str, gradient: Tensor) -> None:
        found[name] += float(gradient.float().square().sum()) / gradient.shape[-1]

    def watch(name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output + probe.to(output)  # the gradient comes this far even if nothing in the model is trained
        output.register_hook(partial(feel, name))
        return output

    handles = [model.get_submodule(name).register_forward_hook(partial(watch, name)) for name in names]
    try:
        with evaluating(model), torch.enable_grad():
            for batch in given(batches, asked):
                loss = getattr(model(**batch, **lean(model)), "loss", None)
                if loss is None or not loss.requires_grad:
                    return None
                torch.autograd.grad(loss, probe)
    finally:
        for handle in handles:
            handle.remove()
    values = agreed(torch.tensor([found[name] for name in names], dtype=torch.float64))
    return dict(zip(names, values.tolist(), strict=True)) if values.isfinite().all() and values.any() else None
