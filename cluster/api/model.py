"""`m2f.load` and the model that it gives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, overload

import numpy as np
import torch
import yaml
from PIL import Image

from m2f.cluster.api.images import Channels, GivenImage, ImageLike, given_images, is_single, loaded_images
from m2f.cluster.api.result import Result, make_result
from m2f.cluster.predict.inputs import read_image
from m2f.cluster.predict.predict import Predictor, batches_by_shape, prepare_model
from m2f.cluster.predict.trained_model import TrainedModel, open_trained
from m2f.data_pipeline.categories import TASKS, Task
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.inference.evaluator import EVALUABLE_TASKS
from m2f.model.errors import ConfigError

_END_OF_SCALAR = "...\n"
"""What PyYAML writes behind a value that stands alone."""


class Model:
    """A trained model, made by `m2f.load`."""

    def __init__(self, trained: TrainedModel) -> None:
        self._trained = trained
        prepare_model(trained)

    @property
    def task(self) -> Task:
        """What the model was trained for: "panoptic", "instance" or "semantic"."""
        return self._trained.task

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What it can predict: a panoptic model all three."""
        return EVALUABLE_TASKS[self._trained.task]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return tuple(category.name for category in self._trained.classes)

    @property
    def is_thing(self) -> tuple[bool, ...]:
        """By label: whether the class has instances (thing) or not (stuff)."""
        return tuple(category.is_thing for category in self._trained.classes)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """By label: the id of the class in the data set, as COCO results have it."""
        return tuple(category.id for category in self._trained.classes)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self._trained.model.parameters()).device

    @property
    def module(self) -> torch.nn.Module:
        """The network itself, in evaluation mode."""
        return self._trained.model

    @property
    def source(self) -> str:
        """Checkpoint folder or file that the weights came from."""
        return self._trained.weights

    # A string may name one image or a folder, which a type cannot tell.
    @overload
    def predict(
        self,
        images: str | os.PathLike[str],
        *,
        task: Task | None = None,
        min_score: float | None = None,
        batch: int = 1,
        channels: Channels = "rgb",
    ) -> Result | Any: ...

    @overload
    def predict(
        self,
        images: Image.Image | np.ndarray | torch.Tensor,
        *,
        task: Task | None = None,
        min_score: float | None = None,
        batch: int = 1,
        channels: Channels = "rgb",
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
    ) -> list[Result]: ...

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        task: Task | None = None,
        min_score: float | None = None,
        batch: int = 1,
        channels: Channels = "rgb",
    ) -> Result | list[Result]:
        """What the model finds in one image, or in each of several; equal to what `m2f predict` writes.

        Args:
            images: one image gives a `Result`; a list, a folder or a pattern such as `photos/*.jpg` a list of them. An
                image is a path or `s3://` URL of a JPEG, PNG, TIFF, BMP or WebP file; a PIL image; an array uint8
                [H, W, 3] from 0 to 255, or grey [H, W]; or a tensor [3, H, W] or [1, H, W], uint8 from 0 to 255 or
                floats from 0 to 1. Any size: the model resizes as its recipe says, and results have the image's size.
            task: "panoptic", "instance" or "semantic"; None: what the model was trained for.
            min_score: lowest score, from 0 to 1, of segments, detections and labelled pixels; None: the recipe's
                threshold for segments, everything else.
            batch: images of one shape that go through the model together. Results differ by rounding only.
            channels: "rgb", or "bgr" for arrays and tensors that OpenCV read. Files and PIL images know theirs.

        Raises:
            ConfigError: a task that the model cannot do, or a value out of its range.
            DataError: an image that cannot be read or has another shape or range, named.
            EvaluationError: the model's output for an image is not finite.
        """
        task = self._check(task, min_score, batch, channels)
        storage = Storage()
        given = given_images(images, channels, storage)
        predictor = Predictor(self._trained, task, min_score)
        results: dict[int, Result] = {}
        for together in batches_by_shape(loaded_images(given, storage), predictor, batch):
            for loaded, found in zip(together, predictor.predict(together), strict=True):
                number = loaded.image.id
                results[number] = make_result(
                    found,
                    self._trained.classes,
                    source=loaded.image.url,
                    size=(loaded.pixels.shape[0], loaded.pixels.shape[1]),
                    read=partial(_pixels, given[number - 1]),
                )
        ordered = [results[image.input.id] for image in given]
        return ordered[0] if is_single(images) else ordered

    def _check(self, task: Task | None, min_score: float | None, batch: int, channels: str) -> Task:
        if task is not None and task not in TASKS:
            raise ConfigError(f"task is {task!r}; it must be one of {', '.join(self.tasks)}")
        if task is not None and task not in self.tasks:
            raise ConfigError(
                f"task is {task!r}, but this model was trained for {self.task!r}: it can do {', '.join(self.tasks)}"
            )
        if min_score is not None and not 0 <= min_score <= 1:
            raise ConfigError(f"min_score is {min_score}; it must be from 0 to 1")
        if batch < 1:
            raise ConfigError(f"batch is {batch}; it must be at least 1")
        if channels not in ("rgb", "bgr"):
            raise ConfigError(f"channels is {channels!r}; it must be 'rgb' or 'bgr'")
        return task or self.task

    def __repr__(self) -> str:
        return f"Model({self.source!r}, {self.task}, {len(self.names)} classes, on {self.device})"


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
        source: a run folder, a checkpoint folder, a file of weights or a Hugging Face folder, here or at `s3://`; a
            model of the hub, `hub:OWNER/NAME`, or of an MLflow registry, `models:/NAME@ALIAS`; or a recipe, which
            stands for the run that it describes.
        recipe: for weights that do not hold their own recipe, such as official `.pkl` files: the path of a recipe, or
            the name of one that the package brings, such as `coco_panoptic_r50`.
        checkpoint: of a run: "last" (the default), "best", or a step.
        settings: settings of the recipe to change, by dotted name, such as `{"evaluation.shortest_edge": 640}`.
        device: "auto" takes the GPU if there is one; else "cpu", "cuda", "cuda:1".

    Raises:
        ConfigError: the source is none of these, the run has no such checkpoint, or the device is not there.
        WeightsError: the weights cannot be read, or are of another model.
        DataError: neither the weights nor the recipe say which classes there are.
        StorageError: a store cannot be read.
        CheckpointError: the weights differ from the manifest of their checkpoint.
    """
    place = os.fspath(source)
    overrides = overrides_of(settings)
    where = resolved_device(device)
    if recipe is None:
        chosen = None if checkpoint is None else str(checkpoint)
        return Model(open_trained(place, overrides, chosen, where))
    if checkpoint is not None:
        raise ConfigError(f"checkpoint is {checkpoint!r} beside a recipe; give the run's folder without recipe")
    return Model(open_trained(os.fspath(recipe), overrides, place, where))


def overrides_of(settings: Mapping[str, Any] | None) -> list[str]:
    """Settings as `m2f` takes them on the command line."""
    try:
        dumped = {name: yaml.safe_dump(value, default_flow_style=True) for name, value in (settings or {}).items()}
    except yaml.YAMLError as error:
        raise ConfigError(
            f"settings: only dictionaries, lists, texts, numbers and None can be set ({error})"
        ) from error
    return [f"{name}={text.removesuffix(_END_OF_SCALAR)}" for name, text in dumped.items()]


def resolved_device(device: str) -> str | None:
    """A name for torch; None: the GPU if there is one. Raises ConfigError for one that this machine lacks."""
    if device == "auto":
        return None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either where it has no CUDA
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device is {device!r}, which cannot be used here ({reason}); give 'auto' or 'cpu'"
        ) from error
    return device


def _pixels(given: GivenImage) -> np.ndarray:
    if given.pixels is not None:
        return given.pixels
    return read_image(given.input, Storage(), DatasetConfig.max_pixels)
