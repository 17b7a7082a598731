"""An encoder-decoder as two graphs: one reads, and works out all that the decoder needs of it; one writes on, by caches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

PAST, WRITTEN = 4, 3
"""Tokens that a decoder is traced with: those of its cache, and those that it is given; sizes that nothing else has."""


class Reads(nn.Module):
    """The encoder, and the keys and values of every layer of the decoder that attends to it: (batch, heads, length, width)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **given: Tensor) -> dict[str, list[Tensor]]:
        hidden = self.model.get_encoder()(**given, return_dict=True).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = torch.zeros_like(hidden[:, :1, 0], dtype=torch.long)
        mask = {name: given[name] for name in ("attention_mask",) if name in given}
        said = BaseModelOutput(last_hidden_state=hidden)
        self.model(
            encoder_outputs=said, decoder_input_ids=start, past_key_values=cache, use_cache=True, **mask
        )  # what else it says is not given back, and so no part of the graph
        read: list[Any] = cache.cross_attention_cache.layers
        return {"cross": [tensor for layer in read for tensor in (layer.keys, layer.values)]}


class Writes(nn.Module):
    """The decoder: the logits of tokens (batch, new) after those of the cache, which it gives back longer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(
        self, decoder_input_ids: Tensor, cross: list[Tensor], past_key_values: Any, attention_mask: Tensor | None = None
    ) -> CausalLMOutputWithPast:
        read = DynamicCache()
        for layer, (keys, values) in enumerate(zip(cross[::2], cross[1::2], strict=True)):
            read.update(keys, values, layer)
        cache = EncoderDecoderCache(past_key_values, read)
        cache.is_updated = dict.fromkeys(range(len(read.layers)), True)
        length = BaseModelOutput(last_hidden_state=cross[0][:, 0, :, :1])  # of what was read, its length alone is asked for
        given: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
        given |= {"encoder_outputs": length, "decoder_input_ids": decoder_input_ids}
        said = self.model(**given, past_key_values=cache, use_cache=True)
        return CausalLMOutputWithPast(logits=said.logits, past_key_values=said.past_key_values.self_attention_cache)


@torch.no_grad()
def read_and_written(model: Any, given: dict[str, Tensor]) -> dict[str, Any] | None:
    """What `Writes` is traced with, after `given` was read; None where the model can't be taken apart so, as it says other
    logits then."""
    start = torch.zeros(len(next(iter(given.values()))), PAST + WRITTEN, dtype=torch.long)
    try:
        expected = model(**given, decoder_input_ids=start).logits[:, PAST:]
        cross, past = Reads(model)(**given)["cross"], DynamicCache()
        inputs = {"cross": cross, **({"attention_mask": given["attention_mask"]} if "attention_mask" in given else {})}
        Writes(model)(decoder_input_ids=start[:, :PAST], past_key_values=past, **inputs)
        inputs |= {"decoder_input_ids": start[:, PAST:]}
        found = Writes(model)(past_key_values=copy.deepcopy(past), **inputs).logits
    except Exception:  # of a model whose decoder asks for something else
        return None
    is_same = found.shape == expected.shape and bool((found - expected).norm() <= 1e-4 * expected.norm())
    return {**inputs, "past_key_values": past} if is_same else None
