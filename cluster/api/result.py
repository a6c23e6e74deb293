"""`Result`: the prediction of a model for one image."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2f.cluster.predict.files import Prediction
from m2f.data_pipeline.categories import Category, Task
from m2f.eval.metrics.average_precision import InstanceDetections
from m2f.eval.metrics.rle import Rle, decode_mask, encode_masks, mask_boxes
from m2f.eval.report.coco_files import mask_results, panoptic_annotation, panoptic_png
from m2f.eval.report.overlays import MIN_SHOWN_SCORE, predicted_instances, predicted_labels, predicted_segments
from m2f.eval.report.panels import draw_overlay
from m2f.model.errors import ConfigError
from m2f.model.structures import PanopticResult, SemanticResult


@dataclass(frozen=True, eq=False)
class Result:
    """Prediction of a model for one image, with N objects: segments, detections, or the classes of a label map.

    Masks are stored compactly, so that many results fit into memory: run lengths for detections, and mostly one byte
    per pixel for maps. `masks`, `panoptic` and `semantic` decode them.
    """

    source: str
    """Path or URL of the image. An image given as pixels is named by its position, such as `image 3` for the fourth."""
    size: tuple[int, int]
    """Height and width of the image in pixels; all masks and maps have this size."""
    task: Task
    """Task of the prediction: "panoptic", "instance" or "semantic"."""
    names: tuple[str, ...]
    """Names of the model's classes, by label."""
    labels: np.ndarray
    """[N] int64 labels, from 0. Detections are sorted by descending score, classes of a label map by label."""
    scores: np.ndarray
    """[N] float64 scores from 0 to 1; NaN for the classes of a label map, which have no scores."""
    _prediction: Prediction
    """The prediction on the CPU; the dtype of its map is that of `_compact`."""
    _classes: tuple[Category, ...]
    _read: Callable[[], np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_names(self) -> list[str]:
        """Class name of every object."""
        return [self.names[label] for label in self.labels]

    @property
    def image(self) -> np.ndarray:
        """Pixels of the image, [H, W, 3] uint8 RGB, as a new array for every call.

        A file is read again. Raises DataError if it no longer exists.
        """
        return self._read()

    @cached_property
    def masks(self) -> np.ndarray:
        """[N, H, W] bool masks. Masks of detections may overlap; masks of segments and classes never do."""
        decoded = np.zeros((len(self), *self.size), dtype=bool)
        for position, mask in enumerate(self._masks):
            decoded[position] = decode_mask(mask)
        return decoded

    @cached_property
    def boxes(self) -> np.ndarray:
        """[N, 4] float64 tight boxes around the masks: x1, y1, x2, y2 in pixels.

        Pixel (x, y) covers x to x + 1, so x2 - x1 is the width. The box of an empty mask is all zeros.
        """
        boxes = mask_boxes(self._masks)
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    @property
    def panoptic(self) -> np.ndarray:
        """[H, W] int32 segment map: 0 is void, i + 1 is the segment of `labels[i]`.

        Raises ConfigError if the task is not "panoptic".
        """
        if not isinstance(self._prediction, PanopticResult):
            raise ConfigError(
                f"this result has no segment map, because its task is {self.task}; use predict(..., task='panoptic') "
                "with a model trained for panoptic segmentation"
            )
        return self._prediction.segment_map.numpy().astype(np.int32)

    @property
    def semantic(self) -> np.ndarray:
        """[H, W] int64 label map; pixels without a label are -1.

        For a semantic result, this is the map of the model. For a panoptic result, each pixel has the class of its
        segment. Raises ConfigError for instance results, because several instances may cover a pixel.
        """
        if isinstance(self._prediction, SemanticResult):
            return self._prediction.label_map.numpy().astype(np.int64)
        if isinstance(self._prediction, PanopticResult):
            return np.array([-1, *self.labels], dtype=np.int64)[self._prediction.segment_map.numpy()]
        raise ConfigError(
            "this result has no label map, because its task is instance; use predict(..., task='semantic') with a "
            "model trained for panoptic or semantic segmentation"
        )

    def overlay(self, min_score: float = MIN_SHOWN_SCORE) -> Image.Image:
        """Draw the objects on the image, tinted, outlined and named; return a PIL image of the same size.

        Only detections with a score of at least `min_score` are drawn, the highest score on top. `min_score` does not
        apply to other tasks. Raises DataError if the image file no longer exists.
        """
        prediction = self._prediction
        if isinstance(prediction, InstanceDetections):
            overlay = predicted_instances(prediction, self.size, min_score)
        elif isinstance(prediction, SemanticResult):
            overlay = predicted_labels(self.semantic, len(self.names))
        else:
            labels, scores = (
                {s.id: value(s) for s in prediction.segments} for value in (lambda s: s.label, lambda s: s.score)
            )
            overlay = predicted_segments("prediction", self.panoptic, labels, scores)
        return Image.fromarray(draw_overlay(self.image, overlay, self._classes))

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """Return one COCO result per object: image_id, category_id of the data set, segmentation (RLE) and score.

        Classes of a label map have no score. `json.dumps` and pycocotools' `loadRes` accept the entries.
        """
        results = mask_results(int(image_id), self._detections, self._classes)
        if isinstance(self._prediction, SemanticResult):
            return [{name: value for name, value in entry.items() if name != "score"} for entry in results]
        return results

    def to_coco_panoptic(self, image_id: int = 1, file_name: str = "1.png") -> tuple[dict[str, Any], bytes]:
        """Return the entry for `annotations` of a COCO panoptic JSON, and the bytes of the PNG file that it names.

        Raises ConfigError if the task is not "panoptic".
        """
        png = panoptic_png(self.panoptic)
        assert isinstance(self._prediction, PanopticResult)
        return panoptic_annotation(int(image_id), file_name, self._prediction.segments, self._classes), png

    def to_supervision(self) -> Any:
        """Return `supervision.Detections` with boxes, masks, labels, scores and `data["class_name"]`.

        Raises ConfigError if the package supervision is not installed.
        """
        try:
            detections = import_module("supervision").Detections
        except ModuleNotFoundError as error:
            if error.name != "supervision":
                raise
            raise ConfigError("to_supervision() needs the package supervision: pip install supervision") from error
        names = np.array(self.class_names, dtype=str)
        return detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": names},
        )

    def _repr_png_(self) -> bytes:
        """Return the overlay as PNG bytes, which notebooks display."""
        file = io.BytesIO()
        self.overlay().save(file, "PNG")
        return file.getvalue()

    def __repr__(self) -> str:
        names = ", ".join(self.class_names[:5]) + (", ..." if len(self) > 5 else "")
        return f"Result({self.source!r}, {self.task}, {self.size[1]} x {self.size[0]} pixels, {len(self)}: {names})"

    @cached_property
    def _masks(self) -> tuple[Rle, ...]:
        prediction = self._prediction
        if isinstance(prediction, InstanceDetections):
            return tuple(prediction.masks[i] for i in prediction.mask_index.tolist())
        if isinstance(prediction, SemanticResult):
            return encode_masks(prediction.label_map.numpy() == label for label in self.labels)
        return encode_masks(prediction.segment_map.numpy() == segment.id for segment in prediction.segments)

    @property
    def _detections(self) -> InstanceDetections:
        if isinstance(self._prediction, InstanceDetections):
            return self._prediction
        return InstanceDetections(self._masks, np.arange(len(self)), self.labels, self.scores)


