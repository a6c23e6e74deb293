"""Resolve addresses of registered models, such as `models:/NAME@ALIAS`, and fetch the files of the models."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from m2f.cluster.environment import environment
from m2f.cluster.tracking.store import TrackingError, brief, checked_uri, connect
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.model.errors import UserError

CHECKPOINT_FOLDER = "artifacts/checkpoint"
"""Path, inside a registered model, of the checkpoint folder with weights, identity and recipe."""


def model_folder(address: str, tracking: str | None = None, folder: str | None = None) -> Path:
    """Return the local checkpoint folder of a registered model; fetch it from the store if it is remote.

    Args:
        address: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or `models:/MODEL_ID` of a logged model.
        tracking: URI of the store; None uses MLFLOW_TRACKING_URI, or MLflow's current store if that is not set.
            MLFLOW_REGISTRY_URI, if set, names the registry.
        folder: destination of the files. With None, files on this machine are used in place, and others are fetched
            into a temporary folder that is removed when this process ends.

    Raises:
        TrackingError: the address does not exist, `m2f register` did not create the model, or the store does not
            answer.
        StorageError: there is no space for temporary files.
    """
    uri = checked_uri(tracking or os.environ.get("MLFLOW_TRACKING_URI") or mlflow.get_tracking_uri())
    registry = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    fetched: ScratchFolder | None = None
    try:
        location = _location(address, MlflowClient(tracking_uri=uri, registry_uri=registry))
        if folder is None and not _is_local(location):
            fetched = ScratchFolder("model")
            atexit.register(fetched.remove)
            folder = str(fetched.path)
        local = mlflow.artifacts.download_artifacts(
            artifact_uri=location, dst_path=folder, tracking_uri=uri, registry_uri=registry
        )
    except UserError:
        raise
    except Exception as error:  # artifact stores raise errors of many types
        if fetched is not None:
            fetched.remove()
        raise TrackingError(
            f"{address}: cannot be read from {uri} ({brief(error)}); set MLFLOW_TRACKING_URI to the store that "
            "contains it, and check name and alias"
        ) from error
    found = Path(local) / CHECKPOINT_FOLDER
    if not found.is_dir():
        raise TrackingError(f"{address} was not created by `m2f register`: it has no {CHECKPOINT_FOLDER}")
    return found


def _location(address: str, client: MlflowClient) -> str:
    """Return the location of a model's files in the client's store.

    MLflow's own resolution of addresses uses the process-wide store instead.
    """
    words = address.removeprefix("models:/").strip("/")
    name, separator, alias = words.rpartition("@")
    if separator:
        return client.get_model_version_download_uri(name, client.get_model_version_by_alias(name, alias).version)
    name, slash, version = words.rpartition("/")
    if slash:
        is_number = version.isdecimal()  # otherwise a keyword of MLflow such as `latest`
        return client.get_model_version_download_uri(name, version) if is_number else address
    return str(client.get_logged_model(words).artifact_location)


def _is_local(location: str) -> bool:
    """Return whether a location is on this machine: a path or a file URL."""
    return urlsplit(location).scheme in ("", "file")


def find_version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the model version that an alias points to; None if the model or the alias does not exist."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def registry_client(uri: str) -> MlflowClient:
    """Return a client of a store and its registry. MLFLOW_REGISTRY_URI, if set, names a separate registry."""
    connect(uri)  # configures MLflow and checks the URI
    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


@contextmanager
def using_store(uri: str) -> Iterator[None]:
    """Set the store for MLflow's functions that take no URI, and restore the previous one at exit."""
    before = mlflow.get_tracking_uri()
    with environment({"MLFLOW_TRACKING_URI": checked_uri(uri)}):  # `set_tracking_uri` also sets the variable
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)
