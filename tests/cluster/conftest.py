"""What tests of the cluster package share."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory) -> bytes:
    """An empty MLflow database; making one takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path.read_bytes()
