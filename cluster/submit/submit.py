"""A training run as a Ray job: its upload, command, environment and id.

The name of a job follows from its run folder, so a second `m2f submit` of the same run finds the first one's job.
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


@dataclass(frozen=True)
class ChosenJob:
    """The job that trains a run."""

    job_id: str
    is_new: bool
    """False where the cluster has it already."""


def submit_training(
    client: JobClient, config: RunConfig, env: Mapping[str, str], shared: Sequence[str] = (), installed: bool = False
) -> ChosenJob:
    """Send a run to a cluster, or find its active job there.

    Args:
        client: the cluster.
        config: recipe with absolute paths.
        env: environment variables of the job; see `environment.job_environment`.
        shared: folders that all nodes mount at the same place.
        installed: the cluster has m2f; only the recipe is sent.

    Raises:
        ConfigError: the recipe cannot work on another machine, or a job with other settings trains in its run folder.
        UploadError: too much to send.
        JobError: the cluster refuses.
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
    """Send `m2f doctor` for all nodes of a cluster; the id of its job."""
    recipe = None if config is None else dump_recipe(replace(config, cluster=replace(config.cluster, address=None)))
    command = ["python", "-m", "m2f.cluster.cli", "doctor", *(() if recipe is None else (RECIPE,)), "--address", "auto"]
    job_id = f"m2f-doctor-{secrets.token_hex(4)}"
    env = {**env, "COLUMNS": str(shutil.get_terminal_size().columns)}  # its table is read on this terminal
    with ScratchFolder("submit") as folder:
        client.submit(JobRequest(job_id, shlex.join(command), pack(folder, recipe), env, metadata={}))
    return job_id


def job_name(config: RunConfig) -> str:
    """First part of the ids of a run's jobs; `-1`, `-2` ... follow, as Ray takes no id twice."""
    return f"m2f-{config.name.replace('.', '-')}-{run_digest(config)}"


def run_digest(config: RunConfig) -> str:
    """Digest of the run folder, eight characters."""
    return hashlib.sha256(config.run_folder.encode()).hexdigest()[:_DIGEST_LENGTH]


def choose_job(config: RunConfig, digest: str, jobs: Iterable[JobInfo]) -> ChosenJob:
    """The active job of this run, else a new one with the next free id.

    Raises ConfigError where the active job has another recipe.
    """
    earlier = jobs_of(config, jobs)
    for job in earlier:
        if job.ended:
            continue
        if job.metadata.get("m2f_recipe") != digest:
            raise ConfigError(
                f"the job {job.job_id} trains in {config.run_folder} with other settings; give `name` another value, "
                f"or end it with `m2f submit --stop {job.job_id}`"
            )
        return ChosenJob(job.job_id, is_new=False)
    number = max((_number(job) for job in earlier), default=0) + 1
    return ChosenJob(f"{job_name(config)}-{number}", is_new=True)


def jobs_of(config: RunConfig, jobs: Iterable[JobInfo]) -> list[JobInfo]:
    """Jobs of this run, the newest last."""
    pattern = re.compile(re.escape(job_name(config)) + r"-\d+")
    return sorted((job for job in jobs if pattern.fullmatch(job.job_id)), key=_number)


def _number(job: JobInfo) -> int:
    return int(job.job_id.rpartition("-")[2])


def bind_to_cluster(config: RunConfig, shared: Sequence[str] = ()) -> RunConfig:
    """The recipe as its job gets it: without `cluster.address`, as the job runs on the cluster.

    Raises ConfigError for every path that exists only here; `shared` names folders that all nodes have.
    """
    problems = [
        f"{setting} is {path}, which is a path of this machine; use s3://, or pass `--shared FOLDER` where all nodes "
        "of the cluster mount it"
        for setting, path in _paths(config).items()
        if "://" not in path and not any(Path(path).is_relative_to(folder) for folder in shared)
    ]
    uri = config.tracking.uri or ""
    if uri and is_local_tracking(uri):
        problems.append(f"tracking.uri is {uri}, which only one machine can open; name a tracking server, http://...")
    if problems:
        raise ConfigError("the recipe cannot run on a cluster\n  " + "\n  ".join(problems))
    for setting, url in (("storage.endpoint_url", config.storage.endpoint_url), ("tracking.uri", uri)):
        if url and urlsplit(url).hostname in _LOOPBACK:
            print_err(f"{setting} is {url}: every node looks for it on itself")
    return replace(config, cluster=replace(config.cluster, address=None))


def _paths(config: RunConfig) -> dict[str, str]:
    """What training and evaluation read and write for the whole run, by setting. Caches belong to each machine."""
    used = [item.dataset for item in config.data.train] + [item.dataset for item in config.evaluation.sets]
    paths = {"output": config.output}
    paths |= {f"datasets.{name}.shards": config.datasets[name].shards for name in used}
    weights = {"model.weights": config.model.weights, "model.backbone.weights": config.model.backbone.weights}
    return paths | {setting: path for setting, path in weights.items() if path is not None and is_path(path)}
