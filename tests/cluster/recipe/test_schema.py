"""Tests of the JSON Schema with which editors validate recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from m2f.cluster.recipe.schema import recipe_schema

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name != "ablations.yaml")
VALIDATOR = Draft202012Validator(recipe_schema())

MINIMAL = """
name: first
datasets: {train: {shards: shards}}
data: {train: [{dataset: train}]}
training: {max_steps: 10, optimizer: {lr: 0.0001}}
"""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_in_configs_matches_the_schema(path):
    problems = [
        f"{list(e.absolute_path)}: {e.message}" for e in VALIDATOR.iter_errors(yaml.safe_load(path.read_text()))
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("before", "after", "where"),
    [
        ("max_steps", "max_stebs", ["training"]),
        ("max_steps: 10", "max_steps: -1", ["training", "max_steps"]),
        ("lr: 0.0001", "lr: -1", ["training", "optimizer", "lr"]),
        ("lr: 0.0001", "betas: [0.9, 1.5]", ["training", "optimizer", "betas", 1]),
        ("lr: 0.0001", "lr: fast", ["training", "optimizer", "lr"]),
        ("name: first", "", []),
    ],
)
def test_schema_error_has_the_path_of_the_setting(before, after, where):
    errors = list(VALIDATOR.iter_errors(yaml.safe_load(MINIMAL.replace(before, after))))
    assert where in [list(error.absolute_path) for error in errors]


def test_schema_has_descriptions_and_accepts_a_minimal_recipe():
    assert VALIDATOR.is_valid(yaml.safe_load(MINIMAL))
    schema = recipe_schema()
    assert schema["$defs"]["TrainingConfig"]["properties"]["global_batch"]["description"].startswith("Images per")
