"""Markdown documentation of the settings, from their types, defaults, ranges and docstrings in the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
from functools import lru_cache
from typing import Any

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import kind_tag, sections_in, suggestion, type_hints
from m2f.model.errors import ConfigError
from m2f.model.limits import Range, ranges_of


def explain(section: str = "") -> str:
    """Return the documentation of a section (`training.optimizer`) and its subsections; "" is the whole recipe.

    If a section has several kinds, such as `data.augment`, all of them are described. For a list or mapping of
    sections, the section of its items is described.

    Raises:
        ConfigError: the section does not exist.
    """
    classes: tuple[type, ...] = (RunConfig,)
    known_path: list[str] = []
    for name in section.split(".") if section else []:
        classes, known = _sections_of_field(classes, name)
        if not classes:
            where = f"`{'.'.join(known_path)}`" if known_path else "the recipe"
            raise ConfigError(f"--explain {section}: `{name}` is not a section of {where}{suggestion(name, known)}")
        known_path.append(name)
    return "\n".join(line for cls in classes for line in _describe(cls, section)).rstrip() + "\n"


def _sections_of_field(classes: tuple[type, ...], name: str) -> tuple[tuple[type, ...], list[str]]:
    """Return the sections in the field `name` of the classes, and the names of all fields that contain sections."""
    inner = {field: sections_in(hint) for cls in classes for field, hint in type_hints(cls).items()}
    known = [field for field, sections in inner.items() if sections]
    return inner.get(name, ()), known


def _describe(cls: type, path: str) -> list[str]:
    tag = kind_tag(cls)
    title = f"{path or 'Recipe'}" + (f" (kind: {tag})" if tag else "")
    lines = [f"## {title}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
    hints, docs = type_hints(cls), field_docs(cls)
    inner: list[str] = []
    for field in dataclasses.fields(cls):
        if field.name == "kind":
            continue
        doc = f": {docs[field.name]}" if field.name in docs else ""
        text = f"{_type(field)}{_default(field)}{_range(ranges_of(cls).get(field.name))}"
        lines.append(f"- `{field.name}` ({text}){doc}")
        for section in sections_in(hints[field.name]):
            inner += _describe(section, f"{path}.{field.name}".lstrip("."))
    return [*lines, "", *inner]


def _type(field: dataclasses.Field[Any]) -> str:
    """Return the annotation of a field without its range."""
    return re.sub(r"^Annotated\[(.*), [^,]+\]$", r"\1", str(field.type))


def _range(allowed: Range | None) -> str:
    if allowed is None:
        return ""
    return f", {allowed}" + (f", in {allowed.unit}" if allowed.unit else "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f", default {field.default!r}"
    if field.default_factory is dataclasses.MISSING:
        return ", required"
    value = field.default_factory()
    tag = kind_tag(type(value)) if dataclasses.is_dataclass(value) else None
    return f", default kind {tag}" if tag else ""


@lru_cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring below each field. It is parsed from the source, because Python does not store it."""
    tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            docs[field.target.id] = " ".join(text.split())
    return docs
