"""Panels with image, truth and prediction side by side, and sheets of several panels."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2f.data_pipeline.categories import Category, drawn_name
from m2f.data_pipeline.printable import to_ascii
from m2f.data_pipeline.sample import VOID_ID

COLUMN_PIXELS = (560, 960)
"""Range of an image's longer side in a panel, in pixels. Images outside the range are scaled to its nearest end."""
JPEG_QUALITY = 85
"""Quality from 0 to 100. Higher values make files larger, lower ones blur the contours."""
JPEG_PIXELS = 65_500
"""Largest height of a sheet in pixels. JPEG files are limited to 65,535."""
SHEET_PIXELS = 960
"""Panels on a sheet are scaled down to the width of the narrowest, but not below this width in pixels."""
GAP = 8
"""Pixels between two columns of a panel and between two panels of a sheet."""
HEADER = 30
"""Height in pixels of the title above a column: one line of FONT_SIZE + 1 and its margins."""
FONT_SIZE = 15
"""Size in pixels of the names in segments. Larger names would fit into fewer segments."""
BACKGROUND_COLOR = (24, 26, 30)
TEXT_COLOR = (236, 238, 240)
FILL_OPACITY, VOID_OPACITY = 0.55, 0.4
"""Opacity of the colours of segments, and of the black over other pixels. The image must remain visible below both."""
MIN_NAMED_PIXELS = 200
"""Segments with fewer pixels get a name only if it fits inside."""
GOLDEN_RATIO = 0.61803398875
"""Part of a turn between the hues of successive labels. Its multiples are spread evenly for any number of labels."""


@dataclass(frozen=True)
class OverlaySegment:
    """Drawing data of one segment."""

    label: int
    """Index into the `classes` that are passed with the overlay when it is drawn."""
    score: float | None = None
    """Score written after the class name; None for truth."""


@dataclass(frozen=True)
class Overlay:
    """Segments of a picture: truth or prediction of any task, as one id map."""

    title: str
    id_map: np.ndarray
    """[H, W] integers. VOID_ID and ids without a segment show the dimmed image."""
    segments: Mapping[int, OverlaySegment]


@dataclass(frozen=True)
class HeatMap:
    """Weights over an image, drawn as colours that range from 0 to the map's maximum."""

    title: str
    values: np.ndarray
    """[h, w] floats of at least 0, at any resolution."""


