"""Fixtures shared by the tests of the cluster package."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory) -> bytes:
    """Return an empty MLflow database. Creating one takes seconds, so tests copy it."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path.read_bytes()
