"""Open a model with its weights and classes, from a run, a recipe, a weight file or a Hugging Face folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m2f.cluster.evaluation.weights import model_classes, model_with_weights
from m2f.cluster.predict.choose_checkpoint import ChosenWeights, choose_checkpoint, open_recipe, recipe_of
from m2f.cluster.predict.sources import resolve_source
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.identity import model_identity
from m2f.cluster.recipe.load import dump_recipe, parse_recipe
from m2f.cluster.recipe.paths import with_absolute_paths
from m2f.data_pipeline.categories import TASKS, Category, Task, distinct_color
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.label_space import LabelSpace
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.eval.report.coco_files import describe_categories
from m2f.model.config import ModelConfig, PostprocessConfig
from m2f.model.errors import ConfigError, WeightsError
from m2f.model.export.hugging_face import HuggingFaceModel, is_hugging_face_folder, read_hugging_face_config
from m2f.model.segmenter import Segmenter
from m2f.model.weights.files import count_classes
from m2f.trainer.checkpoint.identity import METADATA_KEY, ModelIdentity
from m2f.trainer.checkpoint.weights import fetched_weights, read_identity, weights_url

LOGGER = logging.getLogger(__name__)

_WEIGHT_SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model with everything that prediction and export need."""

    model: Segmenter
    """The network, in evaluation mode."""
    config: ModelConfig
    task: Task
    """Task that the model was trained for."""
    classes: tuple[Category, ...]
    """Classes of the model, by label."""
    evaluation: EvaluationConfig
    """Settings for inference, such as image sizes, test-time augmentation, precision and threads."""
    weights: str
    """Path or URL from which the weights were loaded."""
    recipe: str = ""
    """Recipe (YAML) of the model; empty if it is not known."""

    @property
    def identity(self) -> ModelIdentity:
        """Identity of the model, which every export stores."""
        return model_identity(LabelSpace(self.task, self.classes), self.config, self.evaluation, self.recipe)

    def notes(self) -> dict[str, Any]:
        """Return metadata that Hugging Face's format has no field for. `open_trained` reads it back."""
        categories = describe_categories(self.classes)
        return {"task": self.task, "categories": categories, METADATA_KEY: self.identity.to_json()}


def open_trained(
    source: str, overrides: Sequence[str], checkpoint: str | None, device: str | None = None
) -> TrainedModel:
    """Open the model that an argument of the command line names.

    Args:
        source: a recipe, a run or checkpoint folder (local or URL), or a weight file that contains a recipe. It may
            also be a local Hugging Face folder, or a model of the hub or of a registry.
        overrides: settings of the recipe to change, as `section.key=value`.
        checkpoint: see `choose_checkpoint`.
        device: see `model_with_weights`.

    Raises:
        ConfigError: the source is none of these, or the run has no such checkpoint.
        DataError: the number of classes cannot be determined from the weights, the training data or the recipe.
        WeightsError: the weights cannot be read, or belong to a different model.
        EvaluationError: the weights do not cover the whole model.
        CheckpointError: the weights differ from the manifest of their checkpoint.
    """
    source = resolve_source(source)
    folder = Path(source)
    if is_hugging_face_folder(folder):
        if overrides or checkpoint is not None:
            raise ConfigError(
                f"{source} is a Hugging Face folder, so settings and --checkpoint have no effect; remove them"
            )
        return _open_hugging_face(folder, device)
    if folder.suffix in _WEIGHT_SUFFIXES:
        return _open_weights(source, overrides, checkpoint, device)
    config, url = open_recipe(source, overrides)
    chosen = url if checkpoint is None else resolve_source(checkpoint)
    weights = choose_checkpoint(config, Storage(config.storage), chosen)
    return _open_run(recipe_of(weights, source, overrides, config), weights, device)


def _open_weights(source: str, overrides: Sequence[str], checkpoint: str | None, device: str | None) -> TrainedModel:
    """Open a weight file that contains the recipe of its model.

    Raises ConfigError for other weight files, and if `checkpoint` is also given.
    """
    if checkpoint is not None:
        raise ConfigError(
            f"{source} is a weight file, which cannot be combined with --checkpoint {checkpoint}; omit --checkpoint, "
            f"or give the recipe of the model instead of {source}"
        )
    identity = read_identity(source, Storage()) if "://" in source or os.path.isfile(source) else None
    if identity is None or not identity.recipe:
        raise ConfigError(f"{source} is only a weight file; give the recipe of its model, and --checkpoint {source}")
    path = source if "://" in source else str(Path(source).resolve())
    config = with_absolute_paths(parse_recipe(identity.recipe, overrides, source=source))
    return _open_run(config, ChosenWeights(path, None), device)


