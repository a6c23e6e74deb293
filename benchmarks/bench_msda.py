"""Multi-scale deformable attention, forward and backward, against one `grid_sample` per level (as peers do it).

From values, offsets and logits to the attended values: the softmax and the arithmetic of locations are part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measure import Row, compare
from benchmarks.memory import peak_growth
from model.ms_deform_attn import SamplingGrid, Shapes, ms_deform_attn, ms_deform_attn_grid_sample

HEADS, DIM, POINTS = 8, 32, 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def run(tiny: bool, device: torch.device) -> list[Row]:
    """On a CPU one row per image size in fp32; on a GPU 21,504 and 22,050 tokens in several batches and both dtypes."""
    if device.type == "cpu":
        sides = (256,) if tiny else (256, 512, 1024)
        return [_case(1, (side, side), torch.float32, device, repeats=3 if tiny else 10) for side in sides]
    cases = [(1, (1024, 1024))] if tiny else [(n, size) for size in ((1024, 1024), (800, 1344)) for n in (1, 4, 8)]
    return [_case(*case, dtype, device, repeats=20) for case in cases for dtype in (torch.bfloat16, torch.float32)]


def _case(images: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device, repeats: int) -> Row:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(size[0] // stride, size[1] // stride) for stride in (32, 16, 8)]
    pixels = sum(height * width for height, width in shapes)
    grid = SamplingGrid.of_pixels(shapes, device)
    samples = (images, pixels, HEADS, len(shapes), POINTS)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    value = random(images, pixels, HEADS, DIM).to(dtype).requires_grad_()
    offsets = (2 * random(*samples, 2)).requires_grad_()
    logits = random(*samples).requires_grad_()
    cotangent = random(images, pixels, HEADS * DIM).to(dtype)

    def plainly(function: Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]) -> Tensor:
        weights = logits.flatten(-2).softmax(-1).view(samples)
        locations = grid.reference[:, :, None, :, None] + offsets / grid.sizes
        return function(value, shapes, locations, weights)

    def fused() -> Tensor:
        from model.ms_deform_attn_triton import fused_ms_deform_attn

        return fused_ms_deform_attn(value, shapes, grid.reference.squeeze(2), offsets, logits)

    def both_ways(forward: Callable[[], Tensor]) -> Sequence[Tensor]:
        output = forward()
        return output.float(), *torch.autograd.grad(output, (value, offsets, logits), cotangent)

    ours = fused if device.type == "cuda" else lambda: plainly(ms_deform_attn)
    sides = (lambda: both_ways(ours), lambda: both_ways(lambda: plainly(ms_deform_attn_grid_sample)))
    ours_gb, peer_gb = (peak_growth(side, device) for side in sides)
    name = f"msda forward + backward {str(dtype).removeprefix('torch.')}"
    shape = f"{images} x {pixels} tokens"
    row = compare(name, shape, sides[0], "grid_sample", sides[1], TOLERANCE[dtype], repeats, device)
    return replace(row, ours_gb=ours_gb, peer_gb=peer_gb)
