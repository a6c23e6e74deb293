"""`m2f compare`: differences between runs in metrics, recipes, classes, curves and speed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.output_file import check_output, write_output
from m2f.model.errors import UserError
from m2f.model.format_count import format_count

if TYPE_CHECKING:
    from pathlib import Path

    from m2f.cluster.compare.compare import Comparison

SUMMARY = "compare runs: metrics, recipes, classes, curves and speed"
EXAMPLE = "m2f compare runs/cells runs/wider --output compare.html"
FORMAT_BY_SUFFIX = {".md": "markdown", ".html": "html", ".htm": "html", ".json": "json", ".txt": "text"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="run folder, or id or name of an MLflow run; the first is the baseline"
    )
    parser.add_argument(
        "--experiment", metavar="NAME", help="MLflow experiment; without RUN, all its runs, newest first"
    )
    parser.add_argument(
        "--filter", metavar="F", help="MLflow search filter, for example: params.seed = '0' and metrics.\"val/PQ\" > 50"
    )
    parser.add_argument("--tracking", metavar="URI", help="MLflow server (default: MLFLOW_TRACKING_URI)")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="M",
        help="metric to compare, for example PQ, val/PQ or train/loss/total; repeatable",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="step of the evaluations (default: the newest of each run)"
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=1000,
        metavar="N",
        help="bootstrap samples for intervals, at least 40; 0: no intervals over images (default: 1000)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "markdown", "html", "json"),
        help="output format (default: that of the extension of --output, otherwise text)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="file to write; for Markdown, the curves are written beside it as .svg"
    )


def run(args: argparse.Namespace) -> int:
    """Print the comparison, or write it to the file given by `--output`."""
    print_err("comparing runs: loading MLflow")
    from pathlib import Path

    from m2f.cluster.compare.compare import compare_runs
    from m2f.cluster.compare.errors import CompareError
    from m2f.cluster.compare.intervals import MIN_DRAWS
    from m2f.cluster.compare.records import read_runs

    output = None if args.output is None else Path(args.output)
    if output is not None:
        check_output("--output", output, creates_folder=True)
    output_format = args.format or FORMAT_BY_SUFFIX.get(Path(args.output or "").suffix.lower(), "text")
    if args.draws != 0 and args.draws < MIN_DRAWS:
        raise CompareError(
            f"--draws is {args.draws}; it must be at least {MIN_DRAWS}, or 0 for no intervals over images"
        )
    runs = read_runs(args.runs, tracking=args.tracking, experiment=args.experiment, query=args.filter, step=args.step)
    comparison = compare_runs(runs, args.metric, args.step, args.draws)
    if output is None:
        print_out(_render(comparison, output_format, None).rstrip("\n"))
        return ExitStatus.DONE
    try:
        write_output("--output", output, _render(comparison, output_format, output))
    except UserError:
        print_out(_render(comparison, "text", None).rstrip("\n"))  # so that a full disk does not lose it
        raise
    print_out(f"{output}: {format_count(len(runs), 'run')}")
    return ExitStatus.DONE


def _render(comparison: Comparison, output_format: str, output: Path | None) -> str:
    from m2f.cluster.compare.page import as_page
    from m2f.cluster.compare.report import as_json, as_markdown, as_text

    match output_format:
        case "html":
            return as_page(comparison)
        case "json":
            return as_json(comparison)
        case "markdown":
            return as_markdown(comparison, _write_curves(comparison, output) if output is not None else None)
        case _:
            return as_text(comparison)


def _write_curves(comparison: Comparison, output: Path) -> str | None:
    """Write the curves as an SVG file beside a Markdown file, and return its name; None if there are no curves."""
    from m2f.cluster.compare.page import plot_svg
    from m2f.eval.report.charts import stack_charts

    if not comparison.plots:
        return None
    picture = output.with_name(f"{output.stem}_curves.svg")
    write_output("--output", picture, stack_charts([plot_svg(plot, comparison) for plot in comparison.plots]))
    return picture.name
