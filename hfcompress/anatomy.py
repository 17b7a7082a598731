"""Where the heads, feed-forward neurons, layers and embeddings of an architecture are. Names and sizes only.

This is the one file that knows module names. Sizes are read from the modules as they stand, so an anatomy holds for a model
whose layers were already cut unevenly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hfcompress.errors import CompressionError
from hfcompress.layers import features, kind_of


@dataclass(frozen=True)
class Units:
    """`count` equal units of one layer, attention heads or feed-forward neurons: cutting one takes rows out of every input
    projection and columns out of the output projection. Under grouped-query attention a unit is a whole key-value group.
    """

    owner: str
    """The module that holds them: "bert.encoder.layer.0.attention.self"."""
    inputs: tuple[str, ...]
    """Projections whose output features the units are."""
    rows: tuple[int, ...]
    """Output features a unit takes in each of `inputs`."""
    fused: int
    """How many blocks of `count` units an input stacks: 3 for GPT-2's c_attn, else 1."""
    output: str
    """The projection that reads the units."""
    size: int
    """Input features a unit takes in `output`."""
    count: int
    counters: dict[str, int] = field(default_factory=dict)
    """Integers of `owner` that its forward reads, and how much of each a unit is worth."""


@dataclass(frozen=True)
class Layer:
    name: str
    heads: Units
    neurons: Units


@dataclass(frozen=True)
class Anatomy:
    stack: str
    """The ModuleList of layers."""
    layers: tuple[Layer, ...]
    embedding: str

    def units(self, kind: str) -> list[Units]:
        """All units of a kind, "heads" or "neurons", first layer first."""
        return [getattr(layer, kind) for layer in self.layers]


@dataclass(frozen=True)
class Family:
    """Names inside a base model (`BertModel`, `LlamaModel`); projections are named from their layer."""

    stack: str
    attention: str
    query: tuple[str, ...]
    """Query, key, value projections; a single name if they are fused."""
    attention_output: str
    neurons: tuple[str, ...]
    """The projections into the neurons: one, or gate and up."""
    neurons_output: str
    embedding: str
    head_size: str = "head_dim"
    """The attribute of the attention module that holds it."""
    counters: tuple[str, ...] = ()
    """Attributes of the attention module counted in heads."""
    width_counters: tuple[str, ...] = ()
    """Attributes of the attention module counted in features."""


_BERT = Family(
    stack="encoder.layer",
    attention="attention.self",
    query=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_output="attention.output.dense",
    neurons=("intermediate.dense",),
    neurons_output="output.dense",
    embedding="embeddings.word_embeddings",
    head_size="attention_head_size",
    counters=("num_attention_heads",),
    width_counters=("all_head_size",),
)
_DISTILBERT = Family(
    stack="transformer.layer",
    attention="attention",
    query=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attention_output="attention.out_lin",
    neurons=("ffn.lin1",),
    neurons_output="ffn.lin2",
    embedding="embeddings.word_embeddings",
    head_size="attention_head_size",
    counters=("n_heads",),
)
_LLAMA = Family(
    stack="layers",
    attention="self_attn",
    query=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.o_proj",
    neurons=("mlp.gate_proj", "mlp.up_proj"),
    neurons_output="mlp.down_proj",
    embedding="embed_tokens",
)
_GPT2 = Family(
    stack="h",
    attention="attn",
    query=("attn.c_attn",),
    attention_output="attn.c_proj",
    neurons=("mlp.c_fc",),
    neurons_output="mlp.c_proj",
    embedding="wte",
    counters=("num_heads",),
    width_counters=("split_size",),
)
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _DISTILBERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": _GPT2,
}


def base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """(the prefix of the base model's names, the base model): ("bert.", BertModel) of a classifier, ("", itself) of a base."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    return (f"{prefix}.", inner) if isinstance(inner, nn.Module) else ("", model)


def anatomy(model: nn.Module) -> Anatomy:
    """Read the anatomy of a model of a known family; CompressionError for others."""
    family = family_of(model)
    prefix, base = base_of(model)
    stack: Any = base.get_submodule(family.stack)
    layers = []
    for index, layer in enumerate(stack):
        name = f"{prefix}{family.stack}.{index}"
        layers.append(Layer(name, _heads(layer, name, family), _neurons(layer, name, family)))
    return Anatomy(f"{prefix}{family.stack}", tuple(layers), f"{prefix}{family.embedding}")


def family_of(model: nn.Module) -> Family:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise CompressionError(
            f"{type(model).__name__}: hfcompress does not know where heads, neurons and layers of {kind!r} models are; "
            f"known are {', '.join(FAMILIES)}; "
            f"distill, student, prune_weights, low_rank, adapters, quantize and cast work on any architecture."
        )
    return FAMILIES[kind]


def _heads(layer: nn.Module, name: str, family: Family) -> Units:
    head = getattr(layer.get_submodule(family.attention), family.head_size)
    widths = [features(layer.get_submodule(part))[1] for part in family.query]
    columns = features(layer.get_submodule(family.attention_output))[0]
    fused = 3 if len(widths) == 1 else 1
    groups = (columns if fused == 3 else widths[1]) // head
    per_group = columns // head // groups
    rows = (head,) if fused == 3 else (per_group * head, head, head)
    return Units(
        owner=f"{name}.{family.attention}",
        inputs=tuple(f"{name}.{part}" for part in family.query),
        rows=rows,
        fused=fused,
        output=f"{name}.{family.attention_output}",
        size=per_group * head,
        count=groups,
        counters=dict.fromkeys(family.counters, per_group) | dict.fromkeys(family.width_counters, per_group * head),
    )


def _neurons(layer: nn.Module, name: str, family: Family) -> Units:
    return Units(
        owner=name,
        inputs=tuple(f"{name}.{part}" for part in family.neurons),
        rows=(1,) * len(family.neurons),
        fused=1,
        output=f"{name}.{family.neurons_output}",
        size=1,
        count=features(layer.get_submodule(family.neurons_output))[0],
    )


def body_linears(model: Any) -> list[str]:
    """Names of every linear layer inside the base model: what `target_modules: all-linear` means, heads excepted."""
    prefix, base = base_of(model)
    skip = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        f"{prefix}{name}"
        for name, module in base.named_modules()
        if module is not skip and kind_of(module) in ("linear", "conv1d")
    ]
