"""What TrainingArguments do not check of their own values: numbers out of range train nothing, or fail in the step."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from hfcompress.checkpoint.errors import did_you_mean, shown

CHOICES: dict[str, type[Enum]] = {
    "optim": OptimizerNames,
    "lr_scheduler_type": SchedulerType,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
}
ABOVE_ZERO = frozenset({"learning_rate", "adam_epsilon", "logging_steps", "eval_steps", "save_steps"})
FROM_ZERO = frozenset(
    {"weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers", "seed", "data_seed", "eval_delay"}
)
FROM_ONE = frozenset(
    {
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "eval_accumulation_steps",
        "dataloader_prefetch_factor",
        "save_total_limit",
        "torch_empty_cache_steps",
        "ddp_timeout",
        "max_steps",
    }
)
SHARES = frozenset({"adam_beta1", "adam_beta2", "label_smoothing_factor"})


def value_mistake(name: str, value: Any) -> str | None:
    """What is wrong with a value of the right type, or None; `name`: a field of TrainingArguments."""
    if (choices := CHOICES.get(name)) is not None:
        word, possible = getattr(value, "value", value), [str(choice.value) for choice in choices]
        return (
            None if word in possible else f"{name} = {shown(word)}: there is no such choice.{did_you_mean(str(word), possible)}"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return f"{name} = {value}: it must be a finite number"
    if name == "max_steps" and value == -1:  # "no limit", as TrainingArguments write it
        return None
    for names, fits, range_ in (
        (ABOVE_ZERO, value > 0, "greater than 0"),
        (FROM_ZERO, value >= 0, "0 or greater"),
        (FROM_ONE, value >= 1, "1 or greater"),
        (SHARES, 0 <= value < 1, "from 0 to below 1"),
    ):
        if name in names and not fits:
            return f"{name} = {value}: it must be {range_}"
    return None
