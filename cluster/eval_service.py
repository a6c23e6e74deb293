"""The evaluation manager as a detached Ray actor, and the driver's way to it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import RunConfig
from cluster.eval_manager import EvaluationManager, EvaluationProgress, EvaluationStatus, Report
from cluster.eval_pool import EvaluationPool
from cluster.eval_queue import Entry, EvaluationQueue, read_entries
from cluster.evaluate import evaluate_sets, make_pool, write_files
from cluster.tracking import TrackedRun, Tracking
from data_pipeline.storage import Storage, join
from trainer.checkpoint_folder import pin, unpin
from trainer.reporting import CommittedCheckpoint

NAMESPACE = "m2f"
PIN = "evaluation"
PATIENCE_S = 10.0


class EvaluationService:
    """The actor: queue, pool and publication of one run.

    Its own death loses nothing: Ray makes it again, and the stored queue tells it what to do.
    """

    def __init__(self, config: RunConfig, tracked: TrackedRun) -> None:
        self._config = config
        self._tracked = tracked
        self._storage = Storage(config.storage)
        self._tracking = Tracking(tracked, "evaluation")
        self._pool: EvaluationPool | None = None
        queue = EvaluationQueue(self._storage, queue_url(config))
        self._manager = EvaluationManager(queue, config.evaluation.policy, self._evaluate, self._release)

    def submit(self, checkpoint: CommittedCheckpoint) -> None:
        """Queue a checkpoint, and keep it from being deleted until it is settled. Known steps are left alone."""
        if checkpoint.step in {entry.step for entry in self._manager.status().entries}:
            return
        pin(self._storage, checkpoint.url, PIN)
        self._manager.submit(checkpoint.step, checkpoint.url)

    def status(self) -> EvaluationStatus:
        """Entries and the running evaluation."""
        return self._manager.status()

    def close(self) -> None:
        """Send what waits for MLflow. Called when every entry is settled."""
        self._manager.close()
        self._tracking.close()

    def _evaluate(self, entry: Entry, report: Report) -> Mapping[str, float]:
        """Evaluate and publish; returns the headline numbers of all sets."""
        if self._pool is None:
            self._pool = make_pool(self._config)
        metrics: dict[str, float] = {}
        evaluations = evaluate_sets(
            self._config,
            self._pool,
            entry.checkpoint,
            entry.step,
            lambda s, done, total: report(EvaluationProgress(entry.step, s.dataset, done, total)),
        )
        for evaluation in evaluations:
            name = evaluation.results.subject.dataset
            place = f"evaluations/step_{entry.step:08d}/{name}"
            folder = write_files(
                self._storage,
                join(self._config.run_folder, place),
                evaluation.files(),
                local=Path(self._tracked.spool) / place,
            )
            self._tracking.log_artifact(folder, place)
            metrics |= evaluation.results.headline(name)
        self._tracking.log_metrics(entry.step, metrics)
        return metrics

    def _release(self, entry: Entry) -> None:
        unpin(self._storage, entry.checkpoint, PIN)


class EvaluationClient:
    """The driver's handle of the manager."""

    def __init__(self, config: RunConfig, manager: Any) -> None:
        self.manager = manager
        """Actor handle; workers submit through it too."""
        self._config = config

    def submit(self, checkpoint: CommittedCheckpoint) -> None:
        """Queue a checkpoint; sent, not waited for."""
        self.manager.submit.remote(checkpoint)

    def status(self) -> EvaluationStatus | None:
        """What the manager knows; None while it does not answer."""
        try:
            return ray.get(self.manager.status.remote(), timeout=PATIENCE_S)
        except (RayActorError, GetTimeoutError):
            return None

    def entries(self) -> tuple[Entry, ...]:
        """The stored queue."""
        return read_entries(Storage(self._config.storage), queue_url(self._config))

    def close(self) -> tuple[Entry, ...]:
        """End the actor and its pool; the entries as they are stored. What waits is done when the run is continued."""
        status = self.status()
        if status is not None and status.idle:
            ray.get(self.manager.close.remote())
        ray.kill(self.manager)
        return self.entries()


def start_evaluations(config: RunConfig, tracked: TrackedRun) -> EvaluationClient:
    """Start the manager of this run folder; one that an earlier driver left is replaced and its queue taken over."""
    name = f"evaluation-{hashlib.sha256(config.run_folder.encode()).hexdigest()[:16]}"
    _end_earlier(name)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    service = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(EvaluationService)
    manager = service.options(  # on the driver's node, where the journal of MLflow points is
        name=name, namespace=NAMESPACE, lifetime="detached", scheduling_strategy=here
    ).remote(config, tracked)
    return EvaluationClient(config, manager)


def queue_url(config: RunConfig) -> str:
    """Where the queue of a run's evaluations is stored."""
    return join(config.run_folder, "evaluations", "queue.json")


def _end_earlier(name: str) -> None:
    """Kill the actor of this name, if any, and wait until the name is free."""
    while True:
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:  # nobody has the name
            return
        time.sleep(0.2)
