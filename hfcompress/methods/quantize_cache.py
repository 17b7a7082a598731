from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import QuantizedCache

from hfcompress.checkpoint.errors import CompressionError, first_line
from hfcompress.methods.base import Method, Tick
from hfcompress.surgery.modules import check_editable

PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
"""What a backend needs installed; fp8 is torch's own."""
BITS = {"fp8": (8,), "quanto": (4, 2), "hqq": (8, 4, 2)}


class QuantizeCache(Method):
    """Keep the keys and values that generation goes back to in 8, 4 or 2 bits, by transformers' own quantised caches.

    Needs: a decoder all of whose layers attend to the whole context; for 4 and 2 bits the package optimum-quanto or hqq, here
    and wherever the model generates.
    Buys: memory of long contexts: at 8 bits a quarter of a float32 cache, half of a bfloat16 one; weights stay as they are.
    Costs: time a token, to unpack; 8 bits have one scale a layer, set by the prompt, and clip what exceeds it later. Only
    generation reads the cache: what a report scores and times does not feel it (`hfcompress.results.kv_cache` does).
    Paper: Liu et al. 2024, KIVI (arXiv 2402.02750); Micikevicius et al. 2022, FP8 Formats (arXiv 2209.05433)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"cache"})

    bits: Literal[8, 4, 2] = Field(default=8, description="Bits a key or value.")
    backend: Literal["fp8", "quanto", "hqq"] | None = Field(
        default=None, description="Who quantises, as in transformers: fp8 if absent at 8 bits, quanto at 4 and 2."
    )
    q_group_size: int = Field(default=64, ge=1, description="quanto, hqq: how many numbers share a scale.")
    residual_length: int = Field(default=128, ge=1, description="quanto, hqq: how many of the latest tokens stay as they are.")

    @model_validator(mode="after")
    def _fields_fit(self) -> QuantizeCache:
        if self.bits not in BITS[self.chosen]:
            able = [backend for backend, bits in BITS.items() if self.bits in bits]
            raise ValueError(f"backend {self.chosen} has no {self.bits} bits; possible are {' and '.join(able)}")
        groups = {"q_group_size", "residual_length"} & self.model_fields_set
        if self.chosen == "fp8" and groups:
            raise ValueError(f"{', '.join(sorted(groups))} belong to backends quanto and hqq; remove them, or choose one")
        return self

    @property
    def chosen(self) -> str:
        """The backend."""
        return self.backend or ("fp8" if self.bits == 8 else "quanto")

    @property
    def cache_config(self) -> dict[str, Any]:
        """As `generation_config.cache_config` has it."""
        if self.chosen == "fp8":
            return {"backend": "fp8"}
        axis = 1 if self.chosen == "hqq" else 0
        groups = {"q_group_size": self.q_group_size, "residual_length": self.residual_length}
        return {"backend": self.chosen, "nbits": self.bits, "axis_key": axis, "axis_value": axis, **groups}

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        yield None
        check_editable(model, self.key())
        generates: Any = model
        if not generates.can_generate() or generates.config.is_encoder_decoder:
            raise CompressionError(
                f"{self.key()}: {type(model).__name__} is no decoder that generates, and transformers quantises the caches of "
                f"these alone; leave it out."
            )
        generation = generates.generation_config
        generation.cache_implementation, generation.cache_config = "quantized", self.cache_config
        generation._from_model_config = False  # else it would be made anew of the model's config
        self._prove(generates)

    def _prove(self, model: Any) -> None:
        """Generate a few tokens, so that it fails here and not where the model is used."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        asked: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
        training, cache, why = model.training, None, "its generate uses no such cache"
        try:
            made = model.eval().generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **asked)
            cache = getattr(made, "past_key_values", None)
        except ImportError as error:
            raise CompressionError(
                f"{self.key()}: backend {self.chosen} can't be used here ({first_line(error)}); pip install "
                f"{PACKAGES.get(self.chosen, 'transformers')}, here and wherever the model generates, or choose bits: 8, which "
                f"needs nothing."
            ) from error
        except Exception as error:  # an architecture's own code fails with whatever error it likes
            why = first_line(error)
        finally:
            model.train(training)
        if not isinstance(cache, QuantizedCache):
            raise CompressionError(
                f"{self.key()}: {type(model).__name__} can't generate with a cache of {self.bits} bits ({why}); possible are "
                f"decoders that cache (use_cache) and whose layers all attend to the whole context; leave it out."
            )
