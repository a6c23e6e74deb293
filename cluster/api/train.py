"""`m2f.train`: train a recipe to its end, and the class `Run` with the outcome."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from m2f.cluster.api.evaluate import preserve_num_threads
from m2f.cluster.api.model import Model, load, to_overrides
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import load_recipe, recipe_from_tree
from m2f.cluster.recipe.pinned_weights import with_pinned_weights
from m2f.data_pipeline.shards.manifest import DATASET_FILE
from m2f.data_pipeline.sources import CustomSource
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import ConfigError
from m2f.model.extras import report_missing_extras
from m2f.trainer.checkpoint.commits import read_metrics
from m2f.trainer.checkpoint.folder import list_checkpoints

if TYPE_CHECKING:
    from m2f.cluster.train.supervisor import RunSummary

Launcher = Literal["ray", "local"]


@dataclass(frozen=True)
class Run:
    """Outcome of a training run: scores, curves and checkpoints."""

    folder: str
    """Path or URL of the run folder."""
    status: Literal["finished", "stopped", "drained"]
    """How the run ended.

    "finished": the run is complete. "stopped": a signal stopped it. "drained": its machine is about to be preempted.
    Another call to `m2f.train` continues a stopped or drained run.
    """
    metrics: Mapping[str, float]
    """Scores of the newest evaluated checkpoint in per cent, such as `val/PQ`; empty if no checkpoint was evaluated."""
    evaluations: Mapping[int, Mapping[str, float]]
    """Scores of every evaluated checkpoint in per cent, by step."""
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    """Training metrics as (step, value) points in ascending order of steps, by name such as `loss/total`."""
    checkpoints: Mapping[int, str]
    """Folders or URLs of the checkpoints in the run folder, by step."""
    tracking_uri: str
    """URI of the MLflow store."""
    run_id: str
    """Id of the run in MLflow."""

    def load(self, checkpoint: Literal["last", "best"] | int = "last", device: str = "auto") -> Model:
        """Load the model of a checkpoint with `m2f.load`."""
        return load(self.folder, checkpoint=checkpoint, device=device)


class TrainingFailedError(RuntimeError):
    """The run failed and was given up. The message states why; earlier checkpoints remain in the run folder."""


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    launcher: Launcher = "ray",
) -> Run:
    """Train a recipe and evaluate its checkpoints, as `m2f train` does. An existing run resumes.

    Data sets with a source but without shards are sharded first, as `m2f shard` does. More than 300 images or 50 MB are
    sharded in parallel with Ray, whatever the launcher.

    Args:
        recipe: path of a YAML file, the name of a recipe in the package such as `coco_panoptic_r50`, or the settings
            as nested dictionaries. Relative paths are relative to the current directory.
        settings: settings to change, by dotted name, such as `{"training.max_steps": 1000}`. Dictionaries are merged
            into the recipe; lists, and sections with `kind`, replace the recipe's value.
        launcher: "ray" trains on a Ray cluster, and starts one on this machine if there is none. "local" trains in
            processes of this machine, and evaluates at the end unless `training.early_stopping` is set. A script that
            uses "local" must guard the call with `if __name__ == "__main__":`.

    Returns:
        Scores, curves and checkpoints of the run.

    Raises:
        MissingExtraError: the extra `train` is not installed.
        ConfigError: the recipe has problems, and the message lists all of them; or there is no such launcher.
        DataError, WeightsError, StorageError: the data, the initial weights or the storage cannot be used.
        TrainingFailedError: the run gave up, for example after more than `cluster.max_failures` failures without a
            new checkpoint.
    """
    if launcher not in get_args(Launcher):
        raise ConfigError(f"launcher is {launcher!r}; it must be 'ray' or 'local'")
    overrides = to_overrides(settings)
    if isinstance(recipe, Mapping):
        config = recipe_from_tree(recipe, overrides, for_training=True)
    else:
        config = load_recipe(os.fspath(recipe), overrides, for_training=True)
    storage = Storage(config.storage)
    with report_missing_extras("m2f.train"), preserve_num_threads():
        _write_missing_shards(config, storage)
        return _make_run(_train(with_pinned_weights(config, storage), launcher), storage)


def _train(config: RunConfig, launcher: Launcher) -> RunSummary:
    if launcher == "local":
        from m2f.cluster.train.local import train_locally

        return train_locally(config)
    from m2f.cluster.train.ray_launcher import run_training

    return run_training(config)


def _write_missing_shards(config: RunConfig, storage: Storage) -> None:
    from m2f.cluster.sharding.job import run_shard_job

    used = [item.dataset for item in config.data.train] + [item.dataset for item in config.evaluation.sets]
    for name in dict.fromkeys(used):
        dataset = config.datasets[name]
        can_shard = dataset.source is not None and not isinstance(dataset.source, CustomSource)
        if can_shard and not storage.exists(join(dataset.shards, DATASET_FILE)):
            run_shard_job(name, dataset, config.cluster, storage)


def _make_run(summary: RunSummary, storage: Storage) -> Run:
    if summary.status == "failed":
        reason = summary.failures[-1].message if summary.failures else "no reason was recorded"
        raise TrainingFailedError(f"training in {summary.run_folder} failed: {reason}")
    assert summary.status != "lost"  # LeaseLostError is raised in this case
    curves: dict[str, dict[int, float]] = {}
    for _, by_step in read_metrics(storage, summary.run_folder):
        for step, values in by_step.items():
            for name, value in values.items():
                curves.setdefault(name, {})[step] = value
    evaluations = {e.step: e.metrics for e in summary.evaluations if e.status == "published"}
    return Run(
        folder=summary.run_folder,
        status=summary.status,
        metrics=evaluations[max(evaluations)] if evaluations else {},
        evaluations=evaluations,
        curves={name: tuple(sorted(points.items())) for name, points in curves.items()},
        checkpoints={c.step: c.url for c in reversed(list_checkpoints(storage, summary.run_folder))},
        tracking_uri=summary.tracked.uri,
        run_id=summary.tracked.run_id,
    )
