"""Predictions of an evaluation as files for panopticapi, pycocotools and evaluation servers.

A call evaluates a few images and stores their predictions. Calls may run in any order, and may be repeated. At the end,
the driver joins the stored parts. The folder then contains:

panoptic.json, panoptic/KEY.png   COCO panoptic format
instances.json                    COCO results with run-length masks
labels.json                       the same as a COCO annotation file, with boxes, for viewers
labels/KEY.png                    label maps of category ids
categories.json                   the categories
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.keys import check_key, key_problem
from m2f.data_pipeline.sample import DecodedSample
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.metrics.instance_matching import InstanceDetections
from m2f.eval.report.coco_files import (
    as_annotations,
    describe_categories,
    image_entry,
    label_png,
    mask_results,
    panoptic_annotation,
    panoptic_png,
)
from m2f.model.structures import PanopticResult

_PARTS = "parts"
_IMAGES = "images"
"""Kind of the parts that list the images."""
_SEPARATOR = b",\n"
_IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png"})


class ResultDump:
    """Collects the predictions for the images of one call until they are stored."""

    def __init__(self, categories: CategoryTable) -> None:
        self._categories = categories
        self._files: dict[str, bytes] = {}
        self._entries: dict[str, list[dict[str, Any]]] = {}
        self._images: dict[int, dict[str, Any]] = {}

    def add_panoptic(self, sample: DecodedSample, result: PanopticResult) -> None:
        """Add the panoptic result of one image."""
        name = self._png_name(sample)
        self._files[f"panoptic/{name}"] = panoptic_png(result.segment_map.cpu().numpy())
        annotation = panoptic_annotation(sample.image_id, name, result.segments, self._categories.for_task("panoptic"))
        self._entries.setdefault("panoptic", []).append(annotation)

    def add_instances(self, sample: DecodedSample, detections: InstanceDetections) -> None:
        """Add the detections of one image, labelled with the classes of the instance task."""
        self._add_image(sample)
        results = mask_results(sample.image_id, detections, self._categories.for_task("instance"))
        self._entries.setdefault("instances", []).extend(results)

    def add_labels(self, sample: DecodedSample, label_map: np.ndarray) -> None:
        """Add the label map [H, W] of one image."""
        self._files[f"labels/{self._png_name(sample)}"] = label_png(label_map, self._categories.for_task("semantic"))

    def store(self, storage: Storage, url: str, call: int) -> None:
        """Write everything to the folder `url`. Storing the same call again writes the same files."""
        for name, data in self._files.items():
            storage.put(join(url, name), data)
        for kind, entries in {**self._entries, _IMAGES: list(self._images.values())}.items():
            storage.put(_part(url, kind, call), _SEPARATOR.join(json.dumps(entry).encode() for entry in entries))

    def _png_name(self, sample: DecodedSample) -> str:
        """List the image, and return the file name of its map. Raises DataError if its key cannot be a file name."""
        self._add_image(sample)
        return f"{check_key(sample.key, sample.source)}.png"

    def _add_image(self, sample: DecodedSample) -> None:
        self._images[sample.image_id] = image_entry(sample.image_id, image_file_name(sample), sample.size)


def image_file_name(sample: DecodedSample) -> str:
    """Return the image's path in the folder from which the shards were made, or KEY.EXTENSION if it is unknown."""
    path = PurePosixPath(sample.source)
    name = path.relative_to(path.parts[0]).as_posix() if len(path.parts) > 1 else ""
    if path.suffix.lower() in _IMAGE_ENDINGS and key_problem(name) is None:
        return name
    return f"{sample.key}.{sample.image_ext}"


def join_dump(storage: Storage, url: str, calls: int, categories: CategoryTable) -> None:
    """Create the JSON files from the parts of calls 0 to `calls` - 1, and delete the parts."""
    present = set(storage.list(join(url, _PARTS)))

    def parts_of(kind: str) -> list[str]:
        return [part for call in range(calls) if (part := _part(url, kind, call)) in present]

    category_entries = describe_categories(categories.categories)
    images = [entry for part in parts_of(_IMAGES) for entry in _entries(storage.get(part))]
    head = {"images": sorted(images, key=lambda image: image["id"]), "categories": category_entries}
    document = json.dumps(head)[:-1] + ', "annotations": [\n', "\n]}\n"
    if parts := parts_of("panoptic"):
        _join(map(storage.get, parts), storage, join(url, "panoptic.json"), document)
    if parts := parts_of("instances"):
        _join(map(storage.get, parts), storage, join(url, "instances.json"), ("[\n", "\n]\n"))
        _join(_annotations(map(storage.get, parts)), storage, join(url, "labels.json"), document)
    storage.put(join(url, "categories.json"), (json.dumps(category_entries, indent=1) + "\n").encode())
    storage.delete_prefix(join(url, _PARTS))


def _entries(content: bytes) -> list[dict[str, Any]]:
    """Parse a part file, which contains JSON objects separated by commas, without enclosing brackets."""
    return json.loads(b"[" + content + b"]")


def _annotations(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Convert parts with results to parts with annotations, numbered from 1."""
    first_id = 1
    for part in parts:
        annotations = as_annotations(_entries(part), first_id)
        first_id += len(annotations)
        yield _SEPARATOR.join(json.dumps(annotation).encode() for annotation in annotations)


def _join(parts: Iterable[bytes], storage: Storage, url: str, enclosing: tuple[str, str]) -> None:
    """Join parts through a local file, because all detections of a large set may not fit into memory."""
    with ScratchFolder("dump") as folder:
        path = folder / "joined.json"
        with path.open("wb") as file:
            file.write(enclosing[0].encode())
            separator = b""
            for content in parts:
                if content:  # a call without detections has an empty part
                    file.write(separator + content)
                    separator = _SEPARATOR
            file.write(enclosing[1].encode())
        storage.put_file(url, path)


def _part(url: str, kind: str, call: int) -> str:
    return join(url, _PARTS, f"{kind}.{call:06d}")
