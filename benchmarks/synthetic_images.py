"""Synthetic images for the data benchmark, similar to COCO's in size and number of segments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m2f.data_pipeline.categories import Category, CategoryTable, distinct_color
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers.custom import CustomReader
from m2f.data_pipeline.sample import Annotation, Segment
from m2f.data_pipeline.shards.columns import SAMPLES_FILE
from m2f.data_pipeline.shards.manifest import DATASET_FILE, Manifest, ShardInfo, make_document, write_table
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import CustomSource
from m2f.data_pipeline.storage.storage import Storage, join

SIZE = (480, 640)
SEGMENTS = 18
"""Number of regions of a panoptic map."""
SHARD_MB = 4.0
"""Size of a shard in MB, so small that few images fill several shards."""
TABLE = CategoryTable(tuple(Category(n, f"class {n}", n % 3 > 0, distinct_color(n)) for n in range(1, 81)))


@dataclass(frozen=True)
class SyntheticImage:
    """One image with its annotation, both for our shards and in COCO panoptic format."""

    name: str
    jpeg: bytes
    annotation: Annotation
    id_png: bytes
    """Colour PNG that encodes the `source_id` of each pixel's segment as R + 256 G + 65536 B."""


def make_image(index: int) -> SyntheticImage:
    """Return a noise image of several scales (a JPEG of about 67 KB) with up to 18 segments with ragged borders."""
    rng = np.random.default_rng(index)
    height, width = SIZE
    image = sum(
        cv2.resize(rng.normal(0, amplitude, (max(2, height // cell), max(2, width // cell), 3)), (width, height))
        for cell, amplitude in ((120, 40.0), (30, 30.0), (8, 14.0), (3, 8.0))
    )
    pixels = np.clip(image + 120, 0, 255).astype(np.uint8)
    warp = [cv2.resize(rng.normal(0, 25, (12, 16)), (width, height)) for _ in range(2)]
    rows, columns = np.mgrid[:height, :width] + np.stack(warp)
    centers = rng.random((SEGMENTS, 2)) * SIZE
    seg = 1 + np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in centers], axis=0).astype(np.uint8)
    segments = []
    for id_ in np.unique(seg).tolist():
        category = TABLE.categories[int(rng.integers(len(TABLE.categories)))]
        y, x = np.nonzero(seg == id_)
        segments.append(
            Segment(
                id=id_,
                category_id=category.id,
                is_thing=category.is_thing,
                is_crowd=False,
                area=float(len(y)),
                bbox=(float(x.min()), float(y.min()), float(np.ptp(x) + 1), float(np.ptp(y) + 1)),
                source_id=int(rng.integers(1, 1 << 24)),
                map="seg",
            )
        )
    table = np.zeros((256, 3), np.uint8)
    for segment in segments:
        table[segment.id] = [segment.source_id >> shift & 255 for shift in (0, 8, 16)]
    jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    annotation = Annotation(seg=seg, inst=None, segments=tuple(segments))
    return SyntheticImage(f"image_{index:06d}", jpeg, annotation, encode_png(table[seg]))


def write_images(images: list[SyntheticImage], url: str, storage: Storage) -> Manifest:
    """Write the images as shards of about 4 MB and return the manifest."""
    by_name = {image.name: image for image in images}

    def load(name: str) -> tuple[bytes, Annotation]:
        return by_name[name].jpeg, by_name[name].annotation

    config = DatasetConfig(shards=url, source=CustomSource(), shard_mb=SHARD_MB)
    reader = CustomReader.of(TABLE, tuple(by_name), load, config.max_pixels)
    return write_dataset(reader, config, storage)


def write_long_manifest(small: Manifest, folder: Path, count: int, storage: Storage) -> None:
    """Write a manifest of `count` samples by repeating the rows of a small manifest. No shards are written."""
    rows = pq.read_table(Path(small.url, SAMPLES_FILE))
    table = rows.take(pa.array(np.arange(count) % len(rows)))
    length = table["length"].to_numpy()
    per_shard = int(128e6 / length.mean())
    shard = np.arange(count) // per_shard
    end = np.cumsum(length)
    offset = end - length - (end - length)[np.unique(shard, return_index=True)[1]][shard]
    columns = {
        "key": pa.array([f"image_{n:08d}" for n in range(count)]),
        "shard": pa.array(shard, pa.int32()),
        "offset": pa.array(offset, pa.int64()),
        "crc32": pa.array(np.random.default_rng(0).integers(0, 1 << 32, count), pa.uint32()),
    }
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    samples = write_table(table)
    shards = [
        ShardInfo(f"{n:05d}.tar", int(length[shard == n].sum()), f"{n:064x}", int((shard == n).sum()))
        for n in range(int(shard[-1]) + 1)
    ]
    document = make_document(plan="", source_fingerprint="", categories=TABLE, shards=shards, samples=samples)
    storage.put(join(str(folder), SAMPLES_FILE), samples)
    storage.put(join(str(folder), DATASET_FILE), json.dumps(document).encode())
