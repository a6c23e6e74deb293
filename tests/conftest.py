"""Fixtures shared by all tests: folders of optional real data and golden numbers, and environment variables."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import hypothesis
import pytest

# Set before torch, deepspeed or ray are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as in local clusters of m2f, because tests share the machine
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A process keeps the authentication mode of its first Ray cluster, so all clusters of a test session have the same one.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

# No deadline, because a single example may be slow on a busy machine.
hypothesis.settings.register_profile("m2f", deadline=None)
hypothesis.settings.load_profile("m2f")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("M2F_SHARED", REPOSITORY.parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Set the maximum wait of tests and of their subprocesses below pytest's timeout of a test."""
    limit = config.getoption("timeout") or config.getini("timeout")
    os.environ["M2F_TEST_PATIENCE_S"] = f"{0.8 * float(limit)}"  # read by tests.waiting, which is imported later


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End a process that has loaded Ray without the interpreter's shutdown, in which one of its threads has crashed."""
    session = config.pluginmanager.get_plugin("session")
    if "ray" in sys.modules and isinstance(session, pytest.Session) and not hasattr(config, "workerinput"):
        from m2f.cluster.exit_status import end_process

        config.get_terminal_writer().flush()
        end_process(int(session.exitstatus))


@pytest.fixture(autouse=True, scope="session")
def _fork_ranks() -> Iterator[None]:
    from m2f.cluster.train import processes
    from tests.forks import FORK_CONTEXT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_SPAWN_CONTEXT", FORK_CONTEXT)
        yield


def _require_folder(folder: Path) -> Path:
    if not folder.exists():
        pytest.skip(f"{folder} does not exist; set M2F_SHARED to the folder that contains the shared data")
    return folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Return the folder with numbers made by the official code."""
    return _require_folder(SHARED / "goldens" / "official")


@pytest.fixture(scope="session")
def authors_goldens() -> Path:
    """Return the folder with numbers made by the authors' code of later heads."""
    return _require_folder(SHARED / "goldens" / "beyond")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder with real images and annotations."""
    return _require_folder(SHARED / "data")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """Return the URL of a local S3 server with an empty bucket `box`, and set its credentials in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer  # takes seconds, so it is imported only if needed

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        boto3.session.Session().client("s3", endpoint_url=endpoint).create_bucket(Bucket="box")
        yield endpoint
    urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()  # moto shares objects between servers
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return `s3://box`. The environment holds the endpoint and the credentials."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return "s3://box"
