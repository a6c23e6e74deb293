"""Files that `m2f predict` writes into its folder.

overlays/NAME.png                           the image beside its prediction
panoptic.json, panoptic/NAME.png            COCO panoptic format
instances.json, boxes.json                  COCO results, with masks and with boxes
labels.json                                 masks and boxes as a COCO annotation file, for viewers
labels/NAME.png                             label maps of category ids
images.json, categories.json                images and categories by id
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, assert_never

import numpy as np

from m2f.cluster.predict.inputs import ImageInput
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.errors import DataError
from m2f.eval.metrics.average_precision import InstanceDetections
from m2f.eval.report.coco_files import (
    as_annotations,
    box_results,
    describe_categories,
    label_png,
    mask_results,
    panoptic_annotation,
    panoptic_png,
)
from m2f.eval.report.overlays import MIN_SHOWN_SCORE, predicted_instances, predicted_labels, predicted_segments
from m2f.eval.report.panels import Overlay, render_panel
from m2f.model.structures import PanopticResult, SemanticResult

Prediction = PanopticResult | InstanceDetections | SemanticResult

_PICTURE_FOLDERS = ("overlays", "panoptic", "labels")
"""Subfolders with one picture per image."""


def exclude_written_pictures(output: Path, urls: Sequence[str]) -> tuple[str, ...]:
    """Return the paths and URLs without the pictures that an earlier `m2f predict` wrote into its folder `output`.

    They would otherwise be predicted if the folder is inside that of the images. Raises DataError if nothing remains.
    """
    written = {(output / name).resolve() for name in _PICTURE_FOLDERS}
    left_out = {folder for folder in {Path(url).parent for url in urls} if folder.resolve() in written}
    images = tuple(url for url in urls if Path(url).parent not in left_out)
    if not images:
        raise DataError(f"all images are pictures that were predicted into {output}; give others, or another --output")
    return images


class JsonList:
    """Writes a list into a JSON file, entry by entry, so that memory does not limit its length."""

    def __init__(self, path: Path, opening: str = "[") -> None:
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._file.write(opening)
        self._separator = "\n"

    def extend(self, entries: Sequence[dict[str, Any]]) -> None:
        """Append entries to the list."""
        for entry in entries:
            self._file.write(self._separator + json.dumps(entry))
            self._separator = ",\n"

    def close(self, closing: str = "]\n") -> None:
        """End the list with `closing` and close the file."""
        self._file.write("\n" + closing)
        self._file.close()


class PredictionFolder:
    """Context manager that writes predictions one by one. If the block fails, the files are incomplete."""

    def __init__(self, folder: Path, classes: Sequence[Category], *, pictures: bool, shown_score: float | None) -> None:
        self._folder, self._classes, self._pictures = folder, classes, pictures
        self._shown_score = MIN_SHOWN_SCORE if shown_score is None else shown_score
        self._lists: dict[str, JsonList] = {}
        self._labels_file: JsonList | None = None
        self._num_labels = 0
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self.num_empty = 0
        """Number of images without any segment, or without any detection whose score is high enough to be drawn."""
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for entries in self._lists.values():
            entries.close()
        categories = describe_categories(self._classes)
        if self._labels_file is not None:
            head = json.dumps({"images": self._images, "categories": categories})
            self._labels_file.close(f"], {head[1:]}\n")
        if kind is None:
            self._write_json("images.json", self._images)
            self._write_json("categories.json", categories)
            if self._annotations:
                content = {"images": self._images, "annotations": self._annotations, "categories": categories}
                self._write_json("panoptic.json", content)

    def add(self, image: ImageInput, pixels: np.ndarray, prediction: Prediction) -> None:
        """Write the prediction for an image. `pixels` is [H, W, 3] uint8 RGB."""
        height, width = pixels.shape[:2]
        self._images.append(
            {"id": image.id, "file_name": image.url, "height": height, "width": width, "name": image.name}
        )
        match prediction:
            case PanopticResult():
                overlay = self._add_segments(image, prediction)
                self.num_empty += not prediction.segments
            case InstanceDetections():
                self._add_instances(mask_results(image.id, prediction, self._classes))
                self._list("boxes").extend(box_results(image.id, prediction, self._classes))
                overlay = predicted_instances(prediction, (height, width), self._shown_score)
                self.num_empty += not bool((prediction.scores >= self._shown_score).any())
            case SemanticResult():
                labels = prediction.label_map.numpy()
                self._write(f"labels/{image.name}.png", label_png(labels, self._classes))
                overlay = predicted_labels(labels, len(self._classes))
            case _:
                assert_never(prediction)
        if self._pictures:
            self._write(f"overlays/{image.name}.png", render_panel(pixels, image.name, [overlay], self._classes))

    def _add_instances(self, results: list[dict[str, Any]]) -> None:
        self._list("instances").extend(results)
        if self._labels_file is None:
            self._labels_file = JsonList(self._folder / "labels.json", '{"annotations": [')
        self._labels_file.extend(as_annotations(results, self._num_labels + 1))
        self._num_labels += len(results)

    def _add_segments(self, image: ImageInput, result: PanopticResult) -> Overlay:
        name, id_map = f"{image.name}.png", result.segment_map.numpy()
        self._write(f"panoptic/{name}", panoptic_png(id_map))
        self._annotations.append(panoptic_annotation(image.id, name, result.segments, self._classes))
        labels, scores = ({s.id: value(s) for s in result.segments} for value in (lambda s: s.label, lambda s: s.score))
        return predicted_segments("prediction", id_map, labels, scores)

    def _list(self, name: str) -> JsonList:
        if name not in self._lists:
            self._lists[name] = JsonList(self._folder / f"{name}.json")
        return self._lists[name]

    def _write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    def _write_json(self, name: str, content: object) -> None:
        (self._folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
