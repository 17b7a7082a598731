"""What a key-value cache costs: its bytes a token, and the perplexity of a text that is read through it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache, QuantizedCache

from hfcompress.checkpoint.errors import CompressionError


class CacheCosts(NamedTuple):
    """Of one text."""

    bytes_per_token: float
    """All that the cache holds, scales too, over the tokens that it holds it of."""
    perplexity: float
    """Of the tokens after the prompt, each read one by one, as generation does."""


@torch.no_grad()
def cache_costs(model: Any, ids: Tensor, prompt: int) -> CacheCosts:
    """Read a text through the cache that the model's `generation_config` asks for.

    `ids` (batch, tokens); the first `prompt` tokens are read at once and are not scored: caches give them back unrounded in
    that pass. A forward without a cache, as evaluation runs it, would not feel the cache at all.
    """
    batch, tokens = ids.shape
    if not 0 < prompt < tokens - 1:
        raise CompressionError(
            f"cache_costs: prompt = {prompt}: of {tokens} tokens it must leave two or more to score; give 1 to {tokens - 2}."
        )
    cache, ids = cache_of(model), ids.to(model.device)
    logits, nll = model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True).logits[:, -1], 0.0
    for place in range(prompt, tokens):
        nll += float(functional.cross_entropy(logits.float(), ids[:, place], reduction="sum"))
        if place + 1 < tokens:
            logits = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits[:, -1]
    held = batch * (tokens - 1)
    return CacheCosts(cache_bytes(cache) / held, math.exp(nll / (batch * (tokens - prompt))))


def cache_of(model: Any) -> Cache:
    """An empty cache, as `generate` would make it for this model."""
    config, generation = model.config.get_text_config(decoder=True), model.generation_config
    if generation.cache_implementation == "quantized":
        asked = dict(generation.cache_config or {})
        return QuantizedCache(backend=asked.pop("backend", "quanto"), **{"config": config, **asked})
    return DynamicCache(config=config)


def cache_bytes(cache: Cache) -> int:
    """The memory of every tensor that a cache holds."""
    found: dict[Any, int] = {}
    waiting: list[Any] = [vars(layer) for layer in cache.layers]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor) and hasattr(one, "__tensor_flatten__"):  # packed: what it is made of counts
            waiting += [getattr(one, name) for name in one.__tensor_flatten__()[0]]
        elif isinstance(one, Tensor):
            found[one.device, one.data_ptr(), one.numel()] = one.numel() * one.element_size()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
    return sum(found.values())
