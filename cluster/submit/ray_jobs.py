"""Client of Ray's Jobs API: submit a command, follow its output, and stop it. Errors name a remedy."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.ray_cluster import require_listening
from m2f.cluster.ray_private import quiet_job_client, server_ray_version
from m2f.cluster.terminal import first_line, format_duration, print_err, print_out
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.urls import url_problem
from m2f.model.errors import UserError

POLL_S = 0.5
"""Pause in seconds between two requests for the state of a job."""
DASHBOARD_TIMEOUT_S = 300.0
"""Seconds for which the dashboard may fail to answer while a job is followed."""
_STARTUP_ERRORS = ("RUNTIME_ENV_SETUP_FAILURE", "START", "UNSCHEDULABLE")
"""Parts of Ray's error types for jobs whose command never ran."""


class JobError(UserError):
    """The cluster cannot be reached or refuses a job."""


@dataclass(frozen=True)
class JobRequest:
    """A command to run on a cluster."""

    job_id: str
    command: str
    archive: Path
    """Zip file of the job's working directory."""
    env: Mapping[str, str]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class JobInfo:
    """State of a job on a cluster."""

    job_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    exit_code: int | None
    seconds: float | None
    """Run time in seconds so far or in total; None before the start."""
    metadata: Mapping[str, str]
    error: str = ""
    """Ray's error type of a failed job; "" if there is none."""

    @property
    def has_ended(self) -> bool:
        """Whether the job finished, failed or was stopped."""
        return JobStatus(self.status).is_terminal()

    @property
    def exit_status(self) -> int:
        """Exit status of the command; if it is unknown, an ExitStatus derived from the state of the job.

        A job whose process was lost with its node or with Ray has status OUTAGE, because a new job can resume the run.
        """
        if self.exit_code:
            return self.exit_code if self.exit_code > 0 else 128 - self.exit_code
        match JobStatus(self.status):
            case JobStatus.STOPPED:
                return ExitStatus.STOPPED
            case JobStatus.FAILED:
                was_lost = self.error and not any(part in self.error for part in _STARTUP_ERRORS)
                return ExitStatus.OUTAGE if was_lost else ExitStatus.FAILED
        return ExitStatus.DONE

    def describe(self) -> str:
        """Return id, status, duration and run in one line."""
        duration = "" if self.seconds is None else f" after {format_duration(self.seconds)}"
        run = self.metadata.get("m2f_run")
        return f"{self.job_id}  {self.status}{duration}" + ("" if run is None else f"  {run}")


