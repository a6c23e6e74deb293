"""Contact sheet of images beside their annotations, for a visual check of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable, drawn_name
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.printable import to_ascii
from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.augment import resize_image
from m2f.model.format_count import format_count

_TILE = 320  # longer side of one image in pixels
_GAP = 8  # pixels between images
_LINE = 20  # height of a line of text
_BACKGROUND = (250, 250, 250)  # RGB
_TEXT_COLOR = (30, 30, 30)  # RGB
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_BAND = 3  # pixels along the border of a segment; the outermost is the white outline
_OPACITY = 0.55  # opacity of segments over the image
_LABEL_SHARE = 0.01  # smaller segments, by share of the image, have no name written on them
_SWATCH = 14  # side of a colour square in the legend in pixels


@dataclass(frozen=True)
class _Tile:
    """Picture of one sample, and the categories that it shows."""

    picture: np.ndarray
    category_ids: frozenset[int]


def contact_sheet(manifest: Manifest, indices: Sequence[int], storage: Storage, columns: int = 3) -> np.ndarray:
    """Return a sheet [H, W, 3] uint8 RGB with image and annotation of samples, and a legend of their categories.

    Instances are drawn over the panoptic or semantic map. Crowds are hatched.

    Raises:
        DataError, StorageError: a sample cannot be read.
    """
    tiles = [
        _tile(manifest.read_sample(index, storage), int(manifest.num_segments[index]), manifest.categories)
        for index in indices
    ]
    rows = [
        _stack_horizontally([t.picture for t in tiles[k : k + columns]], _GAP) for k in range(0, len(tiles), columns)
    ]
    shown = frozenset[int]().union(*(tile.category_ids for tile in tiles))
    legend = _legend([c for c in manifest.categories.categories if c.id in shown], max(r.shape[1] for r in rows))
    return _frame(_stack_vertically([*rows, legend], 2 * _GAP))


def write_contact_sheet(
    manifest: Manifest, indices: Sequence[int], storage: Storage, url: str, columns: int = 3
) -> None:
    """Write the contact sheet as a PNG to a path or URL."""
    storage.put(url, encode_png(contact_sheet(manifest, indices, storage, columns)))


def spread_indices(manifest: Manifest, count: int) -> tuple[int, ...]:
    """Return up to `count` rows, spread evenly over the data set."""
    count = min(count, manifest.num_samples)
    return tuple(int(i) for i in np.linspace(0, manifest.num_samples - 1, count).round())


def draw_annotation(image: np.ndarray, annotation: Annotation, categories: CategoryTable) -> np.ndarray:
    """Return the image [H, W, 3] uint8 with segments outlined, named and tinted in their category's colour.

    A band inside the outline has exactly the colour of the legend.
    """
    drawn = image.copy()
    segments = list(_drawing_order(annotation))
    for segment, mask in segments:
        color = categories.by_id[segment.category_id].color
        drawn[mask] = np.rint(image[mask] * (1 - _OPACITY) + np.array(color, dtype=np.float32) * _OPACITY).astype(
            np.uint8
        )
        drawn[mask & ~_inner_part(mask)] = color
        if segment.is_crowd:
            rows, columns = np.nonzero(mask)
            hatched = (rows + columns) % 8 < 2
            drawn[rows[hatched], columns[hatched]] = 255
    for _, mask in segments:
        outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outline, -1, (255, 255, 255), 1)
    for segment, mask in segments:
        if mask.mean() >= _LABEL_SHARE:
            _draw_name(drawn, mask, drawn_name(categories.by_id[segment.category_id]))
    return drawn


def _drawing_order(annotation: Annotation) -> Iterator[tuple[Segment, np.ndarray]]:
    """Yield segments with their masks [H, W] bool: first those of the map, then instances from large to small.

    If the sample has instances, things of the map are omitted, because instances show the same objects completely.
    """
    seg, inst = annotation.seg, annotation.inst
    if seg is not None:
        for segment in annotation.segments:
            if segment.map == "seg" and not (segment.is_thing and inst is not None):
                yield segment, seg == segment.id
    if inst is not None:
        instances = [s for s in annotation.segments if s.map == "inst"]
        for segment in sorted(instances, key=lambda s: -s.area):
            yield segment, inst[segment.layer] == segment.id


def _inner_part(mask: np.ndarray) -> np.ndarray:
    """Return [H, W] bool: the mask without a band of 3 pixels along its border."""
    size = 2 * _BAND + 1
    return cv2.erode(mask.astype(np.uint8), np.ones((size, size), np.uint8)).astype(bool)


def _draw_name(picture: np.ndarray, mask: np.ndarray, name: str) -> None:
    """Write the name around the point of the mask that is farthest from its border."""
    inside = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(np.argmax(inside)), inside.shape)
    (width, height), _ = cv2.getTextSize(name, _FONT, 0.38, 1)
    left = min(max(0, int(x) - width // 2), max(0, picture.shape[1] - width))
    base = min(max(height, int(y) + height // 2), picture.shape[0] - 2)
    # Dark copies around the text make it readable on any colour. A thicker stroke would widen the glyphs.
    for dx, dy in ((-1, -1), (-1, 1), (1, -1), (1, 1), (0, 1), (0, -1), (1, 0), (-1, 0)):
        cv2.putText(picture, name, (left + dx, base + dy), _FONT, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(picture, name, (left, base), _FONT, 0.38, (255, 255, 255), 1, cv2.LINE_AA)


def _tile(sample: DecodedSample, num_segments: int, categories: CategoryTable) -> _Tile:
    """Return the image and its annotation side by side, below the sample's key. Their longer side has _TILE pixels."""
    height, width = sample.size
    scale = _TILE / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    image = resize_image(sample.image, size)
    # Maps are resized before drawing, so that outlines and names stay sharp.
    annotation = Annotation(
        seg=None if sample.annotation.seg is None else _resize_ids(sample.annotation.seg, size),
        inst=None
        if sample.annotation.inst is None
        else np.stack([_resize_ids(layer, size) for layer in sample.annotation.inst]),
        segments=sample.annotation.segments,
    )
    pair = _stack_horizontally([image, draw_annotation(image, annotation, categories)], 2)
    caption = f"{sample.key}  {width}x{height}  {format_count(num_segments, 'segment')}"
    return _Tile(
        picture=_stack_vertically([_text_line(caption, pair.shape[1]), pair], 0),
        category_ids=frozenset(s.category_id for s in sample.annotation.segments),
    )


