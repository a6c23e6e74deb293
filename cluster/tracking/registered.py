"""Registered models by their address, `models:/NAME@ALIAS`, and where their files are on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from m2f.cluster.tracking.store import TrackingError, brief, checked_uri, connect

CHECKPOINT_FOLDER = "artifacts/checkpoint"
"""Within a registered model: a checkpoint folder with weights, identity and recipe."""


def model_folder(address: str, tracking: str | None = None, folder: str | None = None) -> Path:
    """The checkpoint folder of a registered model, fetched from the store unless that is on this machine.

    Args:
        address: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or `models:/MODEL_ID` of a logged model.
        tracking: the store; None takes MLFLOW_TRACKING_URI, and MLFLOW_REGISTRY_URI where that is set.
        folder: where files are fetched to; None makes one that lasts as long as this process' temporary files.

    Raises TrackingError for an address that names nothing, a model that `m2f register` did not make, or a store that
    does not answer.
    """
    with using_store(tracking or os.environ.get("MLFLOW_TRACKING_URI") or mlflow.get_tracking_uri()):
        try:
            local = mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=folder)
        except Exception as error:  # whatever the artifact store behind it raises
            raise TrackingError(
                f"{address}: cannot be read from {mlflow.get_tracking_uri()} ({brief(error)}); set MLFLOW_TRACKING_URI "
                "to the store that has it, and check name and alias"
            ) from error
    found = Path(local) / CHECKPOINT_FOLDER
    if not found.is_dir():
        raise TrackingError(f"{address} is no model that m2f register made: it has no {CHECKPOINT_FOLDER}")
    return found


def find_version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version of a registered model that an alias means; None where there is no such model or alias."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def registry_client(uri: str) -> MlflowClient:
    """A client of a store and its registry, which MLFLOW_REGISTRY_URI may put elsewhere."""
    connect(uri)  # for its settings of MLflow, and the check of the URI
    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


@contextmanager
def using_store(uri: str) -> Iterator[None]:
    """Let MLflow's functions that take no store use this one."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(checked_uri(uri))
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
