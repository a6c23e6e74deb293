"""Service that evaluates the commits of one run and publishes the results to the run folder and to MLflow."""

from __future__ import annotations

import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from m2f.cluster.evaluation.choice import best_step
from m2f.cluster.evaluation.evaluate import Pool, evaluate_sets, write_files
from m2f.cluster.evaluation.manager import EvaluationManager, EvaluationProgress, EvaluationStatus, Report
from m2f.cluster.evaluation.publication import evaluated_checkpoint, kept_checkpoints, make_set_metrics
from m2f.cluster.evaluation.queue import WITHDRAWN, Entry, EvaluationQueue, evaluation_folder, queue_url
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.tracking.logged_models import SetMetrics
from m2f.cluster.tracking.tracking import TrackedRun, Tracking
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.commits import read_commits
from m2f.trainer.checkpoint.folder import EVALUATION_PIN, list_pins, pin, unpin
from m2f.trainer.checkpoint.lease_record import check_lease
from m2f.trainer.errors import LeaseLostError

BEST_PIN = "best"


class EvaluationService:
    """Evaluates the checkpoints of one run and publishes the results.

    A new service continues from the stored queue if this one dies.
    """

    def __init__(self, config: RunConfig, tracked: TrackedRun, make_pool: Callable[[RunConfig], Pool]) -> None:
        """`make_pool` is called at the first evaluation."""
        self._config = config
        self._make_pool = make_pool
        self._tracked = tracked
        self._storage = Storage(config.storage, known_reachable=True)
        self._tracking = Tracking(tracked, "evaluation")
        self._pool: Pool | None = None
        self._queue = EvaluationQueue(self._storage, queue_url(config), self._check_lease)
        self._manager = EvaluationManager(
            self._queue,
            lambda: read_commits(self._storage, config.run_folder),
            config.evaluation.policy,
            self._evaluate,
            self._release,
            poll_interval_s=poll_interval_s(config.run_folder),
        )

    def status(self) -> EvaluationStatus:
        """Return all entries and the progress of the running evaluation."""
        return self._manager.status()

    def close(self) -> None:
        """End the evaluation thread and send the remaining data to MLflow. Call it when every entry is settled."""
        self._manager.close()
        self._tracking.close()

    def _evaluate(self, entry: Entry, report: Report) -> Mapping[str, float]:
        """Evaluate and publish an entry, and return the headline metrics of all sets.

        The traceback of a failure is stored as error.txt in the folder of the evaluation.
        """
        try:
            return self._evaluate_sets(entry, report)
        except (LeaseLostError, OutageError):
            raise
        except Exception:
            details = traceback.format_exc().encode()
            self._storage.put(join(self._config.run_folder, evaluation_folder(entry.step), "error.txt"), details)
            raise

    def _evaluate_sets(self, entry: Entry, report: Report) -> Mapping[str, float]:
        if self._pool is None:
            self._pool = self._make_pool(self._config)
        metrics: dict[str, float] = {}
        set_results: list[SetMetrics] = []
        started_at = time.monotonic()
        evaluations = evaluate_sets(
            self._config,
            self._pool,
            entry.checkpoint,
            entry.step,
            lambda s, done, total: report(EvaluationProgress(entry.step, entry.key, s.label, done, total)),
        )
        self._check_lease()
        for evaluation in evaluations:
            name = evaluation.results.subject.label
            relative_folder = f"{evaluation_folder(entry.step)}/{name}"
            folder = write_files(
                self._storage,
                join(self._config.run_folder, relative_folder),
                evaluation.files(),
                local=Path(self._tracked.spool) / f"evaluation-{uuid.uuid4().hex}",
            )
            if folder is not None:
                self._tracking.log_artifact(folder, relative_folder)
            metrics |= evaluation.results.headline(name)
            set_results.append(make_set_metrics(self._config, self._storage, evaluation, name))
        self._tracking.log_metrics(entry.step, self._cost(self._pool, time.monotonic() - started_at))
        checkpoint = evaluated_checkpoint(self._config, self._storage, entry.checkpoint, entry.step, entry.commit)
        self._tracking.log_evaluation(checkpoint, set_results, replaces=self._queue.replaces(entry))
        self._tracking.log_kept(kept_checkpoints(self._storage, self._config.run_folder))
        return metrics

    @staticmethod
    def _cost(pool: Pool, seconds: float) -> dict[str, float]:
        """Return the time (s) and peak memory (10^9 bytes) of an evaluation, to log them apart from its results."""
        cost = {"train/evaluation/seconds": seconds}
        peaks = pool.ask("peak_memory")
        for name in ("host", "gpu"):
            peak_bytes = max((getattr(peak, name) for peak in peaks), default=0)
            if peak_bytes:
                cost[f"train/evaluation/peak_{name}_memory_gb"] = peak_bytes / 1e9
        return cost

    def _check_lease(self) -> None:
        """Raise LeaseLostError if another process has taken over the run."""
        lease = self._tracked.lease
        if lease is not None:
            check_lease(self._storage, lease.run_folder, lease.number)

    def _release(self, settled: Sequence[Entry]) -> None:
        self._check_lease()
        metric = self._config.training.checkpoint.best_metric
        release(self._storage, self._config.run_folder, settled, self._queue.entries(), metric)


def release(
    storage: Storage, run_folder: str, settled: Iterable[Entry], entries: Iterable[Entry], metric: str | None
) -> None:
    """Allow `settled` checkpoints of a run to be deleted, by removing their evaluation pins.

    Before that, pin the checkpoint with the best value of `metric` among those that still exist.
    """
    if metric is not None:
        _pin_best(storage, run_folder, entries, metric)
    for entry in settled:
        if entry.detail != WITHDRAWN:  # the folder of a withdrawn commit may now contain a later commit
            unpin(storage, entry.checkpoint, EVALUATION_PIN)


def _pin_best(storage: Storage, run_folder: str, entries: Iterable[Entry], metric: str) -> None:
    existing = {checkpoint.url: pins for checkpoint, pins in list_pins(storage, run_folder).items()}
    known = {e.step: e for e in entries if e.status == "published" and e.checkpoint in existing}
    best = best_step({step: e.metrics for step, e in known.items()}, metric)
    if best is None:
        return
    pin(storage, known[best].checkpoint, BEST_PIN)
    for step in known.keys() - {best}:
        if BEST_PIN in existing[known[step].checkpoint]:
            unpin(storage, known[step].checkpoint, BEST_PIN)


def poll_interval_s(run_folder: str) -> float:
    """Return the seconds between two checks for new commits: 5 for a remote run folder, 1 for a local one."""
    return 5.0 if "://" in run_folder else 1.0
