"""Weights edited while `from_pretrained` reads them, so that a model which does not fit in memory is never whole in it.

transformers goes through a checkpoint tensor by tensor, renames and converts each, and asks its quantizer about it before the
next is read: this one has a layer edited as soon as its weight is there.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.checkpoint.config_fields import parts

NAME = "hfcompress_streaming"
PAGEOUT = 21  # of madvise, on Linux: whoever reads the pages again gets them from the file again


@register_quantization_config(NAME)
class Streaming(QuantizationConfigMixin):
    """What to do while a model is read; it never gets into a file.

    `begin(model)`, on the meta device: the names of layers to edit as they are read. `edit(name)`: edit this one, whose
    tensors are all there.
    """

    def __init__(self, begin: Callable[[Any], Collection[str]], edit: Callable[[str], None]) -> None:
        self.quant_method: Any = NAME
        self.begin, self.edit = begin, edit

    def __deepcopy__(self, _: Any) -> Streaming:
        return self  # configs are copied, the model that is edited is one

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}

    to_diff_dict = to_dict


@register_quantizer(NAME)
class StreamingQuantizer(HfQuantizer):
    """Leaves a plain model behind, with the edited layers in it."""

    quantization_config: Streaming

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        self._failed: Exception | None = None
        with _tied(model):
            names = self.quantization_config.begin(model)
        # A layer that is read in another dtype than the rest would be cast too early: it waits until all is read.
        dtype = torch.get_default_dtype()
        self._waiting = {name for name in names if model.get_submodule(name).weight.dtype == dtype}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._failed is not None:
            raise self._failed
        self.remove_quantization_config(model)
        del model.is_quantized
        for part in parts(model.config):
            vars(part).pop("_is_quantized", None)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")  # type: ignore[assignment]
        return leaf == "weight" and owner in self._waiting

    def get_quantize_ops(self) -> ConversionOps:
        return _Edit(self)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def takes(self, model: Any, param_name: str, weight: Tensor) -> bool:
        """Edit the layer of this weight, if it is one to edit and whole by now; else transformers loads it, and tells what is
        wrong with it."""
        if not self.param_needs_quantization(model, param_name):
            return False
        name = param_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        self._waiting.discard(name)
        others = (tensor for key, tensor in layer.named_parameters(recurse=False) if key != "weight")
        if layer.weight.shape != weight.shape or any(tensor.is_meta for tensor in others):
            return False
        layer.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        try:
            with torch.random.fork_rng(devices=[]):  # a head that is new must get the weights that it gets without us
                self.quantization_config.edit(name)
        except Exception as error:  # transformers would tell it as a fault of the checkpoint: see above
            self._failed = error
            self._waiting.clear()
        _mark_as_read(model.get_submodule(name))
        give_back(weight)
        return True


class _Edit(ConversionOps):
    """Takes the weights of layers to edit, and lets others through."""

    def __init__(self, quantizer: StreamingQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **where: Any) -> dict[str, Any]:
        left = {}
        for name, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            if self._quantizer.takes(where["model"], name, tensor):
                where["missing_keys"].discard(name)
            else:
                left[name] = tensor
        return left


@contextmanager
def _tied(model: Any) -> Iterator[None]:
    """The weights tied that transformers ties when all are read; as before afterwards."""
    before = []
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        (owner, leaf), shared = _owner(model, target), getattr(*_owner(model, source))
        before.append((owner, leaf, getattr(owner, leaf)))
        setattr(owner, leaf, shared)
    try:
        yield
    finally:
        for owner, leaf, tensor in before:
            setattr(owner, leaf, tensor)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _mark_as_read(layer: nn.Module) -> None:
    """Keep transformers, and the model's class, from giving it random weights."""
    for part in layer.modules():
        held: list[Any] = [part, *part.parameters(recurse=False), *part.buffers(recurse=False)]
        for one in held:
            one._is_hf_initialized = True


def give_back(tensor: Tensor) -> None:
    """Tell the system that the memory of a tensor, mostly a mapped file, may go for now; its values stay. And what computing
    with it has freed, which small blocks that live on would else hold fast."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if end > start:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGEOUT)
            ctypes.CDLL("libc.so.6").malloc_trim(0)
