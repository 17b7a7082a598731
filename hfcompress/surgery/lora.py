"""Low-rank adapters (LoRA, through peft) on a model's layers: where they start, how they are merged, what a kept one is.

An adapter computes W x + s B A x beside a layer of weight W (out, in), with A (r, in), B (out, r) and s the scaling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import twin
from hfcompress.layers import KINDS, features, holds_codes, kind_of
from hfcompress.layers.bnb_library import import_first
from hfcompress.layers.quantized import QuantLinear
from hfcompress.surgery.modules import forget_codes, swap

DEFAULT = "default"
"""The name that peft gives an adapter."""


class Split(NamedTuple):
    """A dense layer that PiSSA divided into a low-rank part, which is trained, and what is left of the weight."""

    weight: Tensor
    """As it was before, in the layer's own orientation; in the CPU's memory."""
    down: Tensor
    """A as it started, (r, in)."""
    up: Tensor
    """B as it started, (out, r)."""


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers that adapters stand on, by name."""
    import_first()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


# ---------------------------------------------------------------- where they start


def split_weights(model: nn.Module, init: str, splits: dict[str, Split]) -> None:
    """Start from the largest singular values of each weight, and leave the layer the rest of it: W = W_rest + s B A.

    Meng et al. 2024, PiSSA (arXiv 2404.02948). `init`: "pissa", or "pissa_niter_N" for N rounds of a randomised SVD, with a
    seed of its own so that a training that is resumed splits alike. What was split is noted in `splits` as it is done.
    """
    layers = adapted(model)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if kind_of(base) not in ("linear", "conv1d"):
            is_code = "holds codes" if holds_codes(base) else f"is {_a(base)}"
            raise CompressionError(
                f"adapters: init_lora_weights: {init} splits dense linear weights, and {name} {is_code}; choose loftq or true "
                f"for codes, or name other target_modules."
            )
        _check_rank(name, layer, init)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        devices = [base.weight.device] if base.weight.device.type == "cuda" else []
        kept = base.weight.data
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            layer.pissa_init(DEFAULT, init)  # puts a new tensor into the parameter
        down, up = layer.lora_A[DEFAULT].weight.data, layer.lora_B[DEFAULT].weight.data
        splits[name] = Split(kept.cpu(), down.clone(), up.clone())


def start_from_codes(model: nn.Module, original: nn.Module | None) -> None:
    """Start from the best approximation of what rounding to codes took away: s B A = SVD_r(W - Q), for layers of codes Q.

    Li et al. 2023, LoftQ (arXiv 2310.08659), with one round, as the codes are given. W is the weight of the same layer in
    `original`. Layers that hold no codes lost nothing, and their adapters start at zero.
    """
    coded = {name: layer for name, layer in adapted(model).items() if holds_codes(layer.get_base_layer())}
    if not coded:
        raise CompressionError(
            "adapters: init_lora_weights: loftq starts from the error of codes, and no adapted layer holds codes; quantize in "
            "a step before, or choose pissa or true."
        )
    for name, layer in coded.items():
        _check_rank(name, layer, "loftq")
        dense = _dense_of(original, name, layer.get_base_layer())
        codes = _dequantised(layer.get_base_layer())
        error = dense - codes
        if error.norm() >= dense.norm():
            raise CompressionError(
                f"adapters: init_lora_weights: loftq: the codes of {name} are further from the original's weight than zeros "
                f"are, so they stand for another; quantize the original itself, or set init_lora_weights: true."
            )
        left, values, right = torch.linalg.svd(error, full_matrices=False)
        rank, root = layer.r[DEFAULT], (values / layer.scaling[DEFAULT]).sqrt()
        down, up = layer.lora_A[DEFAULT].weight, layer.lora_B[DEFAULT].weight
        down.data.copy_(root[:rank, None] * right[:rank])
        up.data.copy_(left[:, :rank] * root[:rank])
        if DEFAULT in layer.lora_magnitude_vector:  # DoRA's lengths are those of the weight that it starts from
            layer.lora_magnitude_vector[DEFAULT].update_layer(
                base_layer=layer.get_base_layer(), lora_A=down.data, lora_B=up.data, scaling=layer.scaling[DEFAULT]
            )


def _dense_of(original: nn.Module | None, name: str, base: nn.Module) -> Tensor:
    """(out, in) in float32 on the layer's device: the weight that its codes were made of."""
    other = dict(original.named_modules()).get(name) if original is not None else None
    if other is None or holds_codes(other):
        lacks = (
            "holds codes there too" if other is not None else "has no such layer" if original is not None else "is not known"
        )
        raise CompressionError(
            f"adapters: init_lora_weights: loftq compares the codes of {name} with the original's weight, and the original "
            f"{lacks}; list quantize in a step before, in one recipe, or set init_lora_weights: true."
        )
    if kind_of(other) not in ("linear", "conv1d") or features(other) != features(base):
        raise CompressionError(
            f"adapters: init_lora_weights: loftq: {name} has {features(base)} features and the original's "
            f"{type(other).__name__} {features(other)}, so it is another layer since; cut in a recipe of its own before, or "
            f"set init_lora_weights: true."
        )
    return KINDS[kind_of(other) or ""].dequantised(other).to(_place(base), torch.float32)


def _check_rank(name: str, layer: Any, init: str) -> None:
    most = min(features(layer.get_base_layer()))
    if layer.r[DEFAULT] > most:
        raise CompressionError(
            f"adapters: r = {layer.r[DEFAULT]}: init_lora_weights: {init} takes singular values, and {name} has {most}; set r "
            f"to {most} or less."
        )


