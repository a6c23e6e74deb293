"""Benchmark of the forward pass of the whole R50 model against `transformers` with the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import Measurement, compare
from benchmarks.peers.transformers_peer import twins


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Return one measurement per image size, in fp32."""
    ours, theirs = (model.eval().to(device) for model in twins())
    return [_case(ours, theirs, size, device) for size in ((256,) if tiny else (512, 1024))]


@torch.inference_mode()
def _case(ours: nn.Module, theirs: nn.Module, size: int, device: torch.device) -> Measurement:
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)

    def run_ours() -> Sequence[Tensor]:
        predictions = ours(images)
        return predictions.class_logits[-1], predictions.mask_logits()

    def run_transformers() -> Sequence[Tensor]:
        output = theirs(pixel_values=images)
        return output.class_queries_logits, output.masks_queries_logits

    shape = f"1 x {size} x {size}"
    return compare(
        "R50 forward fp32",
        shape,
        run_ours,
        "transformers",
        run_transformers,
        1e-3,
        repeats=3,
        device=device,
        memory=True,
    )
