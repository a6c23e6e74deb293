"""Everything m2f takes from Ray's private modules, each behind a function, tested with the versions in TESTED.

No other module imports from them. Ray is imported inside the functions, so that whoever needs one waits for no other.
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

TESTED = ">=2.60,<2.61"
"""Ray versions whose private modules these functions were tried with, as pip writes ranges."""
LOGGER = logging.getLogger(__name__)


class RayVersionError(UserError):
    """The installed Ray does not have a private part that m2f needs. Names the versions that have it."""


@contextmanager
def _expected() -> Iterator[None]:
    """Say which versions of Ray are needed where an import or an attribute is not there."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise RayVersionError(
            f"Ray {metadata.version('ray')} lacks a private part that m2f needs ({error}). m2f is tested with Ray "
            f"{TESTED}; install it: pip install 'ray[default,train]{TESTED}'"
        ) from error


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """What is free on every node that lives, by the node's id."""
    with _expected():
        from ray._private.state import available_resources_per_node
    return available_resources_per_node()


def dashboard_url() -> str | None:
    """URL of the dashboard of the connected cluster; None where it has none."""
    with _expected():
        from ray._private.worker import get_dashboard_url

        address = get_dashboard_url()
    return f"http://{address}" if address else None


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are about to leave the cluster."""
    with _expected():
        from ray._private.state import state

        nodes = state.get_draining_nodes
    return frozenset(nodes())


def preemption_notice() -> Callable[[], bool]:
    """Inside a worker of Ray Train: a function that says whether the node of a worker was told to leave.

    It reads this process alone; the public `get_preemption_info` is a barrier that every rank would have to enter.
    """
    with _expected():
        from ray.train.v2._internal.execution import context

        preemption = context.get_train_context().preemption_context
        _ = preemption.preemption_info
    return lambda: preemption.preemption_info is not None


def scaling_config(workers: int, gpus: bool, needs: Mapping[str, float]) -> ScalingConfig:
    """The workers of an attempt; `needs` are the resources of each."""
    with _expected():  # to a type checker the public ray.train.ScalingConfig is one of two classes
        from ray.train.v2.api.config import ScalingConfig
    return ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=dict(needs))


def attempt_config(name: str, folder: str) -> RunConfig:
    """An attempt that is not repeated when it fails, and of which Ray says nothing: our supervisor does both.

    Args:
        name: of a folder in `folder` for what Ray keeps.
        folder: on the disk of the driver.
    """
    with _expected():
        from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig
    return RunConfig(
        name=name,
        storage_path=folder,
        failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        logging_config=LoggingConfig(log_level="CRITICAL"),
    )


@contextmanager
def on_loopback() -> Iterator[None]:
    """During the block, a cluster that starts here listens on loopback alone, as Ray does on macOS.

    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 says the same to processes that import Ray then; this one has imported it.
    """
    with _expected():
        from ray._private import ray_constants

        before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def quiet_reports() -> None:
    """Inside a worker of Ray Train: it announces every report otherwise."""
    with _expected():
        from ray.train.v2._internal.execution import context

        context.logger.setLevel(logging.WARNING)


def quiet_tokens() -> None:
    """Ray announces otherwise where it took its token from."""
    with _expected():
        from ray._private.authentication import authentication_token_setup

        authentication_token_setup.logger.setLevel(logging.ERROR)


def quiet_job_client() -> None:
    """The client of the Jobs API announces otherwise every upload and every end of a log."""
    with _expected():
        from ray.dashboard.modules import dashboard_sdk
        from ray.dashboard.modules.job import sdk

        for module in (sdk, dashboard_sdk):
            module.logger.setLevel(logging.WARNING)


def ray_version_of(client: JobSubmissionClient) -> str | None:
    """Of the cluster; the public `get_version` gives the version of the Jobs API. None where it was not said."""
    with _expected():
        return client._server_ray_version


def pack_working_dir(folder: Path, archive: Path) -> None:
    """Make the archive as Ray makes it of a `working_dir`: by .rayignore, and equal bytes for equal files."""
    with _expected():
        from ray._private.runtime_env.packaging import create_package
    create_package(str(folder), archive, include_gitignore=False, logger=LOGGER)
