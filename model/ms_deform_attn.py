"""Multi-scale deformable attention (Deformable DETR, section 4.1), in pure PyTorch.

Axis letters: B images, S pixels of all levels, G heads, D channels per head, Q queries, L levels, P points.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import scipy.sparse
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
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
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
    """`ms_deform_attn` as one weighted sum of 4 L P rows per query and head: fast on CPU, and stores no sample."""
    batch, queries = weights.shape[:2]
    table = value.reshape(-1, value.shape[-1]).to(locations.dtype)
    output = SampledRowSum.apply(table, locations, weights, shapes)
    return output.view(batch, queries, -1).to(value.dtype)


def bilinear_corners(shapes: Shapes, locations: Tensor, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The 4 pixels around every location: their int32 index among all pixels and their weight, each [B, Q, G, L * P].

    A pixel outside its map gets the weight 0 and the index of a pixel inside. Axes are handled one by one because
    elementwise loops over a last dimension of 2 are slow.
    """
    points = locations.shape[-2]
    areas = [height * width for height, width in shapes]
    starts = [sum(areas[:level]) for level in range(len(areas))]
    geometry = [(width, height, start) for (height, width), start in zip(shapes, starts, strict=True)]
    width, height, start = torch.tensor(geometry, device=locations.device).repeat_interleave(points, dim=0).unbind(1)
    x, y = locations.flatten(-3, -2).unbind(-1)
    columns, column_weights = _axis_corners(x, width)
    lines, line_weights = _axis_corners(y, height)
    weights = weights.flatten(-2)
    line_weights = [line_weight * weights for line_weight in line_weights]
    lines = [(line * width + start).int() for line in lines]
    columns = [column.int() for column in columns]
    return (
        [line + column for line in lines for column in columns],
        [line_weight * column_weight for line_weight in line_weights for column_weight in column_weights],
    )


