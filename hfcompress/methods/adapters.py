from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import holds_codes, kind_of, prepare
from hfcompress.layers.bnb_hooks import is_repacked
from hfcompress.layers.bnb_library import import_first
from hfcompress.layers.quantized import QuantLinear
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.lora import (
    Split,
    adapted,
    merge,
    restore_split,
    split_weights,
    start_from_codes,
    weights_back_on_error,
)
from hfcompress.surgery.modules import HALVES, check_editable, in_float32
from hfcompress.surgery.targets import base_of, check_unshared, sharing

INITS = re.compile(r"gaussian|loftq|pissa(_niter_[1-9]\d{0,3})?")


class Adapters(Method):
    """Train LoRA adapters (peft) instead of the weights, on dense or low-bit layers; merged when training ends, or kept.

    Needs: training around it.
    Buys: healing of a model that is too big, or too quantised, to train.
    Costs: when merged into codes, the merged weights are rounded once more (merge: dense leaves them dense); pissa keeps a copy
    of what it adapts in the CPU's memory, loftq the original.
    Paper: Hu et al. 2021, LoRA (arXiv 2106.09685); Dettmers et al. 2023, QLoRA (arXiv 2305.14314); DoRA (2402.09353); rsLoRA
    (2312.03732); PiSSA (2404.02948); LoftQ (2310.08659)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"adapter"})
    adds_parameters: ClassVar[bool] = True
    chooses_trained: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    tag: ClassVar[str] = "lora"

    r: int = Field(default=8, ge=1, description="Rank of the adapters.")
    lora_alpha: int = Field(default=16, ge=1, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: str | list[str] = Field(default="all-linear", description="As in PEFT.")
    modules_to_save: list[str] | None = Field(
        default=None,
        description="As in PEFT: modules trained whole; the head of a classifier and its like if absent, [] for none.",
    )
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r) instead, which large ranks need.")
    use_dora: bool = Field(
        default=False, description="Train the length of each output's weights apart from their direction (DoRA)."
    )
    init_lora_weights: bool | str = Field(
        default=True,
        description="true, gaussian: adapters start at zero; pissa, pissa_niter_N: at the largest singular values of dense "
        "weights (N rounds of a faster SVD); loftq: at what rounding the original to codes took away.",
    )
    merge: bool | Literal["dense"] = Field(
        default=True,
        description="Merge into the weights when training ends, codes being coded again; dense leaves dense layers where "
        "adapted codes were; false keeps an adapter that PEFT loads.",
    )

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _known_start(cls, value: Any) -> Any:
        if value is not True and not (isinstance(value, str) and INITS.fullmatch(value)):
            raise ValueError("possible are true, gaussian, pissa, pissa_niter_N with N rounds, and loftq")
        return value

    @field_validator("merge", mode="before")
    @classmethod
    def _known_end(cls, value: Any) -> Any:
        if not isinstance(value, bool) and value != "dense":
            raise ValueError("possible are true, false and dense")
        return value

    @property
    def keeps_adapter(self) -> bool:
        return self.merge is False

    @property
    def wants_original(self) -> bool:
        return self.init_lora_weights == "loftq"

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        if getattr(model, "peft_config", None):
            raise CompressionError("adapters: the model has an adapter already; merge it first, or list adapters once.")
        check_editable(model, "adapters")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _freeze_codes(model)
        self._check_dora(model)
        with weights_back_on_error(model) as splits:
            self._put_in(model, task, splits)
            heads: list[Any] = [module for module in model.modules() if hasattr(module, "modules_to_save")]
            with _heads_in_float32([head.modules_to_save["default"] for head in heads]):
                yield None
            if self.merge:
                merge(model, dense=self.merge == "dense")
                for parameter in trained:
                    parameter.requires_grad_(True)
            else:
                restore_split(model, splits)

    def _check_dora(self, model: nn.Module) -> None:
        ours = next((name for name, module in model.named_modules() if isinstance(module, QuantLinear)), None)
        if self.use_dora and ours is not None:
            raise CompressionError(
                f"adapters: use_dora: PEFT can't read the codes of {ours}, which are hfcompress' own; leave use_dora out, or "
                f"quantize with engine: bitsandbytes."
            )

    def _put_in(self, model: Any, task: Any, splits: dict[str, Split]) -> None:
        import_first()
        from peft import LoraConfig

        whole = task_heads(model, self.target_modules) if self.modules_to_save is None else self.modules_to_save
        inside = [name for name, module in model.named_modules() if kind_of(module) and _is_within(name, whole)]
        model.requires_grad_(False)
        start = str(self.init_lora_weights)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            modules_to_save=whole or None,
            exclude_modules=inside or None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights="gaussian" if start == "gaussian" else True,
        )
        with _low_bit_seen(model):
            try:
                model.add_adapter(config)
            except ValueError as error:
                raise CompressionError(f"adapters: target_modules {self.target_modules!r}: {error}") from error
        layers = adapted(model)
        check_unshared(model, [f"{name}.base_layer" for name in layers], "adapters")
        for layer in layers.values():  # as get_peft_model does and add_adapter does not: half precision loses most updates
            for name, parameter in layer.named_parameters():
                if not name.startswith("base_layer.") and parameter.dtype in HALVES:
                    parameter.data = parameter.data.float()
        if self.merge == "dense" and not any(holds_codes(layer.get_base_layer()) for layer in layers.values()):
            raise CompressionError(
                "adapters: merge: dense makes dense layers of codes, and no adapted layer holds codes; set merge: true."
            )
        if start == "loftq":
            start_from_codes(model, getattr(task, "original", None))
        elif start.startswith("pissa"):
            split_weights(model, start, splits)
            config.init_lora_weights = self.init_lora_weights  # type: ignore[assignment]  # what a checkpoint of it is loaded on


def _freeze_codes(model: nn.Module) -> None:
    """Codes that transformers loaded, as ours: off bitsandbytes' path that repacks them for inference at the first forward."""
    for name, module in model.named_modules():
        if holds_codes(module):
            if is_repacked(module):
                raise CompressionError(
                    f"adapters: bitsandbytes repacked the codes of {name} for inference at the model's first forward, and "
                    f"gradients and merging would be wrong; load the model again, and train before anything else runs it."
                )
            prepare(module)


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
