"""AP of the boxes of instances."""

from __future__ import annotations

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.eval.metrics.average_precision import AveragePrecision, AveragePrecisionState
from m2f.eval.metrics.base import Numbers, percent
from m2f.eval.metrics.box_average_precision import detection_boxes, match_boxes, truth_boxes
from m2f.eval.metrics.extra.task_metric import ScoredImage, TaskMetric


class BoxInstance(TaskMetric):
    """AP of the boxes around annotated and detected masks."""

    key, task, title, prefix = "box_instance", "instance", "box", "box_"
    state_type = AveragePrecisionState

    def empty_state(self, categories: CategoryTable) -> AveragePrecisionState:
        return AveragePrecisionState(len(categories.for_task("instance")))

    def update(self, state: AveragePrecisionState, image: ScoredImage) -> None:
        truth, detections = truth_boxes(image.truth), detection_boxes(image.prediction)
        state.add(image.image_id, match_boxes(truth, detections, state.max_dets[-1]))

    def values(self, result: AveragePrecision) -> Numbers:
        return {name: percent(value) for name, value in result.stats.items()}

    def class_values(self, result: AveragePrecision, category: Category, label: int | None) -> Numbers:
        return {"AP": None if label is None else percent(result.per_class[label])}


BOX_INSTANCE = BoxInstance()
TASK_METRICS = (BOX_INSTANCE,)
