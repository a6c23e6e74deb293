"""Compares the Triton kernel with the plain form, in Triton's interpreter on CPU tensors: `python FILE`.

Not a test module: TRITON_INTERPRET must be set before triton is imported, so test_ms_deform_attn_triton.py starts it.
"""

from __future__ import annotations

import json
import math
import sys

import torch

from m2f.model.deform_attn import triton_op as ms_deform_attn_triton
from m2f.model.deform_attn.module import ms_deform_attn_grid_sample
from m2f.model.deform_attn.triton_op import fused_ms_deform_attn

SHAPES = [(3, 4), (5, 2), (1, 7)]
PIXELS = sum(height * width for height, width in SHAPES)


def plain(value, reference, offsets, logits):
    """Return the output of the same function, computed with softmax, division and grid_sample."""
    sizes = torch.tensor([[width, height] for height, width in SHAPES], dtype=torch.float64)
    locations = reference[:, :, None, None, None] + offsets / sizes[:, None]
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    return ms_deform_attn_grid_sample(value, SHAPES, locations, weights)


def errors(dtype, batch, heads, dim, points, queries, shared_reference, in_order=False) -> dict[str, float]:
    """Return the largest errors of output and gradients against float64, relative to the largest value of each."""
    torch.manual_seed(0)
    value = torch.randn(batch, PIXELS, heads, dim).to(dtype)
    reference = torch.rand(1 if shared_reference else batch, queries, 2)
    offsets = 3 * torch.randn(batch, queries, heads, len(SHAPES), points, 2)  # many samples lie outside the maps
    logits = torch.randn(batch, queries, heads, len(SHAPES), points)
    cotangent = torch.randn(batch, queries, heads * dim).to(dtype)
    ours = [tensor.requires_grad_() for tensor in (value, offsets, logits)]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    torch.use_deterministic_algorithms(in_order)
    output = fused_ms_deform_attn(ours[0], SHAPES, reference, *ours[1:])
    gradients = torch.autograd.grad(output, ours, cotangent)
    torch.use_deterministic_algorithms(False)
    expected = plain(exact[0], reference.double(), *exact[1:])
    expected_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    assert output.dtype == dtype
    pairs = zip(
        ("output", "value", "offsets", "logits"), (output, *gradients), (expected, *expected_gradients), strict=True
    )
    return {name: float((a.double() - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def nan_location_reaches_the_output() -> bool:
    """Return whether NaN in an offset makes its query's output NaN, and no other output."""
    value, reference = torch.randn(1, PIXELS, 1, 4), torch.rand(1, 3, 2)
    offsets, logits = torch.zeros(1, 3, 1, len(SHAPES), 1, 2), torch.zeros(1, 3, 1, len(SHAPES), 1)
    offsets[0, 1, 0, 2, 0, 0] = math.nan
    output = fused_ms_deform_attn(value, SHAPES, reference, offsets, logits)
    return output.isnan().all(-1).tolist() == [[False, True, False]]


def errors_of_all_tunings() -> list[dict[str, float]]:
    """Return the errors with each launch config, chosen after trial runs of all configs as by the autotuner."""
    original, results = ms_deform_attn_triton._launch_config, []
    for place in range(len(ms_deform_attn_triton.BACKWARD.table)):

        def try_all(tuner, inputs, run, place=place):
            for tuning in tuner.table:
                run(tuning)
            return tuner.table[place % len(tuner.table)]

        ms_deform_attn_triton._launch_config = try_all
        results.append(errors(torch.float32, 1, 1, 4, 1, 9, shared_reference=True))
    ms_deform_attn_triton._launch_config = original
    return results


def opcheck_results() -> list[str]:
    """Return the results of torch's opcheck of both operators: schema, autograd registration and fake tensors."""
    value = torch.randn(2, PIXELS, 2, 4, requires_grad=True)
    offsets = torch.randn(2, 5, 2, len(SHAPES), 2, 2, requires_grad=True)
    logits = torch.randn(2, 5, 2, len(SHAPES), 2, requires_grad=True)
    inputs = (value, [side for shape in SHAPES for side in shape], torch.rand(1, 5, 2), offsets, logits)
    operators = torch.ops.m2f
    forward = torch.library.opcheck(operators.ms_deform_attn.default, inputs)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    backward = torch.library.opcheck(operators.ms_deform_attn_backward.default, (torch.randn(2, 5, 8), *detached))
    return [*forward.values(), *backward.values()]


def compiled_error() -> float:
    """Return the largest gradient difference between a function that uses the operator and its compiled form."""
    value, reference = torch.randn(1, PIXELS, 1, 4), torch.rand(1, 3, 2)
    offsets, logits = torch.randn(1, 3, 1, len(SHAPES), 1, 2), torch.randn(1, 3, 1, len(SHAPES), 1)

    def attend(value, offsets, logits):
        return fused_ms_deform_attn(2 * value, SHAPES, reference, offsets, logits).sin().sum()

    inputs = [tensor.requires_grad_() for tensor in (value, offsets, logits)]
    plain_gradients = torch.autograd.grad(attend(*inputs), inputs)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    gradients = torch.autograd.grad(compiled(*inputs), inputs)
    return max(float((a - b).detach().abs().max()) for a, b in zip(gradients, plain_gradients, strict=True))


def main() -> None:
    """Write all results as one JSON object to standard output."""
    results = {
        "float32": errors(torch.float32, 2, 2, 4, 2, 19, shared_reference=True),
        "reference_per_image": errors(torch.float32, 2, 1, 4, 2, 5, shared_reference=False),
        "odd_dim": errors(torch.float32, 1, 2, 6, 3, 9, shared_reference=True),
        "many_blocks": errors(torch.float32, 1, 1, 4, 1, 70, shared_reference=True),
        "in_order": errors(torch.float32, 2, 2, 4, 2, 9, shared_reference=True, in_order=True),
        "bfloat16": errors(torch.bfloat16, 1, 2, 4, 2, 19, shared_reference=True),
        "float16": errors(torch.float16, 1, 2, 4, 2, 19, shared_reference=True),
        "batch_16": errors(torch.float32, 16, 1, 4, 1, 3, shared_reference=True),
        "tunings": errors_of_all_tunings(),
        "operator": opcheck_results(),
        "compiled": compiled_error(),
        "nan": nan_location_reaches_the_output(),
    }
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
