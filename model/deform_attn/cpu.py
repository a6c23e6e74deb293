"""Deformable attention for CPUs: bilinear samples as weighted sums of table rows.

The table holds all pixels of all levels, each level with a margin of zeros two pixels wide. A sample outside its map
reads zeros there, so it needs no special case. Axis letters are those of `m2f.model.deform_attn.module`, and T table
rows per image.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]
"""(height, width) of every level, in the order of the flattened pixels."""

MARGIN = 2
"""Margin in pixels. It contains both neighbours of a position that is clamped just outside the map."""


def padded_table(value: Tensor, shapes: Shapes) -> Tensor:
    """Return the table [B * T, D] of values [B, S, G, D]; T is the number of pixels with margins times the heads."""
    batch, _, heads, dim = value.shape
    table = value.new_zeros(batch, _padded_pixels(shapes), heads, dim)
    for inner, pixels in _levels(table, value, shapes):
        inner.copy_(pixels)
    return table.view(-1, dim)


def unpadded_values(table: Tensor, like: Tensor, shapes: Shapes) -> Tensor:
    """Return the values [B, S, G, D] of a table without its margins; the inverse of `padded_table`.

    `like` has the shape of the result.
    """
    batch, _, heads, dim = like.shape
    value = table.new_empty(like.shape)
    for inner, pixels in _levels(table.view(batch, -1, heads, dim), value, shapes):
        pixels.copy_(inner)
    return value


def _padded_pixels(shapes: Shapes) -> int:
    return sum((height + 2 * MARGIN) * (width + 2 * MARGIN) for height, width in shapes)


def _levels(table: Tensor, value: Tensor, shapes: Shapes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views [B, H, W, G, D] of every level, in the table and in the values."""
    row = pixel = 0
    for height, width in shapes:
        rows, columns = height + 2 * MARGIN, width + 2 * MARGIN
        level = table[:, row : row + rows * columns].unflatten(1, (rows, columns))
        inner = level[:, MARGIN : MARGIN + height, MARGIN : MARGIN + width]
        yield inner, value[:, pixel : pixel + height * width].unflatten(1, (height, width))
        row, pixel = row + rows * columns, pixel + height * width


