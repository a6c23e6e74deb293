"""Triton kernels of `m2f.model.deform_attn.triton_op`, which documents what they compute.

They use plain `@triton.jit`, so Triton's interpreter can run them without a GPU. A program computes a block of queries,
one head and one image. Its tensors are [BLOCK] over queries, or [BLOCK, LANES] over queries and channels.
"""

import triton
import triton.language as tl


@triton.jit
def _queries(
    reference_ptr, logits_ptr, queries, heads, reference_per_image,
    SAMPLES: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the values that all samples of a query share.

    Return which queries exist, their output rows, their reference points, and maximum and sum of the softmax.
    """
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, image = tl.program_id(1), tl.program_id(2)
    inside = query < queries
    rows = (image.to(tl.int64) * queries + query) * heads + head
    reference = reference_ptr + (image * reference_per_image * queries + query) * 2
    ref_x = tl.load(reference, mask=inside, other=0.0)
    ref_y = tl.load(reference + 1, mask=inside, other=0.0)
    columns = tl.arange(0, SAMPLES)
    mask = inside[:, None] & (columns < COUNT)[None, :]
    logits = tl.load(logits_ptr + rows[:, None] * COUNT + columns[None, :], mask=mask, other=float("-inf"))
    logits = tl.where(inside[:, None], logits.to(tl.float32), 0.0)
    largest = tl.max(logits, axis=1)
    total = tl.sum(tl.exp(logits - largest[:, None]), axis=1)
    return inside, rows, ref_x, ref_y, largest, total


@triton.jit
def _head_start(pixels, heads, DIM: tl.constexpr):
    """Return the offset of pixel 0 of the program's image and head. Pixels are heads * DIM elements apart."""
    return (tl.program_id(2).to(tl.int64) * pixels * heads + tl.program_id(1)) * DIM


@triton.jit
def _level(levels_ptr, level: tl.constexpr):
    """Return width, height and first pixel of a level."""
    at = levels_ptr + level * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _sample(
    offsets_ptr, logits_ptr, rows, inside, ref_x, ref_y, largest, total, width, height,
    sample, COUNT: tl.constexpr,
):  # fmt: skip
    """Return attention weight and pixel coordinates of one sample of every query.

    Coordinate 0 is the centre of the first pixel.
    """
    at = rows * COUNT + sample
    logit = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = ref_x * width + tl.load(offsets_ptr + at * 2, mask=inside, other=0.0) - 0.5
    y = ref_y * height + tl.load(offsets_ptr + at * 2 + 1, mask=inside, other=0.0) - 0.5
    return tl.exp(logit - largest) / total, x, y


@triton.jit
def _corner(x, y, inside, width, height, start, corner: tl.constexpr):
    """Return the weights along x and y of one of the four pixels around every sample, and the pixel's index.

    Also return whether the pixel exists.
    """
    column = tl.floor(x) + corner % 2
    line = tl.floor(y) + corner // 2
    along_x = 1 - tl.abs(x - column)  # NaN stays NaN
    along_y = 1 - tl.abs(y - line)
    hit = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
    pixel = tl.where(hit, start + line.to(tl.int32) * width + column.to(tl.int32), 0)
    return along_x, along_y, hit, pixel.to(tl.int64)


@triton.jit
def forward_kernel(
    value_ptr, levels_ptr, reference_ptr, offsets_ptr, logits_ptr, output_ptr,
    pixels, queries, heads, reference_per_image,
    DIM: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the weighted sum of the samples of every query."""
    COUNT: tl.constexpr = LEVELS * POINTS
    inside, rows, ref_x, ref_y, largest, total = _queries(
        reference_ptr, logits_ptr, queries, heads, reference_per_image, SAMPLES, COUNT, BLOCK
    )
    channels = tl.arange(0, LANES)
    real = (channels < DIM)[None, :]
    base = value_ptr + _head_start(pixels, heads, DIM)
    sums = tl.zeros((BLOCK, LANES), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        width, height, start = _level(levels_ptr, level)
        for point in tl.static_range(POINTS):
            sample = level * POINTS + point
            weight, x, y = _sample(
                offsets_ptr, logits_ptr, rows, inside, ref_x, ref_y, largest, total, width, height, sample, COUNT
            )
            for corner in tl.static_range(4):
                along_x, along_y, hit, pixel = _corner(x, y, inside, width, height, start, corner)
                at = base + pixel[:, None] * (heads * DIM) + channels[None, :]
                sampled = tl.load(at, mask=hit[:, None] & real, other=0.0).to(tl.float32)
                sums += (along_x * along_y * weight)[:, None] * sampled
    out = output_ptr + rows[:, None] * DIM + channels[None, :]
    tl.store(out, sums.to(output_ptr.dtype.element_ty), mask=inside[:, None] & real)


@triton.jit
def backward_kernel(
    value_ptr, levels_ptr, reference_ptr, offsets_ptr, logits_ptr, gradient_ptr,
    value_gradient_ptr, offset_gradient_ptr, logit_gradient_ptr,
    pixels, queries, heads, reference_per_image,
    DIM: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of value, offsets and logits.

    The gradient of the value is added atomically if SCATTER is set. Those of offsets and logits are written once.
    """
    COUNT: tl.constexpr = LEVELS * POINTS
    inside, rows, ref_x, ref_y, largest, total = _queries(
        reference_ptr, logits_ptr, queries, heads, reference_per_image, SAMPLES, COUNT, BLOCK
    )
    channels = tl.arange(0, LANES)
    real = (channels < DIM)[None, :]
    head_start = _head_start(pixels, heads, DIM)
    at_output = rows[:, None] * DIM + channels[None, :]
    gradient = tl.load(gradient_ptr + at_output, mask=inside[:, None] & real, other=0.0).to(tl.float32)
    samples = tl.arange(0, SAMPLES)
    weights = tl.zeros((BLOCK, SAMPLES), dtype=tl.float32)
    weight_gradients = tl.zeros((BLOCK, SAMPLES), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        width, height, start = _level(levels_ptr, level)
        for point in tl.static_range(POINTS):
            sample = level * POINTS + point
            weight, x, y = _sample(
                offsets_ptr, logits_ptr, rows, inside, ref_x, ref_y, largest, total, width, height, sample, COUNT
            )
            weight_gradient = tl.zeros((BLOCK,), dtype=tl.float32)
            x_gradient = tl.zeros((BLOCK,), dtype=tl.float32)
            y_gradient = tl.zeros((BLOCK,), dtype=tl.float32)
            for corner in tl.static_range(4):
                along_x, along_y, hit, pixel = _corner(x, y, inside, width, height, start, corner)
                at = head_start + pixel[:, None] * (heads * DIM) + channels[None, :]
                sampled = tl.load(value_ptr + at, mask=hit[:, None] & real, other=0.0).to(tl.float32)
                product = tl.sum(sampled * gradient, axis=1)
                weight_gradient += product * along_x * along_y
                x_gradient += product * along_y * (2 * (corner % 2) - 1)
                y_gradient += product * along_x * (2 * (corner // 2) - 1)
                if SCATTER:
                    share = (along_x * along_y * weight)[:, None] * gradient
                    tl.atomic_add(value_gradient_ptr + at, share, mask=hit[:, None] & real, sem="relaxed")
            at_offset = offset_gradient_ptr + (rows * COUNT + sample) * 2
            tl.store(at_offset, weight * x_gradient, mask=inside)
            tl.store(at_offset + 1, weight * y_gradient, mask=inside)
            of_sample = (samples == sample)[None, :]
            weights = tl.where(of_sample, weight[:, None], weights)
            weight_gradients = tl.where(of_sample, weight_gradient[:, None], weight_gradients)
    mean = tl.sum(weights * weight_gradients, axis=1)
    logit_gradients = weights * (weight_gradients - mean[:, None])
    mask = inside[:, None] & (samples < COUNT)[None, :]
    tl.store(logit_gradient_ptr + rows[:, None] * COUNT + samples[None, :], logit_gradients, mask=mask)
