"""Run the peer `transformers`: train it in a separate process, then evaluate its weights with our evaluation."""

from __future__ import annotations

from pathlib import Path

from m2f.cluster.evaluation.evaluate import evaluate_sets, write_files
from m2f.cluster.evaluation.local_pool import LocalPool
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.start.settling import local_devices, settled_run
from m2f.cluster.train.compose import compose_job
from m2f.cluster.train.launch import launch
from m2f.cluster.train.local_rank import stopped_by_signals, worker_environment
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.job import TrainJob

WEIGHTS = "weights.safetensors"
"""File that exists in the run folder once training has finished."""


def train_transformers(config: RunConfig) -> bool:
    """Train or resume, then evaluate; return False if a signal stopped training after a checkpoint.

    Raises:
        LaunchError: training failed.
        EvaluationError, DataError, StorageError: see `evaluate_sets`.
    """
    config = settled_run(config, local_devices(), during_training=False)
    launch(train_rank, (compose_job(config),), 1, worker_environment(config))
    weights = Path(config.run_folder) / WEIGHTS
    if not weights.exists():
        return False
    step, storage = config.training.max_steps, Storage(config.storage)
    place = Path(config.run_folder) / "evaluations" / f"step_{step:08d}"
    for evaluation in evaluate_sets(config, LocalPool(config), str(weights), step, lambda *_: None):
        url = place / evaluation.results.subject.label
        write_files(storage, str(url), evaluation.files(), local=url)
    return True


def train_rank(job: TrainJob) -> None:
    """Train in the training process, the only one that imports `transformers`."""
    with stopped_by_signals() as control:
        from benchmarks.quality.plain_loop import run_plain_loop

        run_plain_loop(job, control)
