from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import holds_codes
from hfcompress.methods.base import Method, Tick


class Adapters(Method):
    """Train LoRA adapters (peft) instead of the weights, on dense or low-bit layers; merged when training ends, or kept.

    Needs: training around it.
    Buys: healing of a model that is too big, or too quantised, to train.
    Costs: when merged into 4-bit layers, the merged weights are rounded to 4 bits again.
    Paper: Hu et al. 2021, LoRA (arXiv 2106.09685); Dettmers et al. 2023, QLoRA (arXiv 2305.14314)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"adapter"})
    adds_parameters: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    tag: ClassVar[str] = "lora"

    r: int = Field(8, ge=1, description="Rank of the adapters.")
    lora_alpha: int = Field(16, ge=1, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: str | list[str] = Field("all-linear", description="As in PEFT.")
    modules_to_save: list[str] | None = Field(None, description="As in PEFT: modules trained whole, a new head for instance.")
    merge: bool = Field(True, description="Merge into the weights when training ends; false keeps an adapter that PEFT loads.")

    @property
    def keeps_adapter(self) -> bool:
        return not self.merge

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        from peft import LoraConfig

        if getattr(model, "peft_config", None):
            raise CompressionError("adapters: the model has an adapter already; merge it first, or list adapters once.")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
        )
        with _low_bit_seen(model):
            try:
                model.add_adapter(config)  # type: ignore[operator]
            except ValueError as error:
                raise CompressionError(f"adapters: target_modules {self.target_modules!r}: {error}") from error
        try:
            yield None
        except BaseException:
            take_out(model, merge=False)
            raise
        if self.merge:
            take_out(model, merge=True)
            for parameter in trained:
                parameter.requires_grad_(True)


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


def take_out(model: Any, merge: bool) -> None:
    """Put the base layers back in place of PEFT's, with the adapters merged in or dropped."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save["default"] if merge else module.original_module)
    model._hf_peft_config_loaded = False
    del model.peft_config
