"""Multi-scale deformable attention in one CUDA kernel per direction, written in Triton.

One pass computes the softmax over levels and points, the coordinates and the samples. Attention weights, locations and
samples are never stored. Values may be float32, bfloat16 or float16; geometry, weights and sums are float32. Both
directions are registered torch operators (`m2f::ms_deform_attn`), which torch.compile calls without tracing into them.

Axis letters are those of `m2f.model.deform_attn.module`, and K = L * P samples of a query and head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from m2f.model.constants import cache_constants
from m2f.model.deform_attn.cpu import Samples, Shapes, padded_table, unpadded_values
from m2f.model.deform_attn.triton_kernels import backward_kernel, forward_kernel
from m2f.model.deform_attn.tuning import Autotuner, LaunchConfig, milliseconds_on_gpu

# No configuration spills registers with 32 channels per head on a GPU of compute capability 9.0.
FORWARD = Autotuner(
    [LaunchConfig(8, 1), LaunchConfig(32, 4), LaunchConfig(16, 2), LaunchConfig(16, 4), LaunchConfig(8, 4)],
    milliseconds_on_gpu,
)
BACKWARD = Autotuner(
    [
        LaunchConfig(16, 4),
        LaunchConfig(32, 4),
        LaunchConfig(16, 2),
        LaunchConfig(32, 8),
        LaunchConfig(4, 1),
        LaunchConfig(8, 2),
    ],
    milliseconds_on_gpu,
)
WIDE_HEAD = LaunchConfig(16, 4)
"""Configuration for more than 32 channels per head, used without tuning. The forward kernel's first one would spill
registers."""
WIDEST_HEAD = LaunchConfig(8, 4)
"""Configuration of the forward kernel for more than 64 channels per head, where WIDE_HEAD would spill registers."""
MIN_QUERIES_TO_TUNE = 1024
"""Minimum queries of a batch for tuning. Below it, compiling all configurations costs more than the fastest can
save."""


def fused_ms_deform_attn(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Return the output [B, Q, G * D] in the dtype of `value`.

    Args:
        value: [B, S, G, D] features of the pixels of all levels.
        shapes: (height, width) of every level.
        reference: float32 [B or 1, Q, 2] as (x, y) in [0, 1].
        offsets: float32 [B, Q, G, L, P, 2] in pixels of their level.
        logits: [B, Q, G, L, P] before the softmax.

    Value, offsets and logits get gradients. With `torch.use_deterministic_algorithms` the gradient of the value is
    summed in a fixed order, which is slower.
    """
    sides = [side for shape in shapes for side in shape]
    return _attend(value, sides, reference, offsets, logits)


