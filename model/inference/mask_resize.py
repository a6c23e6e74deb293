"""Resize mask logits from stride 4 to the original image, in bands of rows to bound memory.

The results equal those of resizing whole masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.model.loss.point_sampling import chunk_elements


@dataclass(frozen=True)
class ImageGeometry:
    """Sizes of an image before and after preprocessing, as (height, width) in pixels."""

    padded_size: tuple[int, int]
    """Size of the model's input, padded on the right and at the bottom."""
    resized_size: tuple[int, int]
    """Size of the image inside the input."""
    original_size: tuple[int, int]
    """Size of the image as it was read."""


class MaskResize:
    """Two bilinear resizes: from stride 4 to the padded input, and from the image in it to the original size.

    Each is separable into rows and columns, so any rows can be computed independently.
    """

    def __init__(self, mask_embeddings: Tensor, mask_features: Tensor, geometry: ImageGeometry) -> None:
        with torch.autocast(mask_features.device.type, enabled=False):
            self._logits = torch.einsum("qc,chw->qhw", mask_embeddings.float(), mask_features.float())
        self.geometry = geometry
        self._to_input = RowTaps.between(self._logits.shape[1], geometry.padded_size[0])
        self._to_original = RowTaps.between(geometry.resized_size[0], geometry.original_size[0])

    def bands(self, values_per_pixel: int) -> Iterator[slice]:
        """Return slices that together cover all rows of the original image, each small enough for one chunk of work."""
        height, width = self.geometry.original_size
        return row_bands(height, values_per_pixel * max(self.geometry.padded_size[1], width), self._logits.device)

    def original(self, rows: slice) -> Tensor:
        """Return mask logits [Q, rows, W] for rows of the original image.

        Rows are interpolated first, from the few source rows that are needed.
        """
        if self.geometry.resized_size == self.geometry.original_size:
            return self.input(rows)  # windows: the second resize is the identity
        source, taps = self._to_original.for_rows(rows)
        at_rows = taps.apply(self._to_input.of(source).apply(self._logits))
        return self.original_columns(self._input_columns(at_rows))

    def input(self, rows: slice) -> Tensor:
        """Return mask logits [Q, rows, w] for rows of the image in the input."""
        return self._input_columns(self._to_input.of(rows).apply(self._logits))

    def to_original(self, rows: slice) -> tuple[slice, RowTaps]:
        """Return the input rows needed for rows of the original image, and the taps that interpolate them."""
        return self._to_original.for_rows(rows)

    def original_columns(self, maps: Tensor) -> Tensor:
        """Resize [n, rows, w] from the columns of the image in the input to those of the original image."""
        return resize_columns(maps, self.geometry.original_size[1])

    def _input_columns(self, maps: Tensor) -> Tensor:
        """Resize [n, rows, w] to the columns of the image in the input."""
        return resize_columns(maps, self.geometry.padded_size[1])[..., : self.geometry.resized_size[1]]


def row_bands(height: int, values_per_row: int, device: torch.device) -> Iterator[slice]:
    """Return slices of consecutive rows, each with as many rows as fit into one chunk of work."""
    step = max(1, chunk_elements(device) // values_per_row)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


def resize_columns(maps: Tensor, width: int) -> Tensor:
    """Resize maps [n, rows, w] to another width: the horizontal half of a bilinear resize."""
    return F.interpolate(maps[None], (maps.shape[1], width), mode="bilinear")[0]


class RowTaps(NamedTuple):
    """Vertical half of a bilinear resize: the two source rows of every target row.

    The tensors are on the host; coordinates are computed in fp32.
    """

    lower: Tensor
    """[n] int64 first source row."""
    upper: Tensor
    """[n] int64 second source row."""
    weight: Tensor
    """[n] float32 weight of the second source row."""

    @staticmethod
    def between(source: int, target: int) -> RowTaps:
        """Return the taps of a resize as `F.interpolate(mode="bilinear", align_corners=False)` computes them."""
        position = ((torch.arange(target) + 0.5) * (torch.tensor(float(source)) / target) - 0.5).clamp(min=0)
        lower = position.long().clamp(max=source - 1)
        return RowTaps(lower, (lower + 1).clamp(max=source - 1), position - lower)

    def of(self, rows: slice) -> RowTaps:
        """Return the taps of some target rows."""
        return RowTaps(self.lower[rows], self.upper[rows], self.weight[rows])

    def for_rows(self, rows: slice) -> tuple[slice, RowTaps]:
        """Return the source rows needed for some target rows, and taps with indices relative to them."""
        taps = self.of(rows)
        first, last = int(taps.lower[0]), int(taps.upper[-1])
        return slice(first, last + 1), RowTaps(taps.lower - first, taps.upper - first, taps.weight)

    def apply(self, source: Tensor) -> Tensor:
        """Return target rows [Q, n, w] of `source` [Q, rows, w]."""
        lower, upper, weight = (t.to(source.device) for t in self)
        weight = weight[:, None]
        return source[:, lower] * (1 - weight) + source[:, upper] * weight
