"""AP, IoU and iIoU as the Cityscapes benchmark defines them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.readers.cityscapes import CATEGORIES
from m2f.data_pipeline.sample import DecodedSample
from m2f.eval.metrics.base import Numbers, percent
from m2f.eval.metrics.cityscapes_ap import FIRST_INSTANCE, CityscapesAP, CityscapesAPState, CityscapesDetection
from m2f.eval.metrics.cityscapes_iou import CityscapesIoU, CityscapesIoUState
from m2f.eval.metrics.extra.task_metric import ScoredImage, TaskMetric
from m2f.eval.metrics.instance_matching import InstanceDetections
from m2f.eval.metrics.rle import decode_mask
from m2f.eval.metrics.truth import partition
from m2f.model.errors import ConfigError

_CLASSES = {(c.id, c.name) for c in CATEGORIES.categories}
"""Ids and names of the categories that the metrics require."""


class _Cityscapes(TaskMetric):
    """A metric of the Cityscapes benchmark."""

    prefix = "cityscapes_"

    def check_classes(self, categories: CategoryTable) -> None:
        if {(c.id, c.name) for c in categories.categories} != _CLASSES:
            raise ConfigError(
                "evaluation.extra_metrics has 'cityscapes', but the data set does not have the classes of Cityscapes; "
                "remove the metric or evaluate on shards of Cityscapes"
            )


class CityscapesInstance(_Cityscapes):
    """AP and AP50 of instances."""

    key, task, title = "cityscapes_instance", "instance", "Cityscapes instances"
    state_type = CityscapesAPState

    def empty_state(self, categories: CategoryTable) -> CityscapesAPState:
        return CityscapesAPState()

    def update(self, state: CityscapesAPState, image: ScoredImage) -> None:
        assert image.sample is not None
        detections = cityscapes_detections(image.prediction, _category_ids(image))
        state.update(image.image_id, cityscapes_truth(image.sample), detections)

    def values(self, result: CityscapesAP) -> Numbers:
        return {"AP": percent(result.ap), "AP50": percent(result.ap50)}

    def class_values(self, result: CityscapesAP, category: Category, label: int | None) -> Numbers:
        known = result.per_class.get(category.id)
        return {"AP": None if known is None else percent(known[0])}


class CityscapesSemantic(_Cityscapes):
    """IoU and iIoU of classes and of groups of classes."""

    key, task, title = "cityscapes_semantic", "semantic", "Cityscapes semantic"
    state_type = CityscapesIoUState

    def empty_state(self, categories: CategoryTable) -> CityscapesIoUState:
        return CityscapesIoUState()

    def update(self, state: CityscapesIoUState, image: ScoredImage) -> None:
        assert image.sample is not None
        state.update(image.image_id, cityscapes_truth(image.sample), _category_ids(image)[image.prediction])

    def values(self, result: CityscapesIoU) -> Numbers:
        return {
            "IoU": percent(result.iou),
            "iIoU": percent(result.iiou),
            "IoU_categories": percent(result.group_iou),
            "iIoU_categories": percent(result.group_iiou),
        }

    def class_values(self, result: CityscapesIoU, category: Category, label: int | None) -> Numbers:
        iou, iiou = result.per_class.get(category.id), result.per_class_iiou.get(category.id)
        return {"IoU": percent(iou), "iIoU": percent(iiou)}


TASK_METRICS = (CityscapesInstance(), CityscapesSemantic())


def _category_ids(image: ScoredImage) -> np.ndarray:
    """Return the category id of every class."""
    return np.array([c.id for c in image.classes])


def cityscapes_truth(sample: DecodedSample) -> np.ndarray:
    """Return ids [H, W] int32 as in gtFine_instanceIds.png, for a data set with the categories of Cityscapes.

    Ids are label ids for stuff and groups, 1000 times the label id plus a number for instances, and 0 for void. Shards
    contain only the 19 classes, so instances of caravans and trailers are void here. With the original files,
    detections that overlap them are false positives.
    """
    id_map = partition(sample, "Cityscapes metrics", "remove `cityscapes` from evaluation.extra_metrics")
    ids = np.zeros(np.iinfo(id_map.dtype).max + 1, dtype=np.int32)
    number: dict[int, int] = {}
    for segment in sample.annotation.segments:
        category = segment.category_id
        if segment.map != "seg":
            continue
        if segment.is_thing and not segment.is_crowd:
            ids[segment.id] = FIRST_INSTANCE * category + number.setdefault(category, 0)
            number[category] += 1
        else:
            ids[segment.id] = category
    return ids[id_map]


def cityscapes_detections(detections: InstanceDetections, category_ids: np.ndarray) -> Iterator[CityscapesDetection]:
    """Yield detections in the benchmark's form, decoded one at a time; `category_ids` are indexed by class."""
    columns = detections.mask_index, category_ids[detections.labels], detections.scores
    for index, label, score in zip(*(column.tolist() for column in columns), strict=True):
        yield CityscapesDetection(decode_mask(detections.masks[index]), label, score)
