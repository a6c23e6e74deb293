"""`python -m benchmarks.quality.point_costs`: measure CPU time of matching, losses and gradients for m2f's arms."""

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
    """Sizes of one micro-batch and of the model's predictions."""

    images: int
    canvas: int
    """Height and width of the images in pixels."""
    targets: int
    layers: int
    """Number of predictions of the decoder."""
    queries: int
    channels: int
    """Channels of the mask embeddings."""

    def __str__(self) -> str:
        return (
            f"{self.images} x {self.canvas} x {self.canvas}, {self.targets} masks, {self.layers} predictions of "
            f"{self.queries} queries, {self.channels} channels"
        )


SIZES = (Sizes(4, 128, 12, 4, 32, 96), Sizes(2, 256, 50, 4, 120, 96), Sizes(1, 1024, 11, 10, 100, 256))
"""Sizes of the shapes recipe, the nuclei recipe, and the R50 of the paper."""


def measure(sizes: Sizes, losses: Sequence[LossConfig], repeats: int) -> list[float]:
    """Return the median CPU seconds of each of `losses`. Every repeat measures all of them, one after the other."""
    predictions, targets = _inputs(sizes)
    seconds: list[list[float]] = [[] for _ in losses]
    for _ in range(repeats + 1):
        for config, times in zip(losses, seconds, strict=True):
            began = time.process_time()
            normalizers = count_normalizers(targets, sizes.queries, config)
            total = compute_losses(predictions, targets, CounterPoints(0), normalizers, config, CLASSES).total
            torch.autograd.grad(total, predictions[:3])
            times.append(time.process_time() - began)
    return [statistics.median(times[1:]) for times in seconds]  # leaves out the warm-up run


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
    """CPU time for one micro-batch."""

    sizes: str
    milliseconds: Mapping[str, float]
    """Milliseconds of CPU time by arm."""


def measure_all(all_sizes: Sequence[Sizes], repeats: int) -> list[Costs]:
    """Measure every arm that our trainer trains."""
    arms = [arm for arm in ARMS if arm.trainer == "m2f"]
    losses = [Run(IMAGE_SETS[0], arm, 0).config(Path("unused")).model.loss for arm in arms]
    names = [arm.name for arm in arms]
    return [
        Costs(
            str(sizes), dict(zip(names, (1000 * seconds for seconds in measure(sizes, losses, repeats)), strict=True))
        )
        for sizes in all_sizes
    ]


def read_costs(folders: Sequence[Path]) -> list[Costs]:
    """Return the different measurements that `write_costs` wrote to these folders."""
    costs: list[Costs] = []
    for path in (folder / COSTS_FILE for folder in folders):
        listed = [Costs(**content) for content in json.loads(path.read_text())] if path.exists() else []
        costs += [cost for cost in listed if cost not in costs]
    return costs


def write_costs(costs: Sequence[Costs], folder: Path) -> None:
    """Write measurements to a folder in place of those that it holds."""
    (folder / COSTS_FILE).write_text(json.dumps([asdict(cost) for cost in costs], indent=1))


def costs_table(costs: Sequence[Costs]) -> str:
    """Return a table of milliseconds of every arm, with the ratio to the last arm."""
    names = list(costs[0].milliseconds)
    rows = [
        [
            cost.sizes,
            *(f"{value:.1f} ({value / cost.milliseconds[names[-1]]:.2f})" for value in cost.milliseconds.values()),
        ]
        for cost in costs
    ]
    return markdown(["micro-batch", *(f"{name}, ms (ratio)" for name in names)], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all sizes, print the table, and return 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.point_costs", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="also write the results to FOLDER, for make_tables")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)  # first, so that a wrong path fails before the measurement
    costs = measure_all(SIZES, arguments.repeats)
    if arguments.save is not None:
        write_costs(costs, arguments.save)
    print_out(costs_table(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
