"""`python -m benchmarks.record_batches RECIPE FILE [KEY=VALUE ...]`: record training batches in one file.

Runs the recipe's own loader and saves the images and targets of the first steps.
`python -m benchmarks.train_recorded` trains from the file on a machine without the data set.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from benchmarks.recording import RecordingWriter
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import dump_recipe, load_recipe
from m2f.cluster.train.compose import compose_job
from m2f.data_pipeline.loading.loader import LoaderSpec
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError, UserError
from m2f.trainer.data import open_shards

MAX_MB = 30.0
"""Default limit in 10^6 bytes, for machines that accept only small files besides code and packages."""


def record(
    config: RunConfig, path: str | Path, steps: int | None, max_mb: float = MAX_MB, quality: int | None = 92
) -> int:
    """Record the first `steps` steps of a recipe (None: as many as fit) and return their number.

    Raises:
        ConfigError: fewer than `steps` steps (None: not even one) fit into `max_mb` (10^6 bytes).
        UserError: the data cannot be used.
    """
    storage = Storage(config.storage)
    job = compose_job(config, storage)
    assert job.model.num_classes is not None
    spec = LoaderSpec(
        global_batch=job.training.global_batch, micro_batch=1, rank=0, world=1, start_step=0, seed=job.seed
    )
    num_steps, recipe = 0, dump_recipe(replace(config, output="runs"))  # the training machine has different folders
    with (
        closing(open_shards(job, storage).steps(job, storage, spec, order_start=0)) as loaded,
        RecordingWriter(path, recipe, job.model.num_classes, int(max_mb * 1e6), quality) as writer,
    ):
        for step in islice(loaded, steps):
            if not writer.add([batch.to("cpu") for batch in step.micro_batches]):
                break
            num_steps += 1
        if num_steps < (steps or 1):
            raise ConfigError(
                f"{path}: {num_steps} of {steps or 1} steps of {job.training.global_batch} images fit into "
                f"{max_mb:g} MB; lower --steps or --quality, or make images smaller (data.augment)"
            )
    return num_steps


def main() -> int:
    """Record as the command line says; return exit status 2 for a user error, else 0."""
    parser = argparse.ArgumentParser(prog="record_batches", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="YAML file; its shards must exist (m2f shard)")
    parser.add_argument("file", help="recording to write, a zip file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that override the recipe")
    parser.add_argument("--steps", type=int, help="number of training steps; default: as many as fit")
    parser.add_argument("--max-mb", type=float, default=MAX_MB, help=f"maximum file size in MB; default {MAX_MB:g}")
    format_group = parser.add_mutually_exclusive_group()
    format_group.add_argument("--quality", type=int, default=92, help="JPEG quality, 1 to 100; default 92")
    format_group.add_argument("--lossless", action="store_true", help="store lossless PNG, about five times larger")
    arguments = parser.parse_args()
    quality = None if arguments.lossless else arguments.quality
    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        steps = record(config, arguments.file, arguments.steps, arguments.max_mb, quality)
    except UserError as error:
        print(f"record_batches: {error}", file=sys.stderr)
        return 2
    images = steps * config.training.global_batch
    size = Path(arguments.file).stat().st_size
    print(f"{arguments.file}: {steps} steps, {images} images, {size / 1e6:.1f} MB ({size / images / 1e3:.1f} KB/image)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
