"""`m2f train`: train a recipe; a second start resumes from the last checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import add_recipe

if TYPE_CHECKING:
    from m2f.cluster.recipe.config import RunConfig

EXIT_STATUS = {
    "finished": ExitStatus.DONE,
    "failed": ExitStatus.FAILED,
    "stopped": ExitStatus.STOPPED,
    "drained": ExitStatus.DRAINED,
}
"""Exit status by the status of the run."""

SUMMARY = "train a recipe; a second start resumes from the last checkpoint"
EXAMPLE = "m2f train cells.yaml training.max_steps=2000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--launcher",
        choices=("ray", "local"),
        default="ray",
        help="ray: Ray workers, and evaluations during training; local: processes on this machine without Ray, and "
        "evaluations after the last step, or during training with training.early_stopping (default: ray)",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="restart the training if its process is killed or the storage or Ray fails, within cluster.max_failures; "
        "jobs of `m2f submit` use this",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start a new run; if the run folder exists, use NAME-2 (or -3, ...) beside it",
    )
    parser.add_argument("--plain", action="store_true", help="print log lines instead of the live view")


def run(args: argparse.Namespace) -> int:
    """Train the recipe, and return an `ExitStatus` that depends on how the run ended."""
    from m2f.cluster.recipe.load import load_recipe
    from m2f.cluster.recipe.pinned_weights import with_pinned_weights
    from m2f.cluster.recipe.stored import unused_name
    from m2f.data_pipeline.storage.storage import Storage
    from m2f.trainer.checkpoint.lease import LEASE_VARIABLE

    config = load_recipe(args.recipe, args.overrides, for_training=True)
    if args.fresh:
        args.overrides = [*args.overrides, f"name={unused_name(config)}"]  # restarts must use the same folder
        config = load_recipe(args.recipe, args.overrides, for_training=True)
    config = with_pinned_weights(
        config, Storage(config.storage, known_reachable=LEASE_VARIABLE in os.environ, on_wait=print_err)
    )
    print_err(f"{args.recipe}: loading PyTorch and MLflow")
    if args.restart:
        return _train_with_restarts(args, config)
    from m2f.cluster.train.driver_restarts import report_deliberate_exit

    try:
        return _train(args, config)
    finally:
        report_deliberate_exit()


def _train(args: argparse.Namespace, config: RunConfig) -> int:
    """Train in this process and print the location of the results; return the exit status."""
    live = sys.stdout.isatty() and not args.plain
    if args.launcher == "local":
        from m2f.cluster.train.local import train_locally

        summary = train_locally(config, live)
    else:
        from m2f.cluster.train.ray_launcher import run_training

        summary = run_training(config, live)
    from m2f.cluster.evaluation.queue import evaluation_folder
    from m2f.cluster.tracking.store import ui_command
    from m2f.data_pipeline.storage.storage import join

    print_out(f"run {summary.status}: {summary.run_folder}")
    print_out(f"curves: {ui_command(summary.tracked.uri)}")
    published = [entry.step for entry in summary.evaluations if entry.status == "published"]
    if published and config.evaluation.sets:
        label = config.evaluation.sets[0].label
        print_out(f"report: {join(summary.run_folder, evaluation_folder(max(published)), label, 'report.html')}")
    for entry in summary.evaluations:
        if entry.status == "failed":
            print_err(f"evaluation of step {entry.step} failed: {entry.detail}; run `m2f eval` to repeat it")
    return EXIT_STATUS[summary.status]


def _train_with_restarts(args: argparse.Namespace, config: RunConfig) -> int:
    """Train in a child process that is restarted after failures (`--restart`); return its last exit status."""
    from m2f.cluster.train.driver_restarts import run_with_restarts

    words = [args.recipe, *args.overrides]
    words += ["--launcher", "local"] if args.launcher == "local" else []
    words += ["--plain"] if args.plain else []
    return run_with_restarts([sys.executable, "-m", "m2f.cluster.cli", "train", *words], config)