class JobClient:
    """Client for the jobs of one cluster, through its dashboard (`http://HEAD:8265`).

    Raises:
        JobError: the dashboard does not answer, or the token is missing or wrong. All methods also raise it.
    """

    def __init__(self, address: str | None) -> None:
        self.address = _resolve_address(address)
        self._last_contact = time.monotonic()
        quiet_job_client()
        with _convert_errors(self.address):
            require_listening(self.address)
            self._client = JobSubmissionClient(self.address)
            version = server_ray_version(self._client)
        if version != ray.__version__:
            print_err(f"the cluster has Ray {version}, but this machine has {ray.__version__}")

    def jobs(self) -> list[JobInfo]:
        """Return all jobs that were submitted through the Jobs API."""
        with _convert_errors(self.address):
            jobs: list[Any] = self._client.list_jobs()
        return [_job_info(job) for job in jobs if job.submission_id is not None]

    def job(self, job_id: str) -> JobInfo:
        """Return the state of a job. Raises JobError if the cluster does not know the id."""
        with _convert_errors(self.address):
            return _job_info(self._client.get_job_info(job_id))

    def submit(self, job: JobRequest) -> bool:
        """Submit a job. Return False if its id already exists, because another process has submitted it."""
        with _convert_errors(self.address):
            try:
                self._client.submit_job(
                    entrypoint=job.command,
                    submission_id=job.job_id,
                    runtime_env={"working_dir": str(job.archive), "env_vars": dict(job.env)},
                    metadata=dict(job.metadata),
                )
            except RuntimeError:
                if any(known.job_id == job.job_id for known in self.jobs()):
                    return False
                raise
        return True

    def stop(self, job_id: str) -> JobInfo:
        """Ask a job to stop, wait until it has ended, and return its state. A training run saves a checkpoint first."""
        with _convert_errors(self.address):
            self._client.stop_job(job_id)
            while not (job := self.job(job_id)).has_ended:
                time.sleep(POLL_S)
        return job

    def follow(self, job_id: str) -> int:
        """Print the output of a job until it ends, and return its exit status.

        Ctrl-C stops only the printing and returns 130. The dashboard may be unavailable for `DASHBOARD_TIMEOUT_S`.
        """
        printed, self._last_contact = 0, time.monotonic()
        try:
            while True:
                printed = asyncio.run(self._print_log(job_id, printed))
                job = self._poll(job_id)
                if job is not None and job.has_ended:
                    break
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            print_err(f"\ndetached; {job_id} keeps running; use `m2f submit --stop {job_id}` to stop it")
            return ExitStatus.INTERRUPTED
        print_out(job.describe())
        if job.status == JobStatus.FAILED and job.exit_code is None:  # the command never ran, or was lost with its node
            print_err(job.message)
        return job.exit_status

    async def _print_log(self, job_id: str, printed: int) -> int:
        """Print the log after its first `printed` characters until the connection ends; return its printed length."""
        received = 0
        try:
            async for text in self._client.tail_job_logs(job_id):
                new = text[max(0, printed - received) :]
                received += len(text)
                if new:
                    print_out(new.removesuffix("\n"), colors=True)
                self._last_contact = time.monotonic()
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            logging.getLogger(__name__).debug("connection to the log of %s ended: %s", job_id, error)
        return max(printed, received)

    def _poll(self, job_id: str) -> JobInfo | None:
        """Return the job; None while the dashboard does not answer. Raises OutageError after `DASHBOARD_TIMEOUT_S`."""
        try:
            job = self.job(job_id)
        except JobError as error:
            if time.monotonic() - self._last_contact > DASHBOARD_TIMEOUT_S:
                raise OutageError(
                    f"the dashboard has not answered for {DASHBOARD_TIMEOUT_S:g} s ({error}). Submit the run again: it "
                    "follows the job if that still runs, and resumes the run if not"
                ) from error
            return None
        self._last_contact = time.monotonic()
        return job


def _job_info(info: Any) -> JobInfo:
    """Return the state of a job from Ray's JobDetails."""
    start, end = info.start_time, info.end_time
    return JobInfo(
        job_id=info.submission_id or "",
        status=info.status.value,
        message=info.message or "",
        exit_code=info.driver_exit_code,
        seconds=None if start is None else (end or time.time() * 1000) / 1000 - start / 1000,
        metadata=info.metadata or {},
        error=info.error_type or "",
    )


@contextmanager
def _convert_errors(address: str) -> Iterator[None]:
    """Convert errors of Ray, requests and sockets to JobError."""
    try:
        yield
    except AuthenticationError as error:
        raise JobError(
            f"the cluster at {address} requires a different token ({first_line(error.message)}); set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the output of `ray get-auth-token` on its head"
        ) from error
    except (OSError, requests.RequestException) as error:
        raise JobError(
            f"cannot reach a Ray dashboard at {address} ({error}); start the cluster, or forward its port "
            "(`ray dashboard CLUSTER.yaml`, `kubectl port-forward service/NAME-head-svc 8265`)"
        ) from error
    except RuntimeError as error:
        raise JobError(f"the cluster at {address} rejected the request: {first_line(error)}") from error


def _resolve_address(address: str | None) -> str:
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise JobError("no cluster given; use --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    if (problem := url_problem(address)) is not None:
        raise JobError(f"the address of the dashboard {problem}. Remove it, and set RAY_AUTH_TOKEN instead")
    if urlsplit(address).scheme not in ("http", "https"):
        raise JobError(f"{address} is not the address of a dashboard; use http://HEAD:8265")
    return address.rstrip("/")
