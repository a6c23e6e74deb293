"""Multi-scale deformable attention (Deformable DETR, section 4.1), in pure PyTorch.

Axis letters: B images, S pixels of all levels, G heads, D channels per head, Q queries, L levels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]
"""(height, width) of every level, in the order of the flattened pixels."""


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of all levels: [B, Q, G * D] in the dtype of `value`.

    `value` is [B, S, G, D]; `locations` [B, Q, G, L, P, 2] are (x, y) with 0 and 1 at the outer borders of a map, and
    pixels outside count zero; `weights` is [B, Q, G, L, P]. Sampling is done in the dtype of `locations`.
    """
    if value.device.type == "cpu" and not torch.compiler.is_exporting():
        return ms_deform_attn_embedding_bag(value, shapes, locations, weights)
    return ms_deform_attn_grid_sample(value, shapes, locations, weights)


def ms_deform_attn_grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The obvious form of `ms_deform_attn`, one `grid_sample` per level. It exports to ONNX."""
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [B G, Q, L, P, 2]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, *weights.shape[3:])
    output = weights.new_zeros(batch * heads, dim, queries)
    maps = value.to(locations.dtype).split([h * w for h, w in shapes], dim=1)
    for level, ((height, width), pixels) in enumerate(zip(shapes, maps, strict=True)):
        image = pixels.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        samples = F.grid_sample(image, grids[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (samples * weights[:, :, :, level]).sum(-1)
    return output.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)


def ms_deform_attn_embedding_bag(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`ms_deform_attn` as one bag of 4 L P weighted rows per query and head: fast on CPU, and no sample is stored."""
    batch, pixels, heads, dim = value.shape
    queries = locations.shape[1]
    rows, row_weights = _bilinear_corners(shapes, locations)
    row_weights = row_weights * weights[..., None]
    # Row of the table [B * S * G, D] = ((image * S) + pixel) * G + head.
    image = torch.arange(batch, device=value.device).view(batch, 1, 1, 1, 1, 1) * pixels
    head = torch.arange(heads, device=value.device).view(1, 1, heads, 1, 1, 1)
    rows = (rows + image) * heads + head
    output = F.embedding_bag(
        rows.view(batch * queries * heads, -1),
        value.reshape(-1, dim).to(locations.dtype),
        per_sample_weights=row_weights.view(batch * queries * heads, -1),
        mode="sum",
    )
    return output.view(batch, queries, heads * dim).to(value.dtype)


def _bilinear_corners(shapes: Shapes, locations: Tensor) -> tuple[Tensor, Tensor]:
    """Flat pixel index (int64) and weight of the 4 pixels around every location, both [B, Q, G, L, P, 4].

    A pixel outside its map gets the weight 0 and the index of a pixel inside.
    """
    device = locations.device
    size = torch.tensor([(width, height) for height, width in shapes], device=device).view(-1, 1, 2)
    areas = [height * width for height, width in shapes]
    start = torch.tensor([sum(areas[:level]) for level in range(len(areas))], device=device).view(-1, 1, 1, 1)
    position = locations * size - 0.5
    low = position.detach().floor()
    fraction = position - low
    corner = torch.stack([low, low + 1], dim=-1).long()  # [..., 2 axes, 2 sides]
    inside = (corner >= 0) & (corner < size[..., None])
    side_weight = torch.stack([1 - fraction, fraction], dim=-1) * inside
    corner = torch.minimum(corner.clamp(min=0), size[..., None] - 1)
    x, y = corner.unbind(-2)
    weight_x, weight_y = side_weight.unbind(-2)
    width = size[..., :1, None]
    index = start + y[..., :, None] * width + x[..., None, :]
    return index.flatten(-2), (weight_y[..., :, None] * weight_x[..., None, :]).flatten(-2)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever autocast or the parameters' dtype say: it makes coordinates."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.Linear
        """[..., in_features] to float32 [..., out_features] (float64 stays float64)."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class MSDeformAttn(nn.Module):
    """Every query attends to `points` learnt positions per head and level around its reference point."""

    def __init__(self, dim: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = Float32Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head g looks into direction g of a circle, point p at p + 1 pixels; uniform attention."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # on the unit square, not the circle
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * distance[:, None]  # [G, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, source: Tensor, shapes: Shapes) -> Tensor:
        """Attend from `query` [B, Q, C] to `source` [B, S, C]: [B, Q, C].

        `reference` [B or 1, Q, L or 1, 2] holds float32 (x, y) in [0, 1]. Coordinates and softmax stay float32.
        """
        batch, queries, dim = query.shape
        value = self.value_proj(source).view(batch, -1, self.heads, dim // self.heads)
        grid = (batch, queries, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).view(*grid, 2)
        logits = self.attention_weights(query).to(offsets.dtype)
        weights = logits.view(batch, queries, self.heads, -1).softmax(-1).view(grid)
        size = torch.tensor([(width, height) for height, width in shapes], device=query.device).view(-1, 1, 2)
        locations = reference[:, :, None, :, None] + offsets / size
        return self.output_proj(ms_deform_attn(value, shapes, locations, weights))
