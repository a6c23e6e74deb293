"""Training on Ray: Ray Train runs the ranks of an attempt, and evaluation actors run alongside them.

An attempt is one call of `TorchTrainer.fit()` with `max_failures=0`, in its own thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import ray
import ray.train
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer

from m2f.cluster.environment import is_external_cluster
from m2f.cluster.evaluation.client import EvaluationClient
from m2f.cluster.ray_cluster import (
    ClusterError,
    cluster_devices,
    connect,
    existing_or_local_cluster,
    this_node_selector,
)
from m2f.cluster.ray_private import attempt_config, draining_nodes, free_resources, scaling_config
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.devices import AvailableDevices
from m2f.cluster.start.settling import local_devices, settled_run
from m2f.cluster.terminal import print_err
from m2f.cluster.tracking.tracking import TrackedRun
from m2f.cluster.train.failure_policy import AttemptError
from m2f.cluster.train.mailbox import Mailbox
from m2f.cluster.train.supervisor import RunSummary, run_supervised
from m2f.cluster.train.torch_backend import CheckedTorchConfig
from m2f.cluster.train.worker import WorkerSettings, train_loop
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.model.format_count import format_count
from m2f.trainer.job import TrainJob
from m2f.trainer.reporting import Event

MAILBOX_TIMEOUT_S = 10.0
"""Seconds to wait for an answer of the mailbox. If none arrives, the next poll asks again."""


def run_training(config: RunConfig, live: bool = False) -> RunSummary:
    """Train to `training.max_steps`, with restarts after failures and concurrent evaluations; return a summary.

    A run folder with checkpoints is continued. Ctrl-C or SIGTERM ends the run after one more checkpoint (status
    `stopped`). A finished run has completed its evaluations. Otherwise pending evaluations stay in the run folder and
    run when the run is continued. With `live`, the terminal shows a panel instead of log lines.

    Raises:
        UserError: a mistake in the recipe, the data or the stored run, found here or by a worker.
        LeaseHeldError: another process is training in the run folder.
        LeaseLostError: another process took over the run folder, because this one did not renew its lease.
    """
    with _available_devices(config) as devices:
        config = settled_run(config, devices, during_training=True)
        return run_supervised(config, RayLauncher(config), live)


@contextmanager
def _available_devices(config: RunConfig) -> Iterator[AvailableDevices]:
    """Yield the devices of the cluster that the run will use, or of this machine if a local cluster will be started."""
    may_grow = is_external_cluster(config.cluster.address)
    if not may_grow and not ray.is_initialized():
        yield local_devices()
        return
    with existing_or_local_cluster(config.cluster, 0):
        yield cluster_devices(may_grow)


class RayLauncher:
    """Launcher that uses Ray Train on the recipe's cluster, or on a local one."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._cluster = config, config.cluster
        self._stack = ExitStack()
        self._scratch = ""
        self._mailbox: Any = None
        self._attempts = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        may_grow = is_external_cluster(self._cluster.address)
        with ExitStack() as stack:
            stack.enter_context(connect(self._config))
            self._scratch = str(stack.enter_context(ScratchFolder("ray-train")))
            check_gpus(self._config, ray.cluster_resources().get("GPU", 0), may_grow)
            # Runs on the driver's node, so that it survives the loss of worker nodes.
            selector = this_node_selector()
            mailbox = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, label_selector=selector)(Mailbox)
            self._mailbox = mailbox.remote()
            if self._cluster.min_workers < self._cluster.max_workers:
                stack.callback(request_resources, bundles=[])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def evaluations(self, tracked: TrackedRun) -> EvaluationClient:
        """Return evaluations that run in a pool of actors during training."""
        return EvaluationClient(self._config, tracked)

    def free_nodes(self) -> Iterable[Mapping[str, float]]:
        """Return the free resources of the nodes that are alive and not draining.

        Also requests resources for `max_workers` from the autoscaler. Without this request, the autoscaler sees no
        pending workers. Every call repeats it, because Ray Train overwrites it at the end of every attempt.
        """
        request_resources(bundles=[self._cluster.needs] * self._cluster.max_workers)
        draining = draining_nodes()
        return [free for node, free in free_resources().items() if node not in draining]

    def start(self, job: TrainJob, workers: int) -> None:
        """Call `TorchTrainer.fit()` in a thread."""
        self._attempts, self._error = self._attempts + 1, None
        trainer = self._trainer(job, workers)

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=fit, name=f"attempt-{self._attempts}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether `fit` is still running."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self, stop: bool, wait_s: float) -> Sequence[Event]:
        """Wait up to `wait_s` seconds and return the events in the mailbox; none if it does not answer."""
        if self._thread is not None:
            self._thread.join(wait_s)
        else:
            time.sleep(wait_s)
        try:
            return ray.get(self._mailbox.poll.remote(stop), timeout=MAILBOX_TIMEOUT_S)
        except RayError:  # Ray restarts the mailbox after its death
            return ()

    def attempt_error(self) -> AttemptError | None:
        """Return what `fit` raised; None if it returned."""
        error = self._error
        if error is None:
            return None
        details = f"{type(error).__name__}: {error}\n"
        if isinstance(error, ray.train.WorkerGroupError):
            return AttemptError(error.worker_failures, details)
        return AttemptError({}, details, other=getattr(error, "controller_failure", error))

    @property
    def is_draining(self) -> bool:
        """Whether Ray is draining the driver's node."""
        return ray.get_runtime_context().get_node_id() in draining_nodes()

    def describe_wait(self) -> str:
        """Describe the resources that a worker needs and those that are free in the cluster."""
        free = ray.available_resources()
        needs = [f"{amount:g} {name} ({free.get(name, 0):g} free now)" for name, amount in self._cluster.needs.items()]
        workers = format_count(self._cluster.min_workers, "worker")
        return f"the run needs at least {workers}, each with {' and '.join(needs)}"

    def _trainer(self, job: TrainJob, workers: int) -> TorchTrainer:
        cluster = self._cluster
        return TorchTrainer(
            train_loop,
            train_loop_config={"settings": WorkerSettings(job, self._mailbox)},
            torch_config=CheckedTorchConfig(
                backend="nccl" if cluster.gpus_per_worker else "gloo",
                timeout_s=round(job.training.collective_timeout_s),
            ),
            scaling_config=scaling_config(workers, cluster.gpus_per_worker > 0, cluster.needs),
            # Each attempt has a new name. Otherwise Ray would look for checkpoints of the previous one.
            run_config=attempt_config(f"attempt-{self._attempts}", self._scratch),
        )


def check_gpus(config: RunConfig, available: float, may_grow: bool) -> None:
    """Raise ClusterError if a local cluster has too few GPUs, because Ray would silently wait for them forever.

    If the cluster may grow, only print a message.
    """
    cluster, evaluation = config.cluster, config.evaluation
    training = cluster.min_workers * cluster.gpus_per_worker
    evaluating = evaluation.actors * evaluation.gpus_per_actor if evaluation.sets else 0
    if training + evaluating <= available:
        return
    message = (
        f"the run needs {training:g} GPUs for training and {evaluating:g} for evaluation, but the cluster has "
        f"{available:g}; lower cluster.num_workers, cluster.num_gpus_per_worker, evaluation.actors or "
        "evaluation.num_gpus_per_actor"
    )
    if not may_grow:
        raise ClusterError(message)
    print_err(f"waiting for the cluster to grow: {message}")
