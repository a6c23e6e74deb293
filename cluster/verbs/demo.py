"""`m2f demo`: the whole workflow on synthetic data."""

from __future__ import annotations

import argparse

from m2f.cluster.terminal import print_err
from m2f.cluster.verbs.arguments import add_overrides
from m2f.cluster.verbs.train import EXIT_STATUS

SUMMARY = "run the whole workflow on synthetic data, in minutes on a laptop"
EXAMPLE = "m2f demo --output runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs", metavar="DIR", help="output folder (default: runs)")
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo, and return the exit status of `m2f train`."""
    print_err(f"demo below {args.output}: loading PyTorch, Ray and MLflow")
    from m2f.cluster.demo import run_demo

    return EXIT_STATUS[run_demo(args.output, args.overrides).status]
