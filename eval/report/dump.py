"""The predictions of an evaluation as files that panopticapi, pycocotools and servers read.

Actors store what their calls predicted, in any order and any number of times; then the driver joins it:

panoptic.json, panoptic/KEY.png   COCO panoptic format
instances.json                    COCO results with run-length masks
labels/KEY.png                    label maps of category ids
categories.json                   the categories
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.keys import check_key
from m2f.data_pipeline.sample import DecodedSample
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.metrics.instance_matching import InstanceDetections
from m2f.eval.report.coco_files import describe_categories, label_png, mask_results, panoptic_annotation, panoptic_png
from m2f.model.structures import PanopticResult

_PARTS = "parts"


class ResultDump:
    """Predictions of the images of one call, until they are stored."""

    def __init__(self, categories: CategoryTable) -> None:
        self._categories = categories
        self._files: dict[str, bytes] = {}
        self._entries: dict[str, list[dict[str, Any]]] = {}

    def add_panoptic(self, sample: DecodedSample, result: PanopticResult) -> None:
        """Take the panoptic result of one image."""
        name = _png(sample)
        self._files[f"panoptic/{name}"] = panoptic_png(result.segment_map.cpu().numpy())
        annotation = panoptic_annotation(sample.image_id, name, result.segments, self._categories.for_task("panoptic"))
        self._entries.setdefault("panoptic", []).append(annotation)

    def add_instances(self, sample: DecodedSample, detections: InstanceDetections) -> None:
        """Take the detections of one image, labelled with the classes of the instance task."""
        results = mask_results(sample.image_id, detections, self._categories.for_task("instance"))
        self._entries.setdefault("instances", []).extend(results)

    def add_labels(self, sample: DecodedSample, label_map: np.ndarray) -> None:
        """Take the labels [H, W] of one image."""
        self._files[f"labels/{_png(sample)}"] = label_png(label_map, self._categories.for_task("semantic"))

    def store(self, storage: Storage, url: str, call: int) -> None:
        """Write everything under the folder `url`; again for the same call replaces it by the same."""
        for name, data in self._files.items():
            storage.put(join(url, name), data)
        for kind, entries in self._entries.items():
            storage.put(_part(url, kind, call), ",\n".join(map(json.dumps, entries)).encode())


def _png(sample: DecodedSample) -> str:
    """Name of an image's file. Raises DataError for a key that may not be part of a path."""
    return f"{check_key(sample.key, sample.source)}.png"


def join_dump(storage: Storage, url: str, calls: int, categories: CategoryTable) -> None:
    """Make the JSON files of the parts that all `calls` stored, and delete the parts."""
    present = set(storage.list(join(url, _PARTS)))
    for kind, opening, closing in (("panoptic", '{"annotations": [\n', "\n]}\n"), ("instances", "[\n", "\n]\n")):
        parts = [part for call in range(calls) if (part := _part(url, kind, call)) in present]
        if parts:
            _join(storage, parts, join(url, f"{kind}.json"), opening, closing)
    document = json.dumps(describe_categories(categories.categories), indent=1) + "\n"
    storage.put(join(url, "categories.json"), document.encode())
    storage.delete_prefix(join(url, _PARTS))


def _join(storage: Storage, parts: Sequence[str], url: str, opening: str, closing: str) -> None:
    """Through a local file: the detections of a large set do not fit into memory twice."""
    with ScratchFolder("dump") as folder:
        path = folder / "joined.json"
        with path.open("wb") as file:
            file.write(opening.encode())
            separator = b""
            for part in parts:
                if content := storage.get(part):  # images without a detection leave an empty one
                    file.write(separator + content)
                    separator = b",\n"
            file.write(closing.encode())
        storage.put_file(url, path)


def _part(url: str, kind: str, call: int) -> str:
    return join(url, _PARTS, f"{kind}.{call:06d}")
