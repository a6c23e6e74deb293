"""Augmentation of an image and its id maps. Parameters are drawn first and then applied by a pure function.

With `shrink: area`, only the part of the image that the crop needs is resized, by OpenCV. On a cropped axis this shifts
the content by at most half an output pixel (mostly less than a tenth) compared with resizing the whole image. Image
and id maps shift together. An axis that is not cropped has no shift.

With `shrink: bilinear`, Pillow resizes the whole image first. The result equals the official code's, pixel for pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

import cv2
import numpy as np
from PIL import Image

from m2f.data_pipeline.config import AugmentConfig, LargeScaleJitter, ScaleJitter, ShortestEdgeCrop, Shrink

PADDING_GREY = 128
"""Grey level of padding, as in the official mappers."""

_CROP_FIRST_EDGES = (400, 500, 600)
"""Shortest edges at which DETR crops before the final resize."""

_MAX_EARLIER_START = 16  # source pixels by which a cut may begin earlier than needed


@dataclass(frozen=True)
class ColorJitter:
    """Photometric distortion of SSD (Liu et al., 2016, section 2.2) for uint8 images. None skips a step."""

    contrast_first: bool = True
    """Whether contrast comes before saturation and hue; otherwise it comes after them."""
    brightness: float | None = None
    """Grey levels to add."""
    contrast: float | None = None
    """Factor for all channels."""
    saturation: float | None = None
    """Factor for the saturation."""
    hue: int | None = None
    """Steps to add to the hue; OpenCV's hue has 180 steps of 2 degrees."""


@dataclass(frozen=True)
class AugmentParams:
    """Random parameters of one sample for resizing, cropping, colour jitter, flipping and padding."""

    scaled: tuple[int, int]
    """Height and width of the whole image after resizing."""
    offset: tuple[int, int]
    """y and x of the first pixel of the crop in the scaled image, before the flip."""
    canvas: tuple[int, int]
    """Height and width of the result. The crop is as large as possible; the rest, right and below, is padding."""
    flip: bool = False
    """Whether to mirror left and right after the crop."""
    shrink: Shrink = "area"
    color: ColorJitter | None = None


@dataclass(frozen=True)
class AxisCrop:
    """One axis of a crop.

    Pixels start..stop - 1 of the `source` pixels are resized by the factor `scale`. Then `skip` pixels are dropped, and
    the next `length` pixels are kept.
    """

    start: int
    stop: int
    source: int
    scale: float
    skip: int
    length: int

    def nearest(self) -> np.ndarray:
        """Return [length]: index of the source pixel under the centre of each output pixel."""
        index = self.start + np.floor((np.arange(self.length) + self.skip + 0.5) / self.scale).astype(np.intp)
        return np.minimum(index, self.source - 1)

    def pillow_nearest(self, mirrored: bool = False) -> np.ndarray:
        """Return the same indices computed by Pillow, which decides differently if two pixels are equally near.

        With `mirrored`, the axis is mirrored before the resize, and the result is mirrored back. This equals the
        official code, which flips before it resizes.
        """
        pixels = np.arange(self.source, dtype=np.int32)[None]
        scaled = round(self.source * self.scale)
        index = np.asarray(Image.fromarray(pixels).resize((scaled, 1), Image.Resampling.NEAREST))[0]
        if mirrored:
            index = self.source - 1 - index[::-1]
        return index[self.skip : self.skip + self.length]


@dataclass(frozen=True)
class Augmented:
    """An augmented image with its id maps."""

    image: np.ndarray
    """[H, W, 3] uint8."""
    id_maps: np.ndarray
    """[Y, H, W] with the dtype of the input."""
    size: tuple[int, int]
    """Height and width of the part that shows the image; the rest is padding."""


def draw_params(rng: np.random.Generator, size: tuple[int, int], config: AugmentConfig) -> AugmentParams:
    """Draw random parameters for an image of `size` (height, width)."""
    match config:
        case LargeScaleJitter():
            return draw_large_scale_jitter(rng, size, config)
        case ShortestEdgeCrop():
            return draw_shortest_edge_crop(rng, size, config)
        case ScaleJitter():
            return draw_scale_jitter(rng, size, config)
        case _:
            assert_never(config)


def draw_large_scale_jitter(rng: np.random.Generator, size: tuple[int, int], config: LargeScaleJitter) -> AugmentParams:
    """Draw a flip with probability 1/2, a uniform scale and crop position, and colour jitter if configured."""
    flip, scale, crop_position = rng.random(3)
    scale = config.min_scale + (config.max_scale - config.min_scale) * float(scale)
    params = large_scale_jitter(size, config, flip=bool(flip < 0.5), scale=scale, crop_position=float(crop_position))
    return replace(params, color=draw_color_jitter(rng)) if config.color else params


