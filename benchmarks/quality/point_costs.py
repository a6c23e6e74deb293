"""CPU time of matching, losses and backward pass, by kind of points: `python -m benchmarks.quality.point_costs`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quality.arms import ARMS, IMAGE_SETS, Run
from benchmarks.quality.make_tables import markdown
from benchmarks.synthetic_batches import CLASSES, make_batch
from m2f.cluster.terminal import print_out
from m2f.model.config import LossConfig
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.loss.points import CounterPoints
from m2f.model.structures import Predictions, Targets


@dataclass(frozen=True)
class Sizes:
    """Of one micro-batch and of the model that predicts it."""

    images: int
    canvas: int
    """Height and width in pixels."""
    targets: int
    layers: int
    """Predictions of the decoder."""
    queries: int
    channels: int
    """Of mask embeddings."""

    def __str__(self) -> str:
        return (
            f"{self.images} x {self.canvas} x {self.canvas}, {self.targets} masks, {self.layers} predictions of "
            f"{self.queries} queries, {self.channels} channels"
        )


SIZES = (Sizes(4, 128, 12, 4, 32, 96), Sizes(2, 256, 50, 4, 120, 96), Sizes(1, 1024, 11, 10, 100, 256))
"""The shapes recipe, the nuclei recipe, and the R50 of the paper."""


def measure(sizes: Sizes, losses: Sequence[LossConfig], repeats: int) -> list[float]:
    """Median CPU seconds for each of the settings, run in turn on one thread."""
    predictions, targets = _inputs(sizes)
    seconds: list[list[float]] = [[] for _ in losses]
    for _ in range(repeats + 1):
        for config, taken in zip(losses, seconds, strict=True):
            began = time.process_time()
            normalizers = count_normalizers(targets, sizes.queries, config)
            total = compute_losses(predictions, targets, CounterPoints(0), normalizers, config, CLASSES).total
            torch.autograd.grad(total, predictions)
            taken.append(time.process_time() - began)
    return [statistics.median(taken[1:]) for taken in seconds]  # the first one warms up


def _inputs(sizes: Sizes) -> tuple[Predictions, Targets]:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.layers, sizes.images, sizes.queries)
    side = sizes.canvas // 4
    predictions = Predictions(
        torch.randn(*shape, CLASSES + 1, generator=generator).requires_grad_(),
        (torch.randn(*shape, sizes.channels, generator=generator) / sizes.channels**0.5).requires_grad_(),
        torch.randn(sizes.images, sizes.channels, side, side, generator=generator).requires_grad_(),
    )
    return predictions, make_batch(sizes.images, sizes.canvas, sizes.targets).targets


def table(all_sizes: Sequence[Sizes], repeats: int) -> str:
    """Milliseconds of every arm, and the ratio of each to the last one."""
    losses = [Run(IMAGE_SETS[0], arm, 0).config(Path("unused")).model.loss for arm in ARMS]
    rows = []
    for sizes in all_sizes:
        seconds = measure(sizes, losses, repeats)
        rows.append([str(sizes), *(f"{1000 * one:.1f} ({one / seconds[-1]:.2f})" for one in seconds)])
    return markdown(["micro-batch", *(f"{arm.name}, ms (ratio)" for arm in ARMS)], rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print_out(table(SIZES, repeats=int(sys.argv[1]) if len(sys.argv) > 1 else 5))
