"""What the model became, read off the model itself: `twin`, `diff`, `rebuild`, `describe`.

A structure is plain JSON, a module's name to an edit: `{"kind": "linear", "in_features": 384, ...}` puts another layer there,
`{"kind": "counts", "num_attention_heads": 6}` corrects integers that a module's forward reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hfcompress.counts import COUNTS, count_in, largest, set_count
from hfcompress.errors import CompressionError
from hfcompress.layers import DTYPES, KINDS, THRESHOLD_LIMIT, blank, features, is_low_bit, kind_of
from hfcompress.plain import changes, parts
from hfcompress.stock import as_bitsandbytes

Structure = dict[str, dict[str, Any]]
FORMAT = 1


def twin(model: nn.Module) -> nn.Module:
    """The model that `model.config` alone describes, on the meta device: names and shapes, no memory."""
    return blank(model)


def diff(model: nn.Module) -> Structure:
    """How the model differs from its twin. `diff(rebuild(twin(model), diff(model))) == diff(model)`.

    Raises CompressionError when the model has a part that no edit can express.
    """
    blank, edits = twin(model), {}
    for name, module in model.named_modules():
        edit = _edit_between(_submodule(blank, name), module, name)
        if edit is not None:
            edits[name] = edit
            _apply(blank, name, edit)
    _check_shapes(model, blank)
    _check_whole(model, blank)
    return edits


def rebuild(model: nn.Module, structure: Structure) -> nn.Module:
    """Give a twin (on the meta device) the shape that the structure tells. The structure is not trusted.

    Names hold for the model they were read from, for its base model (`AutoModel`), and for a base model's heads.
    """
    if not isinstance(structure, dict):
        raise CompressionError("structure: it must map module names to edits; save the model again with hfcompress.")
    for name, edit in structure.items():
        here = _name_in(model, name)
        if here is not None:
            _check_edit(name, edit, model.get_submodule(here))
            _apply(model, here, edit)
    return model


def describe(model: nn.Module) -> Structure:
    """Make `model.config` tell what the model is: by its own fields where they can, else by `quantization_config`."""
    config: Any = model.config
    config.quantization_config = None
    edits, before = diff(model), [(part, dict(vars(part))) for part in parts(config)]
    left = settled(model, edits)
    _set_clashes(model, False)
    if left:
        # In the module's own names: what transformers makes of them for older checkpoints splits and joins dense weights only.
        vars(model)["_weight_conversions"] = []
    plain = as_bitsandbytes(model, left)
    if plain is not None:
        config.quantization_config = plain
    elif left:
        # The plug-in is needed anyway: then config.json stays that of the architecture as it came, and bounds every edit.
        for part, fields in before:
            vars(part).clear()
            vars(part).update(fields)
        rebuild(twin(model), edits)  # what could not be loaded again is refused here, not there
        _make_loud(model)
        config.quantization_config = {"quant_method": "hfcompress", "format": FORMAT, "modules": edits}
        return edits
    else:
        del config.quantization_config
    return left


def _edit_between(old: nn.Module | None, new: nn.Module, name: str) -> dict[str, Any] | None:
    if old is None:
        raise CompressionError(f"{name}: this module is not part of {type(new).__name__}'s config; it can't be saved.")
    kind = kind_of(new)
    if kind is not None:
        fields = KINDS[kind].fields(new)
        same = kind_of(old) == kind and KINDS[kind].fields(old) == fields
        return None if same else {"kind": kind, **fields}
    if type(old).__name__ != type(new).__name__:
        raise CompressionError(
            f"{name}: a {type(new).__name__} stands where the architecture has a {type(old).__name__}, and no edit can "
            f"express it; possible kinds are {', '.join(KINDS)}; merge or remove that layer before saving."
        )
    counts = {key: value for key in COUNTS if (value := count_in(new, key)) is not None and value != count_in(old, key)}
    before, after = _own_shapes(old), _own_shapes(new)
    shapes = {key: shape for key, shape in after.items() if before.get(key, shape) != shape}
    edit: dict[str, Any] = {**counts, **({"shapes": shapes} if shapes else {})}
    return {"kind": "counts", **edit} if edit else None


def _own_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Of the tensors that a checkpoint holds of this module itself."""
    tensors, unsaved = {**module._parameters, **module._buffers}, module._non_persistent_buffers_set
    return {key: list(tensor.shape) for key, tensor in tensors.items() if tensor is not None and key not in unsaved}


