"""Fixtures of the tracking tests."""

import dataclasses

import pytest

from m2f.cluster.recipe.load import parse_recipe

RECIPE = """
name: tracked
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""


@pytest.fixture
def stored_config(tmp_path, monkeypatch, migrated_database):
    """Return a configuration whose output folder has an MLflow database, since creating one takes seconds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(migrated_database)
    return dataclasses.replace(parse_recipe(RECIPE), output=str(tmp_path / "runs"))
