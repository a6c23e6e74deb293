"""`m2f demo`: the whole workflow on synthetic data."""

from __future__ import annotations

import argparse

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err
from m2f.cluster.verbs.arguments import add_overrides

SUMMARY = "run the whole workflow on synthetic data, in minutes on a laptop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs", metavar="DIR", help="output folder (default runs)")
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo. Return exit status 1 if the run failed."""
    print_err(f"demo below {args.output}: loading PyTorch, Ray and MLflow")
    from m2f.cluster.demo import run_demo

    return ExitStatus.FAILED if run_demo(args.output, args.overrides).status == "failed" else ExitStatus.DONE
