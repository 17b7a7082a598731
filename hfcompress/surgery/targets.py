"""Target modules, as PEFT reads them: which layers a method may touch, and which of them may become codes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.layers import KINDS, holds_codes, kind_of, prepare
from hfcompress.layers.bitsandbytes import codes_fit
from hfcompress.layers.bnb_hooks import is_repacked
from hfcompress.layers.quantized_conv import DENSE

_STORED = ("weight", "SCB", "scale", "offset", "packed")


def codable(model: Any, bits: int = 8) -> list[str]:
    """Names of the body's dense layers that may become codes of so many bits."""
    return [
        name
        for name in _loaded_as_named(model, body_linears(model))
        if codes_fit(model.get_submodule(name), bits) and not _is_read(model, name, even_dtype=True)
    ]


def _loaded_as_named(model: Any, names: list[str]) -> list[str]:
    """Those that a load would leave as codes, under their own name."""
    # What transformers keeps in float32, or casts an input to the dtype of, must not become codes: T5 does both with `wo`.
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    dense = [part for attribute in kept for part in getattr(model, attribute, None) or ()]
    renames = get_model_conversion_mapping(model, add_legacy=False)
    return [
        name
        for name in names
        if not any(f".{part}." in f".{name}." for part in dense)
        # The scales of codes are found by the name of their weight, which a load must leave as it is and not find twice.
        and not any(part.endswith("weight") for part in name.split("."))
        and all(one.rename_source_key(f"{name}.{leaf}")[0] == f"{name}.{leaf}" for leaf in _STORED for one in renames)
    ]


def coded_linears(model: Any) -> list[str]:
    """Names of the linear layers, heads too, that are codes already; those that share them, as tied embeddings do, are not
    among them, nor is the output embedding."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shared = sharing(model)
    kinds = [name for name, kind in KINDS.items() if kind.holds_codes and "linear" in kind.replaces]
    return [
        name
        for name, module in model.named_modules()
        if kind_of(module) in kinds and module is not output and name not in shared
    ]


def codable_convolutions(model: Any) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the body's convolutions that may become codes, and of the others by why they may not.

    A row of a depthwise one is a few weights, of which the scale would be a large part.
    """
    prefix, base = base_of(model)
    found: list[str] = []
    others: dict[str, list[str]] = {}
    shared = sharing(model)
    every = {f"{prefix}{name}": one for name, one in base.named_modules() if isinstance(one, DENSE)}
    named = _loaded_as_named(model, list(every))
    for name, layer in every.items():
        if type(layer) not in DENSE or "weight" not in layer._parameters:
            why = "of a weight that is computed"
        elif 1 < layer.groups == layer.in_channels:
            why = "depthwise"
        elif name in shared or _is_read(model, name):
            why = "of a weight that others read"
        elif name not in named:
            why = "kept in float32, or renamed by a load"
        else:
            found.append(name)
            continue
        others.setdefault(why, []).append(name)
    return found, others


