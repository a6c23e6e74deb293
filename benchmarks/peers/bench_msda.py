"""Benchmark of multi-scale deformable attention against one `grid_sample` per level, as peers implement it.

The inputs are values, offsets and logits, so both sides include the softmax and the computation of the sampling
locations. With one image, both sides are also compared with a float64 result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import Measurement, compare, relative_error
from m2f.model.deform_attn.module import (
    SamplingGrid,
    ms_deform_attn_embedding_bag,
    ms_deform_attn_grid_sample,
)

HEADS, DIM, POINTS = 8, 32, 4
"""Heads, channels per head, and points per head and level, as in the paper's pixel decoder."""
PEER = "grid_sample"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure each image size in fp32 on a CPU.

    On a GPU, measure 21,504 and 22,050 tokens with several batch sizes in bf16 and fp32 (`tiny`: one image).
    """
    if device.type == "cpu":
        sides = (256,) if tiny else (256, 512, 1024)
        cases = [_Case(1, (side, side), torch.float32, device, 3 if tiny else 10) for side in sides]
        return [result for case in cases for result in case.results("embedding_bag")]
    sizes = [(1, (1024, 1024))] if tiny else [(n, size) for size in ((1024, 1024), (800, 1344)) for n in (1, 4, 8)]
    dtypes = torch.bfloat16, torch.float32
    cases = [_Case(*size, dtype, device, 20) for size in sizes for dtype in dtypes]
    return [result for case in cases for result in case.results("fused")]


class _Case:
    """One set of inputs, and every implementation of attention on them."""

    def __init__(
        self, images: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device, repeats: int
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.images, self.device, self.repeats, self.dtype = images, device, repeats, dtype
        self.shapes = [(size[0] // stride, size[1] // stride) for stride in (32, 16, 8)]
        self.pixels = sum(height * width for height, width in self.shapes)
        self.grid = SamplingGrid.of_pixels(self.shapes, device)
        samples = (images, self.pixels, HEADS, len(self.shapes), POINTS)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.value = random(images, self.pixels, HEADS, DIM).to(dtype).requires_grad_()
        # Odd multiples of 1/32 pixel avoid the pixel borders, where the gradient jumps and rounding would pick a side.
        self.offsets = (((32 * random(*samples, 2)).round() + 0.5) / 16).requires_grad_()
        self.logits = random(*samples).requires_grad_()
        self.cotangent = random(images, self.pixels, HEADS * DIM).to(dtype)

    def results(self, ours: str) -> list[Measurement]:
        """Measure the forward pass alone, then together with the backward pass."""
        if self.images == 1:
            self._check_against_float64((ours, PEER))
        return [self._measure(backward, ours) for backward in (False, True)]

    def _measure(self, backward: bool, ours: str) -> Measurement:
        return compare(
            f"msda forward{' + backward' if backward else ''} {str(self.dtype).removeprefix('torch.')}",
            f"{self.images} x {self.pixels} tokens",
            lambda: self._run(ours, backward),
            PEER,
            lambda: self._run(PEER, backward),
            TOLERANCE[self.dtype],
            self.repeats,
            self.device,
            memory=True,
        )

    def _run(self, implementation: str, backward: bool) -> Sequence[Tensor]:
        """Run one implementation; return the attended values and, with `backward`, the gradients of all inputs."""
        with torch.set_grad_enabled(backward):
            output = self._attend(implementation, self.value, self.offsets, self.logits)
        if not backward:
            return [output.float()]
        return output.float(), *torch.autograd.grad(output, (self.value, self.offsets, self.logits), self.cotangent)

    def _attend(self, implementation: str, value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        if implementation == "fused":
            from m2f.model.deform_attn.triton_op import fused_ms_deform_attn

            return fused_ms_deform_attn(value, self.shapes, self.grid.reference.squeeze(2), offsets, logits)
        function = ms_deform_attn_grid_sample if implementation == PEER else ms_deform_attn_embedding_bag
        weights = logits.flatten(-2).softmax(-1).view(logits.shape)
        locations = self.grid.reference[:, :, None, :, None] + offsets / self.grid.sizes
        return function(value, self.shapes, locations, weights)

    @torch.no_grad()
    def _check_against_float64(self, implementations: Sequence[str]) -> None:
        exact = self._attend(PEER, self.value.double(), self.offsets.double(), self.logits.double())
        for implementation in implementations:
            error = relative_error(self._attend(implementation, self.value, self.offsets, self.logits).double(), exact)
            assert error <= TOLERANCE[self.dtype], f"{implementation} differs from float64 by {error:.1e}"
