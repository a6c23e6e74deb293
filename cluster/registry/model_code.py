"""Loader of a registered model. It is copied into every model, and MLflow runs it, so that no pickle is needed."""

import sys
from pathlib import Path

from mlflow.models import set_model

try:
    import m2f  # noqa: F401
except ModuleNotFoundError:  # uses the wheel that is stored with the model
    sys.path.extend(str(wheel) for wheel in (Path(__file__).parent / "code").glob("m2f-*.whl"))

from m2f.cluster.registry.served_model import ServedModel

set_model(ServedModel())
