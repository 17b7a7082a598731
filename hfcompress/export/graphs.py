"""What of a model becomes a graph of its own, and along which axes its inputs vary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from hfcompress.checkpoint.sentence_head import sentence_head_of
from hfcompress.export.base import Source
from hfcompress.export.halves import Reads, Writes, read_and_written

MODEL, ENCODER, DECODER = "model", "encoder", "decoder"
"""Names of graphs: a whole model; the two halves of one that reads a text whole and then writes another."""
BATCH, LENGTH = 2, 7
"""Of what a graph is traced with: sizes that nothing else has, as equal ones are taken for the same."""


@dataclass(frozen=True)
class Graph:
    """`module(**inputs)` is traced; `axes` names, for each input, those that vary."""

    module: nn.Module
    inputs: dict[str, Any]
    axes: dict[str, Any]


def graphs_of(source: Source, by_cache: bool = True) -> dict[str, Graph]:
    """The graphs of a model by their names; `by_cache`: whether its runtime can begin with an empty one.

    A causal language model is one that takes a cache and gives it back, so that the same graph reads a text whole and goes on
    word by word. An encoder-decoder is two: what it reads is encoded once, and the second goes on by a cache as well, where the
    model can be taken apart so. All else is one.
    """
    model, example = source.model, dict(source.example(BATCH, LENGTH if source.has_length else None))
    if translates(model):
        return _halves(model, example, by_cache)
    if writes(model):
        return {MODEL: _with_cache(model, example)}
    module = model if sentence_head_of(model) is None else Embeds(model)
    return {MODEL: Graph(module, example, {name: _axes(name, value) for name, value in example.items()})}


class Embeds(nn.Module):
    """What an encoder with a `SentenceHead` tells of texts, (batch, width), and nothing of their tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **given: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.model(**given).logits)


def writes(model: Any) -> bool:
    """Whether it is a causal language model, which goes on with a text by a cache."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def _with_cache(model: Any, example: dict[str, Any]) -> Graph:
    """One step of several tokens, with a cache; batches and lengths vary, heads and their widths don't."""
    from transformers.exporters.utils import decompose_for_generation

    ids = example["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # of a mask without pads nothing would be left in the graph
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask}
        module, inputs = decompose_for_generation(model, given, multi_token_decode=True)["decode"]
    return _step(module, inputs)


def _step(module: nn.Module, inputs: dict[str, Any]) -> Graph:
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes

    traced = {name: value for name, value in inputs.items() if not isinstance(value, bool | int | str | None)}
    return Graph(module, inputs, {name: _varying(get_auto_dynamic_shapes(value)) for name, value in traced.items()})


def translates(model: Any) -> bool:
    """Whether it reads a text whole, or a sound, and then writes another. Of BART there are classifiers too, which don't."""
    return bool(model.can_generate()) and bool(model.config.is_encoder_decoder)


def cached_layers(inputs: dict[str, Any]) -> list[Any]:
    """The layers of the cache among a graph's inputs: `keys` and `values` of each, (batch, heads, length, width)."""
    return list(getattr(inputs.get("past_key_values"), "layers", []))


def _varying(axes: Any) -> Any:
    """Of every tensor the batch and the length: of keys and values, (batch, heads, length, width), axes 0 and 2."""
    if isinstance(axes, list | tuple):
        return [_varying(one) for one in axes]
    if isinstance(axes, dict) and len(axes) == 4 and set(axes) == set(range(4)):
        return {axis: axes[axis] for axis in (0, 2)}
    return axes


def _halves(model: Any, example: dict[str, Any], by_cache: bool) -> dict[str, Graph]:
    read = model.main_input_name
    given = {name: example[name] for name in (read, "attention_mask") if name in example}
    axes: dict[str, Any] = {name: _axes(name, value) for name, value in given.items()}
    if by_cache and (taken := read_and_written(model, given)):
        return {ENCODER: Graph(Reads(model), given, axes), DECODER: _step(Writes(model), taken)}
    encoder = model.get_encoder()
    with torch.no_grad():
        hidden = encoder(**given, return_dict=True).last_hidden_state
    written = example.get("decoder_input_ids")
    if written is None:
        written = torch.full((len(hidden), 3), model.config.decoder_start_token_id or 0)
    inputs: dict[str, Any] = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "decoder_input_ids": written}
    varying: dict[str, Any] = {"encoder_outputs": [_all(hidden)], "decoder_input_ids": _all(written)}
    if "attention_mask" in given:
        inputs["attention_mask"], varying["attention_mask"] = given["attention_mask"], _all(given["attention_mask"])
    return {ENCODER: Graph(encoder, given, axes), DECODER: Graph(model, {**inputs, "use_cache": False}, varying)}


def _axes(name: str, value: Tensor) -> dict[int, Any]:
    """Batches are of any size, and token ids, masks and sounds of any length; images and spectrograms are of one size."""
    is_long = not value.is_floating_point() or name == "input_values"
    return _all(value) if is_long else {0: torch.export.Dim.AUTO}


def _all(value: Tensor) -> dict[int, Any]:
    return dict.fromkeys(range(min(value.dim(), 2)), torch.export.Dim.AUTO)
