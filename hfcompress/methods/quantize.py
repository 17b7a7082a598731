from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from hfcompress.calibration.codes import Stage
from hfcompress.calibration.grid import Codes
from hfcompress.calibration.layer_codes import NEED_NO_DATA, calibrated_codes, four_bit_grid
from hfcompress.calibration.second_moments import DAMPING
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import features
from hfcompress.layers.bitsandbytes import Linear4bit, coded, codes_fit
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable, swap
from hfcompress.surgery.targets import codable, matching

log = logging.getLogger("hfcompress")


class Quantize(Method):
    """Store linear layers as 8- or 4-bit codes and compute with bitsandbytes' kernels.

    Needs: bitsandbytes; nothing after it but adapters may train; calibration data, if calibrate is more than scales.
    Buys: a quarter (8 bits) or an eighth (4 bits) of the float32 size of the layers.
    Costs: half a step of rounding a weight, at most, if not calibrated; time, where unpacking outweighs the smaller reads (see
    the report).
    Paper: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); 2023, QLoRA (arXiv 2305.14314); Frantar et al. 2022, GPTQ (arXiv
    2210.17323): feedback; Behdin et al. 2023, QuantEase (arXiv 2309.01885): rounding
    """

    edits: ClassVar[frozenset[str]] = frozenset({"codes"})
    needs_dense: ClassVar[bool] = True
    tag: ClassVar[str] = "quantization"

    bits: Literal[8, 4] = Field(8, description="Bits a weight.")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4 bits: which sixteen values the codes stand for.")
    use_double_quant: bool = Field(True, description="4 bits: quantise the scales as well (0.4 bits a weight less).")
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="4 bits: how many weights of a row share a scale."
    )
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="4 bits: the dtype to multiply in; that of the input if absent."
    )
    threshold: float = Field(
        0.0, ge=0, le=1000, description="8 bits: inputs above it stay in 16 bits (6.0 helps very large models; 0 is faster)."
    )
    calibrate: Literal["scales", "diagonal", "feedback", "rounding", True, False] = Field(
        False,
        description="4 bits: choose codes by what they do, at the same size. scales: scales of least squared error, without "
        "data; diagonal: the same, columns weighted by what they multiply on samples; feedback, or true: then each column "
        "makes up for the rounding of those before it (GPTQ); rounding: then each code once more beside all others.",
    )
    samples: int = Field(128, ge=1, description="Of calibrate: training examples that layers are calibrated on.")
    damping: float = Field(DAMPING, ge=0, description="Of calibrate: the ridge, as a share of the mean second moment.")
    target_modules: list[str] | None = Field(None, description="Suffixes of module names; all linear layers if absent.")
    skip_modules: list[str] = Field(
        [], description="Suffixes to leave alone, beside task heads and tied embeddings, which are left alone by default."
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Quantize:
        four = {"quant_type", "use_double_quant", "blocksize", "compute_dtype"} & self.model_fields_set
        if self.bits == 8 and four:
            raise ValueError(f"{', '.join(sorted(four))} belong to bits: 4; remove them or set bits: 4")
        if self.bits == 4 and self.threshold:
            raise ValueError("threshold belongs to bits: 8; remove it or set bits: 8")
        if self.bits == 8 and self.calibrate:
            raise ValueError(
                "calibrate chooses codes of 4 bits, and those of 8 bits are bitsandbytes' own, a scale for a whole row; remove "
                "calibrate or set bits: 4"
            )
        idle = {"samples", "damping"} & self.model_fields_set
        if idle and self._stage in NEED_NO_DATA:
            raise ValueError(
                f"{' and '.join(sorted(idle))} belong to calibrate: diagonal, feedback or rounding; set one of "
                f"these, or remove what belongs to it"
            )
        return self

    @property
    def _stage(self) -> Stage:
        return self.calibrate if isinstance(self.calibrate, str) else "feedback" if self.calibrate else "plain"

    @property
    def computes_in(self) -> str | None:
        return self.compute_dtype

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        yield None
        check_editable(model, "quantize")
        names = self._targets(model)
        if self.calibrate:
            self._calibrated(model, task, names)
        else:
            for name in names:
                swap(model, name, self.quantized(model.get_submodule(name)))

    def _calibrated(self, model: nn.Module, task: Any, names: list[str]) -> None:
        asked, has_data = f"quantize: calibrate: {self._stage}", task is not None and getattr(task, "has_data", True)
        if not has_data and self._stage not in NEED_NO_DATA:
            raise CompressionError(
                f"{asked} needs calibration data; give a task or batches, with or without labels, or choose calibrate: scales."
            )
        grid = four_bit_grid(self.quant_type, self.blocksize, self.use_double_quant)

        biases: dict[str, Any] = {}

        def put(name: str, found: Codes) -> None:
            layer: Any = model.get_submodule(name)
            new = Linear4bit.from_codes(layer, found.codes, found.raw_scales, **self._four)
            biases[name] = layer.bias
            new.bias = deepcopy(layer.bias)  # which bitsandbytes casts to compute_dtype, in place, whenever the layer runs
            swap(model, name, new)

        batches = (lambda: task.batches(model, self.samples)) if has_data else None
        calibrated_codes(model, names, lambda _: grid, batches, self._stage, put, self.damping, asked)
        for name, bias in biases.items():
            model.get_submodule(name).bias = bias

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
                f"quantize: 4 bits need in_features in multiples of {max(64, self.blocksize)} and out_features of 32, and no "
                f"chosen layer has them; prune with a round_to that keeps them, or choose bits: 8."
            )
        return names

    def _fits(self, name: str, layer: nn.Module) -> bool:
        if not codes_fit(layer, self.bits, self.blocksize):
            columns = max(64, self.blocksize)
            log.info(
                "quantize: %s left alone: 4-bit kernels need (%dn, 32m) features, it has %s", name, columns, features(layer)
            )
            return False
        return True

    def quantized(self, layer: nn.Module) -> nn.Module:
        """The low-bit twin of a Linear or Conv1D, on the same device."""
        if self.bits == 8:
            return coded(layer, 8, threshold=self.threshold)
        return coded(layer, 4, blocksize=self.blocksize, **self._four)

    @property
    def _four(self) -> dict[str, Any]:
        return {"quant_type": self.quant_type, "use_double_quant": self.use_double_quant, "compute_dtype": self.compute_dtype}
