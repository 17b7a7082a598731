from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.layers import features
from hfcompress.layers.bitsandbytes import coded, codes_fit
from hfcompress.layers.quantized import QuantEmbedding, QuantLinear, mismatch
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable, swap
from hfcompress.surgery.targets import codable, codable_tables, matching

log = logging.getLogger("hfcompress")


class Quantize(Method):
    """Store linear layers, and embeddings if asked for, as 8- or 4-bit codes.

    Needs: nothing for engine hfcompress, bitsandbytes for its own; nothing after it but adapters and what heal names may train.
    Buys: a quarter (8 bits) or an eighth (4 bits) of the float32 size of the layers; time with engine hfcompress in 8 bits,
        where the processor multiplies bytes (hfcompress doctor tells).
    Costs: half a step of rounding a weight, at most; time, where unpacking outweighs the smaller reads (see the report).
    Paper: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); 2023, QLoRA (arXiv 2305.14314); rows of inputs rounded as they
        come: Yao et al. 2022, ZeroQuant (arXiv 2206.01861)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"codes"})
    needs_dense: ClassVar[bool] = True
    tag: ClassVar[str] = "quantization"

    bits: Literal[8, 4] = Field(8, description="Bits a weight.")
    engine: Literal["bitsandbytes", "hfcompress"] = Field(
        "bitsandbytes", description="Whose layers: bitsandbytes' load without this package, hfcompress' are faster on CPUs."
    )
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="bitsandbytes, 4 bits: which sixteen values codes stand for.")
    use_double_quant: bool = Field(
        True, description="bitsandbytes, 4 bits: quantise the scales as well (0.4 bits a weight less)."
    )
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="bitsandbytes, 4 bits: the dtype to multiply in; that of the input if absent."
    )
    threshold: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="bitsandbytes, 8 bits: inputs above it stay in 16 bits (6.0 helps very large models; 0 is faster).",
    )
    group_size: int | None = Field(
        None, ge=2, description="hfcompress: columns that share a scale; a row in 8 bits, 32 columns in 4 bits if absent."
    )
    symmetric: bool = Field(True, description="hfcompress: whether zero is a code; else each group has an offset as well.")
    bits_pattern: dict[str, Literal[16, 8, 4]] = Field(
        {}, description="Suffixes of module names, or regular expressions, to bits of their own; 16 leaves them dense."
    )
    embeddings: Literal[8, 4] | None = Field(
        None, description="Bits of input and output embeddings, tied or not, in hfcompress' layers; dense if absent."
    )
    target_modules: list[str] | None = Field(None, description="Suffixes of module names; all linear layers if absent.")
    skip_modules: list[str] = Field(
        [], description="Suffixes to leave alone, beside task heads and tied embeddings, which are left alone by default."
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Quantize:
        given, theirs = self.model_fields_set, self.engine == "bitsandbytes"
        kinds = {self.bits, *self.bits_pattern.values()} - {16}
        for names, fits, want in (
            ({"quant_type", "use_double_quant", "compute_dtype"}, theirs and 4 in kinds, "bits: 4 with engine: bitsandbytes"),
            ({"threshold"}, theirs and 8 in kinds, "bits: 8 with engine: bitsandbytes"),
            ({"group_size", "symmetric"}, not theirs, "engine: hfcompress"),
        ):
            if (strange := names & given) and not fits and any(getattr(self, name) != _DEFAULTS[name] for name in strange):
                told = ", ".join(sorted(strange))
                raise ValueError(f"{told} belong{'s' * (len(strange) == 1)} to {want}; remove {told} or set {want}")
        return self

    @property
    def computes_in(self) -> str | None:
        return self.compute_dtype

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        yield None
        check_editable(model, "quantize")
        linears, tables = self._targets(model), self._tables(model)
        for name, bits in linears.items():
            swap(model, name, self.quantized(model.get_submodule(name), bits))
        for names in tables:
            self._code_tables(model, names)

    def _targets(self, model: Any) -> dict[str, int]:
        """Names of linear layers to their bits."""
        possible = codable(model)
        if not possible:
            raise CompressionError("quantize: no dense linear layer is left in the model; it is quantised already.")
        chosen = possible if self.target_modules is None else matching(model, self.target_modules, possible, "quantize")
        skipped = set(matching(model, self.skip_modules, possible, "quantize")) if self.skip_modules else set()
        bits: dict[str, int] = dict.fromkeys(chosen, self.bits)
        for pattern, own in self.bits_pattern.items():
            bits |= dict.fromkeys(self._named_by(pattern, chosen), own)
        skipped |= {name for name, own in bits.items() if own == 16}
        if chosen and skipped.issuperset(chosen):
            raise CompressionError("quantize: skip_modules leaves no layer to quantise; take some out of it.")
        fitting = {name: own for name, own in bits.items() if name not in skipped and self._fits(model, name, own)}
        if chosen and not fitting:
            raise CompressionError(
                "quantize: 4 bits need in_features in multiples of 64 and out_features of 32, and no chosen layer has them; "
                "prune with a round_to that keeps them, or choose bits: 8."
            )
        return fitting

    def _named_by(self, pattern: str, names: list[str]) -> list[str]:
        """As PEFT reads the keys of its `rank_pattern`: suffixes of names, or regular expressions for them."""
        try:
            found = [name for name in names if re.match(rf"(.*\.)?(?:{pattern})$", name)]
        except re.error as error:
            raise CompressionError(f"quantize: bits_pattern: {pattern!r} is no regular expression ({error}).") from error
        if not found:
            leaves = {name.rpartition(".")[2] for name in names}
            raise CompressionError(
                f"quantize: bits_pattern: {pattern!r} matches no chosen layer."
                + did_you_mean(pattern.rpartition(".")[2], leaves)
            )
        return found

    def _fits(self, model: nn.Module, name: str, bits: int) -> bool:
        layer = model.get_submodule(name)
        if self.engine == "hfcompress":
            if wrong := mismatch(features(layer)[0], bits, self._group(bits)):
                raise CompressionError(f"quantize: {name}: {wrong}; choose that, or leave the layer out by skip_modules.")
        elif not codes_fit(layer, bits):
            log.info("quantize: %s left alone: 4-bit kernels need (64n, 32m) features, it has %s", name, features(layer))
            return False
        return True

    def _group(self, bits: int) -> int | None:
        return self.group_size or (32 if bits == 4 else None)

    def _tables(self, model: Any) -> list[list[str]]:
        """Embeddings to code, those that share a weight together."""
        if self.embeddings is None:
            return []
        found = codable_tables(model)
        if not found:
            raise CompressionError(
                "quantize: embeddings: the model has no dense table that can become codes; leave embeddings out."
            )
        return found

    def _code_tables(self, model: nn.Module, names: list[str]) -> None:
        """Codes of a table, or of several layers that go on sharing them."""
        bits, shared = self.embeddings or 8, None
        for name in names:
            old: Any = model.get_submodule(name)
            wide, group = old.weight.shape[1], self._group(bits)
            group = None if mismatch(wide, bits, group) else group
            kind = QuantEmbedding.from_dense if isinstance(old, nn.Embedding) else QuantLinear.from_linear
            new: Any = kind(old, bits, group, self.symmetric)
            shared = shared or new
            new.weight = shared.weight  # one tensor in memory and on disk, which is tied again when it is loaded
            swap(model, name, new)

    def quantized(self, layer: nn.Module, bits: int | None = None) -> nn.Module:
        """The low-bit twin of a Linear or Conv1D, on the same device."""
        bits = bits or self.bits
        if self.engine == "hfcompress":
            return QuantLinear.from_linear(layer, bits, self._group(bits), self.symmetric)
        if bits == 8:
            return coded(layer, 8, threshold=self.threshold)
        four = {"quant_type": self.quant_type, "use_double_quant": self.use_double_quant, "compute_dtype": self.compute_dtype}
        return coded(layer, 4, **four)


_DEFAULTS = {name: field.default for name, field in Quantize.model_fields.items()}
