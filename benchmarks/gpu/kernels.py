"""Checks of deformable and masked attention on this GPU against float64 results."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.stage import Stage, describe_error, distance, milliseconds
from m2f.model.deform_attn.module import ms_deform_attn_grid_sample
from m2f.model.deform_attn.tuning import Autotuner, LaunchConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
BACKENDS: dict[str, list[SDPBackend]] = {
    "default": [],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
}


@dataclass(frozen=True)
class Case:
    """One input of deformable attention."""

    name: str
    shapes: Sequence[tuple[int, int]]
    images: int
    queries: int | None
    """Number of queries. None makes every pixel of every level a query."""
    heads: int
    dim: int
    points: int
    all_tunings: bool = False
    """Whether every launch configuration is tested; otherwise only one (see `only_config`)."""


MODEL_CASES = (
    Case("1024", ((128, 128), (64, 64), (32, 32)), 2, None, 8, 32, 4, all_tunings=True),
    Case("800x1344", ((25, 42), (50, 84), (100, 168)), 1, None, 8, 32, 4),
    Case("24 channels", ((16, 16), (8, 8), (4, 4)), 2, None, 4, 24, 4, all_tunings=True),
    Case("64 channels", ((16, 12), (8, 6)), 2, 50, 4, 64, 4),
    Case("128 channels", ((6, 6),), 1, 20, 2, 128, 4),
)
EDGE_CASES = (
    Case("one pixel", ((1, 1), (1, 1)), 2, 3, 2, 4, 2),
    Case("thin", ((1, 13), (9, 1)), 3, 5, 1, 8, 3),
    Case("33 channels", ((4, 5),), 1, 9, 2, 33, 2),
)


def msda(stage: Stage) -> dict[str, object]:
    """Compare the fused kernel and its gradients with float64 for several shapes, dtypes and launch configurations.

    A dry run uses Triton's interpreter. Raises AssertionError if an error exceeds TOLERANCE.
    """
    from m2f.model.deform_attn.module import _checked_kernel
    from m2f.model.deform_attn.triton_op import BACKWARD, FORWARD

    configs = list(
        dict.fromkeys((*FORWARD.table, *BACKWARD.table, LaunchConfig(4, 1), LaunchConfig(8, 2), LaunchConfig(16, 1)))
    )
    max_errors: dict[str, float] = {}
    failures: list[str] = []
    for case, dtype in itertools.product(
        stage.pick((*MODEL_CASES, *EDGE_CASES), EDGE_CASES), stage.pick(DTYPES, DTYPES[:2])
    ):
        for config in configs if case.all_tunings else configs[:1]:
            with only_config(FORWARD, config), only_config(BACKWARD, config):
                error = _kernel_error(case, dtype, stage.device)
            name = f"{case.name} {str(dtype).removeprefix('torch.')}"
            max_errors[name] = max(max_errors.get(name, 0.0), error)
            if not error < TOLERANCE[dtype]:
                failures.append(f"{name} {tuple(config)}: {error:.1e}")
    print(max_errors, flush=True)
    if failures:
        raise AssertionError(
            f"{len(failures)} errors above TOLERANCE in {len(max_errors)} cases: {'; '.join(failures[:5])}"
        )
    accepted = None if stage.dry else _checked_kernel(torch.bfloat16, 3, 8, 4, 32)
    return {
        "worst": f"{max(max_errors.values()):.1e}",
        "cases": len(max_errors),
        "accepted by the model's own trial": accepted,
    }


def _kernel_error(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative distance of output and gradients from float64."""
    from m2f.model.deform_attn.triton_op import fused_ms_deform_attn

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    pixels = sum(height * width for height, width in case.shapes)
    queries, levels = case.queries or pixels, len(case.shapes)
    samples = (case.images, queries, case.heads, levels, case.points)
    value = random(case.images, pixels, case.heads, case.dim).to(dtype).requires_grad_()
    # Odd multiples of 1/32 pixel, as in bench_msda. Reference points are random here, so samples may lie anywhere.
    offsets = (((32 * random(*samples, 2)).round() + 0.5) / 16).requires_grad_()
    logits = random(*samples).to(dtype).requires_grad_()
    reference = torch.rand(case.images, queries, 2, device=device, generator=generator)
    cotangent = random(case.images, queries, case.heads * case.dim).to(dtype)

    inputs = (value, offsets, logits)
    ours = fused_ms_deform_attn(value, list(case.shapes), reference, offsets, logits)
    actual = (ours, *torch.autograd.grad(ours, inputs, cotangent))
    double_inputs = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    plain = _reference_attention(case, double_inputs[0], reference.double(), double_inputs[1], double_inputs[2])
    exact = (plain, *torch.autograd.grad(plain, double_inputs, cotangent.double()))
    return max(distance(a, b) for a, b in zip(actual, exact, strict=True))