class Samples(NamedTuple):
    """Positions of samples in the table."""

    rows: Tensor
    """[B, Q, G, 4, L * P] int32 table rows of the upper left, upper right, lower left and lower right neighbours."""
    x: Tensor
    """[B, Q, G, L * P] distance to the right of the left neighbours, in pixels; NaN if a location is not finite."""
    y: Tensor
    """[B, Q, G, L * P] distance below the upper neighbours, in pixels; NaN if a location is not finite."""

    @staticmethod
    def locate(shapes: Shapes, locations: Tensor) -> Samples:
        """Compute the samples at locations [B, Q, G, L, P, 2]."""
        batch, _, heads, _, points, _ = locations.shape
        width, height, stride, corner = _level_table(shapes, points, locations)
        low_x, x = _split(locations[..., 0].flatten(-2), width)
        low_y, y = _split(locations[..., 1].flatten(-2), height)
        total = _padded_pixels(shapes)
        pixel = low_y.mul_(stride).add_(low_x).add_(corner).int()
        # A NaN location is clamped to some valid pixel. Its weight stays NaN, so the result does too.
        pixel.clamp_(0, total - 2 - (shapes[-1][1] + 2 * MARGIN))
        device = locations.device
        image = torch.arange(batch, dtype=torch.int32, device=device).view(batch, 1, 1, 1) * (total * heads)
        head = torch.arange(heads, dtype=torch.int32, device=device).view(1, 1, heads, 1)
        upper_left = pixel.mul_(heads).add_(image + head)
        steps = torch.stack([stride * down + right for down in (0, 1) for right in (0, 1)]).int() * heads
        return Samples(upper_left[..., None, :] + steps, x, y)

    def row_weights(self, weights: Tensor) -> Tensor:
        """Return weights [B, Q, G, 4, L * P] of the rows from attention weights [B, Q, G, L, P]."""
        weights = weights.flatten(-2)
        left, upper, lower = 1 - self.x, (1 - self.y) * weights, self.y * weights
        return torch.stack((upper * left, upper * self.x, lower * left, lower * self.x), dim=-2)

    def gradients(self, products: Tensor, weights: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Return the gradients of locations and attention weights from those of `row_weights`, [B, Q, G, 4, L * P]."""
        upper_left, upper_right, lower_left, lower_right = products.unbind(-2)
        upper, lower = upper_right - upper_left, lower_right - lower_left  # along x
        top, bottom = torch.addcmul(upper_left, self.x, upper), torch.addcmul(lower_left, self.x, lower)
        down = bottom.sub_(top)
        of_weights = top.addcmul_(self.y, down).view(weights.shape)
        along_x, along_y = (axis.view(weights.shape) for axis in (torch.lerp(upper, lower, self.y), down))
        of_locations = torch.stack((along_x * weights, along_y * weights), dim=-1)
        sizes = of_locations.new_tensor([(width, height) for height, width in shapes])
        return of_locations.mul_(sizes[:, None]), of_weights


def _level_table(shapes: Shapes, points: int, like: Tensor) -> Tensor:
    """Return [4, L * P]: width, height, padded width, and padded index of pixel (0, 0), for each sample's level."""
    rows, start = [], 0
    for height, width in shapes:
        padded = width + 2 * MARGIN
        rows.append((width, height, padded, start + MARGIN * padded + MARGIN))
        start += (height + 2 * MARGIN) * padded
    return like.new_tensor(rows).repeat_interleave(points, dim=0).T.contiguous()


def _split(location: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Split locations on one axis into the neighbour before each and the distance from it.

    The neighbour lies at most two pixels outside the map.
    """
    position = (location * size).sub_(0.5)
    low = position.floor()
    fraction = position.sub_(low)
    return low.clamp_(min=-MARGIN).minimum(size), fraction


class SampledRowSum(torch.autograd.Function):
    """Weighted sum of the 4 L P table rows of a query and head, for CPU tensors.

    The backward pass recomputes the samples, because keeping them would take a quarter of a training step's memory for
    activations. The table's gradient is a product with a transposed sparse matrix. scipy computes it in one pass;
    PyTorch sorts all indices first, which is 10 times slower.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        """Return [B * Q * G, D] sums.

        `value` is [B, S, G, D], `locations` [B, Q, G, L, P, 2] and `weights` [B, Q, G, L, P].
        """
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        samples = Samples.locate(shapes, locations)
        rows, row_weights = samples.rows.flatten(0, 2).flatten(1), samples.row_weights(weights)
        table = padded_table(value, shapes)
        return F.embedding_bag(rows, table, per_sample_weights=row_weights.view(rows.shape), mode="sum")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of the values, the locations and the weights."""
        value, locations, weights = ctx.saved_tensors
        gradient, shapes = grad_outputs[0].contiguous(), ctx.shapes
        samples = Samples.locate(shapes, locations)
        table = padded_table(value, shapes)
        bags, per_bag = len(gradient), samples.rows[0, 0, 0].numel()
        ends = torch.arange(0, bags * per_bag + 1, per_bag, dtype=torch.int32)
        rows, row_weights = samples.rows.flatten(), samples.row_weights(weights).flatten()
        of_value = of_locations = of_weights = None
        if ctx.needs_input_grad[0]:
            parts = (row_weights.numpy(), rows.numpy(), ends.numpy())
            matrix = scipy.sparse.csr_array(parts, shape=(bags, len(table)))
            of_value = unpadded_values(torch.from_numpy(matrix.T @ gradient.numpy()), value, shapes)
        if any(ctx.needs_input_grad[1:3]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
                pattern = torch.sparse_csr_tensor(ends, rows, row_weights, (bags, len(table)))
            products = torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0).values()
            of_locations, of_weights = samples.gradients(products.view(samples.rows.shape), weights, shapes)
        return of_value, of_locations, of_weights, None
