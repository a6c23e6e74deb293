"""Weights of a checkpoint or from elsewhere: where they lie, whether they are whole, what they mean, and the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.same_model import require_same_model
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.errors import EvaluationError
from m2f.model.config import ModelConfig
from m2f.model.export.hugging_face import is_hugging_face_folder, read_hugging_face_config
from m2f.model.mask2former import Mask2Former, build_model
from m2f.model.weights.load import load_weights
from m2f.trainer.checkpoint.folder import AVERAGE, MANIFEST, WEIGHTS, file_entry, read_manifest
from m2f.trainer.checkpoint.identity import IDENTITY, METADATA_KEY, ModelIdentity, read_metadata
from m2f.trainer.errors import CheckpointError

_SUFFIXES = ("safetensors", "pt", "pth", "pkl", "bin")


def weights_url(checkpoint: str, storage: Storage) -> str:
    """Weights of a checkpoint folder, the moving average where it has one; other files and folders as they are."""
    is_file = checkpoint.rsplit("/", 1)[-1].rpartition(".")[2] in _SUFFIXES
    if is_file:
        return checkpoint
    found = (url for name in (AVERAGE, WEIGHTS) if storage.exists(url := join(checkpoint, name)))
    return next(found, checkpoint)


@contextmanager
def fetched_weights(weights: str, storage: Storage) -> Iterator[Path]:
    """A local path of weights from a URL, a file or a local folder.

    Those of a checkpoint are compared with its manifest: raises CheckpointError naming file and checkpoint where a bit
    differs.
    """
    with tempfile.TemporaryDirectory(prefix="m2f-weights-") as folder:
        path = Path(weights)
        if "://" in weights:
            path = Path(folder) / weights.rpartition("/")[2]
            storage.get_file(weights, path)
        _check(weights, path, storage)
        yield path


def read_identity(weights: str, storage: Storage) -> ModelIdentity | None:
    """What weights say of themselves: a checkpoint's folder, else the file or the Hugging Face folder. None without.

    Raises CheckpointError where it is there and damaged.
    """
    folder, _, name = weights.rpartition("/")
    if name in (AVERAGE, WEIGHTS) and storage.exists(url := join(folder, IDENTITY)):
        with fetched_weights(url, storage) as path:
            return ModelIdentity.from_json(path.read_bytes(), url)
    if "://" not in weights and Path(weights).is_dir():
        if not is_hugging_face_folder(weights):
            return None
        text = read_hugging_face_config(weights).notes.get(METADATA_KEY)
        return None if text is None else ModelIdentity.from_json(text, f"{weights}/config.json")
    if "://" not in weights:
        return read_metadata(weights)
    with fetched_weights(weights, storage) as path:
        return read_metadata(path)


def model_classes(config: RunConfig, weights: str, storage: Storage) -> tuple[Category, ...] | None:
    """Classes, by label, of weights for a recipe: their own, else those of the training data; None where neither is.

    Raises ConfigError where the weights are of another task or model than the recipe's.
    """
    identity = read_identity(weights, storage)
    if identity is not None:
        require_same_model(identity, config, weights)
        return identity.label_spaces[0].classes
    try:
        manifest = Manifest.load(config.datasets[config.data.train[0].dataset].shards, storage)
    except DataError:
        return None
    return manifest.categories.for_task(config.data.task)


def model_with_weights(config: ModelConfig, weights: str, storage: Storage) -> Mask2Former:
    """The model with weights from a URL, a file or a local folder, for inference, on the GPU where there is one.

    Raises:
        EvaluationError: the weights are not those of the whole model.
        WeightsError: they are of another model.
        CheckpointError: they differ from the manifest of their checkpoint.
    """
    model = build_model(config, pretrained_backbone=False)
    with fetched_weights(weights, storage) as path:
        report = load_weights(model, path)
    if not report.complete:
        raise EvaluationError(
            f"{weights} does not hold the whole model of the recipe with {config.num_classes} classes: {report}"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _check(weights: str, path: Path, storage: Storage) -> None:
    """Compare a file of a checkpoint with the manifest beside it, where there is one."""
    folder, _, name = weights.rpartition("/")
    if name not in (AVERAGE, WEIGHTS, IDENTITY) or not storage.exists(join(folder, MANIFEST)):
        return
    stated = read_manifest(storage, folder).files.get(name)
    if stated is not None and file_entry(path) != stated:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: the checksum of {name} differs from the manifest's; copy it again, or "
            "use another checkpoint"
        )
