"""A frozen, typed object whose fields are its YAML: what recipes, steps, tasks and terms are made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Fields(BaseModel):
    """A frozen, typed object whose fields are its YAML; the first fields may also be given by position."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    def __init__(self, /, *positional: Any, **fields: Any) -> None:
        super().__init__(**dict(zip(type(self).model_fields, positional, strict=False)), **fields)
