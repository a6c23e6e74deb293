"""Checks of the services and data of a run: storage, shards, MLflow, clocks, and Ray's token."""

from __future__ import annotations

import os
import secrets
import socket
import time
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from m2f.cluster.doctor.finding import Finding
from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.shards.manifest import Manifest, read_document
from m2f.data_pipeline.shards.warnings import data_warnings
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import UserError

TIMEOUT_S = 5.0
"""Seconds for each request to a service. The check ends soon even if no service answers."""
SKEW_WARNING_S, SKEW_ERROR_S = 5.0, 300.0
"""Clock differences in seconds for a warning and for a failure.

S3 refuses requests if the clock is wrong by 15 minutes. Metrics of two machines are out of order at much smaller
differences.
"""
_TOKEN_REMEDY = "start all nodes with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN (docs/cloud.md)"
NO_RECIPE = "give a recipe to check it"


def check_run_folder(config: RunConfig | None) -> Finding:
    """Write, read and delete a small object in the run folder, which holds the checkpoints."""
    if config is None:
        return Finding("run folder", "skipped", NO_RECIPE)
    storage = _storage_without_retries(config)
    url = join(config.run_folder, "doctor", f"{socket.gethostname()}-{secrets.token_hex(4)}")
    content = secrets.token_bytes(1024)
    try:
        started = time.monotonic()
        storage.put(url, content)
        is_unchanged = storage.get(url) == content
        storage.delete(url)
        elapsed_s = time.monotonic() - started
    except UserError as error:
        return Finding("run folder", "failed", str(error), _storage_remedy(config.run_folder))
    if not is_unchanged:
        return Finding(
            "run folder",
            "failed",
            f"{url}: bytes read differ from bytes written",
            "the storage corrupts data; use a different one",
        )
    return Finding("run folder", "ok", f"{config.run_folder}: write, read, delete in {elapsed_s * 1000:.0f} ms")


def check_shards(config: RunConfig | None) -> Finding:
    """Read the manifest of every data set that the run uses."""
    if config is None:
        return Finding("shards", "skipped", NO_RECIPE)
    storage = _storage_without_retries(config)
    used = _used_datasets(config)
    for name in used:
        shards = config.datasets[name].shards
        try:
            document = read_document(shards, storage)
        except UserError as error:
            return Finding("shards", "failed", f"{name}: {error}", _storage_remedy(shards))
        if document is None:
            return Finding("shards", "failed", f"{name}: no manifest in {shards}", f"run m2f shard RECIPE {name}")
    return Finding("shards", "ok", f"read the manifests of {', '.join(used)}")


def check_data(config: RunConfig | None) -> Finding:
    """Check that the data fit the model and the task, and report the warnings that `m2f train` prints."""
    if config is None:
        return Finding("data", "skipped", NO_RECIPE)
    storage = _storage_without_retries(config)
    used, found = _used_datasets(config), []
    for name in used:
        try:
            manifest = Manifest.load(config.datasets[name].shards, storage)
        except UserError:
            return Finding("data", "skipped", f"the shards of {name} cannot be read")
        found += data_warnings(name, manifest, config.data.task, config.model)
    if found:
        return Finding("data", "warning", "\n".join(text.removeprefix("warning: ") for text in found))
    return Finding("data", "ok", f"{', '.join(used)} match the model and the task")


def _used_datasets(config: RunConfig) -> list[str]:
    """Return the names of all data sets of training and evaluation."""
    return sorted({item.dataset for item in config.data.train} | {item.dataset for item in config.evaluation.sets})


def check_tracking(config: RunConfig | None) -> Finding:
    """Check that the MLflow server answers. A local database is not checked, because the run creates it."""
    from m2f.cluster.tracking.store import checked_uri, connect
    from m2f.cluster.tracking.tracking import tracking_uri

    try:
        environment_uri = os.environ.get("MLFLOW_TRACKING_URI")
        uri = tracking_uri(config) if config is not None else environment_uri and checked_uri(environment_uri)
    except UserError as error:
        return Finding("MLflow", "failed", str(error), "set tracking.uri to a tracking server")
    if not uri:
        return Finding("MLflow", "skipped", NO_RECIPE + ", or set MLFLOW_TRACKING_URI")
    if uri.startswith("sqlite:///"):
        return Finding("MLflow", "ok", f"{uri}, on this machine")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(round(TIMEOUT_S))
    try:
        started = time.monotonic()
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow does not convert the errors of its HTTP client
        detail = " ".join(str(error).split())[:200]
        remedy = "start the server, correct tracking.uri or MLFLOW_TRACKING_URI, or set MLFLOW_TRACKING_USERNAME"
        return Finding("MLflow", "failed", f"request to {uri} failed: {detail}", remedy)
    return Finding("MLflow", "ok", f"{uri} responds in {(time.monotonic() - started) * 1000:.0f} ms")


