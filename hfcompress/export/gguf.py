"""GGUF, llama.cpp's format, for Llama-like models of any shape that we cut them to."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.checkpoint.writing import write_text, written
from hfcompress.export.base import Format, Source
from hfcompress.export.gguf_tensors import BLOCK, tensors_of
from hfcompress.export.gguf_tokenizer import tokenizer_fields

log = logging.getLogger("hfcompress")
FILE, MODELFILE = "model.gguf", "Modelfile"
OWN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model types of transformers, and llama.cpp's architecture for layers that are all alike."""
UNEVEN = "deci"
"""Its architecture of layers with heads and neurons of their own number; it rotates neighbours, and has norms of no heads."""
ELSE = "export it to onnx or openvino."
MAY_BE_UNEVEN = ("llama", "mistral", "qwen2")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""llama.cpp's number of the type that most matrices have."""


class Gguf(Format):
    """GGUF, as llama.cpp, Ollama and LM Studio read it: also of models whose layers have each their own heads and neurons.

    Needs: gguf; a Llama, Mistral, Qwen2 or Qwen3 with a byte-level or SentencePiece tokenizer. Buys: the fastest runtime for
    language models on CPUs. Costs: factors are multiplied out. Codes of our own in groups of 32 (quantize: {engine: hfcompress,
    group_size: 32}; bits: 4 and symmetric: false are Q4_1, symmetric: true Q4_0, bits: 8 Q8_0) are written as they are.
    """

    type: Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"] = Field(
        default="F16",
        description="What matrices are stored in that are not codes of the same kind already; tables take 8 bits for Q4.",
    )

    packages: ClassVar[dict[str, str]] = {"gguf": "gguf"}
    answers: ClassVar[bool] = False

    def write(self, source: Source, folder: Path) -> dict[str, Any]:
        from gguf import GGMLQuantizationType, GGUFWriter

        model, shape = source.model, shape_of(source.model)
        fields = {**_fields(model.config, shape), **_tokenizer(source.processor, model)}
        writer = GGUFWriter(None, shape.architecture)
        for name, value in fields.items():
            _add(writer, name, value)
        writer.add_file_type(FILE_TYPES[self.type])
        writer.add_quantization_version(2)
        counted = {"as_coded": 0, "others": 0}
        if (factors := _rope_factors(model.config, shape)) is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        for one in tensors_of(model, self.type, neighbours=shape.architecture in ("llama", UNEVEN)):
            writer.add_tensor(one.name, one.data, raw_dtype=GGMLQuantizationType[one.type])
            if one.data.ndim > 1:
                counted["as_coded" if one.as_coded else "others"] += 1
                if one.type == "F16" != self.type:
                    log.info("export to gguf: rows of %s are no multiple of %d, so it is stored in F16", one.name, BLOCK)
        with written(folder, "the model"):
            writer.write_header_to_file(folder / FILE)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        write_text(folder / MODELFILE, f"FROM ./{FILE}\n", "the Modelfile")
        return {
            "architecture": shape.architecture,
            "matrices_as_coded": counted["as_coded"],
            "matrices_quantised": counted["others"],
        }

    def snippet(self, name: str, told: dict[str, Any]) -> str:
        return "\n".join(
            [
                "import xllamacpp",
                "",
                "params = xllamacpp.CommonParams()",
                f'params.model.path = "{name}/{FILE}"',
                "server = xllamacpp.Server(params)",
                'answer = server.handle_completions({"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0})',
            ]
        )


class Shape(NamedTuple):
    """A Llama-like model as llama.cpp wants it told: one number, or one a layer where they differ."""

    architecture: str
    layers: int
    heads: list[int]
    groups: list[int]
    """Key-value heads."""
    neurons: list[int]
    head: int
    """Of a head's width."""


