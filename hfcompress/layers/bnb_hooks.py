"""What bitsandbytes' layers need worked around, by hooks on each: it is right and stays right then, saved or moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FOUR_BIT, LLM_INT8 = "Linear4bit", "Linear8bitLt"
"""Their classes, which need no import to be known."""


def frozen(layer: Any) -> nn.Module:
    """A low-bit layer, frozen, as codes can't be trained, and kept off the path that repacks the codes in place.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward; what is saved, dequantised or merged
    after that is wrong. `source_cls` is what transformers' own loader notes on the layer.
    """
    layer.source_cls = nn.Linear
    layer.support_avx512bf16_for_cpu = False
    if type(layer).__name__ == FOUR_BIT and not layer.compute_type_is_set and not hasattr(layer, "_follows_input"):
        layer._follows_input = True
        layer.register_forward_pre_hook(_follow)
    if type(layer).__name__ == LLM_INT8 and not hasattr(layer, "_leading"):
        layer._leading, layer._is_fed_oddly, layer._clashes = None, False, False
        layer.register_forward_pre_hook(_flatten)
        layer.register_forward_hook(_unflatten)
        layer.register_state_dict_post_hook(_clash)
    return layer.requires_grad_(False)


def needs_us(layer: nn.Module) -> bool:
    """Whether a low-bit layer was given what bitsandbytes alone can't multiply: its checkpoint needs hfcompress."""
    return bool(getattr(layer, "_is_fed_oddly", False))


def is_repacked(layer: Any) -> bool:
    """Whether bitsandbytes has repacked its codes for the CPU, which it does at a forward: nothing else can read them then."""
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def forget_compute_dtype(layer: Any, dtype: torch.dtype) -> None:
    """A plain bitsandbytes config names a compute dtype even of layers that follow their input: the model's own. Such a layer
    follows it again, so that a model which is loaded and cast is the one that was cast without."""
    if type(layer).__name__ == FOUR_BIT and layer.compute_dtype == dtype:
        layer.compute_dtype, layer.compute_type_is_set = None, False


def follows_input(layer: Any) -> bool:
    """Whether it computes in the dtype of its input, none having been asked for."""
    return hasattr(layer, "_follows_input") or layer.compute_dtype is None


def row_scales(layer: Any) -> Any:
    """(out,): bitsandbytes hands them over at the first forward, and then leaves them behind when a model is moved."""
    scales = getattr(layer.weight, "SCB", None)
    scales = layer.state.SCB if scales is None else scales
    return None if scales is None else scales.to(layer.weight.device)


def _follow(layer: Any, inputs: tuple[Any, ...]) -> None:
    """Where no compute_dtype was asked for, bitsandbytes keeps that of the very first input: a model cast later would go on
    computing in the dtype that it had before."""
    layer.compute_dtype, layer.compute_type_is_set = inputs[0].dtype, True


def _flatten(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What bitsandbytes 0.50 alone gets wrong is given to it as (rows, in), one after the other in memory.

    It gives an input of more than three dimensions back as a matrix. On GPUs it reads float16 rows as if they lay next to each
    other, which first tokens, as BERT's pooler is given them, do not: without a word all but the first are others.
    """
    _follow_weight(layer)
    x = inputs[0]
    layer._leading = x.shape[:-1] if x.dim() > 3 else None
    is_strided = x.dtype == torch.float16 and not x.is_contiguous()
    layer._is_fed_oddly |= is_strided or layer._leading is not None
    x = x if layer._leading is None else x.flatten(0, -2)
    return (x.contiguous() if is_strided else x, *inputs[1:])


def _unflatten(layer: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if layer._leading is None else output.unflatten(0, layer._leading)


def _follow_weight(layer: Any) -> None:
    """Codes that were moved after the first forward, with their model or by peft's DoRA, left what bitsandbytes holds of them
    behind."""
    weight, state = layer.weight, layer.state
    if weight.CB is not None and weight.SCB is None:
        weight.SCB = row_scales(layer)
    elif state.CB is not None and (state.CB.device, state.CB.data_ptr()) != (weight.device, weight.data_ptr()):
        state.CB, state.SCB = weight.data, row_scales(layer)


def _clash(layer: Any, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Codes look like a dense weight: (out, in, 1) can't be loaded as one."""
    if layer._clashes:
        tensors[f"{prefix}weight"] = tensors[f"{prefix}weight"][..., None]
