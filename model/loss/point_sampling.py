"""Bilinear sampling at points: predictions from feature maps, ground truth directly from id maps.

Points are always (x, y) in [0, 1] over the whole map. Pixel centres are at (i + 0.5) / size (align_corners=False), and
values outside the map are zero. The arithmetic equals `F.grid_sample(map, 2 * points - 1)`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.model.structures import ignore_id


def chunk_elements(device: torch.device) -> int:
    """Return roughly how many fp32 values one chunk may hold: 16 MiB on a CPU (near a core's cache), else 512 MiB."""
    return 2**22 if device.type == "cpu" else 2**27


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Return values [R, P] of single-channel maps [R, h, w] at points [R, P, 2]; differentiable in the maps.

    The CUDA backward pass of grid_sample adds in random order, so deterministic mode uses a gather instead.
    """
    if torch.are_deterministic_algorithms_enabled():
        index, weight = _taps(points, *maps.shape[1:])
        return (maps.flatten(1).gather(1, index.flatten(1)).view(index.shape) * weight).sum(-1)
    return F.grid_sample(maps[:, None], points[:, :, None] * 2 - 1, align_corners=False)[:, 0, :, 0]


def most_uncertain(logits: Tensor, count: int) -> Tensor:
    """Return indices [R, count] of the points whose logits [R, P] are nearest to 0, in no particular order."""
    distance = logits.detach().abs()
    if distance.device.type == "cpu":  # NumPy's partition is vectorised: five times faster than topk
        return torch.from_numpy(np.argpartition(distance.numpy(), count - 1, axis=1)[:, :count])
    return distance.topk(count, dim=1, largest=False, sorted=False).indices


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Return features [l, B, P, C] of channels-last maps [B, h, w, C] at points [l, B, P, 2].

    Not differentiable in the points. Each point is one weighted embedding bag of four rows. Rows are contiguous, unlike
    the channel planes that grid_sample reads; this is eight times faster on CPU with 256 channels.
    """
    num_images, height, width, channels = features.shape
    index, weight = _taps(points, height, width)
    index += torch.arange(num_images, device=features.device)[:, None, None] * (height * width)
    bags = F.embedding_bag(
        index.view(-1, 4), features.reshape(-1, channels), per_sample_weights=weight.view(-1, 4), mode="sum"
    )
    return bags.view(*points.shape[:-1], channels)


def _taps(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return index into the flattened map and weight, both [..., P, 4], of the four pixels around every point.

    Pixels outside the map have weight 0.
    """
    cells, place = _cells(points, height, width)
    before, after = (cells - 1).clamp_(min=0), cells.clone()
    sizes = width, height
    for axis, size in enumerate(sizes):
        after[axis].clamp_(max=size - 1)
    inside = torch.stack([cells[axis] < size for axis, size in enumerate(sizes)])
    columns, rows = torch.stack((before, after), dim=-1)
    x_weights, y_weights = torch.stack(((1 - place) * (cells > 0), place * inside), dim=-1)
    index = (rows * width)[..., :, None] + columns[..., None, :]
    weight = y_weights[..., :, None] * x_weights[..., None, :]
    return index.flatten(-2), weight.flatten(-2)


class LabelMaps(NamedTuple):
    """Id maps of a micro-batch, packed so that one read returns the four ids around a point."""

    cells: Tensor
    """[B, Y, (H + 1) * (W + 1)] int32 (four uint8 ids) or int64 (four int16 ids). The order is upper left, upper right,
    lower left, lower right. Ids outside the map are the ignore id, which no target has."""
    id_dtype: torch.dtype
    """Data type of the id maps: uint8 or int16."""
    height: int
    """Height of the id maps in pixels."""
    width: int
    """Width of the id maps in pixels."""

    @staticmethod
    def pack(id_maps: Tensor) -> LabelMaps:
        """Pack id maps [B, Y, H, W] of uint8 or int16."""
        padded = F.pad(id_maps, (1, 1, 1, 1), value=ignore_id(id_maps.dtype))
        upper, lower = padded[..., :-1, :], padded[..., 1:, :]
        quads = torch.stack((upper[..., :-1], upper[..., 1:], lower[..., :-1], lower[..., 1:]), dim=-1)
        packed = torch.int32 if id_maps.dtype == torch.uint8 else torch.int64
        return LabelMaps(quads.view(packed).flatten(2), id_maps.dtype, *id_maps.shape[-2:])

    def rows(self, row_map: Tensor, local_id: Tensor, points: Tensor) -> Tensor:
        """Return soft labels [R, P] of one target per row at the row's own points [R, P, 2].

        `row_map` [R] indexes the flattened first two axes of the id maps; `local_id` [R] is the target's id.
        """
        cell, x, y = self._locate(points)
        cell += (row_map * self.cells.shape[-1])[:, None]
        quads = self.cells.flatten().index_select(0, cell.flatten()).view(cell.shape)
        return self._weigh(quads, local_id, x, y)

    def images(self, layer: Tensor, local_id: Tensor, points: Tensor) -> Tensor:
        """Return soft labels [l, B, N, P] of all targets at points [l, B, P, 2] of their image.

        `layer` and `local_id` are [B, N].
        """
        cell, x, y = self._locate(points)
        images = torch.arange(len(self.cells), device=points.device)[:, None]
        quads = self.cells.transpose(1, 2)[images, cell].transpose(-1, -2)  # [l, B, Y, P]
        return self._weigh(quads[:, images, layer], local_id, x[:, :, None], y[:, :, None])

    def _locate(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the index of every point's cell and the point's position (x, y) inside it."""
        (column, row), (x, y) = _cells(points, self.height, self.width)
        return row.mul_(self.width + 1).add_(column), x, y

    def _weigh(self, quads: Tensor, local_id: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Sum the bilinear weights of the corners with the given id.

        The result equals grid_sample of the mask bit for bit.
        """
        ids = quads.contiguous().view(self.id_dtype).view(*quads.shape, 4)
        hits = (ids == local_id[..., None, None].to(self.id_dtype)).unbind(-1)
        left, upper = 1 - x, 1 - y
        labels = hits[0] * (left * upper)
        for hit, weight in zip(hits[1:], (x * upper, left * y, x * y), strict=True):
            labels += hit * weight
        return labels


def _cells(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the cells [2, ..., P] (x, y) between pixel centres and the positions [2, ..., P] of the points in them.

    Cells count from 0 (before the first centre) to the size (after the last). Rounding matches grid_sample on CPU: from
    [0, 1] to [-1, 1], and from there to pixels with one fused multiply-add.
    """
    shifted = points.movedim(-1, 0).mul(2).sub_(1).add_(1)
    half = shifted.new_full((1,), -0.5).expand(shifted.shape[1:])
    pixel = torch.stack(
        [torch.add(half, axis, alpha=size / 2) for axis, size in zip(shifted, (width, height), strict=True)]
    )
    lower = pixel.floor()
    return lower.add(1).long(), pixel.sub_(lower)
