"""The Triton kernels behind `model.ms_deform_attn_triton`; what they compute is said there.

Plain `@triton.jit`, so that Triton's interpreter can run them without a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def _softmax_statistics(logits_ptr, rows, inside, SAMPLES: tl.constexpr, COUNT: tl.constexpr):
    """Largest logit and sum of exponentials of every query's samples."""
    columns = tl.arange(0, SAMPLES)
    mask = inside[:, None] & (columns < COUNT)[None, :]
    logits = tl.load(logits_ptr + rows[:, None] * COUNT + columns[None, :], mask=mask, other=float("-inf"))
    logits = tl.where(inside[:, None], logits.to(tl.float32), 0.0)
    largest = tl.max(logits, axis=1)
    return largest, tl.sum(tl.exp(logits - largest[:, None]), axis=1)


@triton.jit
def _place(offsets_ptr, ref_x, ref_y, rows, inside, sample, width, height, COUNT: tl.constexpr):
    """Pixel coordinates of one sample of every query; 0 is the middle of the first pixel."""
    at = offsets_ptr + (rows * COUNT + sample) * 2
    x = ref_x * width + tl.load(at, mask=inside, other=0.0) - 0.5
    y = ref_y * height + tl.load(at + 1, mask=inside, other=0.0) - 0.5
    return x, y


@triton.jit
def forward_kernel(
    value_ptr, levels_ptr, reference_ptr, offsets_ptr, logits_ptr, output_ptr,
    pixels, queries, heads, reference_per_image,
    DIM: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries, one head, one image."""
    COUNT: tl.constexpr = LEVELS * POINTS
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, image = tl.program_id(1), tl.program_id(2)
    inside = query < queries
    rows = (image.to(tl.int64) * queries + query) * heads + head
    reference = reference_ptr + (image * reference_per_image * queries + query) * 2
    ref_x = tl.load(reference, mask=inside, other=0.0)
    ref_y = tl.load(reference + 1, mask=inside, other=0.0)
    largest, total = _softmax_statistics(logits_ptr, rows, inside, SAMPLES, COUNT)
    channels = tl.arange(0, LANES)
    real = (channels < DIM)[None, :]
    # Row of pixel 0 for this image and head; pixels are heads * DIM elements apart.
    base = value_ptr + (image.to(tl.int64) * pixels * heads + head) * DIM
    sums = tl.zeros((BLOCK, LANES), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        width = tl.load(levels_ptr + level * 3)
        height = tl.load(levels_ptr + level * 3 + 1)
        start = tl.load(levels_ptr + level * 3 + 2)
        for point in tl.static_range(POINTS):
            sample = level * POINTS + point
            logit = tl.load(logits_ptr + rows * COUNT + sample, mask=inside, other=0.0).to(tl.float32)
            weight = tl.exp(logit - largest) / total
            x, y = _place(offsets_ptr, ref_x, ref_y, rows, inside, sample, width, height, COUNT)
            left, top = tl.floor(x), tl.floor(y)
            for corner in tl.static_range(4):
                column = left + corner % 2
                line = top + corner // 2
                share = (1 - tl.abs(x - column)) * (1 - tl.abs(y - line)) * weight  # NaN stays NaN
                hit = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
                pixel = tl.where(hit, start + line.to(tl.int32) * width + column.to(tl.int32), 0)
                at = base + pixel[:, None].to(tl.int64) * (heads * DIM) + channels[None, :]
                sampled = tl.load(at, mask=hit[:, None] & real, other=0.0).to(tl.float32)
                sums += share[:, None] * sampled
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
    """As the forward; the gradient of the value is added atomically, that of offsets and logits written once."""
    COUNT: tl.constexpr = LEVELS * POINTS
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, image = tl.program_id(1), tl.program_id(2)
    inside = query < queries
    rows = (image.to(tl.int64) * queries + query) * heads + head
    reference = reference_ptr + (image * reference_per_image * queries + query) * 2
    ref_x = tl.load(reference, mask=inside, other=0.0)
    ref_y = tl.load(reference + 1, mask=inside, other=0.0)
    largest, total = _softmax_statistics(logits_ptr, rows, inside, SAMPLES, COUNT)
    channels = tl.arange(0, LANES)
    real = (channels < DIM)[None, :]
    columns_of_samples = tl.arange(0, SAMPLES)
    image_start = (image.to(tl.int64) * pixels * heads + head) * DIM
    at_output = rows[:, None] * DIM + channels[None, :]
    gradient = tl.load(gradient_ptr + at_output, mask=inside[:, None] & real, other=0.0).to(tl.float32)
    weights = tl.zeros((BLOCK, SAMPLES), dtype=tl.float32)
    weight_gradients = tl.zeros((BLOCK, SAMPLES), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        width = tl.load(levels_ptr + level * 3)
        height = tl.load(levels_ptr + level * 3 + 1)
        start = tl.load(levels_ptr + level * 3 + 2)
        for point in tl.static_range(POINTS):
            sample = level * POINTS + point
            logit = tl.load(logits_ptr + rows * COUNT + sample, mask=inside, other=0.0).to(tl.float32)
            weight = tl.exp(logit - largest) / total
            x, y = _place(offsets_ptr, ref_x, ref_y, rows, inside, sample, width, height, COUNT)
            left, top = tl.floor(x), tl.floor(y)
            weight_gradient = tl.zeros((BLOCK,), dtype=tl.float32)
            x_gradient = tl.zeros((BLOCK,), dtype=tl.float32)
            y_gradient = tl.zeros((BLOCK,), dtype=tl.float32)
            for corner in tl.static_range(4):
                column = left + corner % 2
                line = top + corner // 2
                along_x = 1 - tl.abs(x - column)
                along_y = 1 - tl.abs(y - line)
                hit = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
                pixel = tl.where(hit, start + line.to(tl.int32) * width + column.to(tl.int32), 0)
                at = image_start + pixel[:, None].to(tl.int64) * (heads * DIM) + channels[None, :]
                sampled = tl.load(value_ptr + at, mask=hit[:, None] & real, other=0.0).to(tl.float32)
                product = tl.sum(sampled * gradient, axis=1)
                weight_gradient += product * along_x * along_y
                x_gradient += product * along_y * (2 * (corner % 2) - 1)
                y_gradient += product * along_x * (2 * (corner // 2) - 1)
                if SCATTER:
                    share = (weight * along_x * along_y)[:, None] * gradient
                    tl.atomic_add(value_gradient_ptr + at, share, mask=hit[:, None] & real, sem="relaxed")
            at_offset = offset_gradient_ptr + (rows * COUNT + sample) * 2
            tl.store(at_offset, weight * x_gradient, mask=inside)
            tl.store(at_offset + 1, weight * y_gradient, mask=inside)
            of_sample = (columns_of_samples == sample)[None, :]
            weights = tl.where(of_sample, weight[:, None], weights)
            weight_gradients = tl.where(of_sample, weight_gradient[:, None], weight_gradients)
    mean = tl.sum(weights * weight_gradients, axis=1)
    logit_gradients = weights * (weight_gradients - mean[:, None])
    mask = inside[:, None] & (columns_of_samples < COUNT)[None, :]
    at_logits = logit_gradient_ptr + rows[:, None] * COUNT + columns_of_samples[None, :]
    tl.store(at_logits, logit_gradients, mask=mask)
