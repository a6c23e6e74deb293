"""`python -m benchmarks.train_recorded FILE [KEY=VALUE ...]`: train from a file that `record_batches` wrote.

Trainer, checkpoints and launcher are those of `m2f train --launcher local`, but the images come from the file and
nothing is sent to MLflow. The same command resumes from the last checkpoint. The machine needs neither the data set nor
Ray, MLflow or webdataset.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.recording import Recording
from m2f.cluster.recipe.devices import AvailableDevices, local_gpus, print_device_summary, settle
from m2f.cluster.recipe.load import dump_recipe, parse_recipe
from m2f.cluster.recipe.paths import with_absolute_paths
from m2f.cluster.train.launch import LaunchError, launch
from m2f.cluster.train.local_rank import stopped_by_signals, worker_environment
from m2f.model.errors import ConfigError, UserError
from m2f.trainer.job import TrainJob


def train_recorded(path: str, overrides: Sequence[str] = ()) -> str:
    """Train on this machine and return the run folder.

    Raises:
        UserError: the recording or the settings cannot be used.
        LaunchError: a rank failed.
    """
    recording = Recording.load(path)
    config = with_absolute_paths(parse_recipe(recording.recipe, overrides, source=f"the recipe in {path}"))
    if config.training.max_epochs:
        raise ConfigError("training.max_epochs needs the data set to count its images; set training.max_steps")
    config = print_device_summary(settle(config, AvailableDevices(local_gpus()), during_training=False))
    job = TrainJob(
        run_folder=config.run_folder,
        model=replace(config.model, num_classes=recording.num_classes),
        data=config.data,
        shards=(),
        training=config.training,
        storage=config.storage,
        seed=config.seed,
        recipe=dump_recipe(config),
    )
    launch(train_rank, (job, os.path.abspath(path)), config.cluster.max_workers, worker_environment(config))
    return config.run_folder


def train_rank(job: TrainJob, path: str) -> None:
    """Train as one rank, in its own process."""
    from m2f.trainer.worker import run_worker  # DeepSpeed reads the environment when it is imported

    with stopped_by_signals() as control:
        run_worker(job, control=control, open_data=lambda *_: Recording.load(path))


def main() -> int:
    """Train and print the run folder; return exit status 2 for a user error, 1 if a rank failed, else 0."""
    parser = argparse.ArgumentParser(prog="train_recorded", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", help="file written by record_batches")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that override the recipe")
    arguments = parser.parse_args()
    try:
        print(f"run folder: {train_recorded(arguments.file, arguments.overrides)}")
    except UserError as error:
        print(f"train_recorded: {error}", file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"train_recorded: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
