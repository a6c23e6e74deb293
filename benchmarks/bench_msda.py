"""Multi-scale deformable attention, forward and backward, against one `grid_sample` per level (as peers do it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import Row, compare
from model.ms_deform_attn import ms_deform_attn, ms_deform_attn_grid_sample

HEADS, DIM, POINTS = 8, 32, 4


def run(tiny: bool) -> list[Row]:
    """One row per image size."""
    return [_case(size, repeats=3 if tiny else 10) for size in ((256,) if tiny else (256, 512, 1024))]


def _case(size: int, repeats: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    shapes = [(size // stride, size // stride) for stride in (32, 16, 8)]
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(1, pixels, HEADS, DIM, generator=generator, requires_grad=True)
    grid = (1, pixels, HEADS, len(shapes), POINTS)
    locations = torch.rand(*grid, 2, generator=generator, requires_grad=True)
    weights = torch.rand(grid, generator=generator, requires_grad=True)
    cotangent = torch.randn(1, pixels, HEADS * DIM, generator=generator)

    def both_ways(function: object) -> Sequence[Tensor]:
        assert callable(function)
        output = function(value, shapes, locations, weights)
        return output, *torch.autograd.grad(output, (value, locations, weights), cotangent)

    return compare(
        "msda forward + backward",
        f"{pixels} tokens",
        lambda: both_ways(ms_deform_attn),
        "grid_sample",
        lambda: both_ways(ms_deform_attn_grid_sample),
        tolerance=1e-4,
        repeats=repeats,
    )
