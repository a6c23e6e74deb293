"""Contribution of every image to PQ, AP and mIoU, as one parquet file beside the results.

The first columns are for users: the id of the image, its name if known, and its own PQ, AP and mIoU in per cent, null
if undefined. The list columns after them are match records, which `m2f compare` resamples for confidence intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.storage.ragged_table import Ragged, read_table_bytes, table_bytes
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import AveragePrecisionState
from m2f.eval.metrics.base import MetricState
from m2f.eval.metrics.instance_matching import IOU_THRESHOLDS, rank_in_image_and_class
from m2f.eval.metrics.mean_iou import MeanIoUState, split_cells
from m2f.eval.metrics.panoptic_quality import PanopticQualityState
from m2f.eval.metrics.resampled import (
    InstanceImages,
    PanopticImages,
    SemanticImages,
    average_precisions,
    image_precisions,
    mean_ious,
    panoptic_qualities,
)

IMAGES_FILE = "images.parquet"
RESAMPLED_METRICS = ("PQ", "AP", "AP50", "AP75", "mIoU")
"""Metrics that can be computed from image records for a draw of images."""
_THRESHOLDS = {"AP": range(len(IOU_THRESHOLDS)), "AP50": (0,), "AP75": (5,)}
"""Positions in IOU_THRESHOLDS over which each of these metrics is averaged."""
_IMAGES_PER_CHUNK = 256
"""Number of images whose own values are computed at once."""
_ImagesT = TypeVar("_ImagesT", PanopticImages, InstanceImages, SemanticImages)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRecords:
    """Records of all images of one evaluated set; None for a task that was not evaluated."""

    image_ids: np.ndarray
    """[I] int64, in ascending order."""
    panoptic: PanopticImages | None = None
    instance: InstanceImages | None = None
    semantic: SemanticImages | None = None

    def resampled(self, weights: np.ndarray, metrics: Collection[str] = ("PQ", "AP", "mIoU")) -> dict[str, np.ndarray]:
        """Return metrics [draws] in per cent for draws with weights [images, draws]; NaN if undefined.

        `metrics` are some of RESAMPLED_METRICS. Those of a task without records are missing in the result.
        """
        values: dict[str, np.ndarray] = {}
        if self.panoptic is not None and "PQ" in metrics:
            values["PQ"] = 100 * panoptic_qualities(self.panoptic, weights)
        for name, thresholds in _THRESHOLDS.items():
            if self.instance is not None and name in metrics:
                values[name] = 100 * average_precisions(self.instance, weights, thresholds)
        if self.semantic is not None and "mIoU" in metrics:
            values["mIoU"] = 100 * mean_ious(self.semantic, weights)
        return values

    def per_image_values(self) -> dict[str, np.ndarray]:
        """Return PQ, AP and mIoU [I] of every single image in per cent; NaN if undefined."""
        values: dict[str, np.ndarray] = {}
        if self.panoptic is not None:
            values["PQ"] = 100 * _per_image(self.panoptic, panoptic_qualities)
        if self.instance is not None:
            values["AP"] = 100 * image_precisions(self.instance)
        if self.semantic is not None:
            values["mIoU"] = 100 * _per_image(self.semantic, mean_ious)
        return values


def image_records(
    panoptic: PanopticQualityState | None,
    instance: AveragePrecisionState | None,
    semantic: MeanIoUState | None,
    *,
    classes: Collection[int] | None = None,
    limit: int | None = None,
) -> ImageRecords:
    """Return the records of complete states, which must all hold the same images; None for a task without a state.

    mIoU is over `classes`, and AP counts at most `limit` detections per image and class; None: all.
    """
    states = [state for state in (panoptic, instance, semantic) if state is not None]
    return ImageRecords(
        image_ids=np.array(states[0].image_ids if states else [], dtype=np.int64),
        panoptic=None if panoptic is None else _from_state(PanopticImages, panoptic),
        instance=None if instance is None else _instance_images(instance, limit),
        semantic=None if semantic is None else _semantic_images(semantic, classes),
    )


def image_table(records: ImageRecords, names: Mapping[int, str] | None = None) -> bytes:
    """Return the parquet file. `names` adds a column with the name of every image, by image id."""
    columns: dict[str, np.ndarray | Ragged] = {"image_id": records.image_ids}
    if names is not None:
        columns["name"] = np.array([names[i] for i in records.image_ids.tolist()], dtype=object)
    columns |= records.per_image_values()
    for task in ("panoptic", "instance", "semantic"):
        if (images := getattr(records, task)) is not None:
            columns |= {f"{task}_{field.name}": getattr(images, field.name) for field in fields(images)}
    return table_bytes(columns)


def read_image_records(payload: bytes) -> ImageRecords:
    """Parse the output of `image_table`. Raises EvaluationError for any other content."""
    try:
        columns = read_table_bytes(payload)
        return ImageRecords(
            image_ids=columns["image_id"],  # type: ignore[arg-type]
            panoptic=_from_columns(PanopticImages, "panoptic", columns),
            instance=_from_columns(InstanceImages, "instance", columns),
            semantic=_from_columns(SemanticImages, "semantic", columns),
        )
    except (DataError, KeyError) as error:
        raise EvaluationError(f"not a file of image records: {error}") from error


def _from_columns(kind: type[_ImagesT], task: str, columns: Mapping[str, np.ndarray | Ragged]) -> _ImagesT | None:
    """Return the records of a task; None if the file has no columns of this task."""
    names = [field.name for field in fields(kind)]
    if f"{task}_{names[0]}" not in columns:
        return None
    image_columns = {name: columns[f"{task}_{name}"] for name in names}
    if not all(isinstance(column, Ragged) for column in image_columns.values()):
        raise DataError(f"the columns of {task} are not lists")
    return kind(**image_columns)  # type: ignore[arg-type]


def _from_state(kind: type[_ImagesT], state: MetricState) -> _ImagesT:
    """Return the columns of a state's records. Of columns by area range, only the first range (all areas) is kept."""
    columns = {}
    for field in fields(kind):
        values = state.rows(field.name)
        columns[field.name] = Ragged(values if values.ndim == 1 else values[:, 0], state.row_counts(field.name))
    return kind(**columns)


