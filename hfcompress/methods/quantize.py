from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import features
from hfcompress.layers.bitsandbytes import coded, codes_fit
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable, swap
from hfcompress.surgery.targets import codable, matching

log = logging.getLogger("hfcompress")


class Quantize(Method):
    """Store linear layers as 8- or 4-bit codes and compute with bitsandbytes' kernels.

    Needs: bitsandbytes; nothing after it but adapters and what heal names may train.
    Buys: a quarter (8 bits) or an eighth (4 bits) of the float32 size of the layers.
    Costs: half a step of rounding a weight, at most; time, where unpacking outweighs the smaller reads (see the report).
    Paper: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); 2023, QLoRA (arXiv 2305.14314)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"codes"})
    needs_dense: ClassVar[bool] = True
    tag: ClassVar[str] = "quantization"

    bits: Literal[8, 4] = Field(8, description="Bits a weight.")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4 bits: which sixteen values the codes stand for.")
    use_double_quant: bool = Field(True, description="4 bits: quantise the scales as well (0.4 bits a weight less).")
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="4 bits: the dtype to multiply in; that of the input if absent."
    )
    threshold: float = Field(
        0.0, ge=0, le=1000, description="8 bits: inputs above it stay in 16 bits (6.0 helps very large models; 0 is faster)."
    )
    target_modules: list[str] | None = Field(None, description="Suffixes of module names; all linear layers if absent.")
    skip_modules: list[str] = Field(
        [], description="Suffixes to leave alone, beside task heads and tied embeddings, which are left alone by default."
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Quantize:
        four = {"quant_type", "use_double_quant", "compute_dtype"} & self.model_fields_set
        if self.bits == 8 and four:
            raise ValueError(f"{', '.join(sorted(four))} belong to bits: 4; remove them or set bits: 4")
        if self.bits == 4 and self.threshold:
            raise ValueError("threshold belongs to bits: 8; remove it or set bits: 8")
        return self

    @property
    def computes_in(self) -> str | None:
        return self.compute_dtype

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        yield None
        check_editable(model, "quantize")
        names = self._targets(model)
        for name in names:
            swap(model, name, self.quantized(model.get_submodule(name)))

    def _targets(self, model: Any) -> list[str]:
        possible = codable(model)
        if not possible:
            raise CompressionError("quantize: no dense linear layer is left in the model; it is quantised already.")
        chosen = possible if self.target_modules is None else matching(model, self.target_modules, possible, "quantize")
        skipped = set(matching(model, self.skip_modules, possible, "quantize")) if self.skip_modules else set()
        if skipped.issuperset(chosen):
            raise CompressionError("quantize: skip_modules leaves no layer to quantise; take some out of it.")
        names = [name for name in chosen if name not in skipped and self._fits(name, model.get_submodule(name))]
        if not names:
            raise CompressionError(
                "quantize: 4 bits need in_features in multiples of 64 and out_features of 32, and no chosen layer has them; "
                "prune with a round_to that keeps them, or choose bits: 8."
            )
        return names

    def _fits(self, name: str, layer: nn.Module) -> bool:
        if not codes_fit(layer, self.bits):
            log.info("quantize: %s left alone: 4-bit kernels need (64n, 32m) features, it has %s", name, features(layer))
            return False
        return True

    def quantized(self, layer: nn.Module) -> nn.Module:
        """The low-bit twin of a Linear or Conv1D, on the same device."""
        if self.bits == 8:
            return coded(layer, 8, threshold=self.threshold)
        four = {"quant_type": self.quant_type, "use_double_quant": self.use_double_quant, "compute_dtype": self.compute_dtype}
        return coded(layer, 4, **four)