def large_scale_jitter(
    size: tuple[int, int], config: LargeScaleJitter, *, flip: bool, scale: float, crop_position: float
) -> AugmentParams:
    """Return the official geometry for given draws.

    The official code flips before it crops, so a flip mirrors the horizontal offset here. One `crop_position` in [0, 1]
    determines both offsets.
    """
    factor = min(config.size * scale / size[0], config.size * scale / size[1])
    height, width = (max(1, round(side * factor)) for side in size)
    y, x = (round(max(side - config.size, 0) * crop_position) for side in (height, width))
    if flip:
        x = max(width - config.size, 0) - x
    return AugmentParams(
        scaled=(height, width), offset=(y, x), canvas=(config.size, config.size), flip=flip, shrink=config.shrink
    )


def draw_shortest_edge_crop(rng: np.random.Generator, size: tuple[int, int], config: ShortestEdgeCrop) -> AugmentParams:
    """Draw a shortest edge, a uniform crop position, colour jitter, and a flip with probability 1/2."""
    edge, y, x, flip = rng.random(4)
    scaled = shortest_edge_size(size, _pick(config.shortest_edges, edge), config.max_size)
    largest_offset = tuple(max(side - crop, 0) for side, crop in zip(scaled, config.crop, strict=True))
    return AugmentParams(
        scaled=scaled,
        offset=(_uniform_int(0, largest_offset[0], y), _uniform_int(0, largest_offset[1], x)),
        canvas=config.crop,
        flip=bool(flip < 0.5),
        shrink=config.shrink,
        color=draw_color_jitter(rng) if config.color else None,
    )


def draw_scale_jitter(rng: np.random.Generator, size: tuple[int, int], config: ScaleJitter) -> AugmentParams:
    """Draw a flip with probability 1/2 and a shortest edge.

    With `crop_first`, the shortest edge refers to a random part of the image in half of the cases.
    """
    flip, edge, use_part, part_edge, height, width, y, x = rng.random(8).tolist()
    inner, part, start = size, size, (0, 0)
    if config.crop_first is not None and use_part < 0.5:
        inner = shortest_edge_size(size, _pick(_CROP_FIRST_EDGES, part_edge))
        low, high = config.crop_first
        rows, columns = ((min(side, low), min(side, high)) for side in inner)
        part = _uniform_int(*rows, height), _uniform_int(*columns, width)
        start = _uniform_int(0, inner[0] - part[0], y), _uniform_int(0, inner[1] - part[1], x)
    canvas = shortest_edge_size(part, _pick(config.shortest_edges, edge), config.max_size)
    # Combine both resizes: scale the whole image so that the part gets its final size.
    rows, columns = (_scaled_axis(*axis) for axis in zip(inner, part, start, canvas, strict=True))
    scaled, offset = zip(rows, columns, strict=True)
    return AugmentParams(scaled=scaled, offset=offset, canvas=canvas, flip=flip < 0.5, shrink=config.shrink)


def _scaled_axis(side: int, part: int, start: int, canvas: int) -> tuple[int, int]:
    """Return the length of an axis and the start of a part of it, after scaling the part to `canvas` pixels.

    Before the scaling, the axis has `side` pixels and the part covers `part` pixels, starting at `start`.
    """
    scaled = max(canvas, round(side * canvas / part))
    return scaled, min(round(start * canvas / part), scaled - canvas)


def _pick(values: tuple[int, ...], draw: float) -> int:
    return values[int(draw * len(values))]


def _uniform_int(low: int, high: int, draw: float) -> int:
    """Map a draw from [0, 1) to an integer from low to high, both included."""
    return low + int(draw * (high - low + 1))


def shortest_edge_size(size: tuple[int, int], shortest_edge: int, max_size: int | None = None) -> tuple[int, int]:
    """Return height and width after Detectron2's shortest-edge resize.

    The shorter side becomes `shortest_edge`. If the longer side then exceeds `max_size`, it becomes `max_size` instead.
    """
    factor = shortest_edge / min(size)
    if max_size is not None and max(size) * factor > max_size:
        factor = max_size / max(size)
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def draw_color_jitter(rng: np.random.Generator) -> ColorJitter:
    """Draw colour jitter with the official ranges. Each step has probability 1/2. Always consumes nine draws."""
    draws = [float(draw) for draw in rng.random(9)]
    use = [draw < 0.5 for draw in draws[:5]]
    brightness, contrast, saturation, hue = draws[5:]
    return ColorJitter(
        contrast_first=use[0],
        brightness=64 * brightness - 32 if use[1] else None,
        contrast=0.5 + contrast if use[2] else None,
        saturation=0.5 + saturation if use[3] else None,
        hue=int(hue * 37) - 18 if use[4] else None,
    )


def augment(image: np.ndarray, id_maps: np.ndarray, params: AugmentParams, ignore: int) -> Augmented:
    """Apply drawn parameters. A pure function, which does not modify its inputs.

    Args:
        image: [H, W, 3] uint8 RGB.
        id_maps: [Y, H, W] uint8 or int16.
        params: the drawn parameters.
        ignore: value of the id maps in the padding.
    """
    axis_crop = _cropped_axis if params.shrink == "area" else _whole_axis
    rows, columns = map(axis_crop, image.shape[:2], params.scaled, params.offset, params.canvas)
    crop = _resize_crop(image, rows, columns, params.shrink)
    if params.color is not None:
        crop = jitter_color(crop, params.color)
    if params.flip:
        crop = cv2.flip(crop, 1)
    return Augmented(
        image=_pad(crop, params.canvas, PADDING_GREY, axis=0),
        id_maps=_pad(_resize_id_maps(id_maps, rows, columns, params), params.canvas, ignore, axis=1),
        size=(rows.length, columns.length),
    )


