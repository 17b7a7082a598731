"""Reads the tensors of bitsandbytes' layers; imported when a checkpoint has such layers, as it needs what transformers keeps
to itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize
from transformers.quantizers import HfQuantizer

from hfcompress.checkpoint.errors import shown
from hfcompress.layers import kind_of


class FromCodes(ConversionOps):
    """Hands a layer's stored tensors to the bitsandbytes reader they belong to; dense weights pass through."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **where: Any) -> dict[str, Any]:
        module: Any = where["model"].get_submodule(where["full_layer_name"].rpartition(".")[0])
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if key == "weight" and tensor.dim() == 3:
                input_dict[key], module._clashes = tensor.squeeze(-1), True
        reader = Bnb8bitDeserialize if kind_of(module) == "linear_8bit" else Bnb4bitDeserialize
        weight = input_dict.get("weight", torch.empty(0))
        try:
            return reader(self.hf_quantizer).convert(input_dict, *args, **where)
        except Exception as error:  # bitsandbytes' reader checks nothing, and transformers would hide what is raised in a log
            module.unread = f"what lies beside its codes can't be read: {shown(str(error) or type(error).__name__)}"
            return {"weight": weight[0] if isinstance(weight, list) else weight}
