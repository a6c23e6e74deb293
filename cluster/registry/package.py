"""The folder of a registered model: weights, identity, recipe, thresholds, our wheel and exact requirements.

MLmodel, requirements.txt, ...        MLflow's own
model_code.py                         what loads the model
code/m2f-VERSION-py3-none-any.whl     this program
artifacts/checkpoint/                 a checkpoint folder with the weights alone
artifacts/thresholds.json             thresholds by class, where they were chosen
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

from m2f.cluster.predict.trained_model import TrainedModel
from m2f.cluster.registry.thresholds import Thresholds
from m2f.cluster.registry.wheel import exact_requirements, this_project, write_wheel
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.inference.evaluator import EVALUABLE_TASKS
from m2f.eval.report.coco_files import describe_categories
from m2f.trainer.checkpoint.folder import MANIFEST, RECIPE, CheckpointManifest, fetch, file_entry, read_manifest
from m2f.trainer.checkpoint.identity import IDENTITY
from m2f.trainer.checkpoint.weights import weights_url

EXAMPLE_SIZE = (96, 128)


@dataclass(frozen=True, kw_only=True)
class PackageContent:
    """What a registered model is made of."""

    checkpoint: str
    """Folder or URL."""
    trained: TrainedModel
    """Opened from it."""
    thresholds: Thresholds | None
    allowed_hosts: Sequence[str]


def package_digest(
    checkpoint: str, thresholds: Thresholds | None, allowed_hosts: Sequence[str], storage: Storage
) -> str:
    """SHA-256 of weights, thresholds, hosts and code: equal contents are registered without a second upload."""
    name = weights_url(checkpoint, storage).rpartition("/")[2]
    weights = read_manifest(storage, checkpoint).files[name].sha256
    with ScratchFolder("wheel") as folder:
        code = hashlib.sha256(write_wheel(folder, this_project()).read_bytes()).hexdigest()
    parts = [weights, "" if thresholds is None else thresholds.to_json(), sorted(allowed_hosts), code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_package(content: PackageContent, folder: Path, storage: Storage, described: Model) -> Path:
    """Make the folder of a model within an empty folder on this machine.

    `described` names the logged model that it is for. Raises CheckpointError for weights that differ from their
    manifest, StorageError where the storage does not answer.
    """
    project = this_project()
    wheel = write_wheel(folder, project)
    artifacts = {"checkpoint": str(_copy_checkpoint(content, folder / "checkpoint", storage))}
    if content.thresholds is not None:
        path = folder / "thresholds.json"
        path.write_text(content.thresholds.to_json(), encoding="utf-8")
        artifacts["thresholds"] = str(path)
    package = folder / "package"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow about type hints, its own among them
        from mlflow.pyfunc import save_model

        save_model(
            str(package),
            python_model=_staged_code(folder),
            artifacts=artifacts,
            code_paths=[str(wheel)],
            pip_requirements=[*exact_requirements(project), f"code/{wheel.name}"],
            signature=_signature(content.trained),
            input_example={"image": [base64.b64encode(example_jpeg()).decode("ascii")]},
            model_config={"allow_url": list(content.allowed_hosts)},
            metadata={"task": content.trained.task, "categories": describe_categories(content.trained.classes)},
            mlflow_model=described,
        )
    return package


def example_jpeg() -> bytes:
    """A small picture of a disk before a sky, as an example of what is sent."""
    height, width = EXAMPLE_SIZE
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([120 + rows, 160 + rows // 2, np.full_like(rows, 220)], axis=-1).clip(0, 255).astype(np.uint8)
    picture[(rows - height // 2) ** 2 + (columns - width // 3) ** 2 < (height // 4) ** 2] = (200, 60, 40)
    done, jpeg = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]))
    assert done
    return jpeg.tobytes()


def _copy_checkpoint(content: PackageContent, folder: Path, storage: Storage) -> Path:
    """Weights, identity and recipe of a checkpoint, under a manifest of just these."""
    manifest = read_manifest(storage, content.checkpoint)
    weights = weights_url(content.checkpoint, storage).rpartition("/")[2]
    folder.mkdir()
    present = [name for name in (weights, IDENTITY, RECIPE) if name in manifest.files]
    fetch(storage, content.checkpoint, present, manifest, folder)
    if IDENTITY not in present:  # of version 0.1, which asked the training data for the classes
        (folder / IDENTITY).write_text(content.trained.identity.to_json(), encoding="utf-8")
    if RECIPE not in present:
        (folder / RECIPE).write_bytes(storage.get(join(content.checkpoint, RECIPE)))
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    reduced = CheckpointManifest(manifest.step, manifest.world_size, manifest.zero_stage, files)
    (folder / MANIFEST).write_bytes(reduced.to_json())
    return folder


def _staged_code(folder: Path) -> str:
    """The code beside the other parts: MLflow notes the path that it is given, which is nobody's business."""
    return str(shutil.copy2(Path(__file__).with_name("model_code.py"), folder / "model_code.py"))


def _signature(trained: TrainedModel) -> ModelSignature:
    """Any form of an image goes into the column; what is accepted is checked where it is read."""
    keys: dict[Any, str] = {"panoptic": "panoptic", "instance": "instances", "semantic": "semantic"}
    outputs = ["height", "width", *(keys[task] for task in EVALUABLE_TASKS[trained.task])]
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
