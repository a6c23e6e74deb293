"""A registered model as MLflow's generic Python model: images in, COCO's formats out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from m2f.cluster.api.model import load
from m2f.cluster.registry.answers import instances_answer, panoptic_answer, semantic_answer
from m2f.cluster.registry.images import images_of, read_pixels
from m2f.cluster.registry.thresholds import Thresholds
from m2f.data_pipeline.categories import Category, Task
from m2f.model.errors import ConfigError, UserError

IMAGE = "image"
"""Column of what is sent."""
CHECKPOINT = "checkpoint"
"""Artifact: a checkpoint folder."""
THRESHOLDS = "thresholds"
"""Artifact: thresholds by class, where the model was registered with them."""
ALLOWED_HOSTS = "allow_url"
"""Key of MLflow's model_config: hosts from which images are fetched."""


class ServedModel(PythonModel):
    """Answers one record for each image; docs/registry.md has its form."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open weights and thresholds. Called once by MLflow."""
        config: Mapping[str, Any] = context.model_config or {}
        self._allowed = tuple(config.get(ALLOWED_HOSTS) or ())
        self._model = load(context.artifacts[CHECKPOINT])
        rows = zip(self._model.category_ids, self._model.names, self._model.is_thing, strict=True)
        self._classes = tuple(Category(id_, name, thing, (0, 0, 0)) for id_, name, thing in rows)
        self._lowest: np.ndarray | None = None
        if (path := context.artifacts.get(THRESHOLDS)) is not None:
            self._lowest = Thresholds.from_json(Path(path).read_bytes(), path).lowest(self._classes)
        self._lock = threading.Lock()  # a server may call from several threads

    def predict(  # type: ignore[bad-override] - of MLflow's own, which is annotated to return nothing
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One answer per image of the column `image`.

        Raises MlflowException, which a server answers with status 400, for an image that cannot be read.
        """
        options = params or {}
        try:
            tasks = self._tasks(str(options.get("task", "")))
            lowest = self._lowest if options.get("thresholds", True) else None
            min_score = float(options.get("min_score", 0.0))
            return [self._answer(value, tasks, lowest, min_score) for value in images_of(model_input[IMAGE])]
        except UserError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error

    def _tasks(self, wanted: str) -> tuple[Task, ...]:
        possible = self._model.tasks
        if not wanted:
            return possible
        chosen = tuple(task for task in possible if task == wanted)
        if not chosen:
            raise ConfigError(f"task is {wanted!r}; this model answers {', '.join(possible)}")
        return chosen

    def _answer(
        self, value: object, tasks: tuple[Task, ...], lowest: np.ndarray | None, min_score: float
    ) -> dict[str, Any]:
        pixels = read_pixels(value, self._allowed)
        answer: dict[str, Any] = {"height": pixels.shape[0], "width": pixels.shape[1]}
        for task in tasks:
            with self._lock:
                result = self._model.predict(pixels, task=task)
            match task:
                case "panoptic":
                    answer["panoptic"] = panoptic_answer(result)
                case "instance":
                    answer["instances"] = instances_answer(result, lowest, min_score)
                case "semantic":
                    answer["semantic"] = semantic_answer(result, self._classes)
        return answer
