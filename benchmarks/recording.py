"""Recorded training batches in one file, for a machine that has neither the data set nor the tools to read it.

The file is a zip archive:

- `recipe.yaml`
- `images.json`: the targets of every image
- `images/NNNNNN.jpg` or `.png`: the augmented image
- `maps/NNNNNN.png`: its id maps, stacked vertically

Images are in training order. A longer run starts over with the first image, and draws new random points each time.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import BrokenImageError, decode_index_png, decode_rgb, encode_png, read_header
from m2f.data_pipeline.loading.loader import LoaderSpec, StepBatches, map_in_thread
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import FILLER_POSITION, Batch, collate, show_image_in_fillers
from m2f.data_pipeline.transforms.example import Example
from m2f.data_pipeline.transforms.targets import ImageTargets
from m2f.trainer.job import TrainJob

FORMAT = 1
"""Format of a recording. Another format is refused."""
_RECIPE, _IMAGES = "recipe.yaml", "images.json"
_STEPS_AHEAD = 2
"""Number of steps that are prepared while the current one is computed."""
_MAX_PIXELS = 2**26
"""Limit of an image in pixels, against damaged or malicious headers. Recorded images have a million."""
_MEMBER_BYTES = 128  # upper bound of the zip headers of a member, in bytes
_JPEG_OPTIONS = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


@dataclass(frozen=True)
class Recording:
    """A recording in memory, which serves as the training data of a run."""

    recipe: str
    """The resolved recipe (YAML)."""
    num_classes: int
    examples: tuple[Example, ...]
    fingerprint: str
    """SHA-256 of the file, in hexadecimal."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file and decode its images. Raises DataError if it is damaged or not a recording of this format."""
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            with zipfile.ZipFile(path) as archive:
                index = json.loads(archive.read(_IMAGES))
                if index["format"] != FORMAT:
                    raise DataError(f"{path} has format {index['format']}, but this version reads {FORMAT}")
                examples = tuple(_read_example(archive, n, entry) for n, entry in enumerate(index["images"]))
                return cls(archive.read(_RECIPE).decode(), index["num_classes"], examples, digest)
        except (OSError, zipfile.BadZipFile, BrokenImageError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read as a recording ({error!r:.200}); record it again") from error

    @property
    def max_segments(self) -> int:
        """Largest number of segments in an image."""
        return max(len(example.targets.labels) for example in self.examples)

    def check(self, storage: Storage) -> None:
        """Do nothing, because all data is in memory."""

    def steps(self, job: TrainJob, storage: Storage, spec: LoaderSpec, order_start: int) -> Generator[StepBatches]:
        """Yield the steps of one rank endlessly; two steps are prepared ahead."""
        prepared = map_in_thread(lambda step: self._step(step, spec, order_start), count(spec.start_step), _STEPS_AHEAD)
        try:
            while True:
                began = time.perf_counter()
                yield replace(next(prepared), wait_s=time.perf_counter() - began)
        finally:
            prepared.close()

    def _step(self, step: int, spec: LoaderSpec, start: int) -> StepBatches:
        batches = tuple(
            collate(
                [None if position is None else self._example(position, start) for position in positions], self._canvas
            )
            for positions in spec.positions(step)
        )
        show_image_in_fillers(batches)
        positions = tuple(p for batch in batches for p in batch.targets.position.tolist() if p != FILLER_POSITION)
        pinned = tuple(batch.pin_memory() for batch in batches) if spec.pin else batches
        return StepBatches(step, pinned, positions, wait_s=0.0)

    def _example(self, position: int, start: int) -> Example:
        return replace(self.examples[(position - start) % len(self.examples)], position=position)

    @cached_property
    def _canvas(self) -> tuple[int, int] | None:
        """Height and width of all images; None if they differ."""
        shapes = {example.targets.id_maps.shape[1:] for example in self.examples}
        height, width = shapes.pop()
        return None if shapes else (height, width)


class RecordingWriter:
    """Context manager that writes a recording of at most `max_bytes`, and deletes the file on an error."""

    def __init__(self, path: str | Path, recipe: str, num_classes: int, max_bytes: int, quality: int | None) -> None:
        """Create the file. `quality` is the JPEG quality from 1 to 100; None writes lossless PNG."""
        self._path, self._max_bytes, self._quality = Path(path), max_bytes, quality
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._archive = zipfile.ZipFile(self._path, "w", zipfile.ZIP_STORED)
        self._archive.writestr(_RECIPE, recipe)
        self._num_classes = num_classes
        self._entries: list[dict[str, Any]] = []
        self._bytes = len(recipe) + 3 * _MEMBER_BYTES  # for the recipe, the list of images and the end of the archive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            index = {"format": FORMAT, "num_classes": self._num_classes, "images": self._entries}
            self._archive.writestr(_IMAGES, json.dumps(index, separators=(",", ":")))
        self._archive.close()
        if error is not None:
            self._path.unlink()

    def add(self, batches: Sequence[Batch]) -> bool:
        """Append one step, given as micro-batches of one image. Return False, and add nothing, if it does not fit."""
        encoded = [_encode(batch, self._quality) for batch in batches]
        num_bytes = sum(_size_of(entry, members) for entry, members in encoded)
        if self._bytes + num_bytes > self._max_bytes:
            return False
        self._bytes += num_bytes
        for entry, members in encoded:
            for name, data in members.items():
                self._archive.writestr(name.format(len(self._entries)), data)
            self._entries.append(entry)
        return True


def _encode(batch: Batch, quality: int | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Encode a batch of one image.

    Returns its entry in `images.json`, and its archive members by name. The names contain a placeholder for the number
    of the image.
    """
    (image,), (maps,), (size,), targets = batch.images, batch.targets.id_maps, batch.sizes, batch.targets
    pixels, layers = image.permute(1, 2, 0).numpy(), maps.numpy()
    valid = targets.valid[0]
    entry = {
        "key": batch.keys[0],
        "dataset": int(targets.dataset[0]),
        "size": size.tolist(),
        "dropped": batch.dropped_targets,
        "layers": len(layers),
        "wide": layers.dtype == np.int16,
        **{name: getattr(targets, name)[0][valid].tolist() for name in ("labels", "layer", "local_id")},
    }
    stacked = layers.reshape(-1, layers.shape[-1])
    stacked = stacked.view(np.uint16) if stacked.dtype == np.int16 else stacked
    picture = {"images/{:06d}.png": encode_png(pixels)}
    if quality is not None:
        picture = {"images/{:06d}.jpg": _encode_jpeg(pixels, quality)}
    return entry, picture | {"maps/{:06d}.png": encode_png(stacked)}


def _encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    success, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality, *_JPEG_OPTIONS])
    assert success, f"OpenCV cannot write a JPEG of {pixels.shape}"
    return data.tobytes()


def _size_of(entry: Mapping[str, Any], members: Mapping[str, bytes]) -> int:
    return len(json.dumps(entry)) + sum(len(data) + _MEMBER_BYTES for data in members.values())


def _read_picture(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return the bytes of a picture. Raises ValueError if it is compressed or its header states too many pixels."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    data = archive.read(name)
    header = read_header(data)
    if header.height * header.width > _MAX_PIXELS:
        raise ValueError(f"{name} has {header.height} x {header.width} pixels, too many")
    return data


def _read_example(archive: zipfile.ZipFile, number: int, entry: Mapping[str, Any]) -> Example:
    names = [f"images/{number:06d}.{ext}" for ext in ("jpg", "png")]
    picture = next((name for name in names if name in archive.NameToInfo), names[0])
    pixels, stacked = (
        decode_rgb(_read_picture(archive, picture)),
        decode_index_png(_read_picture(archive, f"maps/{number:06d}.png")),
    )
    stacked = stacked.view(np.int16) if entry["wide"] else stacked
    labels, layer, local_id = (np.asarray(entry[name], dtype=np.int64) for name in ("labels", "layer", "local_id"))
    targets = ImageTargets(stacked.reshape(entry["layers"], *pixels.shape[:2]), labels, layer, local_id)
    height, width = entry["size"]
    return Example(entry["key"], entry["dataset"], number, pixels, targets, (height, width), entry["dropped"])
