"""`m2f submit`: train a recipe on a Ray cluster as a job, or on Kubernetes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import add_env, add_overrides, enable_token_authentication
from m2f.model.errors import ConfigError

if TYPE_CHECKING:
    from m2f.cluster.submit.ray_jobs import JobClient, JobInfo

SUMMARY = "train a recipe on a Ray cluster or on Kubernetes; a second call follows the running job"
EXAMPLE = "m2f submit cells.yaml --address http://HEAD:8265"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE|ID", help="recipe; --stop and --status also accept the id of a job")
    add_overrides(parser)
    parser.add_argument(
        "--address", metavar="URL", help="dashboard of the cluster, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)"
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--detach", action="store_true", help="return after submitting the job (default: follow its output)"
    )
    actions.add_argument("--stop", action="store_true", help="stop the run's job after it has saved a checkpoint")
    actions.add_argument("--status", action="store_true", help="show the status of the run's jobs")
    actions.add_argument(
        "--kuberay",
        metavar="TEMPLATE",
        nargs="?",
        const="",
        help="write a RayJob for Kubernetes from a template such as cluster/cloud/kuberay.yaml",
    )
    parser.add_argument("--output", metavar="FILE", help="with --kuberay: output file (default: standard output)")
    parser.add_argument("--apply", action="store_true", help="with --kuberay: apply the RayJob with kubectl")
    add_env(parser)
    parser.add_argument(
        "--shared",
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder that all nodes mount at the same path; repeatable",
    )
    parser.add_argument(
        "--installed", action="store_true", help="m2f is installed on the nodes: upload only the recipe"
    )


def run(args: argparse.Namespace) -> int:
    """Submit, follow, stop or show a job, or write a RayJob.

    Returns the exit status of a job that is followed, or 130 if Ctrl-C detaches from it.
    """
    if args.kuberay is not None:
        return _write_ray_job(args)
    if args.output is not None or args.apply:
        raise ConfigError(
            "--output and --apply require --kuberay TEMPLATE; without it, the run is submitted to a Ray cluster"
        )
    enable_token_authentication()
    print_err("connecting to the cluster")
    from m2f.cluster.submit.ray_jobs import JobClient

    if args.stop or args.status:
        return _stop_or_show(JobClient(args.address), args)
    from m2f.cluster.recipe.load import load_recipe
    from m2f.cluster.submit.environment import job_environment
    from m2f.cluster.submit.submit import submit_training

    config = load_recipe(args.recipe, args.overrides)
    client = JobClient(args.address)
    env = job_environment(args.env, config)
    job = submit_training(client, config, env, args.shared, args.installed)
    print_out(f"{'submitted' if job.is_new else 'the run already has a job'}: {job.job_id} on {client.address}")
    return ExitStatus.DONE if args.detach else client.follow(job.job_id)


def _stop_or_show(client: JobClient, args: argparse.Namespace) -> int:
    """Carry out `--stop` or `--status`. Return exit status 1 if there is no job or the last job failed."""
    jobs = _find_jobs(client, args)
    if not jobs:
        print_err("the cluster has no job of this run")
        return ExitStatus.FAILED
    if args.stop:
        jobs = [job if job.has_ended else client.stop(job.job_id) for job in jobs[-1:]]
    for job in jobs:
        print_out(job.describe())
        if job.status == "FAILED":
            print_err(f"  {job.message}")
    return ExitStatus.FAILED if jobs[-1].status == "FAILED" else ExitStatus.DONE


def _find_jobs(client: JobClient, args: argparse.Namespace) -> list[JobInfo]:
    """Return the job with the given id, or all jobs of a recipe's run."""
    from m2f.cluster.recipe.load import load_recipe
    from m2f.cluster.submit.submit import jobs_of_run

    jobs = client.jobs()
    if named := [job for job in jobs if job.job_id == args.recipe]:
        return named
    try:
        config = load_recipe(args.recipe, args.overrides)
    except ConfigError as error:
        raise ConfigError(f"{client.address} has no job {args.recipe}, and it is not a recipe: {error}") from error
    return jobs_of_run(config, jobs)


def _write_ray_job(args: argparse.Namespace) -> int:
    """Carry out `--kuberay`: write or apply a RayJob."""
    if not args.kuberay:
        raise ConfigError(
            "--kuberay needs a TEMPLATE: copy cluster/cloud/kuberay.yaml, set your image and service account in the "
            "copy, and give its path"
        )
    from m2f.cluster.recipe.load import load_recipe
    from m2f.cluster.submit.environment import job_environment
    from m2f.cluster.submit.kuberay import kubectl_apply, ray_job_yaml
    from m2f.cluster.submit.submit import bind_to_cluster

    config = bind_to_cluster(load_recipe(args.recipe, args.overrides), args.shared)
    text = ray_job_yaml(config, Path(args.kuberay), job_environment(args.env, config))
    if args.output is not None:
        Path(args.output).write_text(text, encoding="utf-8")
    if args.apply:
        kubectl_apply(text)
    elif args.output is None:
        print_out(text)
    return ExitStatus.DONE