def _dequantised(base: nn.Module) -> Tensor:
    """(out, in) in float32, what a layer of codes computes with."""
    return KINDS[kind_of(base) or ""].dequantised(base).float()


def _place(base: Any) -> torch.device:
    return base.weight.device  # type: ignore[no-any-return]


def _a(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


# ---------------------------------------------------------------- what a kept one is


def restore_split(model: nn.Module, splits: dict[str, Split]) -> None:
    """Make adapters that began as PiSSA plain ones, for the model as it came: s B A - s B0 A0 is one of rank 2 r.

    The weights are then those from before, bit for bit, and PEFT loads the adapter on them.
    """
    if not splits:
        return
    layers = adapted(model)
    with torch.no_grad():
        for name, split in splits.items():
            layer: Any = layers[name]
            down, up = layer.lora_A[DEFAULT], layer.lora_B[DEFAULT]
            put_back(layer.get_base_layer(), split)
            down.weight = nn.Parameter(torch.cat([down.weight, split.down.to(down.weight)]))
            up.weight = nn.Parameter(torch.cat([up.weight, -split.up.to(up.weight)], dim=1))
            down.out_features = up.in_features = layer.r[DEFAULT] = 2 * layer.r[DEFAULT]
            layer.lora_alpha[DEFAULT] *= 2**0.5 if layer.use_rslora[DEFAULT] else 2  # the scaling stays
    config = model.peft_config[DEFAULT]  # type: ignore[union-attr,index]
    config.init_lora_weights, config.r = True, 2 * config.r  # type: ignore[union-attr]
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # type: ignore[union-attr]


def put_back(base: Any, split: Split) -> None:
    """The weight of a layer that PiSSA split, as it was."""
    base.weight.data = split.weight.to(base.weight.device)


@contextmanager
def weights_back_on_error(model: nn.Module) -> Iterator[dict[str, Split]]:
    """Takes note of what PiSSA splits, and on an error puts those weights back: they were written in place."""
    splits: dict[str, Split] = {}
    try:
        yield splits
    except BaseException:
        bases = {name: layer.get_base_layer() for name, layer in adapted(model).items()}
        for name, split in splits.items():
            put_back(bases.get(name, model.get_submodule(name)), split)
        raise


# ---------------------------------------------------------------- merging


def merge(model: Any, dense: bool = False) -> None:
    """Put the base layers back in place of PEFT's, with the adapters merged in. On an error no base layer has changed.

    Codes are dequantised, the update is added, and the sum is coded again in the same format, off by half a step at most;
    `dense`: it stays a dense layer, in the dtype of the model, and nothing is rounded twice.
    """
    from peft.utils import ModulesToSaveWrapper

    layers = adapted(model)
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    coded = [name for name, base in bases.items() if holds_codes(base)] if dense else []
    ours = [name for name, base in bases.items() if name not in coded and isinstance(base, QuantLinear)]
    before = [(base, key, one, one.data) for base in bases.values() for key, one in list(base.named_parameters(recurse=False))]
    try:
        for name in coded:
            bases[name] = _merged_dense(model, name, layers[name])
        for name in ours:  # PEFT knows bitsandbytes' codes alone
            bases[name] = bases[name].recoded(_merged_weight(name, layers[name]))
        for name, layer in layers.items():
            if name not in (*coded, *ours):
                layer.merge(safe_merge=True)
    except BaseException as error:
        for base, key, parameter, data in before:  # merging codes puts a new parameter there, merging floats new data
            base._parameters[key], parameter.data = parameter, data
        if isinstance(error, ValueError):
            raise CompressionError(f"adapters: {error}; nothing was merged: train with a lower learning rate.") from error
        raise
    for name, base in bases.items():
        swap(model, name, base)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[DEFAULT])
    model._hf_peft_config_loaded = False
    del model.peft_config
    if coded and not any(holds_codes(module) for module in model.modules()):
        forget_codes(model)


@torch.no_grad()
def _merged_weight(name: str, layer: Any) -> Tensor:
    """(out, in) in float32: the weight that codes and their adapter compute with."""
    weight = _dequantised(layer.get_base_layer())
    if DEFAULT in layer.lora_variant:
        weight = layer.lora_variant[DEFAULT].merge_safe(layer, DEFAULT, weight)
    else:
        weight = weight + layer.get_delta_weight(DEFAULT).float()
    if not bool(weight.isfinite().all()):
        raise ValueError(f"NaNs detected in the merged weights of {name}")
    return weight


@torch.no_grad()
def _merged_dense(model: nn.Module, name: str, layer: Any) -> nn.Module:
    """What the architecture has in place of codes, with the weight that they and the adapter compute with."""
    base, weight = layer.get_base_layer(), _merged_weight(name, layer)
    there = dict(twin(model).named_modules()).get(name)
    kind = "conv1d" if there is not None and kind_of(there) == "conv1d" and base.bias is not None else "linear"
    into, out = features(base)
    with torch.device("meta"):
        new: Any = KINDS[kind].build(in_features=into, out_features=out, bias=base.bias is not None)
    dtype = model.dtype if isinstance(model.dtype, torch.dtype) else torch.float32
    new.weight = nn.Parameter((weight.T if kind == "conv1d" else weight).to(dtype).contiguous())
    if base.bias is not None:
        new.bias = nn.Parameter(base.bias.detach().to(dtype))
    return new  # type: ignore[no-any-return]
