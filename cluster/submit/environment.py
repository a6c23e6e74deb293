"""Environment variables that may be passed to a job: an allowlist of names whose values contain no secrets.

Ray stores the environment of a job and shows it in the dashboard. Other variables must be set where the nodes start
Ray, because all processes of a job inherit the environment of their node.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.urls import REMEDY, url_problem
from m2f.model.errors import ConfigError

STOP_WAIT_S = 600
"""Seconds between SIGTERM and SIGKILL of a stopped job, so that it can save a checkpoint. Ray's default is 3 s."""
ALLOWED_PREFIXES = (
    *("CUBLAS_", "CUDA_", "CUDNN_", "FI_", "GLOO_", "GOMP_", "KMP_", "MKL_", "NCCL_", "NVIDIA_", "NVTE_", "OMP_"),
    *("OPENBLAS_", "PYTORCH_", "RAY_TRAIN_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TRITON_", "UCX_"),
)
"""Prefixes of allowed names: settings of libraries for computation and communication, which contain no passwords."""
ALLOWED_NAMES = frozenset(
    [
        *("AWS_CA_BUNDLE", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"),
        *("AWS_REGION", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
        *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
        *("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_TRACKING_INSECURE_TLS"),
        *("MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_URI"),
        *("PYTHONFAULTHANDLER", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONWARNINGS"),
        *("REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE", "NO_PROXY", "no_proxy"),
        *("CC", "CXX", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "NO_COLOR", "TMPDIR", "TZ", "XDG_CACHE_HOME"),
        *("DS_ACCELERATOR", "M2F_DATA", "RAY_JOB_STOP_WAIT_TIME_S"),
    ]
)
"""Other allowed names."""


def job_environment(variables: Sequence[str], config: RunConfig | None = None) -> dict[str, str]:
    """Return the environment variables of a job: `variables` and those that m2f sets.

    Each item of `variables` is `NAME=VALUE`, or `NAME` for its value in this process.

    Raises:
        ConfigError: a name is not allowed, a value is a URL that may contain a secret, or a variable is not set.
    """
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONUNBUFFERED": "1"}
    tracking = os.environ.get("MLFLOW_TRACKING_URI")
    if config is not None and config.tracking.uri is None and tracking and not is_local_tracking(tracking):
        env["MLFLOW_TRACKING_URI"] = tracking
    for variable in variables:
        name, equals, value = variable.partition("=")
        if name not in ALLOWED_NAMES and not name.startswith(ALLOWED_PREFIXES):
            raise ConfigError(
                f"--env {name}: the variable may contain a secret, and Ray stores and shows the environment of jobs. "
                "Set it where the nodes start Ray (on Kubernetes, in the template), because the processes of a job "
                "inherit the variables of their node. docs/cloud.md lists the names that --env accepts"
            )
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: the variable is not set on this machine; give --env {name}=VALUE")
        env[name] = value if equals else os.environ[name]
    for name, value in env.items():
        if (problem := url_problem(value)) is not None:
            raise ConfigError(f"the variable {name} {problem}, and Ray shows the environment of jobs. {REMEDY}")
    return env


def is_local_tracking(uri: str) -> bool:
    """Return whether a tracking URI names local files or a sqlite database, without a host."""
    return urlsplit(uri).scheme in ("", "file", "sqlite")
