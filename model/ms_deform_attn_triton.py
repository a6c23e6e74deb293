"""Multi-scale deformable attention in one CUDA kernel per direction, written in Triton.

Softmax over levels and points, the way from offsets to pixels and the sampling happen in one pass: neither attention
weights nor locations nor samples are ever stored. Values may be float32, bfloat16 or float16; geometry, weights and
sums are float32.

Axis letters as in `model.ms_deform_attn`, and K = L * P samples of a query and head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from model.ms_deform_attn import Shapes, bilinear_corners
from model.ms_deform_attn_kernels import backward_kernel, forward_kernel


class Tuning(NamedTuple):
    """How a kernel is cut into programs."""

    block: int
    """Queries of one program."""
    num_warps: int


_FORWARD, _BACKWARD = Tuning(block=32, num_warps=4), Tuning(block=16, num_warps=4)


def fused_ms_deform_attn(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Output [B, Q, G * D] in the dtype of `value`.

    `value` [B, S, G, D]; `reference` float32 [B or 1, Q, 2] as (x, y) in [0, 1]; `offsets` float32
    [B, Q, G, L, P, 2] in pixels of their level; `logits` [B, Q, G, L, P] before the softmax. Gradients go to value,
    offsets and logits. With `torch.use_deterministic_algorithms` the gradient of the value adds up in a fixed order,
    which takes longer.
    """
    levels = _level_table(shapes, value.device)
    return _FusedAttention.apply(value, levels, tuple(shapes), reference, offsets, logits)


def _level_table(shapes: Shapes, device: torch.device) -> Tensor:
    """int32 [L, 3]: width, height and first pixel of every level; filled on the device, as a copy would wait."""
    rows, start = [], 0
    for height, width in shapes:
        rows += [torch.full((), number, dtype=torch.int32, device=device) for number in (width, height, start)]
        start += height * width
    return torch.stack(rows).view(-1, 3)


class _FusedAttention(torch.autograd.Function):
    """Forward keeps its inputs only; backward samples again."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, levels: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        value, offsets, logits = value.contiguous(), offsets.contiguous(), logits.contiguous()
        reference = reference.contiguous()
        ctx.save_for_backward(value, levels, reference, offsets, logits)
        ctx.shapes = shapes
        batch, _, heads, dim = value.shape
        output = value.new_empty(batch, offsets.shape[1], heads * dim)
        _launch(forward_kernel, _FORWARD, (value, levels, reference, offsets, logits, output))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        value, levels, reference, offsets, logits = ctx.saved_tensors
        gradient = grad_outputs[0].contiguous()
        in_order = torch.are_deterministic_algorithms_enabled()
        value_gradient = torch.zeros_like(value, dtype=torch.float32)
        offset_gradient, logit_gradient = torch.empty_like(offsets), torch.empty_like(logits, dtype=torch.float32)
        gradients = (gradient, value_gradient, offset_gradient, logit_gradient)
        pointers = (value, levels, reference, offsets, logits, *gradients)
        _launch(backward_kernel, _BACKWARD, pointers, SCATTER=not in_order)
        if in_order:
            value_gradient = _value_gradient_in_order(value, ctx.shapes, reference, offsets, logits, gradient)
        return value_gradient.to(value.dtype), None, None, None, offset_gradient, logit_gradient.to(logits.dtype)


def _launch(kernel: Any, tuning: Tuning, pointers: tuple[Tensor, ...], **constants: bool) -> None:
    """Run a kernel over blocks of queries, heads and images; the first four tensors give the sizes."""
    value, _, reference, offsets = pointers[:4]
    batch, pixels, heads, dim = value.shape
    queries, levels, points = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    kernel[triton.cdiv(queries, tuning.block), heads, batch](
        *pointers,
        pixels,
        queries,
        heads,
        int(len(reference) > 1),
        DIM=dim,
        LANES=triton.next_power_of_2(dim),
        LEVELS=levels,
        POINTS=points,
        SAMPLES=triton.next_power_of_2(levels * points),
        BLOCK=tuning.block,
        num_warps=tuning.num_warps,
        **constants,
    )


def _value_gradient_in_order(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient of the value as a sorted sum, head by head to bound its memory."""
    heads = value.shape[2]
    sizes = torch.tensor([[width, height] for height, width in shapes], device=value.device)
    locations = reference[:, :, None, None, None] + offsets / sizes[:, None]
    weights = logits.float().flatten(-2).softmax(-1).view(logits.shape)
    total = torch.zeros_like(value, dtype=torch.float32)
    per_head = gradient.float().unflatten(2, (heads, -1))
    for image in range(len(value)):
        rows, row_weights = bilinear_corners(shapes, locations[image : image + 1], weights[image : image + 1])
        for head in range(heads):
            for row, weight in zip(rows, row_weights, strict=True):  # [1, Q, G, K]
                shares = weight[0, :, head, :, None] * per_head[image, :, None, head]
                index = row[0, :, head].flatten().long()
                total[image, :, head].index_put_((index,), shares.flatten(0, 1), accumulate=True)
    return total
