"""Resize, flip, colour and padding of a whole micro-batch on the device of the training, by plain tensor operations.

Loader processes decode, draw, and cut the id maps, so that targets are those of the other path bit for bit and their
counts are known on the host. What is left of the image is linear in each axis: two matrix products per image, with the
weights of the same interpolation. Pixels differ from the other path by rounding: without colours by at most one grey
level (two with `shrink: bilinear`, where Pillow rounds between its two passes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from m2f.data_pipeline.transforms.augment import PADDING_GREY, ColorJitter, Cut, Span


@dataclass(frozen=True)
class Axis:
    """One axis of the crops of B images; float64 [B] each, in pixels."""

    source: Tensor
    """Length of the part of the source image."""
    scale: Tensor
    skip: Tensor
    """Scaled pixels before the first that is shown."""
    length: Tensor
    """Scaled pixels that are shown."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Axis:
        """The same on another device."""
        return Axis(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))


@dataclass(frozen=True)
class Cuts:
    """What becomes of B source images."""

    rows: Axis
    columns: Axis
    flip: Tensor
    """[B] bool"""
    area: Tensor
    """[B] bool: averages areas (OpenCV's INTER_AREA)."""
    antialias: bool
    """Pillow's bilinear interpolation instead of OpenCV's."""
    color: Tensor
    """[B, 5] float32: contrast first, brightness, contrast, saturation, hue; NaN leaves a step out."""
    colored: bool
    """Whether any image of the batch has such a step."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Cuts:
        """The same on another device."""
        return replace(
            self,
            rows=self.rows.to(device, non_blocking),
            columns=self.columns.to(device, non_blocking),
            flip=self.flip.to(device, non_blocking=non_blocking),
            area=self.area.to(device, non_blocking=non_blocking),
            color=self.color.to(device, non_blocking=non_blocking),
        )


def stack_cuts(cuts: Sequence[Cut | None]) -> Cuts:
    """The cuts of a micro-batch; None is a filler that shows nothing."""
    real = [cut for cut in cuts if cut is not None]
    shrinks = [cut is not None and cut.rows.scale < 1 and cut.columns.scale < 1 for cut in cuts]
    antialias = any(cut.params.shrink == "bilinear" for cut in real)
    return Cuts(
        rows=_stack_axis([None if cut is None else cut.rows for cut in cuts]),
        columns=_stack_axis([None if cut is None else cut.columns for cut in cuts]),
        flip=torch.tensor([cut is not None and cut.params.flip for cut in cuts]),
        area=torch.tensor([shrink and not antialias for shrink in shrinks]),
        antialias=antialias,
        color=torch.stack([_color_row(None if cut is None else cut.params.color) for cut in cuts]),
        colored=any(cut.params.color is not None for cut in real),
    )


def stack_sources(sources: Sequence[np.ndarray]) -> Tensor:
    """[B, h, w, 3] uint8 images, filled up on the right and below."""
    height, width = (max(source.shape[axis] for source in sources) for axis in (0, 1))
    stacked = np.zeros((len(sources), height, width, 3), dtype=np.uint8)
    for target, source in zip(stacked, sources, strict=True):
        target[: source.shape[0], : source.shape[1]] = source
    return torch.from_numpy(stacked)


def render(sources: Tensor, cuts: Cuts, canvas: tuple[int, int]) -> Tensor:
    """The images [B, 3, H, W] uint8 in channels_last memory, on the device of the arguments.

    Args:
        sources: [B, h, w, 3] uint8, filled up on the right and below.
        cuts: what is shown of each and how.
        canvas: H and W; what an image does not fill is grey.
    """
    never = torch.zeros_like(cuts.flip)
    rows = _weights(cuts.rows, canvas[0], sources.shape[1], cuts, never)
    columns = _weights(cuts.columns, canvas[1], sources.shape[2], cuts, cuts.flip)
    pixels = sources.permute(0, 3, 1, 2).float() @ columns.mT[:, None]
    pixels = (rows[:, None] @ pixels).round().clamp(0, 255)
    if cuts.colored:
        pixels = _jitter_color(pixels, cuts.color)
    shown = rows.any(2)[:, None, :, None] & columns.any(2)[:, None, None, :]
    return torch.where(shown, pixels, PADDING_GREY).byte().contiguous(memory_format=torch.channels_last)


def _weights(axis: Axis, length: int, source: int, cuts: Cuts, flip: Tensor) -> Tensor:
    """[B, length, source] share of every source pixel in every pixel of the canvas; zeros outside what is shown."""
    count, scale, skip, shown = (values[:, None, None] for values in (axis.source, axis.scale, axis.skip, axis.length))
    index = torch.arange(length, device=flip.device, dtype=torch.float64)[None, :, None]
    pixel = torch.arange(source, device=flip.device, dtype=torch.float64)[None, None]
    inside = (index < shown) & (pixel < count)
    index = skip + torch.where(flip[:, None, None], shown - 1 - index, index)
    center = (index + 0.5) / scale
    if cuts.antialias:
        weights = (1 - (pixel + 0.5 - center).abs() / (1 / scale).clamp(min=1)).clamp(min=0)
    else:
        at = torch.minimum((center - 0.5).clamp(min=0), count - 1)
        linear = (1 - (pixel - at).abs()).clamp(min=0)
        covered = torch.minimum((index + 1) / scale, pixel + 1) - torch.maximum(index / scale, pixel)
        weights = torch.where(cuts.area[:, None, None], covered.clamp(min=0), linear)
    weights = weights * inside
    return (weights / weights.sum(2, keepdim=True).clamp(min=1e-12)).float()


def _jitter_color(images: Tensor, color: Tensor) -> Tensor:
    """`augment.jitter_color` of whole numbers [B, 3, H, W] in floats; rounding of hues differs from OpenCV's tables."""
    first, brightness, contrast, saturation, hue = (column[:, None, None] for column in color.unbind(1))
    factor = torch.nan_to_num(contrast, nan=1.0)[:, None]
    first = first[:, None] > 0
    images = _cut_off(images + torch.nan_to_num(brightness, nan=0.0)[:, None])
    images = torch.where(first, _cut_off(images * factor), images)
    h, s, v = _to_hsv(images)
    saturated = _to_rgb(h, _cut_off(s * saturation), v)
    images = torch.where(saturation.isnan()[:, None], images, saturated)
    h, s, v = _to_hsv(images)
    turned = _to_rgb((h + hue) % 180, s, v)
    images = torch.where(hue.isnan()[:, None], images, turned)
    return torch.where(first, images, _cut_off(images * factor))


def _cut_off(values: Tensor) -> Tensor:
    return values.clamp(0, 255).floor()


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue [B, H, W] of 180 steps, saturation and value of 255, whole numbers, as OpenCV has them."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    spread = value - low
    sector = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (30 * sector / spread.clamp(min=1)).round() % 180
    return hue, (255 * spread / value.clamp(min=1)).round(), value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    sector = hue / 30
    saturation = saturation / 255
    channels = [
        value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))
        for k in ((offset + sector) % 6 for offset in (5, 3, 1))
    ]
    return torch.stack(channels, dim=1).round()


def _stack_axis(spans: Sequence[Span | None]) -> Axis:
    values = [
        (1, 1.0, 0, 0) if span is None else (span.stop - span.start, span.scale, span.skip, span.length)
        for span in spans
    ]
    return Axis(*torch.tensor(values, dtype=torch.float64).unbind(1))


def _color_row(jitter: ColorJitter | None) -> Tensor:
    if jitter is None:
        return torch.tensor([0.0, *[float("nan")] * 4])
    steps = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
    row = [float("nan") if step is None else float(step) for step in steps]
    return torch.tensor([float(jitter.contrast_first), *row])
