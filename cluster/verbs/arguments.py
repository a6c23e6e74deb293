"""Arguments shared by several verbs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from m2f.cluster.terminal import first_lines
from m2f.model.errors import ConfigError

OVERRIDE = "section.key=value"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the recipe and its overrides."""
    _add_recipe(parser)
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the argument for overrides, which are words `section.key=value`."""
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDE, help="override settings of the recipe")


def add_recipe_and_names(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    """Add arguments for the recipe, followed by names or paths and overrides in any order; `what` is their help."""
    _add_recipe(parser)
    parser.add_argument("words", nargs="*", metavar=metavar, help=f"{what}; {OVERRIDE} overrides a setting")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    help_text = "YAML file, or a name such as coco_panoptic_r50+cross_attention"
    parser.add_argument("recipe", metavar="RECIPE", help=help_text)


def add_env(parser: argparse.ArgumentParser) -> None:
    """Add the option `--env` of verbs that submit jobs, see `m2f.cluster.submit.environment`."""
    help_text = "environment variable of the job (no secrets); repeatable"
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help=help_text)


def add_threads_and_report(parser: argparse.ArgumentParser, what: str) -> None:
    """Add options of verbs that read many files: `--threads`, whose help names what is read, and `--report`."""
    parser.add_argument(
        "--threads", type=count, metavar="N", help=f"{what} to read in parallel (default: number of cores)"
    )
    parser.add_argument("--report", metavar="FILE", help="JSON file or URL for the complete report")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the option `--checkpoint`, see `m2f.cluster.predict.choose_checkpoint`."""
    parser.add_argument(
        "--checkpoint",
        metavar="STEP|best|last|PATH",
        help="step of a checkpoint, best or last checkpoint of the run, checkpoint folder, or weight file "
        "(default: last)",
    )


def add_model_source(parser: argparse.ArgumentParser) -> None:
    """Add the argument for a trained model, for `m2f.cluster.predict.trained_model.open_trained`."""
    parser.add_argument(
        "source",
        type=_model_name,
        metavar="RECIPE|FOLDER",
        help="recipe of a run, run folder, checkpoint folder, weight file, Hugging Face folder, hub:OWNER/NAME, or "
        "models:/NAME@ALIAS",
    )


def _model_name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a recipe or a folder (is a shell variable not set?)")
    return text


def count(text: str) -> int:
    """Parse an integer of at least 1, for argparse's `type`. Raises ArgumentTypeError or ValueError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def format_faults(faults: Sequence[object], report: str | None) -> list[str]:
    """Return lines for the first 20 faults; the others are in the file given by `--report`."""
    return first_lines(faults, 20, f" in {report}" if report else "; use --report FILE to list all")


def enable_token_authentication() -> None:
    """Enable token authentication if a token is set. Call this before Ray is imported and reads its settings."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into names or paths, and overrides.

    An override has `=` without `/` before it, so `s3://box/day=1/` is not an override. Existing files and folders are
    not overrides either.
    """
    overrides = [w for w in words if "=" in w and "/" not in w.partition("=")[0] and not Path(w).exists()]
    return [word for word in words if word not in overrides], overrides


def choose_datasets(requested: Sequence[str], available: Sequence[str]) -> list[str]:
    """Return the requested data sets, or all if none is given. Raises ConfigError for an unknown name."""
    for name in requested:
        if name not in available:
            raise ConfigError(f"no data set {name!r} under `datasets` (known: {', '.join(available)})")
    return list(requested or available)
