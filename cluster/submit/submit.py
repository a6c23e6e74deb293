"""Submit a training run as a Ray job: its upload, command, environment and id.

The id of a job is derived from the run folder, so a second `m2f submit` of the same run finds the existing job.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import dump_recipe
from m2f.cluster.submit.environment import is_local_tracking
from m2f.cluster.submit.ray_jobs import JobClient, JobInfo, JobRequest
from m2f.cluster.submit.upload import RECIPE, pack
from m2f.cluster.terminal import print_err
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.model.errors import ConfigError
from m2f.model.weights.sources import is_path

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DIGEST_LENGTH = 8
"""Hex digits of a run's digest. 32 bits distinguish the runs of one name, and ids of jobs stay readable."""


@dataclass(frozen=True)
class ChosenJob:
    """The job that trains a run."""

    job_id: str
    is_new: bool
    """Whether the job is new; False if the cluster already has it."""


def submit_training(
    client: JobClient, config: RunConfig, env: Mapping[str, str], shared: Sequence[str] = (), installed: bool = False
) -> ChosenJob:
    """Submit a run to a cluster, or find its active job there.

    Args:
        client: client of the cluster.
        config: recipe with absolute paths.
        env: environment variables of the job; see `environment.job_environment`.
        shared: folders that all nodes mount at the same path.
        installed: whether m2f is installed on the cluster, so that only the recipe is sent.

    Raises:
        ConfigError: the recipe cannot run on another machine, or a job with different settings trains in its run
            folder.
        UploadError: the upload is too large.
        JobError: the cluster refuses the job.
    """
    config = bind_to_cluster(config, shared)
    recipe = dump_recipe(config)
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    chosen = choose_job(config, digest, client.jobs())
    if not chosen.is_new:
        return chosen
    command = ["m2f"] if installed else ["python", "-m", "m2f.cluster.cli"]
    with ScratchFolder("submit") as folder:
        request = JobRequest(
            job_id=chosen.job_id,
            command=shlex.join([*command, "train", RECIPE, "--restart"]),
            archive=pack(folder, recipe, code=not installed),
            env=env,
            metadata={"m2f_run": config.run_folder, "m2f_recipe": digest},
        )
        return ChosenJob(chosen.job_id, is_new=client.submit(request))


def submit_doctor(client: JobClient, config: RunConfig | None, env: Mapping[str, str]) -> str:
    """Submit `m2f doctor` for all nodes of a cluster, and return the id of its job."""
    recipe = None if config is None else dump_recipe(replace(config, cluster=replace(config.cluster, address=None)))
    command = ["python", "-m", "m2f.cluster.cli", "doctor", *(() if recipe is None else (RECIPE,)), "--address", "auto"]
    job_id = f"m2f-doctor-{secrets.token_hex(4)}"
    env = {**env, "COLUMNS": str(shutil.get_terminal_size().columns)}  # the job's table is shown on this terminal
    with ScratchFolder("submit") as folder:
        client.submit(JobRequest(job_id, shlex.join(command), pack(folder, recipe), env, metadata={}))
    return job_id


def job_name(config: RunConfig) -> str:
    """Return the prefix of the ids of a run's jobs. `-1`, `-2`, ... follows, because Ray accepts each id only once."""
    return f"m2f-{config.name.replace('.', '-')}-{run_digest(config)}"


def run_digest(config: RunConfig) -> str:
    """Return the first eight hex digits of the SHA-256 of the run folder."""
    return hashlib.sha256(config.run_folder.encode()).hexdigest()[:_DIGEST_LENGTH]


def choose_job(config: RunConfig, digest: str, jobs: Iterable[JobInfo]) -> ChosenJob:
    """Return the active job of this run, or a new one with the next free id.

    Raises ConfigError if the active job has a different recipe.
    """
    jobs_of_this_run = jobs_of_run(config, jobs)
    for job in jobs_of_this_run:
        if job.has_ended:
            continue
        if job.metadata.get("m2f_recipe") != digest:
            raise ConfigError(
                f"the job {job.job_id} is training in {config.run_folder} with different settings; change `name`, or "
                f"stop the job with `m2f submit --stop {job.job_id}`"
            )
        return ChosenJob(job.job_id, is_new=False)
    number = max((_job_number(job) for job in jobs_of_this_run), default=0) + 1
    return ChosenJob(f"{job_name(config)}-{number}", is_new=True)


def jobs_of_run(config: RunConfig, jobs: Iterable[JobInfo]) -> list[JobInfo]:
    """Return the jobs of this run, newest last."""
    pattern = re.compile(re.escape(job_name(config)) + r"-\d+")
    return sorted((job for job in jobs if pattern.fullmatch(job.job_id)), key=_job_number)


def _job_number(job: JobInfo) -> int:
    return int(job.job_id.rpartition("-")[2])


def bind_to_cluster(config: RunConfig, shared: Sequence[str] = ()) -> RunConfig:
    """Return the recipe for a job on the cluster, without `cluster.address`.

    Prints a warning for URLs of the loopback interface. Raises ConfigError if a path is local and outside the `shared`
    folders, which all nodes must mount, if the tracking URI is local, or if a metric in `training` belongs to no set.
    """
    config.check_metrics()
    problems = [
        f"{setting} is {path}, which is a local path; use s3://, or give `--shared FOLDER` if all nodes of the "
        "cluster mount it"
        for setting, path in _data_paths(config).items()
        if "://" not in path and not any(Path(path).is_relative_to(folder) for folder in shared)
    ]
    uri = config.tracking.uri or ""
    if uri and is_local_tracking(uri):
        problems.append(f"tracking.uri is {uri}, which only one machine can open; use a tracking server, http://...")
    if problems:
        raise ConfigError("the recipe cannot run on a cluster\n  " + "\n  ".join(problems))
    for setting, url in (("storage.endpoint_url", config.storage.endpoint_url), ("tracking.uri", uri)):
        if url and urlsplit(url).hostname in _LOOPBACK:
            print_err(f"{setting} is {url}: on every node, this address refers to the node itself")
    return replace(config, cluster=replace(config.cluster, address=None))


def _data_paths(config: RunConfig) -> dict[str, str]:
    """Return the paths that a run reads and writes, by setting. Caches are omitted: each machine has its own."""
    used = [item.dataset for item in config.data.train] + [item.dataset for item in config.evaluation.sets]
    paths = {"output": config.output}
    paths |= {f"datasets.{name}.shards": config.datasets[name].shards for name in used}
    weights = {"model.weights": config.model.weights, "model.backbone.weights": config.model.backbone.weights}
    return paths | {setting: path for setting, path in weights.items() if path is not None and is_path(path)}