def shape_of(model: Any) -> Shape:
    """CompressionError for what llama.cpp's graphs can't hold."""
    kind, config = model.config.model_type, model.config
    if kind not in OWN or not hasattr(model, "lm_head"):
        raise CompressionError(
            f"export to gguf: {type(model).__name__} can't be held by it here; what can: causal language models of the types "
            f"{', '.join(OWN)}; {ELSE}"
        )
    layers = model.model.layers
    head = layers[0].self_attn.head_dim
    heads = [layer.self_attn.q_proj.out_features // head for layer in layers]
    groups = [layer.self_attn.k_proj.out_features // head for layer in layers]
    neurons = [layer.mlp.gate_proj.out_features for layer in layers]
    is_even = all(len(set(each)) == 1 for each in (heads, groups, neurons))
    if config.hidden_act not in ("silu", "swish"):
        raise CompressionError(
            f"export to gguf: its activation is {shown(config.hidden_act)}, and llama.cpp's graphs of {kind} have silu; {ELSE}"
        )
    if not is_even and kind not in MAY_BE_UNEVEN:
        raise CompressionError(
            f"export to gguf: its layers have different numbers of heads or neurons, which llama.cpp can hold of "
            f"{', '.join(MAY_BE_UNEVEN)}, not of {kind}; cut it with even: true, or {ELSE}"
        )
    has_bias = layers[0].self_attn.q_proj.bias is not None
    if has_bias and any(count * head != config.hidden_size for count in heads):
        raise CompressionError(
            f"export to gguf: its queries have a bias, which llama.cpp wants as wide as the model, and heads were cut; leave "
            f"the heads of {kind} whole, or {ELSE}"
        )
    return Shape(OWN[kind] if is_even else UNEVEN, len(layers), heads, groups, neurons, head)


def _fields(config: Any, shape: Shape) -> dict[str, Any]:
    """The metadata of a GGUF file, by their keys."""
    name, rope = shape.architecture, dict(config.rope_parameters or {})

    def each(values: list[int]) -> Any:
        return values if name == UNEVEN else values[0]

    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window:  # llama.cpp's graphs look at everything: up to there it is the same
        log.info("export to gguf: its attention slides over %d tokens, so that is the length of context it is given", window)
    context = min(config.max_position_embeddings, window or config.max_position_embeddings)
    fields = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": shape.layers,
        "feed_forward_length": each(shape.neurons),
        "attention.head_count": each(shape.heads),
        "attention.head_count_kv": each(shape.groups),
        "attention.key_length": shape.head,
        "attention.value_length": shape.head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": shape.head,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CompressionError(f"export to gguf: it rotates a part of each head alone, which isn't offered here; {ELSE}")
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        fields["rope.scaling.original_context_length"] = int(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
    elif kind not in ("default", "llama3"):
        raise CompressionError(
            f"export to gguf: its positions are scaled by {shown(kind)}; possible: default, linear, yarn, llama3; {ELSE}"
        )
    return {f"{name}.{key}": value for key, value in fields.items()}


def _rope_factors(config: Any, shape: Shape) -> np.ndarray | None:
    """By how much Llama 3 slows each frequency down, (head / 2,); else None (Dubey et al. 2024, arXiv 2407.21783)."""
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type") != "llama3":
        return None
    base, factor, old = float(rope["rope_theta"]), float(rope["factor"]), int(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    waves = 2 * math.pi * base ** (torch.arange(0, shape.head, 2, dtype=torch.float64) / shape.head)
    share = (old / waves - low) / (high - low)
    between = 1 / ((1 - share) / factor + share)
    factors = torch.where(waves < old / high, torch.ones_like(waves), torch.where(waves > old / low, factor, between))
    return factors.float().numpy()


def _tokenizer(tokenizer: Any, model: Any) -> dict[str, Any]:
    if tokenizer is None:
        raise CompressionError("export to gguf: no tokenizer lies beside the model, and a file holds both; put one there.")
    fields = tokenizer_fields(tokenizer, model.config.vocab_size)
    ends = model.generation_config.eos_token_id
    others = [one for one in (ends if isinstance(ends, list) else [ends]) if one not in (None, tokenizer.eos_token_id)]
    if others:  # a chat ends with another token than a text does
        fields["ggml.eot_token_id"] = int(others[0])
    return {f"tokenizer.{key}": value for key, value in fields.items()}


def _add(writer: Any, name: str, value: Any) -> None:
    """A field of the type that llama.cpp reads it as."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
