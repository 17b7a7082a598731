"""Fewer experts: where a mixture-of-experts layer keeps them, who of them is used, and how whole ones are cut out.

No names of fields and few of modules: two models on the meta device, with all experts and with fewer, tell what holds them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.checkpoint.config_fields import parts_by_path
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.surgery.meta_diff import Counter, follow, reloaded, shapes

_CHOSEN = re.compile(r"experts?_per_tok|^(moe_|router_)?top_?k(_experts)?$|^moe_k$|num_selected_experts")
_GROUPS = re.compile(r"^(n_group|num_expert_groups?|n_groups|moe_n_group)$")


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer."""

    name: str
    """The module that holds them."""
    tensors: dict[str, tuple[int, int]]
    """Every tensor with a part for each expert, the router's among them: along which axis, and how many rows a part has."""
    apart: bool = False
    """Whether every expert is a module of its own."""


@dataclass(frozen=True)
class Mixtures:
    """All layers of experts that one field of the config counts."""

    counter: Counter
    count: int
    layers: tuple[Mixture, ...]
    chosen: int
    """How many experts a token goes to."""
    groups: int
    """Experts stand in so many groups, of which a token may see a few only; 1 where all are one group."""


def mixtures(model: Any, asked: str) -> Mixtures:
    """The experts of a model; CompressionError where there are none, or their config does not tell how many."""
    before = reloaded(model, model.config)
    found = []
    for counter, count in _counters(model.config):
        try:
            layers = _layers(before, _fewer(model, counter, count - count // 2), count, count - count // 2)
        except Exception:  # a field of another meaning, or a number that a router can't take
            continue
        if layers:
            part = counter.part(model.config)
            found.append(Mixtures(counter, count, layers, _field(part, _CHOSEN, 1), _field(part, _GROUPS, 1)))
    if not found:
        raise CompressionError(
            f"{asked}: {type(model).__name__} has no experts that its config counts; possible are mixtures of experts whose "
            f"layers all have the same number; choose another method."
        )
    experts = max(found, key=lambda one: len(one.layers))
    for mixture in experts.layers:
        near = f"{mixture.name.rpartition('.')[0]}."
        for name, tensor in before.state_dict().items():
            if name.startswith(near) and not tensor.is_floating_point():
                raise CompressionError(
                    f"{asked}: {name} tells by number which experts a token goes to, and no other expert may take its place; "
                    f"possible are models whose routers weigh all experts; choose another method."
                )
    return experts


def keep_experts(model: Any, experts: Mixtures, kept: list[Tensor]) -> None:
    """Keep these experts (ascending) of each layer, as many in all, in place; config and counts follow."""
    before = reloaded(model, model.config)
    after = _fewer(model, experts.counter, len(kept[0]))
    for mixture, keep in zip(experts.layers, kept, strict=True):
        for name, (axis, each) in mixture.tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            old = getattr(module, leaf)
            new = old.detach().index_select(axis, _rows(old.shape[axis], experts.count, each, keep).to(old.device)).contiguous()
            setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if mixture.apart:
            held, new_names = model.get_submodule(mixture.name), after.get_submodule(mixture.name)._modules
            members = list(held._modules.values())
            held._modules.clear()
            held._modules.update({key: members[index] for key, index in zip(new_names, keep.tolist(), strict=True)})
    follow(model, before, after)


def _rows(total: int, count: int, each: int, keep: Tensor) -> Tensor:
    """Where the parts of the experts kept are; what a router knows beside experts (sinks) comes after them and stays."""
    return torch.cat([(keep[:, None] * each + torch.arange(each)).flatten(), torch.arange(each * count, total)])


def magnitude(model: nn.Module, experts: Mixtures) -> list[Tensor]:
    """L2 norm of everything an expert has, its router's row excepted. (count,) a layer."""
    scores = []
    for mixture in experts.layers:
        total = torch.zeros(experts.count)
        if mixture.apart:
            members = model.get_submodule(mixture.name).children()
            total += torch.tensor([sum(p.detach().float().square().sum().item() for p in one.parameters()) for one in members])
        for name, (axis, _) in mixture.tensors.items():
            if name.startswith(f"{mixture.name}.") and "router" not in name:
                parts_of = model.get_parameter(name).detach().float().movedim(axis, 0).unflatten(0, (experts.count, -1))
                total += parts_of.flatten(1).square().sum(1).cpu()
        scores.append(total.sqrt())
    return scores


def _counters(config: Any) -> Iterator[tuple[Counter, int]]:
    """Every field that may count experts."""
    for path, part in parts_by_path(config):
        for key, value in vars(part).items():
            if type(value) is int and value > 1 and key.endswith("experts") and "shared" not in key:
                yield Counter(path, key), value


def _field(config: Any, pattern: re.Pattern[str], default: int) -> int:
    found = [value for key, value in vars(config).items() if pattern.search(key) and type(value) is int and value > 0]
    return max(found, default=default)


def _fewer(model: Any, counter: Counter, number: int) -> nn.Module:
    config = copy.deepcopy(model.config)
    counter.put(config, number)
    return reloaded(model, config)


def _layers(before: nn.Module, after: nn.Module, count: int, number: int) -> tuple[Mixture, ...]:
    """The mixtures, if all that differs between two models are parts for each expert."""
    apart = _apart(before, after, count, number)
    inside = tuple(f"{name}." for name in apart)
    mine, theirs = (
        {name: shape for name, shape in shapes(one).items() if not name.startswith(inside)} for one in (before, after)
    )
    if mine.keys() != theirs.keys():
        return ()
    tensors: dict[str, tuple[int, int]] = {}
    for name, shape in mine.items():
        axes = [axis for axis, (old, new) in enumerate(zip(shape, theirs[name], strict=True)) if old != new]
        if axes:
            old, new = shape[axes[0]], theirs[name][axes[0]]
            if len(axes) > 1 or (old * number != new * count and old - new != count - number):
                return ()
            tensors[name] = (axes[0], old // count if old * number == new * count else 1)
    homes = apart or _homes(before, tensors)
    held: dict[str, dict[str, tuple[int, int]]] = {home: {} for home in homes}
    for name, part in tensors.items():
        near = sorted(homes, key=lambda home: -_together(home, name))[:2]
        if not near or (len(near) > 1 and _together(near[0], name) == _together(near[1], name)):
            return ()  # it serves several layers
        held[near[0]][name] = part
    order = [name for name, _ in before.named_modules() if name in held]
    return tuple(Mixture(home, held[home], home in apart) for home in order)


def _apart(before: nn.Module, after: nn.Module, count: int, number: int) -> list[str]:
    """Modules that hold experts as modules of their own."""
    lengths = {name: len(one) for name, one in after.named_modules() if isinstance(one, nn.ModuleList | nn.ModuleDict)}
    return [
        name
        for name, one in before.named_modules()
        if isinstance(one, nn.ModuleList | nn.ModuleDict) and len(one) == count and lengths.get(name) == number
    ]


def _homes(model: nn.Module, tensors: Iterable[str]) -> list[str]:
    """Modules that hold experts as stacked tensors; of two side by side (JetMoE), or one inside (DBRX), their parent."""
    owners, sizes = dict.fromkeys(name.rpartition(".")[0] for name in tensors), shapes(model)
    homes = [
        owner
        for owner in owners
        if "expert" in type(model.get_submodule(owner)).__name__.lower()
        or any(len(sizes[name]) == 3 for name in tensors if name.rpartition(".")[0] == owner)
    ]
    parents = [home.rpartition(".")[0] for home in homes]
    merged = [
        parent if parents.count(parent) > 1 or "Experts" in type(model.get_submodule(parent)).__name__ else home
        for parent, home in zip(parents, homes, strict=True)
    ]
    return list(dict.fromkeys(merged))


def _together(one: str, other: str) -> int:
    """How many steps two names go together."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next(
        (number for number, (mine, theirs) in enumerate(pairs) if mine != theirs), min(one.count("."), other.count(".")) + 1
    )
