"""`python -m benchmarks.quality.agreement FOLDER`: compare the losses of our training with those of `transformers`.

Both start with the same weights and use the same batches of our loader, the same points and the same normalisers. Each
is trained with its own losses. Two effects would make correct training runs diverge:

- Rounding errors grow a thousandfold within 20 steps. Both therefore compute in 64 bits; the table also shows 32 bits.
- In a new model the sampling points of deformable attention lie exactly on pixel centres. The derivative of bilinear
  interpolation jumps there, rounding decides which side is used, and AdamW amplifies the difference. The offsets are
  therefore first moved by up to a quarter of a pixel, equally for both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn

from benchmarks.measure import CPU
from benchmarks.quality.arms import ARMS, IMAGE_SETS, Run
from benchmarks.quality.markdown import markdown
from benchmarks.quality.plain_step import PlainStep
from benchmarks.quality.run_arms import make_shards
from benchmarks.quality.transformers_draws import record_draws
from benchmarks.quality.transformers_model import transformers_loss, transformers_twin
from benchmarks.tables import Setting
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_out
from m2f.cluster.train.compose import compose_job
from m2f.data_pipeline.loading.loader import LoaderSpec
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.config import ModelConfig
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.loss.points import PointSource
from m2f.model.mask2former import Mask2Former
from m2f.model.structures import Targets
from m2f.trainer.data import open_shards
from m2f.trainer.job import TrainJob
from m2f.trainer.start_model import start_model

TOLERANCE = 1e-3
"""Largest allowed relative difference of the losses at any step."""
_MAX_SHIFT_PIXELS = 0.25
"""Largest initial shift of a sampling point, in pixels."""


@dataclass(frozen=True)
class StepLosses:
    """Total loss of one step in both training runs."""

    ours: float
    theirs: float

    @property
    def error(self) -> float:
        """Absolute difference of the losses, divided by theirs."""
        return abs(self.ours - self.theirs) / abs(self.theirs)


def compare_losses(
    job: TrainJob, ours: Mask2Former, batches: Iterable[Batch], dtype: torch.dtype
) -> Iterator[StepLosses]:
    """Train both on the batches, one step per batch, and yield the losses of every step."""
    theirs = transformers_twin(ours, job.model).to(dtype).train()
    ours = ours.to(dtype).train()
    update_ours, update_transformers = PlainStep(ours, job.training), PlainStep(theirs, job.training)
    torch.manual_seed(job.seed)
    for number, batch in enumerate(batches):
        pixels = ours.normalise(batch.images, batch.sizes).to(dtype)
        with record_draws(theirs.criterion) as draws:
            transformers_total = transformers_loss(theirs, pixels, batch.targets)
        our_total = _our_loss(ours, pixels, batch.targets, draws.points(batch.targets), job.model)
        update_ours(our_total, number)
        update_transformers(transformers_total, number)
        yield StepLosses(float(our_total.detach()), float(transformers_total.detach()))


def _our_loss(model: Mask2Former, pixels: Tensor, targets: Targets, points: PointSource, config: ModelConfig) -> Tensor:
    assert config.num_classes is not None
    normalizers = count_normalizers(targets, config.transformer_decoder.num_queries, config.loss)
    return compute_losses(model(pixels), targets, points, normalizers, config.loss, config.num_classes).total


@contextmanager
def use_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In the block, use `dtype` as the default type and as the result of `Tensor.float()`, which our losses call."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with patch.object(Tensor, "float", lambda tensor: tensor.to(dtype)):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def move_offsets(model: nn.Module) -> None:
    """Move the sampling points of deformable attention off the pixel centres, by the same amounts at every call."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            parameter.add_(_MAX_SHIFT_PIXELS * (2 * torch.rand(parameter.shape, generator=generator) - 1))


def losses_of_recipe(config: RunConfig, steps: int, dtype: torch.dtype) -> list[StepLosses]:
    """Return the losses of the first steps of a recipe, from its initial weights with moved offsets."""
    make_shards(config)
    storage = Storage(config.storage)
    job = compose_job(config, storage)
    ours, _ = start_model(job, storage, None)
    move_offsets(ours)
    batch = job.training.global_batch
    spec = LoaderSpec(global_batch=batch, micro_batch=batch, rank=0, world=1, start_step=0, seed=job.seed)
    with (
        closing(open_shards(job, storage).steps(job, storage, spec, order_start=0)) as loaded,
        use_default_dtype(dtype),
    ):
        return list(compare_losses(job, ours, (step.micro_batches[0] for step in islice(loaded, steps)), dtype))


def table(name: str, double: Sequence[StepLosses], single: Sequence[StepLosses]) -> str:
    """Return a verdict on the 64-bit losses, and a Markdown table of every step in 64 and 32 bits."""
    verdict = "agree" if agree(double) else "differ (FAILS)"
    head = (
        f"{name}: the losses of {len(double)} steps {verdict}. The largest relative difference is "
        f"{max(step.error for step in double):.1e} in 64 bits (limit {TOLERANCE:g}) and "
        f"{max(step.error for step in single):.1e} in 32 bits."
    )
    rows = [
        [
            str(step),
            f"{in_64_bits.ours:.5f}",
            f"{in_64_bits.theirs:.5f}",
            f"{in_64_bits.error:.1e}",
            f"{in_32_bits.error:.1e}",
        ]
        for step, (in_64_bits, in_32_bits) in enumerate(zip(double, single, strict=True), start=1)
    ]
    columns = ["step", "ours", "transformers", "difference", "difference in 32 bits"]
    return f"{head}\n\n{markdown(columns, rows)}"


def agree(losses: Sequence[StepLosses]) -> bool:
    """Return whether all steps are within the tolerance."""
    return all(step.error <= TOLERANCE for step in losses)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return exit status 0 if all losses agree in 64 bits."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.agreement", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder for shards")
    parser.add_argument("--sets", nargs="+", choices=[image_set.name for image_set in IMAGE_SETS], default=["shapes"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value", help="settings for all runs")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DAY_HARDWARE_transformers_losses.md")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    setting = Setting.now(CPU, ceilings="")
    runs = [Run(s, ARMS[0], seed) for s in IMAGE_SETS if s.name in arguments.sets for seed in arguments.seeds]
    heading = f"{setting.day}, {setting.hardware}, torch {setting.torch}, commit {setting.commit}"
    tables, is_good = [f"{heading}, transformers {transformers.__version__}, one thread"], True
    for run in runs:
        config = run.config(arguments.folder.absolute(), arguments.overrides)
        double, single = (losses_of_recipe(config, arguments.steps, dtype) for dtype in (torch.float64, torch.float32))
        is_good = is_good and agree(double)
        name = ", ".join([run.image_set.name, f"seed {run.seed}", *arguments.overrides])
        tables.append(table(name, double, single))
        print_out(f"{tables[-1]}\n")
    if arguments.save is not None:
        path = arguments.save / f"{setting.file_name}_transformers_losses.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(tables) + "\n")
        print_out(f"wrote {path}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
