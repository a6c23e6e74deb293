"""`m2f register`: register a checkpoint in MLflow, with everything that is needed to serve it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import add_overrides
from m2f.model.errors import ConfigError

SUMMARY = "register a checkpoint in MLflow, with everything needed to serve it"
EXAMPLE = "m2f register runs/cells --alias champion"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or URL, or recipe of the run")
    add_overrides(parser)
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="STEP|best|last",
        help="step of a checkpoint, or best or last checkpoint of the run (default: best); it is pinned, so that it is "
        "never deleted",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the registered model (default: the run's name)")
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="ALIAS",
        help="alias for the new version, for example champion; repeatable",
    )
    parser.add_argument(
        "--if-better",
        metavar="ALIAS",
        help="register only if the model is better than the version with this alias on the same images (95 %% interval "
        "of the paired difference above 0), and move the alias; otherwise exit status 1",
    )
    parser.add_argument("--set", metavar="SET", help="evaluation set for the comparison (default: the recipe's first)")
    parser.add_argument(
        "--metric", choices=("PQ", "AP", "mIoU"), help="metric for the comparison (default: the first that both have)"
    )
    parser.add_argument(
        "--precision",
        type=float,
        metavar="P",
        help="precision, above 0 and at most 1: store with the model, for every thing class, the lowest score "
        "threshold that reaches it on SET",
    )
    parser.add_argument(
        "--allow-url",
        action="append",
        default=[],
        metavar="HOST",
        help="allow the served model to fetch images from this host; repeatable (default: no hosts)",
    )


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise ConfigError if a value is not HOST or HOST:PORT, because such a value would never match a URL's host."""
    for value in hosts:
        if not value or any(c in "/@" or c.isspace() for c in value):
            host = value.strip().rpartition("://")[2].partition("/")[0].rpartition("@")[2]
            advice = (
                f"--allow-url {host}" if host and not any(c.isspace() for c in host) else "a host such as host.example"
            )
            raise ConfigError(f"--allow-url takes a host, or HOST:PORT, and not a URL; give {advice}")


def run(args: argparse.Namespace) -> int:
    """Register the checkpoint. Return exit status 1 if `--if-better` is given and the checkpoint is not better."""
    print_err(f"{args.run}: loading PyTorch and MLflow")
    from m2f.cluster.registry.register import RegisterOptions, register

    if not args.alias and not args.if_better and not args.name:
        raise ConfigError(
            "give --alias (for example --alias champion), --if-better or --name, so that the model can be found"
        )
    check_hosts(args.allow_url)
    outcome = register(
        RegisterOptions(
            source=args.run,
            overrides=tuple(args.overrides),
            checkpoint=args.checkpoint,
            name=args.name,
            aliases=tuple(args.alias),
            if_better=args.if_better,
            dataset=args.set,
            metric=args.metric,
            precision=args.precision,
            allowed_hosts=tuple(args.allow_url),
        ),
        print_err,
    )
    if outcome.verdict is not None:
        print_out(str(outcome.verdict))
    if outcome.version is None:
        print_err(f"step {outcome.step} is not better than {outcome.name}@{args.if_better}, so it is not registered")
        return ExitStatus.FAILED
    for name, class_threshold in (outcome.thresholds.classes if outcome.thresholds else {}).items():
        if class_threshold.threshold is None:
            print_out(f"{name}: no threshold reaches the precision, so all detections of this class are rejected")
        else:
            print_out(
                f"{name}: {class_threshold.threshold:.3f} (precision {class_threshold.precision:.3f}, "
                f"recall {class_threshold.recall or 0:.3f})"
            )
    state = "registered" if outcome.uploaded else "registered (already uploaded)"
    print_out(f"step {outcome.step} {state}: {outcome.name}, version {outcome.version}, in {outcome.store}")
    alias = (args.alias or [args.if_better])[0]
    address = f"models:/{outcome.name}@{alias}" if alias else f"models:/{outcome.name}/{outcome.version}"
    print_out(f"serve it: MLFLOW_TRACKING_URI={outcome.store} mlflow models serve --env-manager local -m {address}")
    return ExitStatus.DONE
