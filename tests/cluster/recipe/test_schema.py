"""The JSON Schema that editors check recipes with."""

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
def test_every_recipe_of_the_project_fits_the_schema(path):
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
def test_an_editor_shows_the_place_of_a_mistake(before, after, where):
    errors = list(VALIDATOR.iter_errors(yaml.safe_load(MINIMAL.replace(before, after))))
    assert where in [list(error.absolute_path) for error in errors]


def test_settings_have_texts_and_the_minimal_recipe_fits():
    assert VALIDATOR.is_valid(yaml.safe_load(MINIMAL))
    schema = recipe_schema()
    assert schema["$defs"]["TrainingConfig"]["properties"]["global_batch"]["description"].startswith("Images per")