def codable_tables(model: Any) -> list[list[str]]:
    """Names of input and output embeddings that may become codes; those that share a weight together."""
    prefix, _ = base_of(model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shared = sharing(model)
    groups: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        is_inner = kind_of(module) == "embedding" and f"{name}.".startswith(prefix)
        if (is_inner or module is output) and not any(name in group for group in groups.values()):
            groups[name] = [name, *shared.get(name, [])]
    plain = [group for group in groups.values() if all(_is_plain_table(model, name) for name in group)]
    return plain if _tells_dtype(model) else []


def _is_plain_table(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    is_whole = kind_of(module) != "embedding" or (module.max_norm is None and not module.sparse)
    return kind_of(module) in ("embedding", "linear") and is_whole and not _is_read(model, name, even_dtype=True)


def _tells_dtype(model: nn.Module) -> bool:
    """Whether a floating parameter is left when all matrices are codes: transformers reads a model's dtype off one, and there
    are norms without any."""
    matrices = {id(module.weight) for module in model.modules() if kind_of(module) in ("linear", "conv1d", "embedding")}
    return any(one.is_floating_point() and id(one) not in matrices for one in model.parameters())


def _is_read(model: nn.Module, name: str, even_dtype: bool = False) -> bool:
    """Whether the code of any module on the way to this one reads its weight past its forward; `even_dtype`: as below."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        owner, rest = model.get_submodule(".".join(parts[:depth])), "." + ".".join(parts[depth:])
        if reads_weight(owner, part, even_dtype) or any(rest.endswith(way) for way in _weights_reached(cast(Any, type(owner)))):
            return True
    return False


def matching(model: nn.Module, targets: list[str], possible: list[str], where: str) -> list[str]:
    """The names among `possible` that end with one of the targets, as PEFT's `target_modules` do; each must match."""
    for target in targets:
        if not any(_matches(name, target) for name in possible):
            shared = sharing(model)
            check_unshared(model, [name for name in shared if _matches(name, target)], where)
            leaves = {name.rpartition(".")[2] for name in possible if name not in shared}
            raise CompressionError(
                f"{where}: target_modules {target!r} matches no layer of {type(model).__name__}."
                + did_you_mean(target.rpartition(".")[2], leaves)
            )
    return [name for name in possible if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def parts_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters that stay dense where every layer is codes, by their names: those of `norms`, all `biases`, those of norms
    too, and the tables of `embeddings`, in whatever dtype they are. A tied one goes by the first of its names."""
    found: dict[str, dict[str, nn.Parameter]] = {"norms": {}, "biases": {}, "embeddings": {}}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if not parameter.is_floating_point():
            continue
        # by the name of the class: every architecture has an RMSNorm of its own
        if "norm" in type(owner).__name__.lower():
            found["norms"][name] = parameter
        if leaf.endswith("bias"):
            found["biases"][name] = parameter
        if hasattr(owner, "num_embeddings"):
            found["embeddings"][name] = parameter
    return found


def base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """(the prefix of the base model's names, the base model): ("bert.", BertModel) of a classifier, ("", itself) of a base."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    return (f"{prefix}.", inner) if isinstance(inner, nn.Module) else ("", model)


def body_linears(model: Any) -> list[str]:
    """Names of every linear layer inside the base model that another layer may stand in for: what `target_modules: all-linear`
    means, heads excepted.

    Left out are layers that share a weight or stand in two places, as a stand-in would part them, and layers whose weight their
    owner multiplies by itself, as it would find codes or nothing there.
    """
    prefix, base = base_of(model)
    skip = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shared = sharing(model)
    return [
        f"{prefix}{name}"
        for name, module in base.named_modules()
        if module is not skip
        and kind_of(module) in ("linear", "conv1d")
        and f"{prefix}{name}" not in shared
        and not reads_weight(base.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    ]


def sharing(model: nn.Module) -> dict[str, list[str]]:
    """A module's name to the others that hold the same weight, or are the same module: what stands in for one parts them.

    Told by where weights lie in memory, as a tie may be one parameter, or two on the same storage.
    """
    holders: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None and weight.numel():
            place = id(weight) if weight.is_meta else (weight.device, weight.data_ptr())
            holders.setdefault(place, []).append(name)
    return {name: [one for one in names if one != name] for names in holders.values() if len(names) > 1 for name in names}


def check_unshared(model: nn.Module, names: list[str], where: str) -> None:
    """CompressionError for the first of these that shares its weight."""
    shared = sharing(model)
    for name in names:
        if name in shared:
            raise CompressionError(
                f"{where}: {name.removesuffix('.base_layer')} shares its weight with {' and '.join(shared[name])}, and {where} "
                f"would part them; take it out of target_modules."
            )


def reads_weight(owner: nn.Module, leaf: str, even_dtype: bool = False) -> bool:
    """Whether the code of a module's class reads `self.leaf.weight`, for more than its device or dtype; `even_dtype`: or its
    dtype, or that of `self.leaf.parameters()`, as some cast to it."""
    return leaf in _weights_read(cast(Any, type(owner)), even_dtype)


@cache
def _weights_read(owner: Any, even_dtype: bool) -> frozenset[str]:
    reads = [r"self\.(\w+)\.weight\b(?!\.(?:device|dtype)\b)"]
    if even_dtype:
        reads = [r"self\.(\w+)\.weight\b(?!\.device\b)", r"next\(self\.(\w+)\.parameters\(\)\)"]
    ours = [inspect.getsource(one) for one in owner.__mro__ if one.__module__.startswith("transformers.models.")]
    return frozenset(leaf for source in ours for read in reads for leaf in re.findall(read, source))


@cache
def _weights_reached(owner: Any) -> frozenset[str]:
    """The ways, as ".attention.output", to weights that the code of a class writes into (RWKV), reads the shape of (Whisper,
    for its positions), or hands a module on for (Perceiver)."""
    found: set[str] = set()
    for one in owner.__mro__:
        if one.__module__.startswith("transformers.models."):
            source, whole = inspect.getsource(one), inspect.getsource(sys.modules[one.__module__])
            found |= set(re.findall(r"\w((?:\.\w+)+)\.weight(?:\.data)?\.(?:\w+_\(|shape)", source))
            handed = re.findall(r"(\w+)=self((?:\.\w+)+)", source)
            found |= {way for name, way in handed if re.search(rf"(?<![\w.]){name}\.weight\b(?!\.(?:device|dtype)\b)", whole)}
    return frozenset(found)


def by_pattern(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """As PEFT reads the keys of its `rank_pattern`: suffixes of names, or regular expressions for them."""
    try:
        found = [name for name in names if re.match(rf"(.*\.)?(?:{pattern})$", name)]
    except re.error as error:
        raise CompressionError(f"{where}: {pattern!r} is no regular expression ({error}).") from error
    if not found:
        leaves = {name.rpartition(".")[2] for name in names}
        raise CompressionError(
            f"{where}: {pattern!r} matches no chosen layer." + did_you_mean(pattern.rpartition(".")[2], leaves)
        )
    return found


def readable(model: nn.Module, names: Iterable[str], where: str) -> list[str]:
    """Those of these layers that are codes, made ready to be read: bitsandbytes would repack them at the next forward."""
    coded = [name for name in names if holds_codes(model.get_submodule(name))]
    for name in coded:
        layer = model.get_submodule(name)
        if is_repacked(layer):
            raise CompressionError(
                f"{where}: bitsandbytes repacked the codes of {name} for inference at the model's first forward, and nothing "
                f"else can read them; load the model again, and {where} before anything else runs it."
            )
        prepare(layer)
    return coded