def _resize_ids(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(ids, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)


def _legend(categories: Sequence[Category], width: int) -> np.ndarray:
    """Return a legend of colour squares with category names, in as many columns as fit into `width`."""
    names = [f"{drawn_name(c)} ({'thing' if c.is_thing else 'stuff'})" for c in categories]
    cell = 2 * _SWATCH + max((cv2.getTextSize(name, _FONT, 0.45, 1)[0][0] for name in names), default=0)
    columns = max(1, width // (cell + _GAP))
    sheet = np.full((max(1, -(-len(names) // columns)) * _LINE, width, 3), _BACKGROUND, dtype=np.uint8)
    for k, (category, name) in enumerate(zip(categories, names, strict=True)):
        y, x = k // columns * _LINE, k % columns * (cell + _GAP)
        sheet[y + 3 : y + 3 + _SWATCH, x : x + _SWATCH] = category.color
        cv2.putText(sheet, name, (x + _SWATCH + 6, y + 15), _FONT, 0.45, _TEXT_COLOR, 1, cv2.LINE_AA)
    return sheet


def _text_line(text: str, width: int) -> np.ndarray:
    line = np.full((_LINE, width, 3), _BACKGROUND, dtype=np.uint8)
    cv2.putText(line, to_ascii(text), (2, 14), _FONT, 0.42, _TEXT_COLOR, 1, cv2.LINE_AA)
    return line


def _stack_horizontally(pictures: Sequence[np.ndarray], gap: int) -> np.ndarray:
    height = max(p.shape[0] for p in pictures)
    width = sum(p.shape[1] for p in pictures) + gap * (len(pictures) - 1)
    sheet = np.full((height, width, 3), _BACKGROUND, dtype=np.uint8)
    x = 0
    for picture in pictures:
        sheet[: picture.shape[0], x : x + picture.shape[1]] = picture
        x += picture.shape[1] + gap
    return sheet


def _stack_vertically(pictures: Sequence[np.ndarray], gap: int) -> np.ndarray:
    transposed = _stack_horizontally([p.transpose(1, 0, 2) for p in pictures], gap)
    return np.ascontiguousarray(transposed.transpose(1, 0, 2))


def _frame(picture: np.ndarray) -> np.ndarray:
    framed = np.full((picture.shape[0] + 4 * _GAP, picture.shape[1] + 4 * _GAP, 3), _BACKGROUND, dtype=np.uint8)
    framed[2 * _GAP : -2 * _GAP, 2 * _GAP : -2 * _GAP] = picture
    return framed