def _axis_corners(location: Tensor, size: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The two neighbours of a location on one axis: indices clamped to 0..size-1, and weights, 0 where outside."""
    position = location * size - 0.5
    low = position.detach().floor()
    fraction = position - low
    first, last = low.new_zeros(()), (size - 1).to(low.dtype)
    corners = [low, low + 1]
    # fmin and fmax give a valid index for NaN too; the weight then carries the NaN to the loss.
    clamped = [torch.fmin(torch.fmax(corner, first), last) for corner in corners]
    inside = [corner == limited for corner, limited in zip(corners, clamped, strict=True)]
    return clamped, [(1 - fraction) * inside[0], fraction * inside[1]]


def _weighted_rows(shapes: Shapes, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the table of values, int32, and their weights, both [B * Q * G, 4 L P]."""
    batch, _, heads = weights.shape[:3]
    rows, row_weights = bilinear_corners(shapes, locations, weights)
    # Row of the table [B * S * G, D] = (image * S + pixel) * G + head.
    pixels = sum(height * width for height, width in shapes)
    image = torch.arange(batch, dtype=torch.int32).view(batch, 1, 1, 1) * (pixels * heads)
    head = torch.arange(heads, dtype=torch.int32).view(1, 1, heads, 1)
    rows = torch.stack([row * heads + (image + head) for row in rows], dim=-2)
    return rows.flatten(0, 2).flatten(1), torch.stack(row_weights, dim=-2).flatten(0, 2).flatten(1)


class SampledRowSum(torch.autograd.Function):
    """`output[n] = sum_k weight[n, k] * table[row[n, k]]` over the corners of all locations, for CPU tensors.

    The backward pass computes rows and weights again: kept, they are a quarter of what a training step remembers. The
    table's gradient is a product with a transposed sparse matrix, which scipy does in one pass where PyTorch sorts all
    indices first (10 times slower).
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        """`table` [B * S * G, D], `locations` [B, Q, G, L, P, 2], `weights` [B, Q, G, L, P] to [B * Q * G, D]."""
        ctx.save_for_backward(table, locations, weights)
        ctx.shapes = shapes
        rows, row_weights = _weighted_rows(shapes, locations, weights)
        return F.embedding_bag(rows, table, per_sample_weights=row_weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of the table, the locations and the weights."""
        table, *geometry = ctx.saved_tensors
        gradient = grad_outputs[0].contiguous()
        needs_table, *needs_geometry, _ = ctx.needs_input_grad
        with torch.enable_grad():
            pairs = zip(geometry, needs_geometry, strict=True)
            inputs = [tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
            rows, row_weights = _weighted_rows(ctx.shapes, *inputs)
        bags, per_bag = rows.shape
        ends = torch.arange(0, bags * per_bag + 1, per_bag, dtype=rows.dtype)
        flat_weights = row_weights.detach().flatten()
        table_gradient = None
        if needs_table:
            parts = (flat_weights.numpy(), rows.numpy().ravel(), ends.numpy())
            matrix = scipy.sparse.csr_array(parts, shape=(bags, len(table)))
            table_gradient = torch.from_numpy(matrix.T @ gradient.numpy())
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        if not wanted:
            return table_gradient, None, None, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
            pattern = torch.sparse_csr_tensor(ends, rows.flatten(), flat_weights, (bags, len(table)))
        products = torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0)
        found = iter(torch.autograd.grad(row_weights, wanted, products.values().view(bags, per_bag)))
        location_gradient, weight_gradient = (next(found) if needed else None for needed in needs_geometry)
        return table_gradient, location_gradient, weight_gradient, None


class SamplingGrid(NamedTuple):
    """Where the queries of one forward pass look, apart from their learnt offsets."""

    shapes: Shapes
    sizes: Tensor
    """[L, 1, 2] float32 (width, height) of every level."""
    reference: Tensor
    """[B or 1, Q, L or 1, 2] float32 (x, y) in [0, 1] around which a query samples."""

    @staticmethod
    def of_pixels(shapes: Shapes, device: torch.device | str = "cpu") -> SamplingGrid:
        """Every pixel of every level is a query at its own centre: Q = S."""
        # Filled on the device: a copy from the host would wait for all work queued before it.
        extents = [torch.sym_float(extent) for height, width in shapes for extent in (width, height)]
        sizes = torch.stack([torch.full((), extent, dtype=torch.float32, device=device) for extent in extents])
        levels = []
        for height, width in shapes:
            y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
            x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
            centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
            levels.append(centres.flatten(0, 1))
        return SamplingGrid(shapes, sizes.view(-1, 1, 2), torch.cat(levels)[None, :, None])


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

    def forward(self, query: Tensor, source: Tensor, grid: SamplingGrid) -> Tensor:
        """Attend from `query` [B, Q, C] to `source` [B, S, C]: [B, Q, C]. Coordinates and softmax stay float32."""
        batch, queries, dim = query.shape
        value = self.value_proj(source).view(batch, -1, self.heads, dim // self.heads)
        samples = (batch, queries, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        logits = self.attention_weights(query).view(samples)
        return self.output_proj(self.attend(value, offsets, logits, grid))

    def attend(self, value: Tensor, offsets: Tensor, logits: Tensor, grid: SamplingGrid) -> Tensor:
        """`value` [B, S, G, D], `offsets` [B, Q, G, L, P, 2] in pixels of their level, `logits` [B, Q, G, L, P].

        To [B, Q, G * D]: in one kernel where it can be, else step by step.
        """
        if self._is_fused(value):
            from model.ms_deform_attn_triton import fused_ms_deform_attn

            return fused_ms_deform_attn(value, grid.shapes, grid.reference.squeeze(2), offsets, logits)
        weights = logits.to(offsets.dtype).flatten(-2).softmax(-1).view(logits.shape)
        sizes = grid.sizes.expand(self.levels, self.points, 2).flatten()
        offsets = (offsets.flatten(-3) / sizes).view(offsets.shape)
        locations = grid.reference[:, :, None, :, None] + offsets
        return ms_deform_attn(value, grid.shapes, locations, weights)

    def _is_fused(self, value: Tensor) -> bool:
        """Whether the kernel takes this input: on CUDA, except in exported graphs and in float64."""
        if value.device.type != "cuda" or value.dtype == torch.float64 or torch.compiler.is_exporting():
            return False
        return _kernel_is_right(value.dtype, self.levels, self.heads, self.points, value.shape[-1])


@torch.compiler.assume_constant_result
def _kernel_is_right(dtype: torch.dtype, levels: int, heads: int, points: int, dim: int) -> bool:
    """As `_tried_kernel` says; a function around it because torch.compile looks through caches."""
    return _tried_kernel(dtype, levels, heads, points, dim)


@functools.cache
def _tried_kernel(dtype: torch.dtype, levels: int, heads: int, points: int, dim: int) -> bool:
    """Try the Triton kernel on this machine against the plain form, once; say so where the plain form must do."""
    try:
        from model.ms_deform_attn_triton import fused_ms_deform_attn

        worst = _kernel_error(fused_ms_deform_attn, dtype, levels, heads, points, dim)
        trouble = f"it is wrong by {worst:.2g}" if worst > (1e-4 if dtype == torch.float32 else 0.05) else None
    except Exception as error:  # no triton, no compiler, an unsupported GPU
        trouble = f"{type(error).__name__}: {error}"
    if trouble is not None:
        warnings.warn(
            f"the fused kernel of deformable attention cannot be used ({trouble}); training and inference go on with "
            "grid_sample, which is several times slower",
            stacklevel=2,
        )
    return trouble is None


def _kernel_error(
    fused: Callable[..., Tensor], dtype: torch.dtype, levels: int, heads: int, points: int, dim: int
) -> float:
    """Largest difference of outputs and gradients, as a share of the largest value of each."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(level + 2, level + 3) for level in range(levels)]
    grid = SamplingGrid.of_pixels(shapes, "cuda")
    queries = grid.reference.shape[1]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    value = random(1, queries, heads, dim).to(dtype).requires_grad_()
    offsets = (2 * random(1, queries, heads, levels, points, 2)).requires_grad_()
    logits = random(1, queries, heads, levels, points).requires_grad_()
    cotangent = random(1, queries, heads * dim).to(dtype)
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        ours = fused(value, shapes, grid.reference.squeeze(2), offsets, logits)
        locations = grid.reference[:, :, None, :, None] + offsets / grid.sizes
        weights = logits.flatten(-2).softmax(-1).view(logits.shape)
        plain = ms_deform_attn_grid_sample(value, shapes, locations, weights)
        inputs = (value, offsets, logits)
        pairs = [(ours, plain)]
        pairs += zip(*(torch.autograd.grad(o, inputs, cotangent) for o in (ours, plain)), strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