def _compact(ids: Tensor) -> Tensor:
    """Return a map of labels or segments (at least -1) on the CPU, in the smallest signed integers that hold it."""
    highest = int(ids.max())
    dtype = next(kind for kind in (torch.int8, torch.int16, torch.int64) if highest <= torch.iinfo(kind).max)
    return ids.to(dtype).cpu()


def make_result(
    prediction: Prediction,
    classes: tuple[Category, ...],
    *,
    source: str,
    size: tuple[int, int],
    read: Callable[[], np.ndarray],
) -> Result:
    """Create a `Result` from a prediction and move its maps to the CPU. `read` returns the pixels of the image."""
    task: Task
    if isinstance(prediction, PanopticResult):
        task = "panoptic"
        prediction = replace(prediction, segment_map=_compact(prediction.segment_map))
        labels = np.array([segment.label for segment in prediction.segments], dtype=np.int64)
        scores = np.array([segment.score for segment in prediction.segments], dtype=np.float64)
    elif isinstance(prediction, SemanticResult):
        task = "semantic"
        prediction = SemanticResult(_compact(prediction.label_map))
        present = np.unique(prediction.label_map.numpy())
        labels = present[present >= 0].astype(np.int64)
        scores = np.full(len(labels), np.nan)
    else:
        task, labels, scores = "instance", prediction.labels, prediction.scores
    return Result(
        source=source,
        size=size,
        task=task,
        names=tuple(category.name for category in classes),
        labels=labels,
        scores=scores,
        _prediction=prediction,
        _classes=classes,
        _read=read,
    )
