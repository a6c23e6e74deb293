"""Load the model of a checkpoint for inference, and determine its classes."""

from __future__ import annotations

import torch

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.same_model import require_same_model
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.errors import EvaluationError
from m2f.model.attention_backends import select_attention_backends
from m2f.model.config import ModelConfig
from m2f.model.segmenter import Segmenter
from m2f.model.weights.build import build_with_weights
from m2f.trainer.checkpoint.weights import fetched_weights, read_identity


def model_classes(config: RunConfig, weights: str, storage: Storage) -> tuple[Category, ...] | None:
    """Return the classes of the weights by label: those stored with them, else those of the recipe's training data.

    Return None if both are unknown. Raises ConfigError if the weights belong to a different task or model than the
    recipe.
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


def model_with_weights(config: ModelConfig, weights: str, storage: Storage, *, device: str | None = None) -> Segmenter:
    """Load the model with weights from a URL, a file or a local folder, in evaluation mode.

    The backbone is added to the base weights if `model.weights_are_deltas` is set and m2f did not write the weights.
    `device` is a torch device; None means the GPU if there is one, else the CPU.

    Raises:
        EvaluationError: the weights do not cover the whole model.
        WeightsError: the weights belong to a different model.
        CheckpointError: the weights differ from the manifest of their checkpoint.
    """
    # Weights that m2f wrote or exported have an identity and are whole, also if training started from deltas.
    deltas = config.weights_are_deltas and read_identity(weights, storage) is None
    with fetched_weights(weights, storage) as path:
        model, report = build_with_weights(config, path, deltas=deltas)
    if not report.complete:
        raise EvaluationError(
            f"{weights} does not contain all weights of the recipe's model with {config.num_classes} classes: {report}"
        )
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    select_attention_backends(torch_device)
    return model.eval().to(torch_device)
