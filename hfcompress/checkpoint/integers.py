"""Integers that forwards read, so cutting must correct them. A structure from the internet may set these and no others."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "num_attn_heads",
    "num_head",
    "num_v_heads",
    "num_k_heads",
    "n_heads",
    "n_head",
    "no_heads",
    "heads",
    "attention_heads",
)
OWN_COUNTS = (
    *HEAD_COUNTS,
    "all_head_size",
    "split_size",
    "inner_dim",
    "intermediate_size",
    "intermediate_dim",
    "ffn_dim",
    "expert_dim",
    "ffn_hidden_size",
    "out_dim_keys_values",
    "out_dim_projection",
    "hidden_size_output",
)
WIDTH_COUNTS = (
    "embed_dim",
    "hidden_size",
    "hidden_dim",
    "d_model",
    "dim",
    "key_dim",
    "value_dim",
    "mem_dim",
    "head_size",  # LXMERT's name for the width of all heads
)
_LAYER_SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim", "in_channels", "out_channels", "groups")
CONFIG_COUNTS = tuple(f"config.{name}" for name in HEAD_COUNTS)
COUNTS = (*CONFIG_COUNTS, *OWN_COUNTS, *WIDTH_COUNTS, "num_key_value_groups", *_LAYER_SIZES)


def count_in(module: nn.Module, key: str) -> int | None:
    """The integer of this name; "config.num_attention_heads" is one that a module has a config of its own for."""
    if key in CONFIG_COUNTS:
        return largest(module, key) if vars(module).get("has_own_config") else None
    value = getattr(module, key, None)
    return value if type(value) is int else None


def set_count(module: Any, key: str, value: int) -> None:
    """Set it. Layers share the model's config: one that reads its counts there gets a copy first."""
    if key not in CONFIG_COUNTS:
        setattr(module, key, value)
        return
    if not vars(module).get("has_own_config"):
        module.config, module.has_own_config = copy.copy(module.config), True
    setattr(module.config, key.removeprefix("config."), value)


def largest(module: Any, key: str) -> int | None:
    """The most that a count may become: what it is before anything is cut. None where there is no such count."""
    if key in CONFIG_COUNTS and isinstance(getattr(module, "config", None), PreTrainedConfig):
        module, key = module.config, key.removeprefix("config.")
    elif key not in COUNTS:
        return None
    value = getattr(module, key, None)
    return value if type(value) is int else None
