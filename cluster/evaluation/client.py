"""Driver-side client of the evaluation service, which runs as a detached Ray actor."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError

from m2f.cluster.evaluation.actor import EvaluationActor
from m2f.cluster.evaluation.manager import EvaluationStatus
from m2f.cluster.evaluation.pool import EvaluationPool
from m2f.cluster.evaluation.service import EvaluationService
from m2f.cluster.ray_cluster import this_node_selector
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.tracking.tracking import TrackedRun

NAMESPACE = "m2f"
STATUS_TIMEOUT_S = 10.0
"""Seconds for one status of the service. The driver does nothing else while it waits."""
CLOSE_TIMEOUT_S = 60.0
"""Seconds for the service to end and to send its metrics. What it does not send stays in its journal."""
MAX_REPLACEMENTS = 4
"""Largest number of replacements in a row. The pauses after them, 2 to 16 s, add up to half a minute."""
DRIVER_SILENCE_S = 600.0
"""Time without a call from the driver, in seconds, after which the service ends."""


class EvaluationClient:
    """The driver's handle to the evaluation service.

    The service is a detached actor. Ray restarts it after a crash; this class re-creates it if it dies permanently.
    The driver must call `status` at least once every DRIVER_SILENCE_S seconds.
    """

    def __init__(self, config: RunConfig, tracked: TrackedRun) -> None:
        self._config = config
        self._tracked = tracked
        self._name = f"evaluation-{hashlib.sha256(config.run_folder.encode()).hexdigest()[:16]}"
        self._deaths = 0
        self._next_start = 0.0
        self.failure_reason: str | None = None
        """Why evaluations have stopped; None until then. A resumed run processes the stored queue."""
        _kill_existing(self._name)
        self._service = self._start()

    def training_ended(self) -> None:
        """Do nothing: the evaluation actors have their own resources and do not wait for the end of training."""

    def status(self) -> EvaluationStatus | None:
        """Return the status of the service; None if it has stopped or does not answer within STATUS_TIMEOUT_S."""
        if self.failure_reason is not None:
            return None
        try:
            status = ray.get(self._service.status.remote(), timeout=STATUS_TIMEOUT_S)
        except ActorDiedError as error:  # it is permanently dead; in all other cases Ray restarts it
            self._replace(error)
            return None
        except (RayActorError, GetTimeoutError):
            return None
        self._deaths = 0
        self.failure_reason = status.failure_reason
        return status

    def close(self) -> None:
        """End the actor and its pool. A resumed run evaluates the entries that wait."""
        status = self.status()
        if status is not None and status.idle:
            with suppress(RayError):  # unsent metrics stay in its journal
                ray.get(self._service.close.remote(), timeout=CLOSE_TIMEOUT_S)
        ray.kill(self._service)

    def _start(self) -> Any:
        service = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(EvaluationServiceActor)
        return service.options(  # runs on the driver's node, which holds the journal of MLflow metrics
            name=self._name, namespace=NAMESPACE, lifetime="detached", label_selector=this_node_selector()
        ).remote(self._config, self._tracked, make_pool, DRIVER_SILENCE_S)

    def _replace(self, error: ActorDiedError) -> None:
        """Create the service again after its actor died permanently, with a pause that doubles each time.

        After MAX_REPLACEMENTS replacements without an answer in between, set `failure_reason` instead.
        """
        if time.monotonic() < self._next_start:
            return
        self._deaths += 1
        if self._deaths > MAX_REPLACEMENTS:
            self.failure_reason = f"the evaluation service cannot start ({str(error).strip().splitlines()[-1]})"
            return
        self._next_start = time.monotonic() + 2.0**self._deaths
        _kill_existing(self._name)
        self._service = self._start()


class EvaluationServiceActor(EvaluationService):
    """An evaluation service that ends itself and its pool if the driver stops asking for its status.

    A detached actor outlives a driver that is killed, and its pool would keep occupying GPUs of a shared cluster.
    """

    def __init__(
        self,
        config: RunConfig,
        tracked: TrackedRun,
        make_pool: Callable[[RunConfig], EvaluationPool],
        driver_silence_s: float,
    ) -> None:
        super().__init__(config, tracked, make_pool)
        self._driver_silence_s = driver_silence_s
        self._last_call = time.monotonic()
        threading.Thread(target=self._end_without_driver, name="driver watch", daemon=True).start()

    def status(self) -> EvaluationStatus:
        """Return all entries and the progress of the running evaluation."""
        self._last_call = time.monotonic()
        return super().status()

    def _end_without_driver(self) -> None:
        while (left := self._last_call + self._driver_silence_s - time.monotonic()) > 0:
            time.sleep(left)
        ray.kill(ray.get_runtime_context().current_actor)


def make_pool(config: RunConfig) -> EvaluationPool:
    """Make a pool with the recipe's evaluation actors. Ray restarts actors that die."""
    settings = config.evaluation
    actor = ray.remote(
        num_cpus=settings.num_cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
        resources=dict(settings.resources_per_actor),
        max_restarts=-1,
    )(EvaluationActor)
    return EvaluationPool(lambda: actor.remote(config), settings.actors, settings.hang_s)


def _kill_existing(name: str) -> None:
    """Kill the actor of this name, if any, and wait until the name is free."""
    while True:
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:  # no actor has the name
            return
        time.sleep(0.2)
