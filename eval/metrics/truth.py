"""Ground truth for each metric, from the annotation of a sample.

Panoptic and semantic truth come from the partition `seg`. Instances come from the layers `inst` if the data set has
them (COCO instances overlap and have their own areas and crowds), else from the things of `seg`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from m2f.data_pipeline.sample import DecodedSample, Segment
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.instance_matching import InstanceTruth
from m2f.eval.metrics.mean_iou import ignore_label
from m2f.eval.metrics.panoptic_quality import PanopticTruth, TruthSegment
from m2f.eval.metrics.rle import encode_masks

_INSTANCE_TASK = "evaluate only the task `instance`"
"""Remedy if a sample has instances but no map."""


def panoptic_truth(sample: DecodedSample, labels: Mapping[int, int]) -> PanopticTruth:
    """Return the partition with all of its segments, including crowds, in the order of the annotation.

    `labels` maps category ids to classes. The pixels of a segment are counted if its stated area is 0, as in shards of
    earlier versions. Raises EvaluationError naming the image if the sample has no partition.
    """
    id_map = partition(sample, "panoptic quality", _INSTANCE_TASK)
    segments = {
        s.id: TruthSegment(_label(sample, s, labels), s.area or float(np.count_nonzero(id_map == s.id)), s.is_crowd)
        for s in sample.annotation.segments
        if s.map == "seg"
    }
    return PanopticTruth(id_map, segments)


def instance_truth(sample: DecodedSample, labels: Mapping[int, int]) -> InstanceTruth:
    """Return the annotated instances, including crowds. `labels` maps ids of thing categories to classes."""
    annotation = sample.annotation
    if annotation.inst is not None:
        layers = annotation.inst
        segments = [s for s in annotation.segments if s.map == "inst"]
    else:
        layers = partition(sample, "instances")[None]
        segments = [s for s in annotation.segments if s.map == "seg" and s.is_thing]
    return InstanceTruth(
        masks=encode_masks(layers[s.layer] == s.id for s in segments),
        labels=np.array([_label(sample, s, labels) for s in segments], dtype=np.int64),
        areas=np.array([s.area for s in segments], dtype=np.float64),
        is_crowd=np.array([s.is_crowd for s in segments], dtype=bool),
    )


def semantic_truth(sample: DecodedSample, labels: Mapping[int, int]) -> np.ndarray:
    """Return the label map [H, W] of the partition. Crowds keep their class; void is `ignore_label(len(labels))`.

    The map is uint8, or uint16 for 256 or more classes. The Mask2Former paper evaluates the mIoU of panoptic models on
    the same map.
    """
    id_map = partition(sample, "semantic labels", _INSTANCE_TASK)
    ignore = ignore_label(len(labels))
    segments = [s for s in sample.annotation.segments if s.map == "seg"]
    label_of_id = np.full(np.iinfo(id_map.dtype).max + 1, ignore, dtype=np.uint8 if ignore == 255 else np.uint16)
    for segment in segments:
        label_of_id[segment.id] = _label(sample, segment, labels)
    return label_of_id[id_map]


def partition(sample: DecodedSample, purpose: str, alternative: str | None = None) -> np.ndarray:
    """Return `seg`. Raises EvaluationError if it is missing; the message suggests `alternative` as a remedy."""
    if sample.annotation.seg is None:
        remedies = [alternative] if alternative is not None else []
        remedies.append("shard the data set together with its maps")
        raise EvaluationError(
            f"image {sample.image_id} ({sample.source}) has no panoptic or semantic map, so {purpose} cannot be "
            f"evaluated; {', or '.join(remedies)}"
        )
    return sample.annotation.seg


def _label(sample: DecodedSample, segment: Segment, labels: Mapping[int, int]) -> int:
    label = labels.get(segment.category_id)
    if label is None:
        raise EvaluationError(
            f"image {sample.image_id} ({sample.source}): segment {segment.id} has category {segment.category_id}, "
            "which is not an evaluated class; the classes of data set and model differ"
        )
    return label
