"""`m2f doctor`: check whether this machine or a cluster is ready to run m2f, with remedies for problems."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from m2f.cluster.terminal import print_err
from m2f.cluster.verbs.arguments import add_env, add_overrides, enable_token_authentication

if TYPE_CHECKING:
    from m2f.cluster.doctor.finding import Finding
    from m2f.cluster.recipe.config import RunConfig

SUMMARY = "check this machine or a cluster, optionally for a recipe, and suggest remedies"
EXAMPLE = "m2f doctor cells.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="recipe whose requirements are checked, too")
    add_overrides(parser)
    parser.add_argument(
        "--address",
        metavar="URL|ADDRESS",
        help="check every node of a cluster: http://HEAD:8265 submits a job; HEAD:6379 or auto connects from a node",
    )
    add_env(parser)


def run(args: argparse.Namespace) -> int:
    """Run the checks and print the findings. Return exit status 1 if a check failed."""
    enable_token_authentication()
    from m2f.cluster.recipe.load import load_recipe

    config = None if args.recipe is None else load_recipe(args.recipe, args.overrides)
    print_err(f"checking {'this machine' if args.address is None else f'the cluster at {args.address}'}")
    if args.address is not None and args.address.startswith(("http://", "https://")):
        return _check_in_job(config, args)
    from m2f.cluster.doctor.doctor import driver_checks, exit_status, machine_checks, print_findings, run_checks

    if args.address is None:
        findings = run_checks([*machine_checks(config), *driver_checks(config)])
    else:
        findings = _check_on_cluster(config, args.address)
    print_findings(findings)
    return exit_status(findings)


def _check_on_cluster(config: RunConfig | None, address: str) -> list[Finding]:
    from m2f.cluster.doctor.cluster_checks import CLUSTER, check_cluster
    from m2f.cluster.doctor.doctor import driver_checks, run_checks
    from m2f.cluster.ray_cluster import existing_or_local_cluster
    from m2f.cluster.ray_private import dashboard_url
    from m2f.cluster.recipe.config import ClusterConfig

    with existing_or_local_cluster(ClusterConfig(address=address), num_cpus=0):
        checks = driver_checks(config, dashboard_url())
        return [*check_cluster(config), *run_checks(checks, where=CLUSTER)]


def _check_in_job(config: RunConfig | None, args: argparse.Namespace) -> int:
    """Run the checks in a job on the cluster, with the code of this machine; return its exit status."""
    from m2f.cluster.submit.environment import job_environment
    from m2f.cluster.submit.ray_jobs import JobClient
    from m2f.cluster.submit.submit import submit_doctor

    client = JobClient(args.address)
    return client.follow(submit_doctor(client, config, job_environment(args.env, config)))
