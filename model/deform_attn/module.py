"""Multi-scale deformable attention (Deformable DETR, section 4.1), and the choice of its form for each device.

Axis letters: B images, S pixels of all levels, G heads, D channels per head, Q queries, L levels, P points.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.constants import cache_constants
from m2f.model.deform_attn.cpu import SampledRowSum, Shapes

_exporting = False
"""Whether `for_export` is active. This is a module global because torch.compile guards on those."""


@contextmanager
def for_export() -> Iterator[None]:
    """Context manager in which modules use portable operations that every runtime supports, also on CUDA.

    This flag replaces `torch.compiler.is_exporting()`, which torch.compile treats as true on torch 2.11; compiled
    models would lose the kernel.
    """
    global _exporting
    before, _exporting = _exporting, True
    try:
        yield
    finally:
        _exporting = before


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of bilinear samples of all levels, [B, Q, G * D] in the dtype of `value`.

    Sampling uses the dtype of `locations`. Pixels outside a map count as zero.

    Args:
        value: [B, S, G, D] features of the pixels of all levels.
        shapes: (height, width) of every level.
        locations: [B, Q, G, L, P, 2] as (x, y), with 0 and 1 at the outer borders of a map.
        weights: [B, Q, G, L, P] attention weights.
    """
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        return ms_deform_attn_embedding_bag(value, shapes, locations, weights)
    return ms_deform_attn_grid_sample(value, shapes, locations, weights)


