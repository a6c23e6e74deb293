"""Decode samples from WebDataset tars that other programs wrote (external samples).

`m2f index` writes a manifest for such tars and does not change them. The manifest describes their format. In memory, an
external sample has two more members, its format and its identity. Their names start with a slash, so they cannot
collide with the extensions of members in a tar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.image_file import (
    BrokenImageError,
    ImageHeader,
    decode_id_png,
    decode_index_png,
    decode_rgb,
    frame_orientation,
    read_header,
)
from m2f.data_pipeline.json_fields import optional_flag
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.sample import Annotation, DecodedSample

FORMAT_MEMBER = "/form"
IDENTITY_MEMBER = "/identity"
"""Names of the two added members. The slash distinguishes them from extensions."""

Labels = Literal["classes", "instances", "panoptic"]


@dataclass(frozen=True, kw_only=True)
class ExternalFormat:
    """Meaning of the members of external samples."""

    labels: Labels
    """Content of the label map. classes: a grey or palette PNG of class labels. instances: a colour PNG; red is the
    class, green + 256 blue the instance number. panoptic: a colour PNG of segment ids as in COCO, with a JSON member
    that has `segments_info`."""
    images: tuple[str, ...]
    """Possible extensions of the image. A sample has exactly one of them."""
    map: str
    """Extension of the PNG with labels."""
    json: str | None = None
    """Extension of the JSON member with `segments_info`; None if `labels` needs none."""
    void: tuple[int, ...] = ()
    """Labels of pixels without a class. In `panoptic`, id 0 is always void."""


def encode_format(tar_format: ExternalFormat, categories: CategoryTable) -> bytes:
    """Encode format and categories as `FORMAT_MEMBER`, which is equal for all samples of a data set."""
    listed = [(c.id, c.is_thing) for c in categories.categories]
    return json.dumps({"form": asdict(tar_format), "categories": listed}).encode()


def encode_identity(key: str, image_id: int, source: str, height: int, width: int) -> bytes:
    """Encode key, image id, source and size of a sample as `IDENTITY_MEMBER`."""
    return json.dumps({"key": key, "image_id": image_id, "source": source, "size": [height, width]}).encode()


def format_from_json(fields: dict[str, Any]) -> ExternalFormat:
    """Return the format for the fields in `dataset.json`."""
    lists: dict[str, Any] = {name: tuple(fields[name]) for name in ("images", "void")}
    return ExternalFormat(**(fields | lists))


def decode_external_sample(members: Mapping[str, bytes]) -> DecodedSample:
    """Decode an external sample from its members, including format and identity.

    Raises:
        DataError: the sample cannot be decoded. The message names the sample.
    """
    tar_format, table = _decode_format(members[FORMAT_MEMBER])
    identity = parse_json(members[IDENTITY_MEMBER])
    name = f"sample {identity['key']!r} ({identity['source']})"
    height, width = identity["size"]
    annotation = decode_labels(members, tar_format, table, (height, width), name)
    try:
        extension = image_extension(members, tar_format, name)
        data = members[extension]
        header = read_header(data)
        _require_size(header, (height, width), "the image")
        image = decode_rgb(data, frame_orientation(header, height, width))
    except BrokenImageError as error:
        raise DataError(f"{name}: {error}") from error
    return DecodedSample(
        key=identity["key"],
        image_id=identity["image_id"],
        source=identity["source"],
        image=image,
        annotation=annotation,
        image_ext=extension.rpartition(".")[2],
    )


def image_extension(members: Mapping[str, bytes], tar_format: ExternalFormat, name: str) -> str:
    """Return the extension of the image member. Raises DataError if there is not exactly one."""
    extensions = [extension for extension in tar_format.images if extension in members]
    if len(extensions) != 1:
        raise DataError(
            f"{name}: exactly one member of {format_list(tar_format.images)} must be the image; it has "
            f"{format_list(sorted(members))}"
        )
    return extensions[0]


def decode_labels(
    members: Mapping[str, bytes], tar_format: ExternalFormat, table: CategoryTable, size: tuple[int, int], name: str
) -> Annotation:
    """Return the ground truth of an external sample.

    Args:
        members: members by extension.
        tar_format: meaning of the members.
        table: categories of the data set.
        size: height and width of the sample.
        name: description of the sample for messages.

    Raises:
        DataError: the labels are missing, damaged, of another size, or unknown.
    """
    if tar_format.map not in members:
        raise DataError(f"{name} has no label member {tar_format.map}; it has {format_list(sorted(members))}")
    try:
        header = read_header(members[tar_format.map])
        _require_size(header, size, f"member {tar_format.map}")
        values = (
            decode_index_png(members[tar_format.map])
            if tar_format.labels == "classes"
            else _colors(members[tar_format.map], header)
        )
    except BrokenImageError as error:
        raise DataError(f"{name}: member {tar_format.map}: {error}") from error
    if tar_format.labels == "panoptic":
        return _panoptic(values, members, tar_format, table, name)

    def classify(value: int) -> Region | None:
        label, number = (value, 0) if tar_format.labels == "classes" else (value & 255, value >> 8)
        if label in tar_format.void:
            return None
        category = table.by_id[label]
        return Region(category, value if number and category.is_thing else category.id)

    unknown = "are neither categories nor void; add them to the category file or to --void"
    return partition(values, classify, f"{name}: member {tar_format.map}", unknown)


def _panoptic(
    ids: np.ndarray, members: Mapping[str, bytes], tar_format: ExternalFormat, table: CategoryTable, name: str
) -> Annotation:
    assert tar_format.json is not None
    regions: dict[int, Region | None] = {0: None}
    try:
        for entry in parse_json(members[tar_format.json])["segments_info"]:
            category = table.by_id[int(entry["category_id"])]
            regions[int(entry["id"])] = Region(
                category,
                int(entry["id"]),
                optional_flag(entry, "iscrowd", f"{name}: member {tar_format.json}: segment {entry['id']}"),
            )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(
            f"{name}: member {tar_format.json} has no usable `segments_info` of known categories ({error!r:.100})"
        ) from error
    annotation = partition(
        ids, regions.__getitem__, f"{name}: member {tar_format.map}", f"are not listed in its {tar_format.json}"
    )
    absent = sorted(regions.keys() - {0} - {segment.source_id for segment in annotation.segments})
    if absent:
        raise DataError(f"{name}: member {tar_format.json} lists segments without a pixel: {format_list(absent)}")
    return annotation


def _colors(data: bytes, header: ImageHeader) -> np.ndarray:
    if header.mode.startswith("gray") or header.bit_depth > 8:
        raise BrokenImageError(
            f"it must store ids in three 8-bit channels, but is {header.bit_depth}-bit {header.mode}"
        )
    return decode_id_png(data)


def _require_size(header: ImageHeader, size: tuple[int, int], what: str) -> None:
    """Raise BrokenImageError for another size. The sides may be swapped, because EXIF may rotate the image.

    This is checked before decoding, because a small file may claim to be huge.
    """
    if size not in ((header.height, header.width), (header.width, header.height)):
        raise BrokenImageError(
            f"{what} is {header.width} x {header.height}, but the manifest says {size[1]} x {size[0]}"
        )


@lru_cache(maxsize=16)
def _decode_format(data: bytes) -> tuple[ExternalFormat, CategoryTable]:
    """Return format and category table of a `FORMAT_MEMBER`. The table has no names and colours."""
    content = parse_json(data)
    table = CategoryTable(tuple(Category(i, "", is_thing, (0, 0, 0)) for i, is_thing in content["categories"]))
    return format_from_json(content["form"]), table
