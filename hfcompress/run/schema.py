"""The JSON Schema of recipes, for editors, from the very fields that read them."""

from __future__ import annotations

from typing import Any

from hfcompress.export import FORMATS
from hfcompress.methods import METHODS
from hfcompress.run.recipe import STEPS, Goal, Recipe
from hfcompress.run.train import Train, training_fields
from hfcompress.tasks import TASKS


def schema() -> dict[str, Any]:
    """JSON Schema of recipes, from the very fields that read them."""
    definitions: dict[str, Any] = {}

    def one_of(table: dict[str, Any]) -> dict[str, Any]:
        return {
            "oneOf": [
                {"type": "object", "properties": {key: fields_of(cls)}, "required": [key], "additionalProperties": False}
                for key, cls in table.items()
            ]
            + [{"enum": list(table)}]
        }

    def fields_of(cls: Any) -> dict[str, Any]:
        if cls is Train:
            known: dict[str, Any] = {name: {} for name in training_fields()}
            known["epochs"] = {"type": "number", "exclusiveMinimum": 0}
            known["with"] = {"type": "array", "items": one_of(METHODS)}
            return {"type": "object", "description": Train.__doc__, "properties": known, "additionalProperties": False}
        told = cls.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(told.pop("$defs", {}))
        return told

    tasks = []
    for name, cls in TASKS.items():
        told = fields_of(cls)
        told["properties"] = {"name": {"const": name}, **told["properties"]}
        tasks.append(told)
    plain = {key: field for key, field in Goal.model_json_schema().items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hfcompress recipe",
        "type": "object",
        "properties": {
            "model": {"type": "string", "description": Recipe.model_fields["model"].description},
            "task": {"oneOf": tasks},
            "steps": {"type": "array", "minItems": 1, "items": one_of(STEPS)},
            "goal": plain,
            "seed": {"type": "integer", "minimum": 0, "default": 42},
            "output_dir": {"type": ["string", "null"]},
            "export": {"description": Recipe.model_fields["export"].description, "type": "array", "items": one_of(FORMATS)},
            "push_to": {"type": ["string", "null"]},
            "control": {"type": "boolean", "default": False, "description": Recipe.model_fields["control"].description},
            "private": {"type": "boolean", "default": False},
        },
        "required": ["model", "task", "steps"],
        "additionalProperties": False,
        "$defs": definitions,
    }
