"""`python -m benchmarks.quality.point_costs`: CPU time of matching, losses and backward pass, by kind of points."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.quality.arms import ARMS, IMAGE_SETS, Run
from benchmarks.quality.markdown import markdown
from benchmarks.synthetic_batches import CLASSES, make_batch
from m2f.cluster.terminal import print_out
from m2f.model.config import LossConfig
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.loss.points import CounterPoints
from m2f.model.structures import Predictions, Targets

COSTS_FILE = "point_costs.json"


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
            torch.autograd.grad(total, predictions[:3])
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


@dataclass(frozen=True)
class Costs:
    """Of one micro-batch."""

    sizes: str
    milliseconds: Mapping[str, float]
    """Of CPU time, by arm."""


def measure_all(all_sizes: Sequence[Sizes], repeats: int) -> list[Costs]:
    """Of every arm that our trainer trains."""
    arms = [arm for arm in ARMS if arm.trainer == "m2f"]
    losses = [Run(IMAGE_SETS[0], arm, 0).config(Path("unused")).model.loss for arm in arms]
    names = [arm.name for arm in arms]
    return [
        Costs(str(sizes), dict(zip(names, (1000 * one for one in measure(sizes, losses, repeats)), strict=True)))
        for sizes in all_sizes
    ]


def read_costs(folder: Path) -> list[Costs]:
    """What `--save` wrote; nothing where it did not."""
    path = folder / COSTS_FILE
    return [Costs(**content) for content in json.loads(path.read_text())] if path.exists() else []


def costs_table(costs: Sequence[Costs]) -> str:
    """Milliseconds of every arm, and the ratio of each to the last one."""
    names = list(costs[0].milliseconds)
    rows = [
        [
            one.sizes,
            *(f"{value:.1f} ({value / one.milliseconds[names[-1]]:.2f})" for value in one.milliseconds.values()),
        ]
        for one in costs
    ]
    return markdown(["micro-batch", *(f"{name}, ms (ratio)" for name in names)], rows)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.point_costs", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the figures there for make_tables")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    costs = measure_all(SIZES, arguments.repeats)
    if arguments.save is not None:
        (arguments.save / COSTS_FILE).write_text(json.dumps([asdict(one) for one in costs], indent=1))
    print_out(costs_table(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
