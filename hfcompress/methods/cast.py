from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from hfcompress.checkpoint.structure import kept_in_float32
from hfcompress.layers import DTYPES, holds_codes
from hfcompress.methods.base import LayerEdits, Method, Tick
from hfcompress.surgery.modules import check_here
from hfcompress.surgery.targets import sharing


class Cast(Method):
    """Store and compute what is dense in half precision; codes of low-bit layers stay as they are, and so does what the
    architecture must have in float32.

    Needs: a processor with that dtype for speed; without one it is slower.
    Buys: half of the memory of everything that is not quantised.
    Costs: bfloat16 keeps 8 bits of precision; float16 keeps 11, and may overflow in models trained in bfloat16.
    Paper: Micikevicius et al. 2017, Mixed Precision Training (arXiv 1710.03740)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"dtype"})

    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="What dense parameters are stored in."
    )

    @property
    def computes_in(self) -> str | None:
        return self.dtype

    @property
    def by_layer(self) -> bool:
        return True

    def layer_edits(self, model: nn.Module) -> LayerEdits:
        def edit(name: str) -> None:
            self._cast(model, [(name, model.get_submodule(name))])

        def rest(done: Collection[str]) -> None:
            self._cast(model, [(name, module) for name, module in model.named_modules() if name not in done])
            self._tell(model)

        names = [name for name, module in model.named_modules() if module._parameters.get("weight") is not None]
        return LayerEdits(names, edit, sharing(model), rest)

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        yield None
        check_here(model, "cast")
        self._cast(model, model.named_modules())
        self._tell(model)

    def _cast(self, model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Cast what these modules themselves hold."""
        body = self._body(model)
        cast: dict[int, Any] = {}
        for prefix, module in modules:
            # Module.to would also convert the scales of quantised layers, and an 8-bit layer's codes.
            for name, parameter in module.named_parameters(recurse=False):
                dtype = self._dtype_of(body, f"{prefix}.{name}")
                if parameter.is_floating_point() and parameter.dtype != dtype:
                    new = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                    setattr(module, name, cast.setdefault(id(parameter), new))  # one for all that are tied
            for name, buffer in module.named_buffers(recurse=False):
                # Scales stay as they are beside codes; what is not saved there tells what a table of codes gives.
                if buffer.is_floating_point() and (name in module._non_persistent_buffers_set) == holds_codes(module):
                    setattr(module, name, buffer.to(self._dtype_of(body, f"{prefix}.{name}")))

    def _tell(self, model: nn.Module) -> None:
        body = self._body(model)
        if getattr(body, "config", None) is not None:
            body.config.dtype = DTYPES[self.dtype]

    @staticmethod
    def _body(model: Any) -> Any:
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _dtype_of(self, model: nn.Module, name: str) -> torch.dtype:
        return torch.float32 if kept_in_float32(model, name, DTYPES[self.dtype]) else DTYPES[self.dtype]
