"""Build the folder of a registered model: weights, identity, recipe, thresholds, m2f's wheel and exact requirements.

MLmodel, requirements.txt, ...        files of MLflow
model_code.py                         code that loads the model
code/m2f-VERSION-py3-none-any.whl     m2f itself
artifacts/checkpoint/                 a checkpoint folder without optimizer state
artifacts/thresholds.json             thresholds by class, if they were chosen
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mlflow.models import Model
from mlflow.models.signature import ModelSignature
from mlflow.types.schema import AnyType, ColSpec, ParamSchema, ParamSpec, Schema

from m2f.cluster.api.thresholds import THRESHOLDS_FILE, Thresholds
from m2f.cluster.predict.trained_model import TrainedModel
from m2f.cluster.project import read_project
from m2f.cluster.registry.responses import served_tasks
from m2f.cluster.registry.wheel import exact_requirements, write_wheel
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.report.coco_files import describe_categories
from m2f.trainer.checkpoint.folder import MANIFEST, RECIPE, CheckpointManifest, fetch, file_entry, read_manifest
from m2f.trainer.checkpoint.identity import IDENTITY
from m2f.trainer.checkpoint.weights import weights_url

EXAMPLE_SIZE = (96, 128)
"""Height and width in pixels of the input example."""


@dataclass(frozen=True, kw_only=True)
class PackageContent:
    """Content of a registered model."""

    checkpoint: str
    """Path or URL of the checkpoint folder."""
    trained: TrainedModel
    """The model, opened from the checkpoint."""
    thresholds: Thresholds | None
    """Thresholds by class; None to register without thresholds."""
    allowed_hosts: Sequence[str]
    """Hosts from which the served model downloads images."""


def package_digest(
    checkpoint: str, thresholds: Thresholds | None, allowed_hosts: Sequence[str], storage: Storage
) -> str:
    """Return the SHA-256 of weights, thresholds, hosts and code. It identifies content that is already uploaded."""
    name = weights_url(checkpoint, storage).rpartition("/")[2]
    weights = read_manifest(storage, checkpoint).files[name].sha256
    with ScratchFolder("wheel") as folder:
        code = hashlib.sha256(write_wheel(folder, read_project()).read_bytes()).hexdigest()
    parts = [weights, "" if thresholds is None else thresholds.to_json(), sorted(allowed_hosts), code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_package(content: PackageContent, folder: Path, storage: Storage, mlflow_model: Model) -> Path:
    """Build the folder of a model inside an empty local folder, and return its path.

    `mlflow_model` is the MLflow metadata of the logged model. Raises CheckpointError if the weights differ from their
    manifest, and StorageError if the storage cannot be read.
    """
    project = read_project()
    wheel = write_wheel(folder, project)
    artifacts = {"checkpoint": str(_copy_checkpoint(content, folder / "checkpoint", storage))}
    if content.thresholds is not None:
        path = folder / THRESHOLDS_FILE
        path.write_text(content.thresholds.to_json(), encoding="utf-8")
        artifacts["thresholds"] = str(path)
    package = folder / "package"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns about type hints, including its own
        from mlflow.pyfunc import save_model

        save_model(
            str(package),
            python_model=_copy_loader(folder),
            artifacts=artifacts,
            code_paths=[str(wheel)],
            pip_requirements=[*exact_requirements(project), f"code/{wheel.name}"],
            signature=_signature(content.trained),
            input_example={"image": [base64.b64encode(example_jpeg()).decode("ascii")]},
            model_config={"allow_url": list(content.allowed_hosts)},
            metadata={"task": content.trained.task, "categories": describe_categories(content.trained.classes)},
            mlflow_model=mlflow_model,
        )
    return package


def example_jpeg() -> bytes:
    """Return a small JPEG of a disk in front of a sky, as the input example of a model."""
    height, width = EXAMPLE_SIZE
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([120 + rows, 160 + rows // 2, np.full_like(rows, 220)], axis=-1).clip(0, 255).astype(np.uint8)
    picture[(rows - height // 2) ** 2 + (columns - width // 3) ** 2 < (height // 4) ** 2] = (200, 60, 40)
    is_encoded, jpeg = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]))
    assert is_encoded
    return jpeg.tobytes()


def _copy_checkpoint(content: PackageContent, folder: Path, storage: Storage) -> Path:
    """Copy weights, identity and recipe of a checkpoint to a new folder, and write a manifest of these files."""
    manifest = read_manifest(storage, content.checkpoint)
    weights = weights_url(content.checkpoint, storage).rpartition("/")[2]
    folder.mkdir()
    present = [name for name in manifest.files if name in (weights, manifest.frozen, IDENTITY, RECIPE)]
    fetch(storage, content.checkpoint, present, manifest, folder)
    if IDENTITY not in present:  # version 0.1 read the classes from the training data instead
        (folder / IDENTITY).write_text(content.trained.identity.to_json(), encoding="utf-8")
    if RECIPE not in present:
        (folder / RECIPE).write_bytes(storage.get(join(content.checkpoint, RECIPE)))
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    copied_manifest = CheckpointManifest(manifest.step, manifest.world_size, manifest.zero_stage, files)
    (folder / MANIFEST).write_bytes(copied_manifest.to_json())
    return folder


def _copy_loader(folder: Path) -> str:
    """Copy the loader to the temporary folder, because MLflow records its path, which would reveal the install path."""
    return str(shutil.copy2(Path(__file__).with_name("model_code.py"), folder / "model_code.py"))


def _signature(trained: TrainedModel) -> ModelSignature:
    """Return the signature of the model. The image column accepts any type, because `read_pixels` checks the values."""
    keys: dict[Any, str] = {"panoptic": "panoptic", "instance": "instances", "semantic": "semantic"}
    outputs = ["height", "width", *(keys[task] for task in served_tasks(trained))]
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "image")]),
        outputs=Schema([ColSpec("long" if name in ("height", "width") else AnyType(), name) for name in outputs]),
        params=ParamSchema(
            [
                ParamSpec("task", "string", ""),
                ParamSpec("min_score", "double", 0.0),
                ParamSpec("thresholds", "boolean", True),
            ]
        ),
    )
