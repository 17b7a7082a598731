from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from hfcompress.calibration.allocation import Target, least_harm
from hfcompress.calibration.batches import MakeBatches
from hfcompress.calibration.codes import Stage
from hfcompress.calibration.formats import BitsAndBytes4, BitsAndBytes8, Format, Ours
from hfcompress.calibration.layer_codes import NEED_NO_DATA
from hfcompress.calibration.other_layers import coded_convolutions, coded_tables
from hfcompress.calibration.second_moments import DAMPING
from hfcompress.calibration.smoothing import smooth
from hfcompress.calibration.stored_layers import store_layers, stored_alone
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import KINDS, holds_codes, kind_of
from hfcompress.methods.base import LayerEdits, Method, Tick
from hfcompress.surgery.modules import check_editable, swap
from hfcompress.surgery.targets import by_pattern, codable, codable_convolutions, coded_linears, matching

log = logging.getLogger("hfcompress")
Bits = Literal[8, 7, 6, 5, 4, 3, 2, 1]
QUANTISED = "quantize: no dense linear layer is left in the model; it is quantised already."
NO_LINEAR = "quantize: no linear layer of the model can become codes; set convolutions or embeddings, if it has these."


class Quantize(Method):
    """Store linear layers, and embeddings and convolutions if asked for, as codes of 1 to 8 bits; codes again in fewer bits.

    Needs: nothing for engine hfcompress, bitsandbytes for its own; nothing after it but adapters and what heal names may train;
        calibration data, if calibrate is more than scales, if smooth is asked for, or if a target decides the bits.
    Buys: a quarter (8 bits), an eighth (4 bits) or less of the float32 size of the layers; time with engine hfcompress in 8
        bits, where the processor multiplies bytes.
    Costs: half a step of rounding a weight, at most, if not calibrated; time, where unpacking outweighs the smaller reads (see
        the report).
    Paper: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); 2023, QLoRA (arXiv 2305.14314); rows of inputs rounded as they
        come: Yao et al. 2022, ZeroQuant (arXiv 2206.01861); feedback: Frantar et al. 2022, GPTQ (arXiv 2210.17323); rounding:
        Behdin et al. 2023, QuantEase (arXiv 2309.01885); smooth: Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), Lin et al.
        2023, AWQ (arXiv 2306.00978); targets: Dong et al. 2020, HAWQ-V2 (arXiv 1911.03852)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"codes"})
    needs_dense: ClassVar[bool] = True
    tag: ClassVar[str] = "quantization"

    bits: Bits = Field(default=8, description="Bits a weight; bitsandbytes has 8 and 4, hfcompress 1 to 8.")
    engine: Literal["bitsandbytes", "hfcompress"] = Field(
        default="bitsandbytes",
        description="Whose layers: bitsandbytes' load without this package, hfcompress' are faster on CPUs.",
    )
    quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="bitsandbytes, 4 bits: which sixteen values codes stand for."
    )
    use_double_quant: bool = Field(
        default=True, description="bitsandbytes, 4 bits: quantise the scales as well (0.4 bits a weight less)."
    )
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        default=64, description="bitsandbytes, 4 bits: how many weights of a row share a scale."
    )
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="bitsandbytes, 4 bits: the dtype to multiply in; that of the input if absent."
    )
    threshold: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="bitsandbytes, 8 bits: inputs above it stay in 16 bits (6.0 helps very large models; 0 is faster).",
    )
    group_size: int | None = Field(
        default=None,
        ge=2,
        description="hfcompress: columns that share a scale; if absent a row from 5 bits on, 32 in 4 bits, 64 in fewer.",
    )
    symmetric: bool = Field(
        default=True, description="hfcompress: whether zero is a code; else each group has an offset as well."
    )
    bits_pattern: dict[str, Literal[16] | Bits] = Field(
        default={}, description="Suffixes of module names, or regular expressions, to bits of their own; 16 leaves them dense."
    )
    target_bits: float | None = Field(
        default=None,
        gt=0,
        description="Bits a weight on average, scales included: layers get 4 or 8, or stay dense, by their harm.",
    )
    target_megabytes: float | None = Field(
        default=None, gt=0, description="The same for what the whole model takes on disk, in 1e6 bytes."
    )
    max_drop: float | None = Field(
        default=None,
        gt=0,
        description="Instead: the fewest bytes with which the loss on the samples grows by no more than this.",
    )
    swaps: int = Field(
        default=4,
        ge=0,
        description="Of target_bits and target_megabytes: exchanges of bits between layers to try on the model.",
    )
    embeddings: Literal[8, 7, 6, 5, 4, 3, 2] | None = Field(
        default=None, description="Bits of input and output embeddings, tied or not, in hfcompress' layers; dense if absent."
    )
    convolutions: Bits | None = Field(
        default=None, description="Bits of convolutions, in hfcompress' layers, depthwise ones excepted; dense if absent."
    )
    calibrate: Literal["scales", "diagonal", "feedback", "rounding", True, False] = Field(
        default=False,
        description="Choose codes by what they do, at the same size. scales: scales of least squared error, without data; "
        "diagonal: the same, columns weighted by what they multiply on samples; feedback, or true: then each column makes up "
        "for the rounding of those before it (GPTQ); rounding: then each code once more beside all others.",
    )
    smooth: bool = Field(
        default=False,
        description="Before that: scale columns up where rounding hurts, and what comes before them down by as much, in powers "
        "of two, so that the model computes the same (SmoothQuant, AWQ); chosen by what layers say on samples.",
    )
    samples: int = Field(default=128, ge=1, description="Of calibrate, smooth and targets: training examples to look at.")
    damping: float = Field(default=DAMPING, ge=0, description="Of calibrate: the ridge, as a share of the mean second moment.")
    target_modules: list[str] | None = Field(default=None, description="Suffixes of module names; all linear layers if absent.")
    skip_modules: list[str] = Field(
        default=[],
        description="Suffixes to leave alone, beside task heads and tied embeddings, which are left alone by default.",
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Quantize:
        given, ours = self.model_fields_set, self.engine == "hfcompress"
        four = sorted({"quant_type", "use_double_quant", "blocksize", "compute_dtype"} & given)
        eight, grouped = sorted({"threshold"} & given if self.threshold else ()), sorted({"group_size", "symmetric"} & given)
        if ours and (theirs := four + eight):
            raise ValueError(f"{', '.join(theirs)} belong to engine: bitsandbytes; remove them or set engine: bitsandbytes")
        if not ours and (lacking := sorted(self._possible_bits - {16, 8, 4})):
            raise ValueError(
                f"engine: bitsandbytes has no codes of {' or '.join(map(str, lacking))} bits; possible are 8 and 4; choose "
                f"one, or set engine: hfcompress, which has 1 to 8"
            )
        if not ours and grouped:
            raise ValueError(f"{', '.join(grouped)} belong to engine: hfcompress; remove them or set engine: hfcompress")
        if four and 4 not in self._possible_bits:
            raise ValueError(f"{', '.join(four)} belong to bits: 4; remove them or set bits: 4")
        if eight and 8 not in self._possible_bits:
            raise ValueError("threshold belongs to bits: 8; remove it or set bits: 8")
        if not ours and 4 not in self._possible_bits and self.calibrate:
            raise ValueError(
                "calibrate chooses codes of 4 bits, and those of 8 bits are bitsandbytes' own, a scale for a whole row; remove "
                "calibrate or set bits: 4"
            )
        idle = {"damping"} | (set() if self._has_target or self.smooth else {"samples"})
        if (idle := idle & given) and self._stage in NEED_NO_DATA:
            raise ValueError(
                f"{' and '.join(sorted(idle))} belong to calibrate: diagonal, feedback or rounding; set one of "
                f"these, or remove what belongs to it"
            )
        if {"swaps"} & given and self.target_bits is None and self.target_megabytes is None:
            raise ValueError("swaps belongs to target_bits and target_megabytes; set one of these, or remove swaps")
        rivals = {"bits", "bits_pattern", "target_bits", "target_megabytes", "max_drop"}
        if self._has_target and (several := sorted(rivals & given))[1:]:
            raise ValueError(f"{' and '.join(several)} decide the same; leave one of them")
        return self

    @property
    def _stage(self) -> Stage:
        return self.calibrate if isinstance(self.calibrate, str) else "feedback" if self.calibrate else "plain"

    @property
    def _has_target(self) -> bool:
        return any(target is not None for target in (self.target_bits, self.target_megabytes, self.max_drop))

    @property
    def _possible_bits(self) -> set[int]:
        return {4, 8} if self._has_target else {self.bits, *self.bits_pattern.values()}

    @property
    def computes_in(self) -> str | None:
        return self.compute_dtype

    @property
    def wants_labels(self) -> bool:
        return self._has_target

    @property
    def by_layer(self) -> bool:
        return not self._has_target and not self.smooth and self._stage in NEED_NO_DATA

    def layer_edits(self, model: nn.Module) -> LayerEdits:
        waiting = list(self._others(model))  # read whole, as a checkpoint may part what a config ties
        formats = self._fitting(model, self._due(model, self._targets(model, alone=not waiting), alone=not waiting))

        def edit(name: str) -> None:
            if name in formats:
                layer = model.get_submodule(name)
                swap(model, name, stored_alone(name, layer, formats[name], self._stage, "quantize"))

        def rest(_: Collection[str]) -> None:
            for name, new in self._others(model).items() if waiting else ():
                swap(model, name, new)

        return LayerEdits(formats, edit, waiting, rest)

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        yield None
        check_editable(model, "quantize")
        others = self._others(model)
        names = self._targets(model, alone=not others)
        batches = self._batches(model, task)
        formats = {} if self._has_target else self._fitting(model, self._due(model, names, alone=not others))
        if self.smooth:
            smooth(model, formats or dict.fromkeys(names, self._format(4)), batches, "quantize: smooth")
        if self._has_target:
            formats = self._within_target(model, names, others, batches)
        for name, new in others.items():
            swap(model, name, new)
        store_layers(model, formats, self._stage, batches, self.damping, "quantize")

    def _batches(self, model: nn.Module, task: Any) -> MakeBatches | None:
        if task is not None and getattr(task, "has_data", True):
            return lambda: task.batches(model, self.samples)
        if self._has_target:
            raise CompressionError(
                "quantize: a target needs calibration data, with labels, to tell which layers the loss feels; give a task or "
                "batches, or choose bits."
            )
        if self._stage not in NEED_NO_DATA:
            raise CompressionError(
                f"quantize: calibrate: {self._stage} needs calibration data; give a task or batches, with or without labels, "
                f"or choose calibrate: scales."
            )
        if self.smooth:
            raise CompressionError(
                "quantize: smooth needs calibration data; give a task or batches, with or without labels, or leave smooth out."
            )
        return None

    def _targets(self, model: Any, alone: bool) -> list[str]:
        """Layers to code, or to code again; `alone`: nothing else is coded."""
        dense, coded = codable(model), [] if self._has_target else coded_linears(model)
        possible = [name for name, _ in model.named_modules() if name in {*dense, *coded}]
        if not possible and alone:
            raise CompressionError(QUANTISED if any(map(holds_codes, model.modules())) else NO_LINEAR)
        chosen = possible if self.target_modules is None else matching(model, self.target_modules, possible, "quantize")
        skipped = self._skipped(model, possible)
        if chosen and skipped.issuperset(chosen):
            raise CompressionError("quantize: skip_modules leaves no layer to quantise; take some out of it.")
        return [name for name in chosen if name not in skipped]

    def _skipped(self, model: Any, possible: list[str]) -> set[str]:
        also = [] if self.convolutions is None else codable_convolutions(model)[0]
        return set(matching(model, self.skip_modules, [*possible, *also], "quantize")) if self.skip_modules else set()

    def _bits_of(self, names: list[str]) -> dict[str, int]:
        bits: dict[str, int] = dict.fromkeys(names, self.bits)
        for pattern, own in self.bits_pattern.items():
            bits |= dict.fromkeys(by_pattern(pattern, names, "quantize: bits_pattern"), own)
        return {name: own for name, own in bits.items() if own != 16}

    def _due(self, model: nn.Module, names: list[str], alone: bool) -> dict[str, Format]:
        """How these layers are asked to be stored, without codes that would gain nothing: those of as few bits already, unless
        data choose them anew in another format."""
        asked = {name: self._format(bits) for name, bits in self._bits_of(names).items()}
        found = {name: storing for name, storing in asked.items() if self._gains(model.get_submodule(name), storing)}
        if asked and not found and alone:
            raise CompressionError(
                QUANTISED
                if not codable(model)
                else "quantize: the chosen layers are codes of as few bits already; ask for fewer, calibrate them on data in "
                "another format, or choose other target_modules."
            )
        return found

    def _gains(self, layer: nn.Module, storing: Format) -> bool:
        if not holds_codes(layer):
            return True
        if storing.bits < KINDS[kind_of(layer) or ""].code_bits(layer):
            return True
        return self._stage not in NEED_NO_DATA and storing.grid(layer) is not None and not storing.holds(layer)

    def _format(self, bits: int) -> Format:
        if self.engine == "hfcompress":
            return Ours(bits, self._group(bits), self.symmetric)
        if bits == 8:
            return BitsAndBytes8(self.threshold)
        return BitsAndBytes4(self.quant_type, self.use_double_quant, self.compute_dtype, self.blocksize)

    def _group(self, bits: int) -> int | None:
        return self.group_size or (None if bits > 4 else 32 if bits == 4 else 64)

    def _fitting(self, model: nn.Module, asked: dict[str, Format]) -> dict[str, Format]:
        """How each layer is stored; what bitsandbytes' kernels can't read is left alone, and a line says so."""
        found: dict[str, Format] = {}
        for name, storing in asked.items():
            wrong = storing.misfit(model.get_submodule(name))
            if wrong and self.engine == "hfcompress":
                raise CompressionError(f"quantize: {name}: {wrong}; choose that, or leave the layer out by skip_modules.")
            if wrong:
                log.info("quantize: %s left alone: %s", name, wrong)
            else:
                found[name] = storing
        if asked and not found:
            raise CompressionError(
                f"quantize: 4 bits need in_features in multiples of {max(64, self.blocksize)} and out_features of 32, and no "
                f"chosen layer has them; prune with a round_to that keeps them, or choose bits: 8."
            )
        return found

    def _within_target(
        self, model: nn.Module, names: list[str], coded: dict[str, nn.Module], batches: MakeBatches | None
    ) -> dict[str, Format]:
        if not names:
            raise CompressionError(QUANTISED if any(map(holds_codes, model.modules())) else NO_LINEAR)
        return least_harm(
            model,
            names,
            {bits: self._format(bits) for bits in (4, 8)},
            batches,
            Target(self.target_bits, None if self.target_megabytes is None else self.target_megabytes * 1e6, self.max_drop),
            coded=coded,
            swaps=self.swaps,
        )

    def _others(self, model: nn.Module) -> dict[str, nn.Module]:
        """What takes the places of embeddings and convolutions."""
        found: dict[str, nn.Module] = {}
        if self.embeddings is not None:
            found |= coded_tables(model, self.embeddings, self._group(self.embeddings), self.symmetric)
        if (bits := self.convolutions) is not None:
            skipped = self._skipped(model, [*codable(model), *coded_linears(model)])
            found |= coded_convolutions(model, skipped, bits, self._group(bits), self.symmetric)
        return found

    def quantized(self, layer: nn.Module) -> nn.Module:
        """The low-bit twin of a Linear or Conv1D, on the same device, in `bits`."""
        return self._format(self.bits).rounded(layer)