def _instance_images(state: AveragePrecisionState, limit: int | None) -> InstanceImages:
    images = _from_state(InstanceImages, state)
    if limit is None:
        return images
    kept = rank_in_image_and_class(images.label.values, images.label.counts) < limit
    counts = np.bincount(images.label.rows[kept], minlength=len(images.label.counts))
    names = ("label", "score", "matched", "ignored")
    return replace(images, **{name: Ragged(getattr(images, name).values[kept], counts) for name in names})


def _semantic_images(state: MeanIoUState, classes: Collection[int] | None) -> SemanticImages:
    """Return the pixels by pair of classes. Classes that are not in `classes` become -1, which no mean includes."""
    truth, predicted = split_cells(state.rows("cell"), state.num_classes)
    if classes is not None:
        truth, predicted = (np.where(np.isin(side, list(classes)), side, -1) for side in (truth, predicted))
    counts = state.row_counts("cell")
    return SemanticImages(*(Ragged(values, counts) for values in (truth, predicted, state.rows("pixels"))))


def _per_image(images: _ImagesT, metric: Callable[[_ImagesT, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return a metric of every single image: [I]."""
    columns = {field.name: getattr(images, field.name) for field in fields(images)}
    count = len(next(iter(columns.values())).counts)
    results = []
    for first in range(0, count, _IMAGES_PER_CHUNK):
        chunk = {name: _rows(column, first, first + _IMAGES_PER_CHUNK) for name, column in columns.items()}
        results.append(metric(type(images)(**chunk), np.eye(min(_IMAGES_PER_CHUNK, count - first))))
    return np.concatenate(results) if results else np.zeros(0)


def _rows(column: Ragged, first: int, end: int) -> Ragged:
    """Return the part of a column for the images from `first` to `end`, `end` excluded."""
    start = int(column.counts[:first].sum())
    counts = column.counts[first:end]
    return Ragged(column.values[start : start + int(counts.sum())], counts)