def check_clock(config: RunConfig | None) -> Finding:
    """Compare the clock of this machine with that of the first server that sends a date."""
    urls = [] if config is None else [config.storage.endpoint_url, config.tracking.uri]
    if config is not None and config.output.startswith("s3://"):
        urls.append(os.environ.get("AWS_ENDPOINT_URL", "https://s3.amazonaws.com"))
    for url in urls:
        if url and url.startswith("http") and (skew := clock_skew(url)) is not None:
            return skew_finding(skew, url)
    return Finding("clock", "skipped", "no server to compare with")


def skew_finding(skew: float, other: str) -> Finding:
    """Return the finding for a clock that is `skew` seconds ahead of the clock of `other`."""
    detail = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {other}"
    remedy = "set the clock: timedatectl set-ntp true"
    if abs(skew) > SKEW_ERROR_S:
        return Finding("clock", "failed", detail + "; S3 rejects requests if the clock is wrong", remedy)
    if abs(skew) > SKEW_WARNING_S:
        return Finding("clock", "warning", detail, remedy)
    return Finding("clock", "ok", f"agrees with {other}")


def clock_skew(url: str) -> float | None:
    """Return the seconds by which this machine is ahead of a server, accurate to a second.

    Returns None if the server does not answer or sends no date.
    """
    before = time.time()
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT_S) as response:
            date = response.headers["Date"]
    except HTTPError as error:  # an error response also has a date
        date = error.headers["Date"]
    except (OSError, ValueError, HTTPException):
        return None
    middle = (before + time.time()) / 2
    # The date is cut to whole seconds, so on average it is 0.5 s too early.
    return None if date is None else middle - parsedate_to_datetime(date).timestamp() - 0.5


def check_ray_token(dashboard: str | None = None) -> Finding:
    """Check that Ray requires a token, since otherwise anyone who reaches its ports can run code.

    `dashboard` is the dashboard URL of a running cluster, which gets a request without a token. The request is needed
    because this process's environment does not show whether the cluster requires a token.
    """
    if dashboard is not None:
        return _query_without_token(dashboard)
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "disabled":
        detail = "RAY_AUTH_MODE=disabled: anyone who can reach a port of Ray can run code on its nodes"
        return Finding("Ray token", "warning", detail, _TOKEN_REMEDY)
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if mode == "token" and not has_token and not (Path.home() / ".ray" / "auth_token").is_file():
        remedy = "set RAY_AUTH_TOKEN to the output of `ray get-auth-token` on the head"
        return Finding("Ray token", "failed", "RAY_AUTH_MODE=token, but no token is set", remedy)
    return Finding("Ray token", "ok", "set" if has_token else "not set; m2f generates one for each local cluster")


def _query_without_token(dashboard: str) -> Finding:
    """Request the list of jobs from the dashboard without a token. If that works, anyone can also submit jobs."""
    try:
        urlopen(f"{dashboard.rstrip('/')}/api/jobs/", timeout=TIMEOUT_S).close()
    except HTTPError as error:
        if error.code in (401, 403):
            return Finding("Ray token", "ok", f"{dashboard} rejects requests without a token")
        detail = (
            f"{dashboard} returned HTTP {error.code} to a request without a token; it is unclear whether it needs one"
        )
        return Finding("Ray token", "warning", detail, _TOKEN_REMEDY)
    except (OSError, ValueError, HTTPException) as error:
        return Finding("Ray token", "warning", f"{dashboard} cannot be reached ({error})", "start the dashboard")
    detail = f"{dashboard} accepts jobs without a token: anyone who can reach it can run code on the nodes"
    return Finding("Ray token", "failed", detail, _TOKEN_REMEDY)


def _storage_without_retries(config: RunConfig) -> Storage:
    return Storage(config.storage).without_retries(TIMEOUT_S)


def _storage_remedy(url: str) -> str:
    if not url.startswith("s3://"):
        return "correct the path or its permissions"
    return (
        "correct storage.endpoint_url and storage.region; give the machine an IAM role, or set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY in the environment of its processes"
    )
