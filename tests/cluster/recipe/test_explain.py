"""Tests that every setting has a description, and that numbers have ranges and units."""

from __future__ import annotations

import dataclasses

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.explain import explain, field_docs
from m2f.cluster.recipe.load import sections_in, type_hints
from m2f.model.limits import ranges_of

ANY_NUMBER = {"seed", "void", "version", "pixel_mean"}
"""Numeric settings without a range."""
UNITS = {
    "_s": "seconds",
    "_steps": "steps",
    "_mb": "MB",
    "_gb": "GB",
    "max_size": "pixels",
    "_edge": "pixels",
    "_edges": "pixels",
}


def _settings(section=RunConfig):
    """Yield (section, field) for every setting of a section and its nested sections."""
    for field in dataclasses.fields(section):
        if field.name != "kind":
            yield section, field
        for inner in sections_in(type_hints(section)[field.name]):
            yield from _settings(inner)


def test_every_setting_has_a_description():
    missing = {f"{section.__name__}.{f.name}" for section, f in _settings() if not field_docs(section).get(f.name)}
    assert not missing, "write a string below these settings, which says what they are"


def test_numbers_have_ranges_and_units():
    for section, field in _settings():
        where, allowed = f"{section.__name__}.{field.name}", ranges_of(section).get(field.name)
        words = field.type.replace("[", " ").replace("]", " ").replace(",", " ").split()
        if {"int", "float"} & set(words) and field.name not in ANY_NUMBER:
            assert allowed is not None, f"{where} has no range"
        for ending, unit in UNITS.items():
            if allowed is not None and field.name.endswith(ending):
                assert allowed.unit == unit, where


def test_explain_prints_description_range_and_unit():
    assert (
        "- `log_every_steps` (int, default 20, at least 1, in steps): Steps between two log lines and points of the "
        "curves."
    ) in explain("training").splitlines()
