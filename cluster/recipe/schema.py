"""JSON Schema of recipes, with which editors complete and check settings."""

from __future__ import annotations

import math
from typing import Any

from pydantic import TypeAdapter

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.explain import field_docs
from m2f.cluster.recipe.load import sections_in, type_hints
from m2f.model.limits import Range, ranges_of


def recipe_schema() -> dict[str, Any]:
    """Return a schema (draft 2020-12) with the names, types, ranges, defaults and descriptions of all settings.

    The schema rejects unknown settings. It does not express constraints between settings.
    """
    schema = TypeAdapter(RunConfig).json_schema()
    found = {"RunConfig": schema, **schema["$defs"]}
    for section in _all_sections(RunConfig):
        described = found[section.__name__]
        described["additionalProperties"] = False
        docs, ranges = field_docs(section), ranges_of(section)
        for name, setting in described["properties"].items():
            setting.pop("title", None)
            if name in docs:
                setting["description"] = docs[name]
            if name in ranges:
                _add_range(setting, ranges[name])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "m2f recipe"}


def _all_sections(section: type) -> set[type]:
    inner = {found for hint in type_hints(section).values() for found in sections_in(hint)}
    return {section}.union(*(_all_sections(found) for found in inner))


def _add_range(schema: Any, allowed: Range) -> None:
    """Add the range to the schema of every number in a setting, including numbers inside lists and mappings."""
    if isinstance(schema, list):
        for item in schema:
            _add_range(item, allowed)
    elif isinstance(schema, dict):
        if schema.get("type") in ("number", "integer"):
            if allowed.low > -math.inf:
                schema["exclusiveMinimum" if allowed.above else "minimum"] = allowed.low
            if allowed.high < math.inf:
                schema["exclusiveMaximum" if allowed.below else "maximum"] = allowed.high
        for name in ("anyOf", "items", "prefixItems", "additionalProperties"):
            _add_range(schema.get(name), allowed)
