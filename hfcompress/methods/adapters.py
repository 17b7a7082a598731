from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import holds_codes, kind_of
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import HALVES, check_editable, in_float32
from hfcompress.surgery.targets import base_of, check_unshared, sharing


class Adapters(Method):
    """Train LoRA adapters (peft) instead of the weights, on dense or low-bit layers; merged when training ends, or kept.

    Needs: training around it.
    Buys: healing of a model that is too big, or too quantised, to train.
    Costs: when merged into 4-bit layers, the merged weights are rounded to 4 bits again.
    Paper: Hu et al. 2021, LoRA (arXiv 2106.09685); Dettmers et al. 2023, QLoRA (arXiv 2305.14314)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"adapter"})
    adds_parameters: ClassVar[bool] = True
    chooses_trained: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    tag: ClassVar[str] = "lora"

    r: int = Field(8, ge=1, description="Rank of the adapters.")
    lora_alpha: int = Field(16, ge=1, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: str | list[str] = Field("all-linear", description="As in PEFT.")
    modules_to_save: list[str] | None = Field(
        None, description="As in PEFT: modules trained whole; the head of a classifier and its like if absent, [] for none."
    )
    merge: bool = Field(True, description="Merge into the weights when training ends; false keeps an adapter that PEFT loads.")

    @property
    def keeps_adapter(self) -> bool:
        return not self.merge

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        if getattr(model, "peft_config", None):
            raise CompressionError("adapters: the model has an adapter already; merge it first, or list adapters once.")
        check_editable(model, "adapters")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._put_in(model)
        heads: list[Any] = [module for module in model.modules() if hasattr(module, "modules_to_save")]
        with _heads_in_float32([head.modules_to_save["default"] for head in heads]):
            yield None
        if self.merge:
            merge(model)
            for parameter in trained:
                parameter.requires_grad_(True)

    def _put_in(self, model: Any) -> None:
        from peft import LoraConfig

        whole = task_heads(model, self.target_modules) if self.modules_to_save is None else self.modules_to_save
        inside = [name for name, module in model.named_modules() if kind_of(module) and _is_within(name, whole)]
        model.requires_grad_(False)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            modules_to_save=whole or None,
            exclude_modules=inside or None,
        )
        with _low_bit_seen(model):
            try:
                model.add_adapter(config)
            except ValueError as error:
                raise CompressionError(f"adapters: target_modules {self.target_modules!r}: {error}") from error
        check_unshared(model, [f"{name}.base_layer" for name in adapted(model)], "adapters")


def task_heads(model: Any, targets: str | list[str]) -> list[str]:
    """Names of what a model has beside its base and trains: the head of a classifier, of question answering. PEFT's own task
    types train these whole too, as they may be new: an adapter that is kept without its head is of no use. So may a pooler be,
    which checkpoints of masked language models lack.

    Left out are the heads of language models, which came with the embeddings, and what `targets` names.
    """
    prefix, base = base_of(model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shared = set(sharing(model))
    heads = []
    poolers = [(f"{prefix}{name}", part) for name, part in base.named_children() if name == "pooler"]
    for name, head in (*model.named_children(), *poolers) if prefix else ():
        parts = [f"{name}.{part}" if part else name for part, _ in head.named_modules()]
        is_language = any(module is output for module in head.modules()) and not type(model).__name__.endswith("CTC")
        is_named = not isinstance(targets, str) and any(f".{part}".endswith(f".{one}") for part in parts for one in targets)
        is_trained = any(parameter.requires_grad for parameter in head.parameters())
        if head is not base and is_trained and not is_language and not is_named and not shared & set(parts):
            heads.append(name)
    return heads


def _is_within(name: str, modules: list[str]) -> bool:
    return any(f".{module}." in f".{name}." for module in modules)


def adapted(model: nn.Module) -> list[str]:
    """Names of the layers that adapters stand on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def _heads_in_float32(heads: list[nn.Module]) -> Iterator[None]:
    """Modules of half precision that are trained whole, in float32 while they are, as PEFT holds its adapters."""

    def widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(one.float() if isinstance(one, Tensor) and one.dtype in HALVES else one for one in args)

    with ExitStack() as stack:
        for head in heads:
            if any(parameter.dtype in HALVES for parameter in head.parameters()):
                stack.enter_context(in_float32(head))
                stack.callback(head.register_forward_pre_hook(widen).remove)
        yield


@contextmanager
def _low_bit_seen(model: Any) -> Iterator[None]:
    """PEFT takes its own layers for low-bit ones only if the model says so; else merging adds floats to codes."""
    told = {name: getattr(model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit")}
    coded = {type(module).__name__ for module in model.modules() if holds_codes(module)}
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "Linear4bit" in coded, "Linear8bitLt" in coded
    try:
        yield
    finally:
        for name, value in told.items():
            setattr(model, name, value)


def merge(model: Any) -> None:
    """Put the base layers back in place of PEFT's, with the adapters merged in. On an error no base layer has changed."""
    from peft.utils import ModulesToSaveWrapper

    layers = {name: model.get_submodule(name) for name in adapted(model)}
    before = [(one, one.data) for layer in layers.values() for one in layer.get_base_layer().parameters(recurse=False)]
    try:
        for layer in layers.values():
            layer.merge(safe_merge=True)  # into a copy, which becomes the parameter's data
    except BaseException as error:
        for parameter, data in before:
            parameter.data = data
        if isinstance(error, ValueError):
            raise CompressionError(f"adapters: {error}; nothing was merged: train with a lower learning rate.") from error
        raise
    for name, layer in layers.items():
        model.set_submodule(name, layer.get_base_layer())
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save["default"])
    model._hf_peft_config_loaded = False
    del model.peft_config
