"""The structure of a compressed model, read: checked, and a model given its shape again (`describe` writes it).

A structure is plain JSON, a module's name to an edit: `{"kind": "linear", "in_features": 384, ...}` puts another layer there,
`{"kind": "counts", "num_attention_heads": 6}` corrects integers that a module's forward reads.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.checkpoint.integers import largest, set_count
from hfcompress.layers import KINDS, kind_of

Structure = dict[str, dict[str, Any]]
FORMAT = 1
PACKED = "packed"
"""How tensors may be stored, see `checkpoint.packed`."""


def twin(model: nn.Module, config: PreTrainedConfig | None = None) -> nn.Module:
    """The model of this class that a config, its own if none is given, describes, on the meta device: names and shapes, no
    memory."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():  # no numbers are drawn for what holds none: half of the time
        blank: Any = type(model)(copy.deepcopy(config or model.config))  # type: ignore[call-arg]
    blank.tie_weights()  # which drawing would have done
    return blank  # type: ignore[no-any-return]


def is_stored_packed(config: Any) -> bool:
    """Whether a config says that the tensors are packed streams in files."""
    told = getattr(config, "quantization_config", None) or {}
    return (told.get("storage") if isinstance(told, dict) else getattr(told, "storage", None)) == PACKED


def rebuild(model: nn.Module, structure: Structure) -> nn.Module:
    """Give a twin (on the meta device) the shape that the structure tells. The structure is not trusted.

    Names hold for the model they were read from, for its base model (`AutoModel`), and for a base model's heads. A class
    other than the config's own may lack a part, such as a pooler: its edits are left out.
    """
    if not isinstance(structure, dict):
        raise CompressionError("structure: it must map module names to edits; save the model again with hfcompress.")
    for name, edit in structure.items():
        here = name_in(model, name)
        if here is not None:
            _check_edit(name, edit, model.get_submodule(here))
            apply_edit(model, here, edit)
    return model


def kept_in_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers loads the parameter of this name in float32 where the model's dtype is this one."""
    kept = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else []
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)


def own_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Of the tensors that a checkpoint holds of this module itself."""
    tensors, unsaved = {**module._parameters, **module._buffers}, module._non_persistent_buffers_set
    return {key: list(tensor.shape) for key, tensor in tensors.items() if tensor is not None and key not in unsaved}


def apply_edit(model: nn.Module, name: str, edit: dict[str, Any]) -> None:
    fields = {key: value for key, value in edit.items() if key != "kind"}
    if edit["kind"] == "counts":
        module = model.get_submodule(name)
        for key, shape in fields.pop("shapes", {}).items():
            tensor = getattr(module, key)
            shaped = torch.empty(shape, dtype=tensor.dtype, device="meta")
            setattr(module, key, nn.Parameter(shaped, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shaped)
        for key, value in fields.items():
            set_count(module, key, value)
    else:
        old = model.get_submodule(name)
        with torch.device("meta"):
            new = KINDS[edit["kind"]].build(**fields)
        new.train(old.training)
        model.set_submodule(name, new)


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def name_in(model: Any, name: str) -> str | None:
    """The structure's name as this class knows it; None for a part that this class does not have, and the saved one has."""
    prefix = model.base_model_prefix
    if submodule(model, name) is not None:
        return name
    if hasattr(model, prefix) and submodule(model, f"{prefix}.{name}") is not None:
        return f"{prefix}.{name}"
    inner = name.removeprefix(f"{prefix}.")
    if inner != name and submodule(model, inner) is not None:
        return inner
    saved_as = getattr(model.config, "architectures", None) or [type(model).__name__]
    if type(model).__name__ not in saved_as:
        return None
    raise CompressionError(
        f"structure: there is no module {shown(name)} in {type(model).__name__}; load the checkpoint with the architecture it "
        f"was saved from, named in its config.json."
    )


def _check_edit(name: str, edit: Any, old: nn.Module) -> None:
    """Known kinds and fields only; sizes positive and no larger than the config's own."""

    def refuse(what: str) -> None:
        raise CompressionError(f"structure: {shown(name)}: {what}; the checkpoint is damaged or not made by hfcompress.")

    if not isinstance(edit, dict) or not isinstance(edit.get("kind"), str) or edit["kind"] not in (*KINDS, "counts"):
        refuse(f"unknown edit {shown(edit)}, possible kinds are {', '.join(KINDS)}, counts")
    fields = {key: value for key, value in edit.items() if key != "kind"}
    if edit["kind"] == "counts":
        _check_shapes_told(fields.pop("shapes", {}), own_shapes(old), refuse)
        for key, value in fields.items():
            most = largest(old, key)
            if not most:
                refuse(f"it has no count {shown(key)}")
            elif type(value) is not int or not 0 < value <= most:
                refuse(f"{shown(key)} = {shown(value)} is not an integer from 1 to {most}")
        return
    kind = KINDS[edit["kind"]]
    if (kind_of(old) or type(old).__name__) not in kind.replaces:
        refuse(f"a {type(old).__name__} can't become a {edit['kind']}")
    if wrong := kind.mistake(fields, kind.limits(old)):
        refuse(wrong)


def _check_shapes_told(told: Any, own: dict[str, list[int]], refuse: Callable[[str], None]) -> None:
    """Of tensors that are there, with as many axes, none longer."""
    if not isinstance(told, dict):
        return refuse(f"shapes = {shown(told)} is no mapping of tensors to shapes")
    for key, shape in told.items():
        limits = own.get(key)
        fits = limits and isinstance(shape, list) and len(shape) == len(limits)
        if not fits or not all(type(n) is int and 0 < n <= limit for n, limit in zip(shape, limits or (), strict=True)):
            refuse(f"the shape {shown(shape)} of {shown(key)} does not fit into {limits or 'nothing there'}")
