"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from m2f.cluster.train.local import train_locally
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from tests.cluster.tiny_run import small_sets, tiny_config, tracked_points
from tests.gateway import Gateway


@dataclass(frozen=True)
class BaselineRun:
    """An undisturbed run of `tiny_config`. Runs with killed processes or storage outages must match it bit for bit."""

    run_folder: str
    losses: list[tuple[int, float]]
    """Sorted (step, loss) points."""


@pytest.fixture(scope="session")
def baseline_run(tmp_path_factory: pytest.TempPathFactory) -> BaselineRun:
    """Train the baseline once for all tests that compare with it."""
    folder = tmp_path_factory.mktemp("baseline")
    config = replace(tiny_config(folder, "baseline", small_sets(str(folder), Storage())), evaluation=EvaluationConfig())
    summary = train_locally(config)
    assert summary.status == "finished"
    return BaselineRun(config.run_folder, tracked_points(summary.tracked, "train/loss/total"))


@pytest.fixture(scope="session", autouse=True)
def no_memory_monitor() -> Iterator[None]:
    """Disable Ray's memory monitor, which kills workers if other programs use up the machine's memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        yield


@pytest.fixture
def gateway(s3_endpoint: str) -> Iterator[Gateway]:
    """Yield a gateway to the S3 server that can refuse requests."""
    with Gateway(s3_endpoint) as gateway:
        yield gateway
        gateway.shutdown()
