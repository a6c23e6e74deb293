"""Fixtures shared by all tests: where the optional real data and golden numbers are, and a quiet environment."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import hypothesis
import pytest

# Set before torch, deepspeed or ray are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as clusters of our own have it: tests share the machine
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A process keeps the authentication mode of its first Ray cluster, so all clusters of a test session have the same one.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

# Machines are noisy: an example that takes long once is no defect.
hypothesis.settings.register_profile("m2f", deadline=None)
hypothesis.settings.load_profile("m2f")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("M2F_SHARED", REPOSITORY.parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Waits of tests, and of the processes that they start, end before pytest's own limit of a test does."""
    limit = config.getoption("timeout") or config.getini("timeout")
    os.environ["M2F_TEST_PATIENCE_S"] = f"{0.8 * float(limit)}"  # tests.waiting reads it; tests are imported later


@pytest.fixture(autouse=True, scope="session")
def _ranks_of_this_process_are_forks() -> Iterator[None]:
    from m2f.cluster.train import processes
    from tests.forks import FORKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_START", FORKS)
        yield


def _present(folder: Path) -> Path:
    if not folder.exists():
        pytest.skip(f"{folder.name} is not here (looked in {folder}); set M2F_SHARED to its parent folder")
    return folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with numbers made by the official code."""
    return _present(SHARED / "goldens" / "official")


@pytest.fixture(scope="session")
def authors_goldens() -> Path:
    """Folder with numbers made by the code of the authors of later heads."""
    return _present(SHARED / "goldens" / "beyond")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real images and annotations."""
    return _present(SHARED / "data")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server on loopback with an empty bucket `box`; the environment has credentials for it."""
    import boto3
    from moto.server import ThreadedMotoServer  # takes seconds, which only tests that want it should pay

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        boto3.session.Session().client("s3", endpoint_url=endpoint).create_bucket(Bucket="box")
        yield endpoint
    urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()  # objects outlive their server otherwise
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://box`, to which the environment alone leads."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return "s3://box"
