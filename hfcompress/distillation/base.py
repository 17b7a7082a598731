"""What every term of a distillation loss is: a weight, and parts (see `batch.Part`), one value for every row that counts, an
example, (B,), or a position of one, (B, T). `Batch.mean` puts them together so that it does not matter how a batch was cut,
padded or spread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_serializer
from torch import Tensor

from hfcompress.checkpoint.fields import Fields
from hfcompress.distillation.batch import Batch, Part

Parts = Iterator[Part]


class Term(Fields):
    """One summand of the loss. `needs` says what of the teacher it reads beside its answers."""

    key: ClassVar[str]
    needs: ClassVar[Literal["labels", "logits", "hidden_states", "attentions", "relations"]]

    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="What the term is multiplied with.")

    @model_serializer(mode="wrap")
    def _as_written(self, fields: Any) -> Any:
        """`kl`, `{kl: 0.7}` or `{kl: {weight: 0.7, temperature: 4.0}}`, as a recipe has it."""
        kept = {
            name: value for name, value in fields(self).items() if getattr(self, name) != type(self).model_fields[name].default
        }
        if not kept:
            return self.key
        return {self.key: kept["weight"] if set(kept) == {"weight"} else kept}

    def total(self, batch: Batch) -> Tensor:
        """The term's mean over the labels of the batch, not yet divided by their number."""
        return batch.mean(self.parts(batch))

    def parts(self, batch: Batch) -> Parts:
        raise NotImplementedError