def _reference_attention(case: Case, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    sizes = torch.tensor([(width, height) for height, width in case.shapes], dtype=value.dtype, device=value.device)
    locations = reference[:, :, None, None, None] + offsets / sizes[:, None]
    return ms_deform_attn_grid_sample(
        value, list(case.shapes), locations, logits.flatten(-2).softmax(-1).view(logits.shape)
    )


def sdpa(stage: Stage) -> dict[str, object]:
    """Measure masked attention of 100 queries to the tokens of a level: ms and error against float64 per backend."""
    stage.need_gpu()
    rows: dict[str, object] = {}
    # 1600 tokens leave a remainder of 64 modulo 128, for which one backend has returned wrong results.
    for images, tokens in ((2, 1024), (2, 4096), (2, 16384), (1, 1050), (1, 1600), (1, 4200), (1, 16800)):
        attend, exact = _masked_attention(images, tokens, stage.device)
        for name, backends in BACKENDS.items():
            try:
                with sdpa_kernel(backends) if backends else contextlib.nullcontext():
                    actual = attend()
                    elapsed_ms = milliseconds(attend, stage.device)
                error = max(distance(a, b) for a, b in zip(actual, exact, strict=True))
                rows[f"{images} x {tokens} {name}"] = f"{elapsed_ms} ms, {error:.0e}"
            except RuntimeError as error:
                rows[f"{images} x {tokens} {name}"] = describe_error(error)
    return rows


def _masked_attention(
    images: int, tokens: int, device: torch.device
) -> tuple[Callable[[], Sequence[Tensor]], Sequence[Tensor]]:
    """Return a function that computes output and gradients in bfloat16, and the float64 results."""
    generator = torch.Generator(device).manual_seed(0)

    def heads(length: int) -> Tensor:
        rows = torch.randn(images, length, 256, device=device, dtype=torch.bfloat16, generator=generator)
        return rows.unflatten(-1, (8, 32)).transpose(1, 2).requires_grad_()

    inputs = (heads(100), heads(tokens), heads(tokens))
    mask = torch.rand(images, 1, 100, tokens, device=device, generator=generator) < 0.1
    mask[:, :, 0] = True
    cotangent = torch.randn(images, 8, 100, 32, device=device, dtype=torch.bfloat16, generator=generator)

    def run(tensors: tuple[Tensor, ...], gradient: Tensor) -> Sequence[Tensor]:
        output = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
        return output.detach(), *torch.autograd.grad(output, tensors, gradient)

    exact = run(tuple(tensor.detach().double().requires_grad_() for tensor in inputs), cotangent.double())
    return (lambda: run(inputs, cotangent)), exact


@contextlib.contextmanager
def only_config(autotuner: Autotuner, config: LaunchConfig) -> Iterator[None]:
    """Restrict a kernel to one launch configuration. Above 32 channels per head, it has no effect."""
    table, fixed = autotuner.table, torch.backends.cudnn.deterministic
    autotuner.table = (config,)
    torch.backends.cudnn.deterministic = True  # prevents timing of configurations
    try:
        yield
    finally:
        autotuner.table = table
        torch.backends.cudnn.deterministic = fixed
