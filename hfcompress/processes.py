"""Which of several processes this is, on accelerators and on CPUs."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """accelerate's state. It must be told to look for CPU processes, or each takes itself for the only one."""
    return PartialState(cpu=not torch.accelerator.is_available())
