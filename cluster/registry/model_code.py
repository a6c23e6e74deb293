"""Copied into every registered model: MLflow runs this file to load it. No part of the model is a pickle."""

import sys
from pathlib import Path

from mlflow.models import set_model

try:
    import m2f  # noqa: F401
except ModuleNotFoundError:  # then from the wheel that travels with the model
    sys.path.extend(str(wheel) for wheel in (Path(__file__).parent / "code").glob("m2f-*.whl"))

from m2f.cluster.registry.served_model import ServedModel

set_model(ServedModel())
