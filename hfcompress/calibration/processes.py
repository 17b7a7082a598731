"""Which of several processes this is, on accelerators and on CPUs, and what they agree on."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor


def processes() -> PartialState:
    """accelerate's state. It must be told to look for CPU processes, or each takes itself for the only one.

    The first process measures and writes while the others wait for it: for a day, where NCCL gives up after ten minutes.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def agreed(values: Tensor) -> Tensor:
    """The first process decides: kernels that add in another order must not make two processes cut different parts."""
    state = processes()
    return values if state.num_processes == 1 else broadcast(values.to(state.device)).cpu()