def _apply(model: nn.Module, name: str, edit: dict[str, Any]) -> None:
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


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _name_in(model: Any, name: str) -> str | None:
    """The structure's name as this class knows it; None for a head that a base model does not have."""
    prefix = model.base_model_prefix
    if _submodule(model, name) is not None:
        return name
    if hasattr(model, prefix) and _submodule(model, f"{prefix}.{name}") is not None:
        return f"{prefix}.{name}"
    inner = name.removeprefix(f"{prefix}.")
    if inner != name and _submodule(model, inner) is not None:
        return inner
    if inner == name and not hasattr(model, prefix):
        return None
    raise CompressionError(
        f"structure: there is no module {name!r} in {type(model).__name__}; load the checkpoint with the architecture it was "
        f"saved from, named in its config.json."
    )


def _check_edit(name: str, edit: Any, old: nn.Module) -> None:
    """Known kinds and fields only; sizes positive and no larger than the config's own."""

    def refuse(what: str) -> None:
        raise CompressionError(f"structure: {name}: {what}; the checkpoint is damaged or not made by hfcompress.")

    if not isinstance(edit, dict) or edit.get("kind") not in (*KINDS, "counts"):
        refuse(f"unknown edit {edit!r}, possible kinds are {', '.join(KINDS)}, counts")
    fields = {key: value for key, value in edit.items() if key != "kind"}
    if edit["kind"] == "counts":
        _check_shapes_told(fields.pop("shapes", {}), _own_shapes(old), refuse)
        for key, value in fields.items():
            most = largest(old, key)
            if most is None or type(value) is not int or not 0 < value <= most:
                refuse(f"{key} = {value!r} is not an integer from 1 to {most or 'nothing there'}")
        return
    if kind_of(old) is None:
        refuse(f"a {type(old).__name__} can't become a {edit['kind']}")
    limits = dict(zip(_size_names(edit["kind"]), features(old), strict=True))
    limits |= {"rank": min(limits.values())}
    for key, value in fields.items():
        if key in limits:
            if type(value) is not int or not 0 < value <= limits[key]:
                refuse(f"{key} = {value!r} is not an integer from 1 to {limits[key]}")
        elif not _harmless(key, value, limits):
            refuse(f"{key} = {value!r} is not allowed")
    if missing := set(KINDS[edit["kind"]].names) - set(fields):
        refuse(f"{', '.join(sorted(missing))} missing")


def _check_shapes_told(told: Any, own: dict[str, list[int]], refuse: Callable[[str], None]) -> None:
    """Of tensors that are there, with as many axes, none longer."""
    if not isinstance(told, dict):
        return refuse(f"shapes = {told!r} is no mapping of tensors to shapes")
    for key, shape in told.items():
        limits = own.get(key)
        fits = limits and isinstance(shape, list) and len(shape) == len(limits)
        if not fits or not all(type(n) is int and 0 < n <= limit for n, limit in zip(shape, limits or (), strict=True)):
            refuse(f"the shape {shape!r} of {key} does not fit into {limits or 'nothing there'}")


def _size_names(kind: str) -> tuple[str, str]:
    return ("num_embeddings", "embedding_dim") if kind.endswith("embedding") else ("in_features", "out_features")


def _harmless(key: str, value: Any, limits: dict[str, int]) -> bool:
    return {
        "bias": type(value) is bool,
        "compress_statistics": type(value) is bool,
        "quant_type": isinstance(value, str) and value in ("nf4", "fp4"),
        "compute_dtype": value is None or (isinstance(value, str) and value in DTYPES),
        "threshold": isinstance(value, int | float) and 0 <= value <= THRESHOLD_LIMIT,
        "padding_idx": value is None or (type(value) is int and 0 <= value < limits.get("num_embeddings", 0)),
    }.get(key, False)


