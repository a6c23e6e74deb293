"""The evaluation manager as a detached Ray actor, and the driver's way to it."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError

from m2f.cluster.evaluation.choice import best_step
from m2f.cluster.evaluation.evaluate import evaluate_sets, make_pool, write_files
from m2f.cluster.evaluation.manager import EvaluationManager, EvaluationProgress, EvaluationStatus, Report
from m2f.cluster.evaluation.pool import EvaluationPool
from m2f.cluster.evaluation.queue import Entry, EvaluationQueue, read_entries
from m2f.cluster.ray_cluster import this_node
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.tracking.tracking import TrackedRun, Tracking
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import pin, unpin
from m2f.trainer.checkpoint.lease_record import check_lease
from m2f.trainer.errors import LeaseLostError
from m2f.trainer.reporting import CommittedCheckpoint

NAMESPACE = "m2f"
PIN = "evaluation"
BEST_PIN = "best"
PATIENCE_S = 10.0
CLOSE_S = 60.0
MAX_STARTS = 4


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
        self._queue = EvaluationQueue(self._storage, queue_url(config), self._check_lease)
        self._manager = EvaluationManager(self._queue, config.evaluation.policy, self._evaluate, self._release)

    def submit(self, checkpoint: CommittedCheckpoint) -> None:
        """Queue a checkpoint, and keep it from being deleted until it is settled. Known steps are left alone."""
        if checkpoint.step in {entry.step for entry in self._manager.status().entries}:
            return
        self._check_lease()
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
        """Evaluate and publish; returns the headline numbers of all sets. The story of a failure goes to a file."""
        try:
            return self._evaluate_sets(entry, report)
        except LeaseLostError:
            raise
        except Exception:
            story = traceback.format_exc().encode()
            self._storage.put(join(self._config.run_folder, _place(entry), "error.txt"), story)
            raise

    def _evaluate_sets(self, entry: Entry, report: Report) -> Mapping[str, float]:
        if self._pool is None:
            self._pool = make_pool(self._config)
        metrics: dict[str, float] = {}
        began = time.monotonic()
        evaluations = evaluate_sets(
            self._config,
            self._pool,
            entry.checkpoint,
            entry.step,
            lambda s, done, total: report(EvaluationProgress(entry.step, s.label, done, total)),
        )
        self._check_lease()
        for evaluation in evaluations:
            name = evaluation.results.subject.label
            place = f"{_place(entry)}/{name}"
            folder = write_files(
                self._storage,
                join(self._config.run_folder, place),
                evaluation.files(),
                local=Path(self._tracked.spool) / place,
            )
            self._tracking.log_artifact(folder, place)
            metrics |= evaluation.results.headline(name)
        self._tracking.log_metrics(entry.step, metrics | self._cost(self._pool, time.monotonic() - began))
        return metrics

    @staticmethod
    def _cost(pool: EvaluationPool, seconds: float) -> dict[str, float]:
        """What the evaluation took: for MLflow, no part of its results."""
        cost = {"train/evaluation/seconds": seconds}
        peaks = pool.ask("peak_memory")
        for name in ("host", "gpu"):
            most = max((getattr(peak, name) for peak in peaks), default=0)
            if most:
                cost[f"train/evaluation/peak_{name}_memory_gb"] = most / 1e9
        return cost

    def _check_lease(self) -> None:
        """Raise LeaseLostError where another process has taken the run over."""
        lease = self._tracked.lease
        if lease is not None:
            check_lease(self._storage, lease.run_folder, lease.number)

    def _release(self, entry: Entry) -> None:
        self._check_lease()
        release(self._storage, entry, self._queue.entries(), self._config.training.checkpoint.best_metric)


def release(storage: Storage, entry: Entry, entries: Iterable[Entry], metric: str | None) -> None:
    """Let a settled checkpoint be deleted; the one with the best value of `metric` stays, in place of earlier ones."""
    known = {e.step: e for e in entries}
    best = best_step({step: e.metrics for step, e in known.items()}, metric) if metric is not None else None
    if best == entry.step:
        pin(storage, entry.checkpoint, BEST_PIN)
        for step in known.keys() - {best}:
            unpin(storage, known[step].checkpoint, BEST_PIN)
    unpin(storage, entry.checkpoint, PIN)


class EvaluationClient:
    """The driver's handle of the manager, which it makes anew where Ray does not."""

    def __init__(self, config: RunConfig, tracked: TrackedRun) -> None:
        self._config = config
        self._tracked = tracked
        self._name = f"evaluation-{hashlib.sha256(config.run_folder.encode()).hexdigest()[:16]}"
        self._submitted: dict[int, CommittedCheckpoint] = {}
        self._deaths = 0
        self._next_start = 0.0
        self.lost: str | None = None
        """Why there is no manager any more; its queue is stored, and done when the run is continued."""
        _end_earlier(self._name)
        self._manager = self._start()

    def submit(self, checkpoint: CommittedCheckpoint) -> None:
        """Queue a checkpoint; sent, not waited for."""
        self._submitted[checkpoint.step] = checkpoint
        self._manager.submit.remote(checkpoint)

    def status(self) -> EvaluationStatus | None:
        """What the manager knows; None while it does not answer."""
        if self.lost is not None:
            return None
        try:
            status = ray.get(self._manager.status.remote(), timeout=PATIENCE_S)
        except ActorDiedError as error:  # for good: in every other case Ray restarts it by itself
            self._replace(error)
            return None
        except (RayActorError, GetTimeoutError):
            return None
        self._deaths = 0
        return status

    def entries(self) -> tuple[Entry, ...]:
        """The stored queue."""
        return read_entries(Storage(self._config.storage), queue_url(self._config))

    def close(self) -> tuple[Entry, ...]:
        """End the actor and its pool; the entries as they are stored. What waits is done when the run is continued."""
        status = self.status()
        if status is not None and status.idle:
            with suppress(RayError):  # what it could not send waits in its journal
                ray.get(self._manager.close.remote(), timeout=CLOSE_S)
        ray.kill(self._manager)
        return self.entries()

    def _start(self) -> Any:
        service = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(EvaluationService)
        return service.options(  # on the driver's node, where the journal of MLflow points is
            name=self._name, namespace=NAMESPACE, lifetime="detached", label_selector=this_node()
        ).remote(self._config, self._tracked)

    def _replace(self, error: ActorDiedError) -> None:
        """Another manager in place of one that could not even be made, after a pause that doubles."""
        if time.monotonic() < self._next_start:
            return
        self._deaths += 1
        if self._deaths > MAX_STARTS:
            self.lost = str(error).strip().splitlines()[-1]
            return
        self._next_start = time.monotonic() + 2.0**self._deaths
        _end_earlier(self._name)
        self._manager = self._start()
        for checkpoint in self._submitted.values():  # calls to the dead one are lost
            self._manager.submit.remote(checkpoint)


def queue_url(config: RunConfig) -> str:
    """Where the queue of a run's evaluations is stored."""
    return join(config.run_folder, "evaluations", "queue.json")


def _place(entry: Entry) -> str:
    """Folder of an evaluation's files within the run folder."""
    return f"evaluations/step_{entry.step:08d}"


def _end_earlier(name: str) -> None:
    """Kill the actor of this name, if any, and wait until the name is free."""
    while True:
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:  # nobody has the name
            return
        time.sleep(0.2)
