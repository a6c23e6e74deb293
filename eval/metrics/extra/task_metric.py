"""What an extra metric defines for a task: its state, how an image changes the state, and its values in results."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from m2f.data_pipeline.categories import Category, CategoryTable, Task
from m2f.data_pipeline.sample import DecodedSample
from m2f.eval.config import EXTRA_METRICS, ExtraMetric
from m2f.eval.metrics.base import MetricState, Numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredImage:
    """Truth and prediction of one image in one task, as the state of the task gets them."""

    image_id: int
    truth: Any
    """PanopticTruth, InstanceTruth, or label map [H, W] of the semantic task."""
    prediction: Any
    """PanopticPrediction, InstanceDetections, or label map [H, W] of the semantic task."""
    classes: Sequence[Category]
    """Classes of the task by label."""
    sample: DecodedSample | None = None
    """The annotated image; None if truth and prediction come from arrays."""


class TaskMetric(ABC):
    """An extra metric in one task. Its values are in per cent."""

    key: str
    """Name of the state, in messages and in stored states."""
    task: Task
    title: str
    """Title of the table of values."""
    prefix: str
    """Prefix of the names of all values in results."""
    state_type: type[MetricState[Any, Any]]

    def check_classes(self, categories: CategoryTable) -> None:  # noqa: B027 - most metrics apply to all classes
        """Raise ConfigError if the metric does not apply to these classes."""

    @abstractmethod
    def empty_state(self, categories: CategoryTable) -> MetricState[Any, Any]:
        """Return a state without images, of type `state_type`."""

    @abstractmethod
    def update(self, state: Any, image: ScoredImage) -> None:
        """Add one image to a state that `empty_state` made."""

    @abstractmethod
    def values(self, result: Any) -> Numbers:
        """Return the values of a computed state by name, without the prefix."""

    def class_values(self, result: Any, category: Category, label: int | None) -> Numbers:
        """Return the values of one category by name, without the prefix.

        `label` is its class in the metric's task, or None if the task does not have the category.
        """
        return {}


def task_metrics(names: Collection[ExtraMetric] | None = None) -> list[TaskMetric]:
    """Return the named metrics (None: every metric) for all of their tasks, in the order of `EXTRA_METRICS`."""
    modules = [entry.module for name, entry in EXTRA_METRICS.items() if names is None or name in names]
    return [metric for module in modules for metric in importlib.import_module(module).TASK_METRICS]
