"""Another architecture from scratch, for the same task: its config read, its head found, its weights random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from hfcompress.checkpoint.errors import CompressionError, did_you_mean, first_line

# What the tokenizer or processor and the data fix, so that a student must have it from the original.
_INPUTS = ("vocab_size", "image_size", "num_channels", "num_mel_bins")
_LABELS = ("id2label", "label2id", "problem_type")


def from_scratch(model: Any, architecture: str | dict[str, Any], seed: int) -> nn.Module:
    """A random model of this architecture with the model's kind of head, labels, vocabulary and special tokens.

    `architecture`: a folder, a config.json, a Hub id, or `{model_type: ..., ...}`. CompressionError for all else.
    """
    config = _read(architecture)
    auto = _head(model, config)
    _take_over(config, model.config, architecture if isinstance(architecture, dict) else {})
    if auto is AutoModelForCausalLM and type(config) in MODEL_FOR_MASKED_LM_MAPPING and hasattr(config, "is_decoder"):
        config.is_decoder = True  # else every token would see the one it is to predict
    config.architectures = []  # where a config has several classes for one kind of head, the first; None would be an error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            other = auto.from_config(config, dtype=model.dtype)
        except Exception as error:
            raise CompressionError(
                f"student: architecture {_name(architecture)}: its sizes build no {config.model_type} model "
                f"({first_line(error)}); give sizes that fit each other."
            ) from error
    return other.to(model.device)


def _read(architecture: str | dict[str, Any]) -> Any:
    if isinstance(architecture, str):
        try:
            return AutoConfig.from_pretrained(architecture)
        except Exception as error:
            raise CompressionError(
                f"student: architecture {architecture!r} can't be read ({first_line(error)}); possible are a folder, a "
                f"config.json, a Hub id and a mapping with a model_type; check the name."
            ) from error
    fields = dict(architecture)
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(kind, CONFIG_MAPPING) if isinstance(kind, str) else " Give one as in model_type: distilbert."
        raise CompressionError(f"student: architecture: unknown model_type {kind!r}.{hint if len(hint) < 400 else ''}")
    known = CONFIG_MAPPING[kind]()
    possible = {key for key in vars(known) if not key.startswith("_")} | set(known.attribute_map) | {"num_labels"}
    for key in fields:
        if key not in possible:
            raise CompressionError(f"student: architecture: a {kind} config has no field {key!r}.{did_you_mean(key, possible)}")
    try:
        return CONFIG_MAPPING[kind](**fields)
    except Exception as error:
        raise CompressionError(
            f"student: architecture: these fields make no {kind} config ({first_line(error)}); give others."
        ) from error


def _head(model: Any, config: Any) -> Any:
    """The auto class that gives the model's own class for its config, and has one for the new config."""
    mine = list(_auto_classes(model))
    for auto in mine:
        if type(config) in auto._model_mapping:
            return auto
    kind = mine[0].__name__.removeprefix("AutoModelFor") if mine else type(model).__name__
    raise CompressionError(
        f"student: architecture: a {config.model_type} model has no head for {kind}, which {type(model).__name__} is; "
        f"possible are architectures that have one; choose another."
    )


def _auto_classes(model: Any) -> Iterator[Any]:
    """Those for a task first; AutoModel and AutoModelForPreTraining give several kinds of head."""
    for name in sorted(modeling_auto.__all__, key=lambda name: name in ("AutoModel", "AutoModelForPreTraining")):
        auto = getattr(transformers, name, None)
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and type(model.config) in mapping:
            classes = mapping[type(model.config)]
            if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
                yield auto


def _take_over(config: Any, original: Any, given: dict[str, Any]) -> None:
    for key in _INPUTS:
        mine = getattr(original, key, None)
        if mine is None or not hasattr(config, key):
            continue
        if given.get(key, mine) != mine:
            raise CompressionError(
                f"student: architecture: {key} = {given[key]!r}, and the original has {mine!r}, as its tokenizer or "
                f"processor wants; leave {key} out."
            )
        setattr(config, key, mine)
    special = {key for key in dir(original) if key.endswith("_token_id")}
    for key in (*sorted(special), *_LABELS):
        value = getattr(original, key, None)
        if key in special or value is not None:
            setattr(config, key, value)


def _name(architecture: str | dict[str, Any]) -> str:
    return repr(architecture if isinstance(architecture, str) else architecture.get("model_type"))
