"""A registered model as an MLflow `PythonModel`, which takes images and returns predictions in COCO formats."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from m2f.cluster.api.result import Result, make_result
from m2f.cluster.api.thresholds import Thresholds
from m2f.cluster.predict.inputs import number_images
from m2f.cluster.predict.predict import LoadedImage, Predictor, prepare_model
from m2f.cluster.predict.trained_model import open_trained
from m2f.cluster.registry.images import flatten_images, read_pixels
from m2f.cluster.registry.responses import instances_response, panoptic_response, semantic_response, served_tasks
from m2f.data_pipeline.categories import Task
from m2f.model.errors import ConfigError, UserError

IMAGE = "image"
"""Name of the input column."""
CHECKPOINT = "checkpoint"
"""Name of the artifact with the checkpoint folder."""
THRESHOLDS = "thresholds"
"""Name of the artifact with thresholds by class, which exists if the model was registered with them."""
ALLOWED_HOSTS = "allow_url"
"""Key of MLflow's model_config: hosts from which images are downloaded."""


class ServedModel(PythonModel):
    """MLflow model that returns one record per image; docs/registry.md describes the record."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights and thresholds. MLflow calls this once."""
        config: Mapping[str, Any] = context.model_config or {}
        self._allowed = tuple(config.get(ALLOWED_HOSTS) or ())
        self._trained = open_trained(context.artifacts[CHECKPOINT], (), None)
        prepare_model(self._trained)
        # If the model supports no task, predicting its own task raises an error that names the setting.
        self._supported = served_tasks(self._trained) or (self._trained.task,)
        self._class_thresholds: np.ndarray | None = None
        if (path := context.artifacts.get(THRESHOLDS)) is not None:
            thresholds = Thresholds.from_json(Path(path).read_bytes(), path)
            self._class_thresholds = thresholds.min_scores(self._trained.classes)
        self._lock = threading.Lock()  # because a server may call `predict` from several threads

    def predict(  # type: ignore[bad-override] - MLflow annotates its method to return None
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return one record per image of the column `image`.

        `params` may contain `task`, `min_score` (lowest score of instances, from 0 to 1) and `thresholds` (False: no
        thresholds by class). None means the default. Raises MlflowException, which a server returns as status 400, if
        an image cannot be read, the task is not supported or `min_score` is out of range.
        """
        options = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            tasks = self._tasks(str(options.get("task", "")))
            class_thresholds = self._class_thresholds if options.get("thresholds", True) else None
            min_score = float(options.get("min_score", 0.0))
            if not 0 <= min_score <= 1:
                raise ConfigError(f"min_score is {min_score}; it must be from 0 to 1")
            images = flatten_images(model_input[IMAGE])
            return [self._predict_image(image, tasks, class_thresholds, min_score) for image in images]
        except UserError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error

    def _tasks(self, task_name: str) -> tuple[Task, ...]:
        if not task_name:
            return self._supported
        chosen = tuple(task for task in self._supported if task == task_name)
        if not chosen:
            raise ConfigError(f"task is {task_name!r}; this model supports {', '.join(self._supported)}")
        return chosen

    def _predict_image(
        self, value: object, tasks: tuple[Task, ...], class_thresholds: np.ndarray | None, min_score: float
    ) -> dict[str, Any]:
        pixels = read_pixels(value, self._allowed)
        response: dict[str, Any] = {"height": pixels.shape[0], "width": pixels.shape[1]}
        for task, result in self._results(pixels, tasks):
            match task:
                case "panoptic":
                    response["panoptic"] = panoptic_response(result)
                case "instance":
                    response["instances"] = instances_response(result, class_thresholds, min_score)
                case "semantic":
                    response["semantic"] = semantic_response(result, self._trained.classes)
        return response

    def _results(self, pixels: np.ndarray, tasks: Sequence[Task]) -> list[tuple[Task, Result]]:
        """Predict all tasks with one forward pass and return the results by task."""
        (image,) = number_images([IMAGE])
        with self._lock:
            predictor = Predictor(self._trained, tasks[0])
            (found,) = predictor.predict_tasks([LoadedImage(image, pixels)], tasks)
        size = (pixels.shape[0], pixels.shape[1])
        classes = self._trained.classes
        return [
            (task, make_result(predicted, classes, source=IMAGE, size=size, read=lambda: pixels))
            for task, predicted in found.items()
        ]
