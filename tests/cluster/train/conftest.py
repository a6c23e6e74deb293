"""What tests of training runs share."""

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
    """What `tiny_config` gives where nothing happens; faults, stores and launchers change no bit of it."""

    run_folder: str
    losses: list[tuple[int, float]]
    """By step."""


@pytest.fixture(scope="session")
def baseline_run(tmp_path_factory: pytest.TempPathFactory) -> BaselineRun:
    """Trained once for all tests that compare with it."""
    folder = tmp_path_factory.mktemp("baseline")
    config = replace(tiny_config(folder, "baseline", small_sets(str(folder), Storage())), evaluation=EvaluationConfig())
    summary = train_locally(config)
    assert summary.status == "finished"
    return BaselineRun(config.run_folder, tracked_points(summary.tracked, "train/loss/total"))


@pytest.fixture(scope="session", autouse=True)
def no_memory_monitor() -> Iterator[None]:
    """Ray kills workers where other programs of this machine take its memory, which is not our business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        yield


@pytest.fixture
def gateway(s3_endpoint: str) -> Iterator[Gateway]:
    """A way to the S3 store that can be closed."""
    with Gateway(s3_endpoint) as gateway:
        yield gateway
        gateway.shutdown()