def render_panel(image: np.ndarray, name: str, overlays: Sequence[Overlay], classes: Sequence[Category]) -> bytes:
    """Return a PNG of the image [H, W, 3] uint8 RGB followed by its overlays, left to right."""
    scale = _scale(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    shown = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    columns = [_with_title(shown, name)]
    columns += [_with_title(draw_overlay(shown, overlay, classes), overlay.title) for overlay in overlays]
    return encode_png(_side_by_side(columns))


def render_heat_maps(image: np.ndarray, outline: np.ndarray, name: str, heats: Sequence[HeatMap]) -> bytes:
    """Return a PNG with one column for the image [H, W, 3] uint8 RGB, and one for every map, drawn over the image.

    Every column shows the outline of a mask [H, W] bool. The colours are scaled to each map separately.
    """
    scale = _scale(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    shown = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    edge = _contours(cv2.resize(outline.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST))
    columns = [_with_title(_draw_outline(shown, edge), name)]
    columns += [_with_title(_draw_outline(_draw_heat_map(shown, heat.values), edge), heat.title) for heat in heats]
    return encode_png(_side_by_side(columns))


def contact_sheet(panels: Sequence[bytes], columns: int = 1) -> bytes:
    """Return a JPEG of several panels in rows of `columns`, scaled down to a common width.

    Panels that are narrower, because their images are very tall, are padded on the right.
    """
    images = [decode_picture(panel) for panel in panels]
    widths = [image.shape[1] for image in images]
    width = min(max(widths), max(min(widths), SHEET_PIXELS))
    images = [_to_width(image, width) if image.shape[1] > width else image for image in images]
    rows = []
    for start in range(0, len(images), columns):
        row = images[start : start + columns]
        sheet = np.full(
            (max(i.shape[0] for i in row) + GAP, columns * (width + GAP) - GAP, 3), BACKGROUND_COLOR, dtype=np.uint8
        )
        for position, image in enumerate(row):
            left = position * (width + GAP)
            sheet[: image.shape[0], left : left + image.shape[1]] = image
        rows.append(sheet)
    sheet = np.concatenate(rows)[:-GAP]
    if len(sheet) > JPEG_PIXELS:
        sheet = _to_width(sheet, max(1, sheet.shape[1] * JPEG_PIXELS // len(sheet)))
    return encode_jpeg(sheet)


def encode_png(image: np.ndarray) -> bytes:
    """Return a PNG of an RGB image [H, W, 3] uint8. Equal pixels give equal bytes."""
    success, png = cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_PNG_COMPRESSION, 6])
    assert success
    return png.tobytes()


def encode_jpeg(image: np.ndarray) -> bytes:
    """Return a JPEG of an RGB image [H, W, 3] uint8. It is much smaller than a PNG, but not exact."""
    success, jpeg = cv2.imencode(
        ".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    assert success
    return jpeg.tobytes()


def decode_picture(picture: bytes) -> np.ndarray:
    """Return the RGB pixels [H, W, 3] uint8 of a panel or a sheet of panels."""
    image = cv2.imdecode(np.frombuffer(picture, dtype=np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image[..., ::-1]


def segment_color(category: Category, label: int, instance: int) -> tuple[int, int, int]:
    """Return the RGB colour of segment number `instance` of a class: the colour of the class, slightly varied.

    Classes without a colour (black) get evenly spread hues.
    """
    if any(category.color):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in category.color))
    else:
        hue, saturation, value = label * GOLDEN_RATIO % 1.0, 0.65, 0.9
    if instance:  # the first one has the colour of its class
        shift = instance * GOLDEN_RATIO % 1.0 - 0.5
        hue = (hue + 0.14 * shift) % 1.0
        saturation = min(1.0, max(saturation, 0.35) * (1.0 + 0.3 * shift))
        value = min(1.0, max(0.55, value) * (1.0 - 0.5 * shift))
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _scale(size: tuple[int, int]) -> float:
    """Return the factor that brings the longer side into COLUMN_PIXELS."""
    smallest, largest = COLUMN_PIXELS
    longer = max(size)
    if longer < smallest:
        return smallest / longer
    return min(1.0, largest / longer)


def _to_width(image: np.ndarray, width: int) -> np.ndarray:
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _side_by_side(columns: Sequence[np.ndarray]) -> np.ndarray:
    gap = np.full((columns[0].shape[0], GAP, 3), BACKGROUND_COLOR, dtype=np.uint8)
    return np.concatenate([part for column in columns for part in (column, gap)][:-1], axis=1)


def _draw_heat_map(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Draw a map [h, w] over the image [H, W, 3]. Each value of the map is one cell of uniform colour."""
    height, width = image.shape[:2]
    strength = values / max(float(values.max()), np.finfo(np.float32).tiny)
    cells = cv2.resize(strength.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST)
    colors = cv2.applyColorMap((255 * cells).round().astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    return (0.35 * image + 0.65 * colors).round().astype(np.uint8)


def _draw_outline(image: np.ndarray, edge: np.ndarray) -> np.ndarray:
    drawn = image.copy()
    drawn[edge] = (250, 250, 250)
    return drawn


def _with_title(column: np.ndarray, title: str) -> np.ndarray:
    header = Image.new("RGB", (column.shape[1], HEADER), BACKGROUND_COLOR)
    ImageDraw.Draw(header).text((6, HEADER // 2), to_ascii(title), TEXT_COLOR, _font(FONT_SIZE + 1), anchor="lm")
    return np.concatenate([np.asarray(header), column])


def draw_overlay(image: np.ndarray, overlay: Overlay, classes: Sequence[Category]) -> np.ndarray:
    """Draw tinted segments, thin contours and names of an overlay over an image [H, W, 3] uint8 RGB of any size."""
    height, width = image.shape[:2]
    present, positions = np.unique(overlay.id_map, return_inverse=True)
    positions = positions.reshape(overlay.id_map.shape).astype(np.float32)
    positions = cv2.resize(positions, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.int64)
    drawn_ids = [int(i) if i in overlay.segments and i != VOID_ID else None for i in present]

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    backdrop = 0.5 * image + 0.5 * grey
    colors, opacity = _palette(drawn_ids, overlay, classes)
    picture = backdrop * (1 - opacity[positions]) + colors[positions] * opacity[positions]
    picture[_contours(positions)] = (250, 250, 250)
    canvas = Image.fromarray(picture.round().astype(np.uint8))
    _write_names(canvas, positions, drawn_ids, overlay, classes)
    return np.asarray(canvas)


def _palette(
    drawn_ids: Sequence[int | None], overlay: Overlay, classes: Sequence[Category]
) -> tuple[np.ndarray, np.ndarray]:
    """Return colour [N, 3] and opacity [N, 1] of every id that is present; ids that are not drawn are darkened."""
    colors = np.zeros((len(drawn_ids), 3), dtype=np.float32)
    opacity = np.full((len(drawn_ids), 1), VOID_OPACITY, dtype=np.float32)
    instance_counts: dict[int, int] = {}
    for position, segment_id in enumerate(drawn_ids):
        if segment_id is not None:
            label = overlay.segments[segment_id].label
            colors[position] = segment_color(classes[label], label, instance_counts.get(label, 0))
            opacity[position] = FILL_OPACITY
            instance_counts[label] = instance_counts.get(label, 0) + 1
    return colors, opacity


def _contours(positions: np.ndarray) -> np.ndarray:
    """Return [H, W] bool: pixels whose right or lower neighbour belongs to another segment."""
    edge = np.zeros(positions.shape, dtype=bool)
    edge[:, :-1] |= positions[:, :-1] != positions[:, 1:]
    edge[:-1] |= positions[:-1] != positions[1:]
    return edge


def _write_names(
    canvas: Image.Image,
    positions: np.ndarray,
    drawn_ids: Sequence[int | None],
    overlay: Overlay,
    classes: Sequence[Category],
) -> None:
    """Write class names and scores into the segments, or above segments that are too narrow.

    The largest segments come first. A name is left out if it would overlap another one.
    """
    draw = ImageDraw.Draw(canvas, "RGBA")
    font = _font(FONT_SIZE)
    areas = np.bincount(positions.ravel(), minlength=len(drawn_ids))
    used_boxes: list[tuple[float, float, float, float]] = []
    for position in np.argsort(-areas, kind="stable"):
        segment_id = drawn_ids[position]
        if segment_id is None:
            continue
        segment = overlay.segments[segment_id]
        score = "" if segment.score is None else f" {100 * segment.score:.0f}"
        text = drawn_name(classes[segment.label]) + score
        mask = positions == position
        x, y, margin = _innermost_point(mask)
        left, top, right, bottom = draw.textbbox((x, y), text, font, anchor="mm")
        if 4 * margin < bottom - top or right - left + 6 > 8 * margin:
            if areas[position] < MIN_NAMED_PIXELS:
                continue
            y -= round(bottom) + 2 - _last_run_start(mask[: y + 1, x])
            left, top, right, bottom = draw.textbbox((x, y), text, font, anchor="mm")
        box = _move_inside((left - 3, top - 2, right + 3, bottom + 2), canvas.size)
        if any(_overlap(box, other) for other in used_boxes):
            continue
        used_boxes.append(box)
        draw.rounded_rectangle(box, radius=3, fill=(0, 0, 0, 150))
        draw.text((box[0] - left + 3 + x, box[1] - top + 2 + y), text, TEXT_COLOR, font, anchor="mm")


def _innermost_point(mask: np.ndarray) -> tuple[int, int, float]:
    """Return the pixel of a mask that is farthest from its border, as x and y, and that distance."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(column) - 1, int(row) - 1, float(distance[row, column])


def _last_run_start(column: np.ndarray) -> int:
    """Return the first row of the run of True values at the end of a column [H] bool."""
    gaps = np.flatnonzero(~column)
    return int(gaps[-1]) + 1 if gaps.size else 0


def _move_inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the box, moved into a picture of this width and height."""
    left, top, right, bottom = box
    dx = max(0.0, -left) - max(0.0, right - size[0] + 1)
    dy = max(0.0, -top) - max(0.0, bottom - size[1] + 1)
    return left + dx, top + dy, right + dx, bottom + dy


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
