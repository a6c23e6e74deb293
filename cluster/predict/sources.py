"""Resolve addresses of models in the Hugging Face hub or in an MLflow registry."""

from __future__ import annotations

from m2f.model.extras import report_missing_extras
from m2f.model.weights.hub import hub_folder
from m2f.model.weights.sources import HUB

REGISTERED = "models:/"
"""Prefix of the address of a model in an MLflow registry."""


def resolve_source(source: str) -> str:
    """Return a local folder for `hub:OWNER/NAME` or `models:/NAME@ALIAS`, and any other source unchanged.

    The model is downloaded if needed. Downloads from a registry are deleted when this process ends. Models of the hub
    stay in its cache.

    Raises:
        WeightsError: the model of the hub is not available.
        TrackingError: the model of the registry is not available.
        MissingExtraError: the package for the registry is not installed.
    """
    if source.startswith(HUB):
        return str(hub_folder(source))
    if source.startswith(REGISTERED):
        with report_missing_extras(source):
            from m2f.cluster.tracking.registered import model_folder
        return str(model_folder(source))
    return source
