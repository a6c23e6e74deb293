"""`m2f.load`, and the class `Model` that it returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import yaml
from PIL import Image

from m2f.cluster.api.images import Channels, GivenImage, ImageLike, given_images, is_single, loaded_images
from m2f.cluster.api.result import Result, make_result
from m2f.cluster.api.thresholds import THRESHOLDS_FILE, Thresholds, accepted
from m2f.cluster.predict.inputs import read_image
from m2f.cluster.predict.predict import Predictor, batches_by_shape, prepare_model
from m2f.cluster.predict.sources import REGISTERED
from m2f.cluster.predict.trained_model import TrainedModel, open_trained
from m2f.cluster.recipe.load import plain_value
from m2f.data_pipeline.categories import TASKS, Task
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import check_test_time
from m2f.eval.inference.evaluator import EVALUABLE_TASKS
from m2f.model.errors import ConfigError

_END_OF_SCALAR = "...\n"
"""Document end marker that PyYAML writes after a bare scalar."""


class Model:
    """A trained model, as returned by `m2f.load`."""

    def __init__(self, trained: TrainedModel, thresholds: Thresholds | None = None) -> None:
        self._trained = trained
        self._min_scores = None if thresholds is None else thresholds.min_scores(trained.classes)
        prepare_model(trained)

    @property
    def task(self) -> Task:
        """Task that the model was trained for: "panoptic", "instance" or "semantic"."""
        return self._trained.task

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that the model can predict. The first one is the default of `predict`.

        A panoptic model can predict all three, unless its `evaluation.test_time` supports only "semantic".
        """
        return predictable_tasks(self._trained)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return tuple(category.name for category in self._trained.classes)

    @property
    def is_thing(self) -> tuple[bool, ...]:
        """Whether each class is a thing (has instances) or stuff, by label."""
        return tuple(category.is_thing for category in self._trained.classes)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Category id of each class in the data set, by label. COCO results contain these ids."""
        return tuple(category.id for category in self._trained.classes)

    @property
    def device(self) -> torch.device:
        """Device that holds the weights."""
        return next(self._trained.model.parameters()).device

    @property
    def module(self) -> torch.nn.Module:
        """The network as a `torch.nn.Module` in evaluation mode."""
        return self._trained.model

    @property
    def source(self) -> str:
        """Path or URL of the checkpoint folder or weight file that was loaded."""
        return self._trained.weights

    # A string may name one image or a folder; types cannot distinguish the two.
    @overload
    def predict(
        self,
        images: str | os.PathLike[str],
        *,
        task: Task | None = None,
        min_score: float | None = None,
        batch: int = 1,
        channels: Channels = "rgb",
        thresholds: bool = True,
    ) -> Any: ...

    @overload
    def predict(
        self,
        images: Image.Image | np.ndarray | torch.Tensor,
        *,
        task: Task | None = None,
        min_score: float | None = None,
        batch: int = 1,
        channels: Channels = "rgb",
        thresholds: bool = True,
    ) -> Result: ...

    @overload
    def predict(
        self,
        images: Sequence[ImageLike],
        *,
        task: Task | None = None,
        min_score: float | None = None,
        batch: int = 1,
        channels: Channels = "rgb",
        thresholds: bool = True,
    ) -> list[Result]: ...

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        task: Task | None = None,
        min_score: float | None = None,
        batch: int = 1,
        channels: Channels = "rgb",
        thresholds: bool = True,
    ) -> Result | list[Result]:
        """Predict one image or several images. Except for `thresholds`, the results equal those of `m2f predict`.

        Args:
            images: one image, a list of images, a folder, or a pattern such as `photos/*.jpg`. An image is a PIL image,
                or a path or `s3://` URL of a JPEG, PNG, TIFF, BMP or WebP file. It may also be a uint8 array [H, W, 3]
                (or [H, W] if grey) from 0 to 255, or a tensor [3, H, W] (or [1, H, W]). Tensors are uint8 from 0 to
                255 or floating point from 0 to 1. Images may have any size: the model resizes them as its recipe says.
            task: "panoptic", "instance" or "semantic". None means the first of `tasks`: the task that the model was
                trained for, if its test-time settings support it.
            min_score: lowest score, from 0 to 1, of segments, detections and labelled pixels. None means the recipe's
                threshold for segments, and no threshold for detections and pixels.
            batch: maximum number of images of the same shape in one forward pass, at least 1. Results for different
                values differ only by rounding.
            channels: channel order of arrays and tensors, "rgb" or "bgr" (as OpenCV reads images). It does not apply
                to files and PIL images.
            thresholds: whether to leave out detections below the thresholds of their classes. Only models that
                `m2f register --precision` registered have thresholds. Set False to compute metrics.

        Returns:
            A `Result` for one image, else a list of results in the order of the images. Masks and maps have the size
            of the image.

        Raises:
            ConfigError: the model does not support the task, or an argument is out of range.
            DataError: an image cannot be read, or has an unsupported shape or value range. The message names it.
            EvaluationError: the model's output for an image is not finite.
        """
        task = self._check(task, min_score, batch)
        storage = Storage()
        given = given_images(images, channels, storage)
        predictor = Predictor(self._trained, task, min_score)
        min_scores = self._min_scores if thresholds else None
        results: dict[int, Result] = {}
        for batch_images in batches_by_shape(loaded_images(given, storage), predictor, batch):
            for loaded, prediction in zip(batch_images, predictor.predict(batch_images), strict=True):
                image_id = loaded.image.id
                results[image_id] = make_result(
                    accepted(prediction, min_scores),
                    self._trained.classes,
                    source=loaded.image.url,
                    size=(loaded.pixels.shape[0], loaded.pixels.shape[1]),
                    read=partial(_pixels, given[image_id - 1]),
                )
        ordered = [results[image.input.id] for image in given]
        return ordered[0] if is_single(images) else ordered

    def _check(self, task: Task | None, min_score: float | None, batch: int) -> Task:
        if task is not None and task not in TASKS:
            raise ConfigError(f"task is {task!r}; it must be one of {', '.join(self.tasks)}")
        possible = EVALUABLE_TASKS[self.task]
        if task is not None and task not in possible:
            raise ConfigError(
                f"task is {task!r}, but this model was trained for {self.task!r}: it supports {', '.join(possible)}"
            )
        if min_score is not None and not 0 <= min_score <= 1:
            raise ConfigError(f"min_score is {min_score}; it must be from 0 to 1")
        if batch < 1:
            raise ConfigError(f"batch is {batch}; it must be at least 1")
        return task or next(iter(self.tasks), self.task)

    def __repr__(self) -> str:
        return f"Model({self.source!r}, {self.task}, {len(self.names)} classes, on {self.device})"


def predictable_tasks(trained: TrainedModel) -> tuple[Task, ...]:
    """Return the tasks that a model can predict with its test-time settings, the default first; empty if none."""
    tasks: list[Task] = []
    for task in EVALUABLE_TASKS[trained.task]:
        with suppress(ConfigError):
            check_test_time(trained.evaluation.test_time, [task], "evaluation")
            tasks.append(task)
    return tuple(tasks)


def load(
    source: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | None = None,
    checkpoint: str | int | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> Model:
    """Load a trained model.

    Args:
        source: a run folder, checkpoint folder or weight file (local or `s3://`), or a local Hugging Face folder. It
            may also be a model of the Hugging Face hub (`hub:OWNER/NAME`) or of an MLflow registry
            (`models:/NAME@ALIAS`). A recipe stands for the run that it describes.
        recipe: recipe for weights that do not contain one, such as official `.pkl` files. It is a path or the name of
            a recipe in the package, such as `coco_panoptic_r50`.
        checkpoint: checkpoint of a run: "last" (the default), "best", or a step.
        settings: settings of the recipe to change, by dotted name, such as `{"evaluation.shortest_edge": 640}`.
            Dictionaries are merged into the recipe; lists, and sections with `kind`, replace the recipe's value.
        device: "auto" (the GPU if there is one) or a torch device such as "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: the source is none of these, the run has no such checkpoint, or the device is not available.
        WeightsError: the weights cannot be read, or belong to a different model.
        EvaluationError: the weights do not cover the whole model.
        DataError: neither the weights nor the recipe name the classes.
        StorageError: the storage cannot be read.
        CheckpointError: the weights differ from the manifest of their checkpoint.
        ThresholdError: the thresholds of a registered model cannot be read.
    """
    source_url = os.fspath(source)
    overrides = to_overrides(settings)
    torch_device = resolved_device(device)
    if recipe is None:
        selected = None if checkpoint is None else str(checkpoint)
        trained = open_trained(source_url, overrides, selected, torch_device)
    elif checkpoint is not None:
        raise ConfigError(f"checkpoint is {checkpoint!r}, but recipe is also set; give the run folder without recipe")
    else:
        trained = open_trained(os.fspath(recipe), overrides, source_url, torch_device)
    return Model(trained, _thresholds(trained) if source_url.startswith(REGISTERED) else None)


def _thresholds(trained: TrainedModel) -> Thresholds | None:
    """Return the thresholds of a registered model, which are beside its checkpoint folder; None if it has none."""
    path = Path(trained.weights).with_name(THRESHOLDS_FILE)
    return Thresholds.from_json(path.read_bytes(), str(path)) if path.is_file() else None


def to_overrides(settings: Mapping[str, Any] | None) -> list[str]:
    """Convert settings to overrides `section.key=value`, as `m2f` accepts them on the command line.

    Dictionaries are merged into the recipe: each of their settings becomes a separate override. Lists, and dictionaries
    with `kind`, replace the recipe's value. So do dictionaries with a `.` or `=` in a name, such as that of a Ray
    resource, because an override cannot name their entries.

    Raises ConfigError, which names the setting, for a value that is not a dictionary, list, string, path, number or
    None.
    """
    dumped = [(name, yaml.safe_dump(value, default_flow_style=True)) for name, value in _flattened(settings or {})]
    return [f"{name}={text.removesuffix(_END_OF_SCALAR)}" for name, text in dumped]


def _flattened(settings: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every setting that `to_overrides` changes."""
    for key, value in settings.items():
        name = f"{parent}{key}"
        is_merged = isinstance(value, Mapping) and "kind" not in value
        if is_merged and not any(letter in str(inner) for inner in value for letter in ".="):
            yield from _flattened(value, f"{name}.")
        else:
            yield name, plain_value(value, name)


def resolved_device(device: str) -> str | None:
    """Return the torch device name, or None for "auto". Raises ConfigError if this machine lacks the device."""
    if device == "auto":
        return None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises one or the other if it has no CUDA
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device is {device!r}, which cannot be used here ({reason}); give 'auto' or 'cpu'"
        ) from error
    return device


def _pixels(given: GivenImage) -> np.ndarray:
    if given.pixels is not None:
        return given.pixels.copy()  # because callers may draw on it
    return read_image(given.input, Storage(), DatasetConfig.max_pixels)