@torch.library.custom_op("m2f::ms_deform_attn", mutates_args=())
def _attend(value: Tensor, sides: Sequence[int], reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Implement `fused_ms_deform_attn`; `sides` are height and width of each level in turn."""
    inputs = _inputs(value, sides, reference, offsets, logits)
    output = _empty_output(value, sides, reference, offsets, logits)

    def run(tuning: LaunchConfig) -> None:
        _launch(forward_kernel, tuning, (*inputs, output))

    with torch.cuda.device_of(value):  # Triton launches on the current device
        run(_launch_config(FORWARD, inputs, run))
    return output


@_attend.register_fake
def _empty_output(value: Tensor, sides: Sequence[int], reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, offsets.shape[1], heads * dim)


@torch.library.custom_op("m2f::ms_deform_attn_backward", mutates_args=())
def _gradients(
    gradient: Tensor, value: Tensor, sides: Sequence[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value (float32), offsets and logits. The samples are recomputed."""
    inputs = _inputs(value, sides, reference, offsets, logits)
    gradient = gradient.contiguous()
    value_gradient, offset_gradient, logit_gradient = _empty_gradients(gradient, *inputs[:1], sides, *inputs[2:])
    in_order = torch.are_deterministic_algorithms_enabled()

    def run(tuning: LaunchConfig, value_sums: Tensor) -> None:
        outputs = (value_sums, offset_gradient, logit_gradient)
        _launch(backward_kernel, tuning, (*inputs, gradient, *outputs), SCATTER=not in_order)

    with torch.cuda.device_of(value):  # Triton launches on the current device
        tuning = _launch_config(BACKWARD, inputs, lambda tuning: run(tuning, torch.empty_like(value_gradient)))
        run(tuning, value_gradient.zero_())
    if in_order:
        value_gradient = _deterministic_value_gradient(value, sides, reference, offsets, logits, gradient)
    return value_gradient, offset_gradient, logit_gradient


@_gradients.register_fake
def _empty_gradients(
    gradient: Tensor, value: Tensor, sides: Sequence[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape, dtype=torch.float32),
        offsets.new_empty(offsets.shape),
        logits.new_empty(logits.shape, dtype=torch.float32),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sides, *others = inputs
    ctx.save_for_backward(value, *others)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    value, reference, offsets, logits = ctx.saved_tensors
    of_value, of_offsets, of_logits = _gradients(gradient, value, ctx.sides, reference, offsets, logits)
    return of_value.to(value.dtype), None, None, of_offsets, of_logits.to(logits.dtype)


_attend.register_autograd(_backward, setup_context=_save_inputs)


def _inputs(
    value: Tensor, sides: Sequence[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the first arguments of both kernels: contiguous inputs and the level table."""
    levels = _level_table(tuple(sides), value.device)
    return value.contiguous(), levels, reference.contiguous(), offsets.contiguous(), logits.contiguous()


@cache_constants(16)
def _level_table(sides: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int32 [L, 3]: width, height and first pixel of every level.

    The table is filled on the device, because a copy from the host would wait for all queued work.
    """
    rows, start = [], 0
    for height, width in zip(sides[::2], sides[1::2], strict=True):
        rows += [torch.full((), number, dtype=torch.int32, device=device) for number in (width, height, start)]
        start += height * width
    return torch.stack(rows).view(-1, 3)


def _launch_config(tuner: Autotuner, inputs: tuple[Tensor, ...], run: Callable[[LaunchConfig], object]) -> LaunchConfig:
    """Return the launch configuration for inputs of these sizes.

    Numbers of queries are rounded up to powers of two, which share a configuration. Configurations may sum in different
    orders and so round differently. If algorithms must be fixed, the configuration is therefore fixed instead of timed:
    with `torch.use_deterministic_algorithms`, and in evaluation (`torch.backends.cudnn.deterministic`).
    """
    value, _, _, offsets, _ = inputs
    batch, queries, *per_query = offsets.shape
    is_fixed = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    is_short = batch * queries < MIN_QUERIES_TO_TUNE or value.device.type == "cpu"  # Triton's interpreter
    if is_fixed or is_short:
        return _untuned(tuner, value.shape[-1])
    sizes = (*per_query, value.shape[-1], triton.next_power_of_2(batch * queries))
    return tuner.choose((value.device, value.dtype, sizes), run)


def _untuned(tuner: Autotuner, dim: int) -> LaunchConfig:
    if dim <= 32:
        return tuner.table[0]
    return WIDEST_HEAD if tuner is FORWARD and dim > 64 else WIDE_HEAD


def _launch(kernel: Any, tuning: LaunchConfig, pointers: tuple[Tensor, ...], **constants: bool) -> None:
    """Run a kernel over blocks of queries, heads and images. The first four tensors give the sizes."""
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
        enable_fp_fusion=True,  # no longer the default in Triton 3.10
        **constants,
    )


def _deterministic_value_gradient(
    value: Tensor, sides: Sequence[int], reference: Tensor, offsets: Tensor, logits: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient of the value as a sum in sorted order.

    It processes one image, head and neighbour at a time to bound memory.
    """
    heads = value.shape[2]
    shapes = list(zip(sides[::2], sides[1::2], strict=True))
    sizes = torch.tensor([[width, height] for height, width in shapes], device=value.device)
    locations = reference[:, :, None, None, None] + offsets / sizes[:, None]
    weights = logits.float().flatten(-2).softmax(-1).view(logits.shape)
    total = padded_table(torch.zeros_like(value, dtype=torch.float32), shapes)
    per_head = gradient.float().unflatten(2, (heads, -1))
    for image, table in enumerate(total.chunk(len(value))):
        samples = Samples.locate(shapes, locations[image : image + 1])
        row_weights = samples.row_weights(weights[image : image + 1])
        for head, neighbour in np.ndindex(heads, 4):
            rows, shares = (tensor[0, :, head, neighbour] for tensor in (samples.rows, row_weights))  # [Q, K]
            gradients = shares[..., None] * per_head[image, :, None, head]
            table.index_put_((rows.flatten().long(),), gradients.flatten(0, 1), accumulate=True)
    return unpadded_values(total, value, shapes)
