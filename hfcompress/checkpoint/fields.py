"""A frozen, typed object whose fields are its YAML: what recipes, steps, tasks and terms are made of."""

from __future__ import annotations

import re
from typing import Any, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field

from hfcompress.checkpoint.errors import CompressionError, shown


@dataclass_transform(kw_only_default=False, field_specifiers=(Field,))
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
        names, kind = list(type(self).model_fields), type(self).__name__
        if len(positional) > len(names):
            raise CompressionError(
                f"{kind}: {len(positional)} values were given without a name, and it has {len(names)} "
                f"field{'s' if len(names) > 1 else ''}, {', '.join(names)}; leave out {shown(positional[len(names)])}."
            )
        given = dict(zip(names, positional, strict=False))
        if twice := next((name for name in given if name in fields), None):
            raise CompressionError(
                f"{kind}: {twice} was given twice, {shown(given[twice])} without its name and {shown(fields[twice])} with it; "
                f"give it once."
            )
        super().__init__(**given, **fields)


class Named(Fields):
    """Fields that a recipe lists under the class's name."""

    @classmethod
    def key(cls) -> str:
        """The YAML key: the class's name in snake case, `PruneHeads` -> `prune_heads`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __str__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self.model_dump(mode="json", exclude_defaults=True).items())
        return f"{self.key()} ({fields})" if fields else self.key()