def _open_run(config: RunConfig, weights: ChosenWeights, device: str | None) -> TrainedModel:
    storage = Storage(config.storage)
    url = weights_url(weights.url, storage)
    classes = model_classes(config, url, storage) or _numbered_classes(config, url, storage)
    model_config = replace(config.model, num_classes=len(classes))
    return TrainedModel(
        model=model_with_weights(model_config, url, storage, device=device),
        config=model_config,
        task=config.data.task,
        classes=classes,
        evaluation=config.evaluation,
        weights=weights.url,
        recipe=dump_recipe(config),
    )


def _numbered_classes(config: RunConfig, weights: str, storage: Storage) -> tuple[Category, ...]:
    """Return classes named by number, for weights and data without class names.

    Their number is `model.num_classes`, else that of the class head in the weights. Raises DataError if there is
    neither.
    """
    number = config.model.num_classes
    if number is None:
        with fetched_weights(weights, storage) as path:
            number = count_classes(path)
    if number is None:
        raise DataError(
            f"{config.datasets[config.data.train[0].dataset].shards} has no manifest, so the number of classes is "
            "unknown; write the shards of the training data, or set model.num_classes"
        )
    return _classes_from_names([f"class {label}" for label in range(number)])


def _open_hugging_face(folder: Path, device: str | None) -> TrainedModel:
    described = read_hugging_face_config(folder)
    task = described.notes.get("task", "panoptic")
    if task not in TASKS:
        raise WeightsError(f"{folder}: the task is {task!r}; it must be one of {', '.join(TASKS)}")
    identity = read_identity(str(folder), Storage())
    recipe = "" if identity is None else identity.recipe
    postprocess, evaluation = _stored_settings(recipe, folder)
    return TrainedModel(
        model=model_with_weights(described.config, str(folder), Storage(), device=device),
        config=replace(described.config, postprocess=postprocess),
        task=task,
        classes=_described_classes(described, folder),
        evaluation=replace(
            evaluation,
            shortest_edge=described.shortest_edge or evaluation.shortest_edge,
            max_size=described.max_size or evaluation.max_size,
        ),
        weights=str(folder),
        recipe=recipe,
    )


def _described_classes(described: HuggingFaceModel, folder: Path) -> tuple[Category, ...]:
    """Return the classes in the notes of m2f, or classes with names only if there are no notes.

    If the model's class names differ from the notes, the notes are ignored with a warning.
    """
    stored = tuple(_category(entry) for entry in described.notes.get("categories") or ())
    if tuple(category.name for category in stored) == described.labels:
        return stored
    if stored:
        LOGGER.warning(
            f"{folder}: the classes in `id2label` of config.json are not those in `m2f`, so another program has "
            "trained or changed the model. The names in `id2label` are used, all classes count as things, and the "
            "stored recipe is not used."
        )
    return _classes_from_names(described.labels)


def _stored_settings(recipe: str, folder: Path) -> tuple[PostprocessConfig, EvaluationConfig]:
    """Return the settings of a stored recipe that config.json has no field for.

    Return the defaults if the recipe is empty. If this version of m2f cannot read it, also log a warning.
    """
    if recipe:
        try:
            config = parse_recipe(recipe, source=str(folder))
        except ConfigError as error:
            LOGGER.warning(
                f"{folder}: the stored recipe cannot be read, so model.postprocess and evaluation have their default "
                f"values; use the version of m2f that exported this folder. {error}"
            )
        else:
            return config.model.postprocess, config.evaluation
    return PostprocessConfig(), EvaluationConfig()


def _category(entry: dict[str, Any]) -> Category:
    red, green, blue = entry["color"]
    return Category(entry["id"], entry["name"], bool(entry["isthing"]), (red, green, blue))


def _classes_from_names(names: Sequence[str]) -> tuple[Category, ...]:
    """Return classes for which only names are known. All become things, so that no segments are merged."""
    return tuple(Category(label, name, True, distinct_color(label)) for label, name in enumerate(names))
