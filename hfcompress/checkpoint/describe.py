"""A model told as data: `diff` reads its structure off it, `describe` writes it where `from_pretrained` finds it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from hfcompress.checkpoint.bnb_config import as_bitsandbytes
from hfcompress.checkpoint.config_fields import changes, parts
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.integers import COUNTS, count_in, largest
from hfcompress.checkpoint.structure import (
    FORMAT,
    PACKED,
    Structure,
    apply_edit,
    is_stored_packed,
    own_shapes,
    rebuild,
    submodule,
    twin,
)
from hfcompress.layers import KINDS, features, holds_codes, kind_of


def diff(model: nn.Module) -> Structure:
    """How the model differs from its twin. `diff(rebuild(twin(model), diff(model))) == diff(model)`.

    Raises CompressionError when the model has a part that no edit can express.
    """
    blank, edits = twin(model), {}
    for name, module in model.named_modules():
        edit = _edit_between(submodule(blank, name), module, name)
        if edit is not None:
            edits[name] = edit
            apply_edit(blank, name, edit)
    _check_shapes(model, blank)
    _check_whole(model, blank)
    return edits


def describe(model: nn.Module, packed: bool | None = None) -> Structure:
    """Make `model.config` tell what the model is: by its own fields where they can, else by `quantization_config`. `packed`:
    whether its tensors are to be stored so, which only the plug-in can read; None: as they were."""
    config: Any = model.config
    packed = is_stored_packed(config) if packed is None else packed
    config.quantization_config = None
    edits, before = diff(model), [(part, dict(vars(part))) for part in parts(config)]
    left = settled(model, edits)
    _set_clashes(model, False)
    if left or packed:
        # In the module's own names: what transformers makes of them for older checkpoints splits and joins dense weights only.
        vars(model)["_weight_conversions"] = []
    plain = None if packed else as_bitsandbytes(model, left)
    if plain is not None:
        config.quantization_config = plain
    elif left or packed:
        # The plug-in is needed anyway: then config.json stays that of the architecture as it came, and bounds every edit.
        for part, fields in before:
            vars(part).clear()
            vars(part).update(fields)
        rebuild(twin(model), edits)  # what could not be loaded again is refused here, not there
        if not packed:  # streams are of no shape that any config describes
            _make_loud(model)
        stored = {"storage": PACKED} if packed else {}
        config.quantization_config = {"quant_method": "hfcompress", "format": FORMAT, "modules": edits, **stored}
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
    before, after = own_shapes(old), own_shapes(new)
    shapes = {key: shape for key, shape in after.items() if before.get(key, shape) != shape}
    edit: dict[str, Any] = {**counts, **({"shapes": shapes} if shapes else {})}
    return {"kind": "counts", **edit} if edit else None


def _check_shapes(model: nn.Module, blank: nn.Module) -> None:
    """Every dense parameter has a counterpart of the same shape: what `named_modules` can't see must not slip through."""
    coded = {name for name, module in model.named_modules() if holds_codes(module)}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        other = dict(submodule(blank, owner).named_parameters(recurse=False)).get(name.rpartition(".")[2])  # type: ignore[union-attr]
        if owner not in coded and (other is None or other.shape != parameter.shape):
            raise CompressionError(
                f"{name}: shape {tuple(parameter.shape)} can't be told by an edit (the config describes "
                f"{None if other is None else tuple(other.shape)}); possible are the layers {', '.join(KINDS)}."
            )


def _check_whole(model: nn.Module, blank: nn.Module) -> None:
    """Nothing that the config describes is missing: a load would fill it with random weights."""
    mine = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    mine |= {name for name, _ in model.named_buffers(remove_duplicate=False)}  # codes, see `QuantEmbedding.hold_codes`
    for name, _ in blank.named_parameters(remove_duplicate=False):
        if name not in mine:
            raise CompressionError(
                f"{name}: the config describes this parameter and the model has none, so a load would make it random; "
                f"put it back, or tell the config (num_hidden_layers, for fewer layers)."
            )


def settled(model: Any, edits: Structure, beside: Collection[str] = ()) -> Structure:
    """Change fields of the config that explain some of these edits, and return those that are left; none need explain those
    named `beside`."""
    if not _may_be_even(model, {name: edit for name, edit in edits.items() if name not in beside}):
        return edits
    for part, change in list(changes(model.config, _resized(model, edits))):
        edits = _settle(model, part, change, edits)
    return edits


def _may_be_even(model: nn.Module, edits: Structure) -> bool:
    """Whether fields of a config might explain all edits. If they can't, none is worth a try: each builds the model anew.

    They can't explain factors, nor sizes of which the same place in several layers has several.
    """
    blank, sizes = twin(model), dict[tuple[str, int, int], int]()
    for name, edit in edits.items():
        if edit["kind"] in KINDS and KINDS[edit["kind"]].stands_in and not KINDS[edit["kind"]].holds_codes:
            return False
        old = submodule(blank, name)
        if old is None or edit["kind"] == "counts":
            continue
        place = ".".join("*" if part.isdigit() else part for part in name.split("."))
        for axis, (before, size) in enumerate(zip(features(old), KINDS[edit["kind"]].sizes, strict=True)):
            if before != edit[size] and sizes.setdefault((place, axis, before), edit[size]) != edit[size]:
                return False
    return True


def _resized(model: nn.Module, edits: Structure) -> list[tuple[int, int]]:
    """(size as the config has it, size as it is now), of every axis and count that an edit changes."""
    blank, found = twin(model), dict[tuple[int, int], None]()
    for name, edit in edits.items():
        old = submodule(blank, name)
        if old is None:
            continue
        if edit["kind"] == "counts":
            pairs = [(largest(old, key) or 0, value) for key, value in edit.items() if key in COUNTS]
            for key, shape in edit.get("shapes", {}).items():
                pairs += zip(own_shapes(old)[key], shape, strict=True)
        else:
            pairs = list(zip(features(old), (edit[size] for size in KINDS[edit["kind"]].sizes), strict=True))
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
        old = submodule(blank, name)
        if old is not None and edit["kind"] != "counts":
            total += features(old) != tuple(edit[size] for size in KINDS[edit["kind"]].sizes)
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
