"""Registered models by their address, `models:/NAME@ALIAS`, and where their files are on this machine."""

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

from m2f.cluster.tracking.store import TrackingError, brief, checked_uri, connect
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.model.errors import UserError

CHECKPOINT_FOLDER = "artifacts/checkpoint"
"""Within a registered model: a checkpoint folder with weights, identity and recipe."""


def model_folder(address: str, tracking: str | None = None, folder: str | None = None) -> Path:
    """The checkpoint folder of a registered model, fetched from the store unless that is on this machine.

    Args:
        address: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or `models:/MODEL_ID` of a logged model.
        tracking: the store; None takes MLFLOW_TRACKING_URI, and MLFLOW_REGISTRY_URI where that is set.
        folder: where files are copied to; None opens files of this machine where they are, and fetches others into a
            folder of temporary files that is removed when this process ends.

    Raises TrackingError for an address that names nothing, a model that `m2f register` did not make, or a store that
    does not answer; StorageError where there is no room for temporary files.
    """
    uri = checked_uri(tracking or os.environ.get("MLFLOW_TRACKING_URI") or mlflow.get_tracking_uri())
    registry = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    fetched: ScratchFolder | None = None
    try:
        location = _location(address, MlflowClient(tracking_uri=uri, registry_uri=registry))
        if folder is None and not _is_here(location):
            fetched = ScratchFolder("model")
            atexit.register(fetched.remove)
            folder = str(fetched.path)
        local = mlflow.artifacts.download_artifacts(
            artifact_uri=location, dst_path=folder, tracking_uri=uri, registry_uri=registry
        )
    except UserError:
        raise
    except Exception as error:  # whatever the artifact store behind it raises
        if fetched is not None:
            fetched.remove()
        raise TrackingError(
            f"{address}: cannot be read from {uri} ({brief(error)}); set MLFLOW_TRACKING_URI to the store that has "
            "it, and check name and alias"
        ) from error
    found = Path(local) / CHECKPOINT_FOLDER
    if not found.is_dir():
        raise TrackingError(f"{address} is no model that m2f register made: it has no {CHECKPOINT_FOLDER}")
    return found


def _location(address: str, client: MlflowClient) -> str:
    """Where the files of a model lie, as its store says: MLflow itself would ask the store of the process."""
    words = address.removeprefix("models:/").strip("/")
    name, at, alias = words.rpartition("@")
    if at:
        return client.get_model_version_download_uri(name, client.get_model_version_by_alias(name, alias).version)
    name, slash, version = words.rpartition("/")
    if slash:
        known = version.isdecimal()  # else a word of MLflow's, as latest
        return client.get_model_version_download_uri(name, version) if known else address
    return str(client.get_logged_model(words).artifact_location)


def _is_here(location: str) -> bool:
    """Whether files are opened where they are: those of a path or a file URL."""
    return urlsplit(location).scheme in ("", "file")


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
    before, stated = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(checked_uri(uri))  # which exports it as well
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if stated is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = stated
