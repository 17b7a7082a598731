"""Two blank models compared, as a config describes them before and after: which field counts what, and what has to follow.

Architectures name the same things each in its own way, so they are found by trying.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hfcompress.checkpoint.config_fields import parts_by_path
from hfcompress.checkpoint.structure import twin

# What single layers have of their own, by their numbers; which layers' outputs a backbone gives.
_BEHIND = ("_heterogeneity_spec", "_out_features", "_out_indices")
_TIED = ("_tied_weights_keys", "all_tied_weights_keys")


@dataclass(frozen=True)
class Counter:
    """A place in a config that holds a count: a field, or an entry of a list (`depths[2]`), maybe of a config inside."""

    path: tuple[str, ...]
    key: str
    index: int | None = None

    def part(self, config: Any) -> Any:
        """The config inside that has the field."""
        for step in self.path:
            config = getattr(config, step)
        return config

    def put(self, config: Any, value: int) -> None:
        part: Any = self.part(config)
        if self.index is None:
            setattr(part, self.key, value)
        else:
            entries = list(getattr(part, self.key))
            entries[self.index] = value
            setattr(part, self.key, type(getattr(part, self.key))(entries))


def counters(config: Any, count: int, word: str) -> list[Counter]:
    """Every place that holds this count: fields first, and of these the ones named after what is counted."""
    found = []
    for path, part in parts_by_path(config):
        for key, value in vars(part).items():
            if type(value) is int and value == count:
                found.append(Counter(path, key))
            elif isinstance(value, list | tuple) and not key.startswith("_"):
                found += [Counter(path, key, i) for i, entry in enumerate(value) if type(entry) is int and entry == count]
    return sorted(found, key=lambda one: (one.index is not None, word not in one.key))


def reloaded(model: nn.Module, config: Any) -> nn.Module:
    """The blank model that this config describes after it was saved and read again: what a load would build."""
    return twin(model, type(config).from_dict(config.to_dict()))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def plain(module: nn.Module) -> dict[str, Any]:
    """What a module's forward may read beside tensors: numbers, flags, names. Dropout may differ from layer to layer."""
    return {
        key: value
        for key, value in vars(module).items()
        if _is_plain(value) and not key.startswith("_") and "drop" not in key
        if key != "training" and not (key == "p" and "Drop" in type(module).__name__)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | set | tuple | dict):
        return all(_is_plain(one) for one in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool | int | float | str)


def differences(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, str, Any, Any]]:
    """(module, attribute, old value, new value) wherever two blank modules are not the same."""
    others = dict(new.named_modules())
    for name, module in old.named_modules():
        if name not in others:
            yield name, "", type(module).__name__, "nothing"
        elif type(module).__name__ != type(others[name]).__name__:
            yield name, "", type(module).__name__, type(others[name]).__name__
        else:
            mine, theirs = plain(module), plain(others[name])
            yield from (
                (name, key, mine.get(key), theirs.get(key))
                for key in {**mine, **theirs}
                if mine.get(key) != theirs.get(key) or type(mine.get(key)) is not type(theirs.get(key))
            )


def follow(module: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Set whatever the two blanks disagree on, attributes and configs, in the module that went from one to the other."""
    mine, others = dict(module.named_modules()), dict(after.named_modules())
    for name, key, _, value in differences(before, after):
        if key and name in mine and hasattr(mine[name], key):
            setattr(mine[name], key, copy.deepcopy(value))
    for name, old in before.named_modules():
        one, new = mine.get(name), others.get(name)
        configs = [getattr(part, "config", None) for part in (one, old, new)]
        if all(isinstance(config, PreTrainedConfig) for config in configs):  # T5 gives each stack a copy of its own
            follow_config(*configs)
        for key in _TIED:
            if (
                one is not None
                and key in vars(one)
                and key in vars(old)
                and new is not None
                and vars(old)[key] != vars(new)[key]
            ):
                setattr(one, key, copy.deepcopy(vars(new)[key]))


def follow_config(config: Any, before: Any, after: Any) -> None:
    """Change in a config what differs between two others."""
    for key, value in vars(after).items():
        if isinstance(value, PreTrainedConfig):
            follow_config(getattr(config, key), getattr(before, key), value)
        elif key in _BEHIND and vars(before).get(key) != value:
            vars(config)[key] = copy.deepcopy(value)
        elif not key.startswith("_") and vars(before).get(key) != value:
            setattr(config, key, copy.deepcopy(value))
