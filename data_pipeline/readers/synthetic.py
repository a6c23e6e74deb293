"""Synthetic data set of shapes on textured ground, also available as COCO files.

Things differ by shape and stuff by pattern, never by colour. Objects hide parts of each other, and some are tiny, so a
model has to learn shapes, order and context. Each image is a pure function of seed and index.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from m2f.data_pipeline.categories import Category, CategoryTable, distinct_color
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers.masks import pixel_box
from m2f.data_pipeline.readers.shapes import SHAPES, TEXTURES
from m2f.data_pipeline.readers.synthetic_image import SyntheticImage, draw_image
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import Annotation, Sample, Segment
from m2f.data_pipeline.sources import CocoPanopticSource, SyntheticSource

CATEGORIES = CategoryTable(
    tuple(
        Category(number, name, name in SHAPES, distinct_color(number))
        for number, name in enumerate((*SHAPES, *TEXTURES), start=1)
    )
)
_IDS = {category.name: category.id for category in CATEGORIES.categories}
_JPEG_OPTIONS = (
    *(cv2.IMWRITE_JPEG_QUALITY, 92),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),  # keeps thin coloured rims sharp
)


@dataclass(frozen=True)
class SyntheticReader:
    """Reader that generates images in memory on demand."""

    config: SyntheticSource
    indices: Sequence[int]

    @classmethod
    def open(cls, source: SyntheticSource) -> Self:
        """Return the reader of all images of a data set."""
        return cls(source, range(source.num_images))

    @property
    def categories(self) -> CategoryTable:
        """Return the categories: six shapes (things) and four textures (stuff)."""
        return CATEGORIES

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return the keys, which are made from seed and index."""
        return tuple(self._key(index) for index in self.indices)

    @property
    def unusable(self) -> tuple[UnusableAnnotation, ...]:
        """Return an empty tuple, because there is no annotation file."""
        return ()

    def source(self, index: int) -> str:
        """Return the path that the image would have in a folder `images`."""
        return f"images/{self._key(self.indices[index])}.jpg"

    def files(self, index: int) -> tuple[Path, ...]:
        """Return an empty tuple, because images are generated in memory."""
        return ()

    def read(self, index: int) -> Sample:
        """Generate one image. Its instances are the visible parts of the things, in one layer."""
        number = self.indices[index]
        drawn = draw_image(self.config.seed, number, self.config.small_share, self.config.small_diameters)
        image_id = self.config.image_id_start + number
        segments = _segments(drawn)
        things = [segment for segment in segments if segment.is_thing]
        to_instance = np.zeros(len(segments) + 1, np.uint8)
        to_instance[[thing.id for thing in things]] = np.arange(1, len(things) + 1)
        instances = tuple(
            replace(thing, map="inst", id=i, source_id=1000 * image_id + i) for i, thing in enumerate(things, start=1)
        )
        return Sample(
            key=self._key(number),
            image_id=image_id,
            source=self.source(index),
            image=_encode_jpeg(drawn.image),
            image_ext="jpg",
            height=drawn.seg.shape[0],
            width=drawn.seg.shape[1],
            annotation=Annotation(seg=drawn.seg, inst=to_instance[drawn.seg][None], segments=(*segments, *instances)),
        )

    def size_hint(self, index: int) -> int:
        """Return the mean size of a sample in bytes."""
        return 18_000

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a reader of the given images, in the given order."""
        return replace(self, indices=tuple(self.indices[i] for i in indices))

    def _key(self, number: int) -> str:
        return f"synthetic-{self.config.seed}-{number:06d}"


def write_synthetic_coco(folder: str | Path, source: SyntheticSource) -> CocoPanopticSource:
    """Write the data set as COCO files: images, panoptic JSON and PNGs, and instances JSON.

    Returns the source settings for reading the files. CocoPanopticReader then returns the same samples as
    SyntheticReader.
    """
    root = Path(folder)
    for name in ("images", "panoptic"):
        (root / name).mkdir(parents=True, exist_ok=True)
    reader = SyntheticReader.open(source)
    images, panoptic, instances = [], [], []
    for index in range(source.num_images):
        sample = reader.read(index)
        (root / "images" / f"{sample.key}.jpg").write_bytes(sample.image)
        (root / "panoptic" / f"{sample.key}.png").write_bytes(_id_png(sample))
        images.append(
            {"id": sample.image_id, "file_name": f"{sample.key}.jpg", "height": sample.height, "width": sample.width}
        )
        panoptic.append(_panoptic_entry(sample))
        instances += _instance_entries(sample)
    info = {"description": "m2f synthetic shapes", "version": "1.0"}
    things = [_category_entry(c) for c in CATEGORIES.for_task("instance")]
    everything = [_category_entry(c) for c in CATEGORIES.categories]
    for name, entries, categories in (("panoptic", panoptic, everything), ("instances", instances, things)):
        document = {"info": info, "images": images, "annotations": entries, "categories": categories}
        (root / f"{name}.json").write_text(json.dumps(document))
    return CocoPanopticSource(
        images=str(root / "images"),
        panoptic_json=str(root / "panoptic.json"),
        panoptic_masks=str(root / "panoptic"),
        instances_json=str(root / "instances.json"),
    )


def _segments(drawn: SyntheticImage) -> tuple[Segment, ...]:
    areas = np.bincount(drawn.seg.ravel())
    return tuple(
        Segment(
            id=local_id,
            category_id=_IDS[name],
            is_thing=name in SHAPES,
            is_crowd=False,
            area=float(areas[local_id]),
            bbox=pixel_box(drawn.seg == local_id),
            source_id=1009 * local_id,  # large enough to use two colour channels of the panoptic PNG
            map="seg",
        )
        for local_id, name in enumerate(drawn.names, start=1)
    )


def _encode_jpeg(image: np.ndarray) -> bytes:
    done, data = cv2.imencode(".jpg", image[..., ::-1], _JPEG_OPTIONS)
    assert done
    return data.tobytes()


def _id_png(sample: Sample) -> bytes:
    seg = sample.annotation.seg
    assert seg is not None
    ids = np.array([0, *(s.source_id for s in sample.annotation.segments if s.map == "seg")], np.uint32)[seg]
    return encode_png(np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8))


def _panoptic_entry(sample: Sample) -> dict[str, Any]:
    segments = [_common_fields(s) for s in sample.annotation.segments if s.map == "seg"]
    return {"image_id": sample.image_id, "file_name": f"{sample.key}.png", "segments_info": segments}


def _instance_entries(sample: Sample) -> list[dict[str, Any]]:
    inst = sample.annotation.inst
    assert inst is not None
    entries = []
    for segment in sample.annotation.segments:
        if segment.map == "inst":
            mask: Any = np.asfortranarray(inst[segment.layer] == segment.id, np.uint8)
            rle: Any = coco_mask.encode(mask)
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            entries.append({**_common_fields(segment), "image_id": sample.image_id, "segmentation": segmentation})
    return entries


def _common_fields(segment: Segment) -> dict[str, Any]:
    return {
        "id": segment.source_id,
        "category_id": segment.category_id,
        "area": int(segment.area),
        "bbox": [int(value) for value in segment.bbox],
        "iscrowd": int(segment.is_crowd),
    }


def _category_entry(category: Category) -> dict[str, Any]:
    kind = "shape" if category.is_thing else "texture"
    fields = {"id": category.id, "name": category.name, "supercategory": kind}
    return {**fields, "isthing": int(category.is_thing), "color": list(category.color)}
