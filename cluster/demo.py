"""End-to-end demo on synthetic data: write shards, train on two ZeRO workers, and evaluate during training."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import m2f
from m2f.cluster.evaluation.choice import HEADLINE
from m2f.cluster.evaluation.queue import Entry, evaluation_folder
from m2f.cluster.ray_cluster import connect
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import load_recipe
from m2f.cluster.sharding.job import run_shard_job
from m2f.cluster.terminal import format_duration, print_out
from m2f.cluster.tracking.store import ui_command
from m2f.cluster.train.ray_launcher import run_training
from m2f.cluster.train.supervisor import RunSummary
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.results.results import columns
from m2f.model.errors import ConfigError

RECIPE = m2f.HOME / "configs" / "demo.yaml"


def run_demo(output: str, overrides: Sequence[str] = ()) -> RunSummary:
    """Run `configs/demo.yaml` under `output`, print the results and return the summary of the run.

    An interrupted demo resumes. `overrides` are further `section.key=value` settings. Raises UserError if an input
    cannot be used or an output cannot be written.
    """
    started = time.monotonic()
    config = demo_config(output, overrides)
    with connect(config):
        storage = Storage(config.storage)
        for name, dataset in config.datasets.items():
            print_out(run_shard_job(name, dataset, config.cluster, storage).summary())
        summary = run_training(config, live=sys.stdout.isatty())
    print_out(f"\n{describe(summary)}\n\ntotal time {format_duration(time.monotonic() - started)}")
    return summary


def demo_config(output: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the demo's recipe, changed to write everything under `output`/demo."""
    if not RECIPE.is_file():
        raise ConfigError(f"{RECIPE} is missing: this installation of m2f is incomplete; install it again")
    shards = [f"datasets.{name}.shards={join(output, 'demo', 'shards', name)}" for name in ("train", "val")]
    return load_recipe(RECIPE, [f"output={output}", *shards, *overrides])


def describe(summary: RunSummary) -> str:
    """Return the text that a demo prints: scores, paths of the results, the command for curves, and failures."""
    lines = [f"run {summary.status}: {summary.run_folder}", "", metrics_table(summary.evaluations)]
    published = [entry for entry in summary.evaluations if entry.status == "published"]
    if published:
        last = join(summary.run_folder, evaluation_folder(published[-1].step))
        lines += ["", f"report:    {last}/val/report.html  (tables, charts and pictures)"]
        lines += [f"pictures:  {last}/val/panels.jpg  (image, truth, prediction)"]
    lines += [f"curves:    {ui_command(summary.tracked.uri)}"]
    failed = [entry for entry in summary.evaluations if entry.status == "failed"]
    lines += [f"evaluation of step {entry.step} failed: {entry.detail}" for entry in failed]
    return "\n".join(lines)


def metrics_table(entries: Sequence[Entry]) -> str:
    """Return a table with one line per evaluation: its status and the headline metrics of set `val`, in per cent."""
    rows = [[entry.step, entry.status, *(entry.metrics.get(f"val/{name}") for name in HEADLINE)] for entry in entries]
    return columns(["step", "evaluation", *HEADLINE], rows)