def _check_shapes(model: nn.Module, blank: nn.Module) -> None:
    """Every dense parameter has a counterpart of the same shape: what `named_modules` can't see must not slip through."""
    coded = {name for name, module in model.named_modules() if is_low_bit(module)}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        other = dict(_submodule(blank, owner).named_parameters(recurse=False)).get(name.rpartition(".")[2])  # type: ignore[union-attr]
        if owner not in coded and (other is None or other.shape != parameter.shape):
            raise CompressionError(
                f"{name}: shape {tuple(parameter.shape)} can't be told by an edit (the config describes "
                f"{None if other is None else tuple(other.shape)}); possible are the layers {', '.join(KINDS)}."
            )


def _check_whole(model: nn.Module, blank: nn.Module) -> None:
    """Nothing that the config describes is missing: a load would fill it with random weights."""
    mine = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, _ in blank.named_parameters(remove_duplicate=False):
        if name not in mine:
            raise CompressionError(
                f"{name}: the config describes this parameter and the model has none, so a load would make it random; "
                f"put it back, or tell the config (num_hidden_layers, for fewer layers)."
            )


def settled(model: Any, edits: Structure) -> Structure:
    """Change fields of the config that explain some of these edits, and return those that are left."""
    for part, change in list(changes(model.config, _resized(model, edits))):
        edits = _settle(model, part, change, edits)
    return edits


def _resized(model: nn.Module, edits: Structure) -> list[tuple[int, int]]:
    """(size as the config has it, size as it is now), of every axis and count that an edit changes."""
    blank, found = twin(model), dict[tuple[int, int], None]()
    for name, edit in edits.items():
        old = _submodule(blank, name)
        if old is None:
            continue
        if edit["kind"] == "counts":
            pairs = [(largest(old, key) or 0, value) for key, value in edit.items() if key in COUNTS]
            for key, shape in edit.get("shapes", {}).items():
                pairs += zip(_own_shapes(old)[key], shape, strict=True)
        else:
            pairs = list(zip(features(old), (edit[size] for size in _size_names(edit["kind"])), strict=True))
        found |= {pair: None for pair in pairs if pair[0] != pair[1]}
    return sorted(found)


def _settle(model: nn.Module, part: Any, change: dict[str, int], edits: Structure) -> Structure:
    """Keep the change of config if it explains some edits and asks for no new ones."""
    if not edits:
        return edits
    before, unexplained = dict(vars(part)), _unexplained(model, edits)
    try:
        for field, value in change.items():
            setattr(part, field, value)
        type(part).from_dict(part.to_dict())  # Llama's refuses, when it is loaded, heads that do not divide its hidden size
        fewer = diff(model)
        if set(fewer) <= set(edits) and _unexplained(model, fewer) < unexplained:
            return fewer
    except Exception:  # a config or model class refuses sizes with whatever error it likes: then this change is none
        pass
    vars(part).clear()
    vars(part).update(before)
    return edits


def _unexplained(model: nn.Module, edits: Structure) -> int:
    """Edits, and those among them that also change a size: a config may explain the size of a layer that is low-bit as well."""
    blank, total = twin(model), len(edits)
    for name, edit in edits.items():
        old = _submodule(blank, name)
        if old is not None and edit["kind"] != "counts":
            total += features(old) != tuple(edit[size] for size in _size_names(edit["kind"]))
    return total


def _make_loud(model: nn.Module) -> None:
    """At least one tensor must clash with what the config alone describes, or a load without hfcompress would be silent."""
    if _is_silent(model):
        _set_clashes(model, True)
    if _is_silent(model):
        raise CompressionError(
            f"{type(model).__name__}: no tensor would clash when the checkpoint is loaded without hfcompress, so it would "
            f"serve noise; this is a fault of hfcompress, please report it with the recipe."
        )


def _is_silent(model: nn.Module) -> bool:
    blank = twin(model).state_dict()
    return all(key not in blank or blank[key].shape == value.shape for key, value in model.state_dict().items())


def _set_clashes(model: nn.Module, clashes: bool) -> None:
    for module in model.modules():
        if hasattr(module, "_clashes"):
            vars(module)["_clashes"] = clashes
