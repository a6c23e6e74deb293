"""Predictions of images in common formats: COCO panoptic, COCO results and label maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.image_file import encode_png
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.instance_matching import InstanceDetections
from m2f.eval.metrics.rle import mask_areas, mask_boxes
from m2f.model.structures import UNLABELLED, PanopticSegment


def panoptic_png(segment_map: np.ndarray) -> bytes:
    """Return a PNG of segment ids [H, W] in COCO's encoding: id = R + 256 G + 65536 B."""
    return encode_png(np.stack([segment_map >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8))


def panoptic_annotation(
    image_id: int, file_name: str, segments: Sequence[PanopticSegment], classes: Sequence[Category]
) -> dict[str, Any]:
    """Return the entry of one image in a COCO panoptic JSON; `classes` are indexed by label."""
    segments_info = [
        {
            "id": segment.id,
            "category_id": classes[segment.label].id,
            "isthing": int(segment.is_thing),
            "area": segment.area,
            "score": segment.score,
        }
        for segment in segments
    ]
    return {"image_id": image_id, "file_name": file_name, "segments_info": segments_info}


def mask_results(image_id: int, detections: InstanceDetections, classes: Sequence[Category]) -> list[dict[str, Any]]:
    """Return detections as COCO results with run-length masks, in the order of the detections.

    Boxes are left out: pycocotools would use the box as the size of a detection, which changes AP by size.
    """
    masks = [{"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")} for mask in detections.masks]
    return [
        {"image_id": image_id, "category_id": classes[label].id, "segmentation": masks[mask], "score": score}
        for mask, label, score in _rows(detections)
    ]


def image_entry(image_id: int, file_name: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return the entry of one image in a COCO file; `size` is height and width in pixels."""
    return {"id": image_id, "file_name": file_name, "height": size[0], "width": size[1]}


def as_annotations(results: Sequence[dict[str, Any]], first_id: int) -> list[dict[str, Any]]:
    """Convert the output of `mask_results` to annotations with boxes and areas for viewers. Ids start at `first_id`."""
    masks = [{**result["segmentation"], "counts": result["segmentation"]["counts"].encode()} for result in results]
    measured = zip(results, mask_boxes(masks).tolist(), mask_areas(masks).tolist(), strict=True)
    return [
        {"id": number, **result, "bbox": box, "area": area, "iscrowd": 0}
        for number, (result, box, area) in enumerate(measured, start=first_id)
    ]


def box_results(image_id: int, detections: InstanceDetections, classes: Sequence[Category]) -> list[dict[str, Any]]:
    """Return detections as COCO results with the smallest boxes around their masks: x, y, width, height in pixels."""
    boxes = mask_boxes(detections.masks).tolist()
    return [
        {"image_id": image_id, "category_id": classes[label].id, "bbox": boxes[mask], "score": score}
        for mask, label, score in _rows(detections)
    ]


def label_png(label_map: np.ndarray, classes: Sequence[Category]) -> bytes:
    """Return a PNG of category ids for labels [H, W], with 8 bits or, for larger ids, 16 bits.

    The servers of ADE20K and Cityscapes require such maps. See `unlabelled_value` for pixels without a label. Raises
    EvaluationError for ids that no PNG can hold.
    """
    ids = [category.id for category in classes]
    if not 0 <= min(ids) <= max(ids) < 2**16 - 1:
        raise EvaluationError(
            f"category ids from {min(ids)} to {max(ids)} do not fit into a 16-bit PNG; leave out the semantic task"
        )
    values = np.array([*ids, unlabelled_value(classes)], dtype=np.uint8 if max(ids) < 255 else np.uint16)
    return encode_png(values[np.where(label_map == UNLABELLED, len(ids), label_map)])


def unlabelled_value(classes: Sequence[Category]) -> int:
    """Return the value of unlabelled pixels in `label_png`: 0, or the largest value if a category has id 0."""
    ids = [category.id for category in classes]
    if 0 not in ids:
        return 0
    return 255 if max(ids) < 255 else 2**16 - 1


def describe_categories(classes: Sequence[Category]) -> list[dict[str, Any]]:
    """Return the categories in the form of COCO files."""
    return [{"id": c.id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)} for c in classes]


def _rows(detections: InstanceDetections) -> list[tuple[int, int, float]]:
    columns = detections.mask_index, detections.labels, detections.scores
    return list(zip(*(column.tolist() for column in columns), strict=True))