def ms_deform_attn_grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute `ms_deform_attn` with one `grid_sample` per level. This form exports to ONNX."""
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
    """Compute `ms_deform_attn` as one weighted sum of 4 L P rows per query and head.

    This form is fast on CPU and does not store samples.
    """
    batch, queries = weights.shape[:2]
    output = SampledRowSum.apply(value.to(locations.dtype), locations, weights, shapes)
    return output.view(batch, queries, -1).to(value.dtype)


class SamplingGrid(NamedTuple):
    """Reference points of the queries in one forward pass, without their learned offsets."""

    shapes: Shapes
    """(height, width) of every level."""
    sizes: Tensor
    """[L, 1, 2] float32 (width, height) of every level."""
    reference: Tensor
    """[B or 1, Q, 1, 2] float32 reference points (x, y) in [0, 1], which all levels share."""

    @staticmethod
    def of_pixels(shapes: Shapes, device: torch.device | str = "cpu") -> SamplingGrid:
        """Return the grid in which every pixel of every level is a query at its own centre (Q = S)."""
        shapes = tuple((height, width) for height, width in shapes)
        return SamplingGrid(shapes, _level_sizes(shapes, device), _pixel_centres(shapes, device))


@cache_constants(4)
def _level_sizes(shapes: Shapes, device: torch.device | str) -> Tensor:
    """Return the tensor [L, 1, 2] for `SamplingGrid.sizes`."""
    # Filled on the device, because a copy from the host would wait for all queued work.
    extents = [torch.sym_float(extent) for height, width in shapes for extent in (width, height)]
    sizes = torch.stack([torch.full((), extent, dtype=torch.float32, device=device) for extent in extents])
    return sizes.view(-1, 1, 2)


@cache_constants(4)
def _pixel_centres(shapes: Shapes, device: torch.device | str) -> Tensor:
    """Return the tensor [1, S, 1, 2] for `SamplingGrid.reference`: the centre of every pixel, level by level."""
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        levels.append(centres.flatten(0, 1))
    return torch.cat(levels)[None, :, None]


class Float32Linear(nn.Linear):
    """Linear layer that computes in float32 regardless of autocast and of its own dtype, for coordinates."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.Linear
        """Map [..., in_features] to float32 [..., out_features]; float64 stays float64."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class MSDeformAttn(nn.Module):
    """Attention of every query to `points` learned positions per head and level, around its reference point."""

    def __init__(self, dim: int, levels: int, heads: int, points: int, *, value_dim: int | None = None) -> None:
        """Build the module. `value_dim` is the number of sampled channels, if it is not `dim`."""
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        value_dim = dim if value_dim is None else value_dim
        self.sampling_offsets = Float32Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, value_dim)
        self.output_proj = nn.Linear(value_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise offsets, attention and projections.

        The offsets of head g point at the angle 2 pi g / G. Point p, counted from 0, is p + 1 pixels away in the larger
        coordinate. Attention is uniform.
        """
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # on the border of a square, not on a circle
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
        """Return [B, Q, C]: attention from `query` [B, Q, C] to `source` [B, S, C].

        Coordinates and softmax stay in float32.
        """
        batch, queries, _ = query.shape
        value = self.value_proj(source).unflatten(2, (self.heads, -1))
        samples = (batch, queries, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        logits = self.attention_weights(query).view(samples)
        return self.output_proj(self.attend(value, offsets, logits, grid))

    def attend(self, value: Tensor, offsets: Tensor, logits: Tensor, grid: SamplingGrid) -> Tensor:
        """Return [B, Q, G * D], with the fused kernel if possible and otherwise step by step.

        `value` is [B, S, G, D], `offsets` [B, Q, G, L, P, 2] in pixels of their level and `logits` [B, Q, G, L, P].
        """
        if self._is_fused(value):
            from m2f.model.deform_attn.triton_op import fused_ms_deform_attn

            return fused_ms_deform_attn(value, grid.shapes, grid.reference.squeeze(2), offsets, logits)
        weights = logits.to(offsets.dtype).flatten(-2).softmax(-1).view(logits.shape)
        sizes = grid.sizes.expand(self.levels, self.points, 2).flatten()
        offsets = (offsets.flatten(-3) / sizes).view(offsets.shape)
        locations = grid.reference[:, :, None, :, None] + offsets
        return ms_deform_attn(value, grid.shapes, locations, weights)

    def _is_fused(self, value: Tensor) -> bool:
        """Return whether the kernel supports this input: on CUDA, except in exported graphs and in float64."""
        if value.device.type != "cuda" or value.dtype == torch.float64 or _exporting:
            return False
        return _kernel_agrees(value.dtype, self.levels, self.heads, self.points, value.shape[-1], value.device)


@torch.compiler.assume_constant_result
def _kernel_agrees(dtype: torch.dtype, levels: int, heads: int, points: int, dim: int, device: torch.device) -> bool:
    """Return the result of `_checked_kernel`. The wrapper is needed because torch.compile traces through caches."""
    return _checked_kernel(dtype, levels, heads, points, dim, device)


@functools.cache
def _checked_kernel(
    dtype: torch.dtype, levels: int, heads: int, points: int, dim: int, device: torch.device | str = "cuda"
) -> bool:
    """Return whether the Triton kernel gives the results of the plain form on this device; warn if not.

    Raises torch.OutOfMemoryError if the memory does not suffice for the check; the next call then checks again.
    """
    try:
        from m2f.model.deform_attn.triton_op import fused_ms_deform_attn

        worst = _kernel_error(fused_ms_deform_attn, dtype, levels, heads, points, dim, device)
        agrees = worst <= (1e-4 if dtype == torch.float32 else 0.05)  # False for NaN
        problem = None if agrees else f"its error is {worst:.2g}"
    except torch.OutOfMemoryError:
        raise  # does not show that the kernel is wrong
    except Exception as error:  # no triton, no compiler, an unsupported GPU
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        warnings.warn(
            f"the fused kernel of deformable attention cannot be used ({problem}); falling back to grid_sample, which "
            "is several times slower",
            stacklevel=2,
        )
    return problem is None


@torch.inference_mode(False)  # the first use may be an evaluation, but the check needs gradients
@torch.enable_grad()
def _kernel_error(
    fused: Callable[..., Tensor],
    dtype: torch.dtype,
    levels: int,
    heads: int,
    points: int,
    dim: int,
    device: torch.device | str = "cuda",
) -> float:
    """Return the largest difference of outputs and gradients, relative to the largest value of each."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(level + 2, level + 3) for level in range(levels)]
    grid = SamplingGrid.of_pixels(shapes, device)
    queries = grid.reference.shape[1]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    value = random(1, queries, heads, dim).to(dtype).requires_grad_()
    offsets = (2 * random(1, queries, heads, levels, points, 2)).requires_grad_()
    logits = random(1, queries, heads, levels, points).requires_grad_()
    cotangent = random(1, queries, heads * dim).to(dtype)
    with torch.autocast(torch.device(device).type, enabled=False):
        ours = fused(value, shapes, grid.reference.squeeze(2), offsets, logits)
        locations = grid.reference[:, :, None, :, None] + offsets / grid.sizes
        weights = logits.flatten(-2).softmax(-1).view(logits.shape)
        plain = ms_deform_attn_grid_sample(value, shapes, locations, weights)
        inputs = (value, offsets, logits)
        pairs = [(ours, plain)]
        pairs += zip(*(torch.autograd.grad(o, inputs, cotangent) for o in (ours, plain)), strict=True)
    errors = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in pairs]
    return float(torch.stack(errors).detach().max())  # NaN if one of them is
