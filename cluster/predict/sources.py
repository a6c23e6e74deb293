"""Where a model lies that is named by an address of the hub or of a registry."""

from __future__ import annotations

from m2f.model.extras import naming_extras
from m2f.model.weights.hub import hub_folder
from m2f.model.weights.sources import HUB

REGISTERED = "models:/"
"""Begins the address of a model in an MLflow registry."""


def resolved_source(source: str) -> str:
    """A local folder for `hub:OWNER/NAME` and `models:/NAME@ALIAS`, fetched where need be; else the word itself.

    What is fetched from a registry is removed when this process ends; models of the hub stay in its cache.

    Raises WeightsError for a model of the hub that cannot be had, TrackingError for one of a registry, and
    MissingExtraError where the registry's package is not installed.
    """
    if source.startswith(HUB):
        return str(hub_folder(source))
    if source.startswith(REGISTERED):
        with naming_extras(source):
            from m2f.cluster.tracking.registered import model_folder
        return str(model_folder(source))
    return source
