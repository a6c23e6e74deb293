"""Encode a sample as members of a tar, and decode it.

A sample has these members. Their order is also the order of their names:

    KEY.img.jpg | KEY.img.png   the original image file, unchanged
    KEY.inst.png                instance layers stacked vertically, [Y * H, W]; omitted if there is no instance
    KEY.json                    ids, size, source, segments, and whether the EXIF orientation is applied
    KEY.seg.png                 panoptic or semantic map, [H, W]; omitted if the source has none

Maps with at most 254 ids are 8-bit, others 16-bit. Equal samples give equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import (
    BrokenImageError,
    decode_index_png,
    decode_rgb,
    encode_png,
    frame_orientation,
    read_header,
)
from m2f.data_pipeline.keys import check_key
from m2f.data_pipeline.sample import Annotation, DecodedSample, Sample, Segment
from m2f.data_pipeline.shards.external_tars import FORMAT_MEMBER, decode_external_sample

IMAGE_ID_MEMBER = "/image_id"
"""Member that manifests of indexed tars add in memory: the image id as text. It replaces that in the description.
No extension in a tar has a slash."""
VERSION = 3
"""Version of the encoding. An unfinished job writes its shards of other versions again."""

_SEGMENT_FIELDS = tuple(field.name for field in fields(Segment))


def encode(sample: Sample) -> list[tuple[str, bytes]]:
    """Return the names and bytes of the sample's members in their fixed order."""
    annotation = sample.annotation
    members = [(f"{sample.key}.img.{sample.image_ext}", sample.image)]
    if annotation.inst is not None and annotation.inst.any():
        members.append((f"{sample.key}.inst.png", encode_png(annotation.inst.reshape(-1, sample.width))))
    members.append((f"{sample.key}.json", _encode_description(sample)))
    if annotation.seg is not None:
        members.append((f"{sample.key}.seg.png", encode_png(annotation.seg)))
    return members


def decode(members: Mapping[str, bytes]) -> DecodedSample:
    """Decode a sample from its members, keyed by extension (`img.jpg`, `json`, ...).

    Raises:
        DataError: the members cannot be decoded or contradict each other. The message names the sample.
    """
    if FORMAT_MEMBER in members:
        return decode_external_sample(members)
    description = _decode_description(members)
    name = f"sample {description['key']!r} ({description['source']})"
    extension = next((ext for ext in ("img.jpg", "img.png") if ext in members), None)
    if extension is None:
        raise DataError(f"{name} has no image member; it has {sorted(members)}")
    size = description["height"], description["width"]
    try:
        header = read_header(members[extension])
        stored = header.height, header.width
        if size not in (stored, stored[::-1]):  # before decoding: a small file may claim to be huge
            raise DataError(f"{name}: the image is {stored}, but its description says {size}; write the shard again")
        image = decode_rgb(members[extension], description["exif"]["applied"])
    except BrokenImageError as error:
        raise DataError(f"{name}: {error}") from error
    if image.shape[:2] != size:
        raise DataError(
            f"{name}: the image is {image.shape[:2]}, but its description says {size}; write the shard again"
        )
    annotation = _decode_annotation(members, description, name)
    return DecodedSample(
        key=description["key"],
        image_id=int(members[IMAGE_ID_MEMBER]) if IMAGE_ID_MEMBER in members else description["image_id"],
        source=description["source"],
        image=image,
        annotation=annotation,
        image_ext=extension.removeprefix("img."),
    )


def _encode_description(sample: Sample) -> bytes:
    header = read_header(sample.image)
    description = {
        "key": sample.key,
        "image_id": sample.image_id,
        "source": sample.source,
        "height": sample.height,
        "width": sample.width,
        "exif": {
            "orientation": header.orientation,
            "applied": frame_orientation(header, sample.height, sample.width),
        },
        "mode": header.mode,
        # an image without instances may have no layer, but 0 would be decoded as an annotation without `inst`
        "inst_layers": 0 if sample.annotation.inst is None else max(1, len(sample.annotation.inst)),
        "segments": [
            {name: getattr(segment, name) for name in _SEGMENT_FIELDS}  # asdict would copy every coordinate
            for segment in sample.annotation.segments
        ],
    }
    return json.dumps(description, separators=(",", ":")).encode()


def _decode_description(members: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise DataError(f"a sample has no json member, only {sorted(members)}; the shard was not written by m2f")
    try:
        description = parse_json(members["json"])
        for field in ("key", "image_id", "source", "height", "width", "exif", "inst_layers", "segments"):
            description[field]
        description["exif"]["applied"]
        image_id = description["image_id"]
        if type(image_id) is not int or abs(image_id) >= 1 << 63:  # the manifest stores 64 bits
            raise ValueError(f"image_id is {image_id!r:.50}, not a 64-bit integer")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"the json member of a sample cannot be read ({error!r}); the shard was not written by m2f"
        ) from error
    check_key(description["key"], "the json member of a sample")
    return description


def _decode_annotation(members: Mapping[str, bytes], description: dict[str, Any], name: str) -> Annotation:
    height, width, layers = description["height"], description["width"], description["inst_layers"]
    seg = _decode_map(members, "seg.png", (height, width), name)
    inst = _decode_map(members, "inst.png", (layers * height, width), name)
    if inst is None and layers:
        inst = np.zeros((layers * height, width), np.uint8)
    try:
        segments = tuple(_decode_segment(fields) for fields in description["segments"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{name}: a segment of its json member cannot be read ({error!r}); write the shard again"
        ) from error
    return Annotation(
        seg=seg, inst=inst.reshape(layers, height, width) if inst is not None else None, segments=segments
    )


def _decode_segment(fields: dict[str, Any]) -> Segment:
    x, y, width, height = fields.pop("bbox")
    rings = fields.pop("polygons")
    polygons = None if rings is None else tuple(tuple(ring) for ring in rings)
    if not all(map(math.isfinite, (x, y, width, height, fields["area"]))):
        raise ValueError(f"area {fields['area']} or box {x, y, width, height} is not finite")
    return Segment(bbox=(x, y, width, height), polygons=polygons, **fields)


def _decode_map(members: Mapping[str, bytes], member: str, shape: tuple[int, int], name: str) -> np.ndarray | None:
    if member not in members:
        return None
    try:
        header = read_header(members[member])
        if (header.height, header.width) != shape:  # before decoding: a small file may claim to be huge
            size = header.height, header.width
            raise DataError(f"{name}: member {member} is {size}, not {shape}; write the shard again")
        return decode_index_png(members[member])
    except BrokenImageError as error:
        raise DataError(f"{name}: member {member}: {error}") from error