def _resize_id_maps(id_maps: np.ndarray, rows: AxisCrop, columns: AxisCrop, params: AugmentParams) -> np.ndarray:
    """Return the crop of id maps [Y, H, W] with nearest-neighbour interpolation, flipped if `params.flip` is set."""
    if params.shrink == "area":
        row_index, column_index = rows.nearest(), columns.nearest()
    else:
        row_index, column_index = rows.pillow_nearest(), columns.pillow_nearest(mirrored=params.flip)
    if params.flip:
        column_index = column_index[::-1]
    source = id_maps[:, rows.start : rows.stop]
    return np.take(np.take(source, column_index, axis=2), row_index - rows.start, axis=1)


def resize_image(image: np.ndarray, size: tuple[int, int], shrink: Shrink = "area") -> np.ndarray:
    """Resize a whole image [H, W, 3] to a given height and width."""
    rows, columns = (
        _whole_axis(source, target, 0, target) for source, target in zip(image.shape[:2], size, strict=True)
    )
    return _resize_crop(image, rows, columns, shrink)


def jitter_color(image: np.ndarray, jitter: ColorJitter) -> np.ndarray:
    """Apply colour jitter to an image [H, W, 3] uint8, in the official order, truncating to uint8 after each step."""
    image = _linear(image, 1.0, jitter.brightness)
    if jitter.contrast_first:
        image = _linear(image, jitter.contrast, 0.0)
    if jitter.saturation is not None:
        image = _hsv_channel(image, 1, _linear_table(jitter.saturation, 0.0))
    if jitter.hue is not None:
        hues = (np.arange(256) + jitter.hue) % 180
        image = _hsv_channel(image, 0, hues.astype(np.uint8))
    if not jitter.contrast_first:
        image = _linear(image, jitter.contrast, 0.0)
    return image


def _linear(image: np.ndarray, factor: float | None, term: float | None) -> np.ndarray:
    if factor is None or term is None:
        return image
    return cv2.LUT(image, _linear_table(factor, term))


def _linear_table(factor: float, term: float) -> np.ndarray:
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(term)
    return np.clip(values, 0, 255).astype(np.uint8)


def _hsv_channel(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[:, :, channel] = cv2.LUT(np.ascontiguousarray(hsv[:, :, channel]), table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _pad(array: np.ndarray, canvas: tuple[int, int], value: int, axis: int) -> np.ndarray:
    """Pad the axes `axis` and `axis + 1` at their ends to the size of the canvas."""
    height, width = array.shape[axis : axis + 2]
    if (height, width) == canvas:
        return array
    padded = np.full((*array.shape[:axis], *canvas, *array.shape[axis + 2 :]), value, dtype=array.dtype)
    padded[(slice(None),) * axis + (slice(height), slice(width))] = array
    return padded


def _whole_axis(source: int, scaled: int, offset: int, canvas_length: int) -> AxisCrop:
    """Return the crop of an axis that scales all `source` pixels to `scaled` pixels.

    At most `canvas_length` pixels are kept, starting at `offset`.
    """
    return AxisCrop(0, source, source, scaled / source, offset, min(scaled, canvas_length))


def _cropped_axis(source: int, scaled: int, offset: int, canvas_length: int) -> AxisCrop:
    """Return the same crop as `_whole_axis`, but scale only the part of the axis that is needed."""
    scale, length = scaled / source, min(scaled, canvas_length)
    if length == scaled:
        return _whole_axis(source, scaled, 0, canvas_length)
    # Interpolation needs one more pixel on both sides. A resized part starts at a whole output pixel, so the content
    # shifts least for the start whose scaled position is closest to a whole number.
    latest = max(0, int(offset / scale) - 1)
    starts = np.arange(max(0, latest - _MAX_EARLIER_START), latest + 1)
    start = int(starts[np.argmin(np.abs(starts * scale - np.round(starts * scale)))])
    stop = min(source, int(np.ceil((offset + length) / scale)) + 1)
    skip = min(round(offset - start * scale), round((stop - start) * scale) - length)
    return AxisCrop(start, stop, source, scale, skip, length)


def _resize_crop(image: np.ndarray, rows: AxisCrop, columns: AxisCrop, shrink: Shrink) -> np.ndarray:
    part = image[rows.start : rows.stop, columns.start : columns.stop]
    if shrink == "bilinear":
        width, height = (round((axis.stop - axis.start) * axis.scale) for axis in (columns, rows))
        resized = np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.BILINEAR))
    else:
        interpolation = cv2.INTER_AREA if rows.scale < 1 and columns.scale < 1 else cv2.INTER_LINEAR
        resized = cv2.resize(part, None, fx=columns.scale, fy=rows.scale, interpolation=interpolation)
    return resized[rows.skip : rows.skip + rows.length, columns.skip : columns.skip + columns.length]
