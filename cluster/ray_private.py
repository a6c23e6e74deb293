"""Functions that wrap everything m2f uses from Ray's private modules, tested with the versions in TESTED_VERSIONS.

Other modules of m2f never import Ray's private modules. Each function imports only the parts of Ray that it needs, to
save import time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from m2f.model.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.train.v2.api.config import RunConfig, ScalingConfig

TESTED_VERSIONS = ">=2.60,<2.61"
"""Ray versions with which these functions were tested, as a pip version specifier."""
LOGGER = logging.getLogger(__name__)


class RayVersionError(UserError):
    """The installed Ray lacks a private part that m2f needs. The message names the versions that have it."""


@contextmanager
def _require_private_api() -> Iterator[None]:
    """Convert ImportError and AttributeError in the block to RayVersionError, which names the versions needed."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise RayVersionError(
            f"Ray {metadata.version('ray')} lacks a private API that m2f needs ({error}). m2f is tested with Ray "
            f"{TESTED_VERSIONS}; install it: pip install 'ray[default,train]{TESTED_VERSIONS}'"
        ) from error


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Return the free resources of every live node, by node id and resource name."""
    with _require_private_api():
        from ray._private.state import available_resources_per_node
    return available_resources_per_node()


def dashboard_url() -> str | None:
    """Return the URL of the dashboard of the connected cluster, or None if it has none."""
    with _require_private_api():
        from ray._private.worker import get_dashboard_url

        address = get_dashboard_url()
    return f"http://{address}" if address else None


def draining_nodes() -> frozenset[str]:
    """Return the ids of the nodes that are about to leave the cluster."""
    with _require_private_api():
        from ray._private.state import state

        nodes = state.get_draining_nodes
    return frozenset(nodes())


def preemption_notice() -> Callable[[], bool]:
    """Return a function that reports whether a node of this run's workers is being preempted.

    Call it inside a Ray Train worker. The returned function only reads state of this process, whereas the public
    `get_preemption_info` is a barrier that every rank must enter.
    """
    with _require_private_api():
        from ray.train.v2._internal.execution import context

        preemption = context.get_train_context().preemption_context
        _ = preemption.preemption_info
    return lambda: preemption.preemption_info is not None


def scaling_config(workers: int, gpus: bool, needs: Mapping[str, float]) -> ScalingConfig:
    """Return the Ray Train configuration for the workers of an attempt; `needs` are the resources of each worker."""
    with _require_private_api():  # type checkers see the public ray.train.ScalingConfig as one of two classes
        from ray.train.v2.api.config import ScalingConfig
    return ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=dict(needs))


def attempt_config(name: str, folder: str) -> RunConfig:
    """Return a Ray Train configuration that neither retries nor logs, because m2f's supervisor does both.

    Args:
        name: name of the subfolder of `folder` in which Ray stores its state.
        folder: path on the driver's disk.
    """
    with _require_private_api():
        from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig
    return RunConfig(
        name=name,
        storage_path=folder,
        failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        logging_config=LoggingConfig(log_level="CRITICAL"),
    )


@contextmanager
def only_on_loopback() -> Iterator[None]:
    """Make clusters that start in the block listen only on loopback, as Ray does on macOS.

    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 does the same for new processes, but this process has already imported Ray.
    """
    with _require_private_api():
        from ray._private import ray_constants

        before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def quiet_reports() -> None:
    """Stop Ray Train from logging every report. Call it inside a worker."""
    with _require_private_api():
        from ray.train.v2._internal.execution import context

        context.logger.setLevel(logging.WARNING)


def quiet_tokens() -> None:
    """Stop Ray from logging where it found its authentication token."""
    with _require_private_api():
        from ray._private.authentication import authentication_token_setup

        authentication_token_setup.logger.setLevel(logging.ERROR)


def quiet_job_client() -> None:
    """Stop the Jobs API client from logging every upload and every end of a log stream."""
    with _require_private_api():
        from ray.dashboard.modules import dashboard_sdk
        from ray.dashboard.modules.job import sdk

        for module in (sdk, dashboard_sdk):
            module.logger.setLevel(logging.WARNING)


def server_ray_version(client: JobSubmissionClient) -> str | None:
    """Return the cluster's Ray version, or None if the server did not report it.

    The public `get_version` returns the version of the Jobs API.
    """
    with _require_private_api():
        return client._server_ray_version


def pack_working_dir(folder: Path, archive: Path) -> None:
    """Write the archive that Ray would make of a `working_dir`.

    It honours .rayignore, and equal files result in equal bytes.
    """
    with _require_private_api():
        from ray._private.runtime_env.packaging import create_package
    create_package(str(folder), archive, include_gitignore=False, logger=LOGGER)
