"""Recall of instances, regardless of class."""

from __future__ import annotations

from m2f.data_pipeline.categories import CategoryTable
from m2f.eval.metrics.average_precision import AveragePrecision, AveragePrecisionState
from m2f.eval.metrics.base import Numbers, percent
from m2f.eval.metrics.extra.task_metric import ScoredImage, TaskMetric
from m2f.eval.metrics.instance_matching import class_agnostic_detections, class_agnostic_truth


class ClassAgnostic(TaskMetric):
    """COCO's recall values, with all instances as one class."""

    key, task, title, prefix = "class_agnostic", "instance", "class-agnostic", "class_agnostic_"
    state_type = AveragePrecisionState

    def empty_state(self, categories: CategoryTable) -> AveragePrecisionState:
        return AveragePrecisionState(1)

    def update(self, state: AveragePrecisionState, image: ScoredImage) -> None:
        state.update(image.image_id, class_agnostic_truth(image.truth), class_agnostic_detections(image.prediction))

    def values(self, result: AveragePrecision) -> Numbers:
        return {name: percent(value) for name, value in result.stats.items() if name.startswith("AR")}


TASK_METRICS = (ClassAgnostic(),)
