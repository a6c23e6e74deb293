"""`python -m benchmarks.quality.agreement FOLDER`: losses of ours and of `transformers` over the first training steps.

Both begin with the same weights and get the same batches of our loader, the same points and the same normalisers; each
is trained by its own losses.

In a new model the sampling points of deformable attention lie exactly on centres of pixels, where the derivative of
bilinear interpolation jumps: rounding decides which one is taken, and a step of AdamW makes much of it. So the offsets
are moved by up to a quarter of a pixel first, alike for both. Without that, the trainings part in the first steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks.measure import CPU
from benchmarks.quality.arms import ARMS, IMAGE_SETS, Run
from benchmarks.quality.make_tables import markdown
from benchmarks.quality.plain_step import PlainStep
from benchmarks.quality.run_arms import make_shards
from benchmarks.quality.their_draws import recorded_draws
from benchmarks.quality.their_model import their_loss, their_twin
from benchmarks.tables import Setting
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_out
from m2f.cluster.train.compose import compose_job
from m2f.data_pipeline.loading.loader import LoaderSpec
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.loss.criterion import count_normalizers
from m2f.model.loss.points import PointSource
from m2f.model.mask2former import Mask2Former
from m2f.trainer.data import open_shards
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.job import TrainJob
from m2f.trainer.start_model import start_model

TOLERANCE = 1e-3
"""Of the relative difference of both losses, at any step."""
_MOST_MOVED = 0.25
"""Of a pixel."""


@dataclass(frozen=True)
class StepLosses:
    """Total losses of one step."""

    ours: float
    theirs: float

    @property
    def error(self) -> float:
        """Of ours, relative to theirs."""
        return abs(self.ours - self.theirs) / abs(self.theirs)


class _OurTraining:
    """Our model and losses in a plain loop."""

    def __init__(self, model: Mask2Former, job: TrainJob) -> None:
        assert job.training.micro_batch >= job.training.global_batch, "theirs knows the normalisers of one micro-batch"
        self._module = TrainingModule(model.train(), job.model, job.seed, "fp32")
        self._config = job.model
        self._update = PlainStep(model, job.training)

    def step(self, batch: Batch, points: PointSource, number: int) -> float:
        """Train on one batch at given points; its loss."""
        normalizers = count_normalizers(batch.targets, self._config.transformer_decoder.num_queries, self._config.loss)
        self._module.points = points  # type: ignore[assignment]
        loss = self._module(batch, normalizers).total
        self._update(loss, number)
        return float(loss.detach())


def compare_losses(job: TrainJob, ours: Mask2Former, batches: Iterable[Batch]) -> Iterator[StepLosses]:
    """Train on the batches, each of which is a whole step, and yield the losses of every step."""
    theirs = their_twin(ours, job.model).train()
    update = PlainStep(theirs, job.training)
    mine = _OurTraining(ours, job)
    torch.manual_seed(job.seed)
    for number, batch in enumerate(batches):
        with recorded_draws(theirs.criterion) as draws:
            loss = their_loss(theirs, ours.normalise(batch.images, batch.sizes), batch.targets)
        own = mine.step(batch, draws.points(batch.targets), number)
        update(loss, number)
        yield StepLosses(own, float(loss.detach()))


@torch.no_grad()
def move_offsets(model: nn.Module) -> None:
    """Move the sampling points of deformable attention off the centres of pixels, by the same amounts every time."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            parameter.add_(_MOST_MOVED * (2 * torch.rand(parameter.shape, generator=generator) - 1))


def losses_of_recipe(config: RunConfig, steps: int, moved: bool) -> list[StepLosses]:
    """Of the first steps of a recipe, from its own start weights or with `moved` offsets."""
    make_shards(config)
    storage = Storage(config.storage)
    job = compose_job(config, storage)
    batch = job.training.global_batch
    job = replace(job, training=replace(job.training, micro_batch=batch))
    ours, _ = start_model(job, storage, None)
    if moved:
        move_offsets(ours)
    spec = LoaderSpec(global_batch=batch, micro_batch=batch, rank=0, world=1, start_step=0, seed=job.seed)
    with closing(open_shards(job, storage).steps(job, storage, spec, order_start=0)) as loaded:
        return list(compare_losses(job, ours, (step.micro_batches[0] for step in islice(loaded, steps))))


def table(name: str, moved: Sequence[StepLosses], unmoved: Sequence[StepLosses]) -> str:
    """Every step, under the largest difference and whether that is small enough."""
    verdict = "agree" if agree(moved) else "FAILS: differ"
    head = (
        f"{name}: the losses of {len(moved)} steps {verdict}. The largest relative difference is "
        f"{max(one.error for one in moved):.1e} (bar {TOLERANCE:g}), without moved offsets "
        f"{max(one.error for one in unmoved):.1e}."
    )
    rows = [
        [str(step), f"{one.ours:.4f}", f"{one.theirs:.4f}", f"{one.error:.1e}", f"{other.error:.1e}"]
        for step, (one, other) in enumerate(zip(moved, unmoved, strict=True), start=1)
    ]
    return f"{head}\n\n{markdown(['step', 'ours', 'transformers', 'difference', 'without moved offsets'], rows)}"


def agree(losses: Sequence[StepLosses]) -> bool:
    """Whether all steps are within the tolerance."""
    return all(one.error <= TOLERANCE for one in losses)


def main(words: Sequence[str] | None = None) -> int:
    """0 if all losses agree."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.agreement", description=__doc__)
    parser.add_argument("folder", type=Path, help="where shards go")
    parser.add_argument("--sets", nargs="+", choices=[one.name for one in IMAGE_SETS], default=["shapes"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value", help="settings of all runs")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DAY_HARDWARE_transformers_losses.md there")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    setting = Setting.now(CPU, ceilings="")
    runs = [Run(s, ARMS[0], seed) for s in IMAGE_SETS if s.name in arguments.sets for seed in arguments.seeds]
    where = f"{setting.day}, {setting.hardware}, torch {setting.torch}, commit {setting.commit}"
    tables, is_good = [f"{where}, transformers {transformers.__version__}, fp32, one thread"], True
    for run in runs:
        config = run.config(arguments.folder.absolute(), arguments.overrides)
        moved, unmoved = (losses_of_recipe(config, arguments.steps, moved) for moved in (True, False))
        is_good = is_good and agree(moved)
        tables.append(table(f"{run.image_set.name}, seed {run.seed}", moved, unmoved))
        print_out(f"{tables[-1]}\n")
    if arguments.save is not None:
        path = arguments.save / f"{setting.file_name}_transformers_losses.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(tables) + "\n")
        print_out(f"written: {path}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
