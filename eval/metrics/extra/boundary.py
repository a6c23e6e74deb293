"""Boundary PQ and Boundary AP (Cheng et al., CVPR 2021)."""

from __future__ import annotations

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.eval.metrics.average_precision import AveragePrecision, AveragePrecisionState
from m2f.eval.metrics.base import Numbers, percent
from m2f.eval.metrics.boundary import BOUNDARY_RATIO
from m2f.eval.metrics.extra.task_metric import ScoredImage, TaskMetric
from m2f.eval.metrics.panoptic_quality import PanopticQuality, PanopticQualityState


class BoundaryPanoptic(TaskMetric):
    """PQ in which the overlap of two segments is the smaller of their mask IoU and boundary IoU."""

    key, task, title, prefix = "boundary_panoptic", "panoptic", "boundary", "boundary_"
    state_type = PanopticQualityState

    def empty_state(self, categories: CategoryTable) -> PanopticQualityState:
        return PanopticQualityState([c.is_thing for c in categories.for_task("panoptic")], BOUNDARY_RATIO)

    def update(self, state: PanopticQualityState, image: ScoredImage) -> None:
        state.update(image.image_id, image.truth, image.prediction)

    def values(self, result: PanopticQuality) -> Numbers:
        numbers: Numbers = {}
        for suffix, quality in (("", result.all), ("_th", result.things), ("_st", result.stuff)):
            shares = (None, None, None) if quality is None else (quality.pq, quality.sq, quality.rq)
            numbers |= {f"{n}{suffix}": percent(share) for n, share in zip(("PQ", "SQ", "RQ"), shares, strict=True)}
        return numbers

    def class_values(self, result: PanopticQuality, category: Category, label: int | None) -> Numbers:
        if label is None:
            return {"PQ": None}
        quality = result.per_class[label]
        return {"PQ": 100 * quality.pq if quality.occurs else None}


class BoundaryInstance(TaskMetric):
    """AP in which the overlap of two masks is the smaller of their mask IoU and boundary IoU."""

    key, task, title, prefix = "boundary_instance", "instance", "boundary mask", "boundary_"
    state_type = AveragePrecisionState

    def empty_state(self, categories: CategoryTable) -> AveragePrecisionState:
        return AveragePrecisionState(len(categories.for_task("instance")), boundary_ratio=BOUNDARY_RATIO)

    def update(self, state: AveragePrecisionState, image: ScoredImage) -> None:
        state.update(image.image_id, image.truth, image.prediction)

    def values(self, result: AveragePrecision) -> Numbers:
        return {name: percent(value) for name, value in result.stats.items()}

    def class_values(self, result: AveragePrecision, category: Category, label: int | None) -> Numbers:
        return {"AP": None if label is None else percent(result.per_class[label])}


TASK_METRICS = (BoundaryPanoptic(), BoundaryInstance())
