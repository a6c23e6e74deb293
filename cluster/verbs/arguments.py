"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from m2f.cluster.terminal import first_lines
from m2f.model.errors import ConfigError

OVERRIDE = "section.key=value"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a name as coco_panoptic_r50+cross_attention")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDE, help="settings that differ from the recipe")


def add_recipe_and_names(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    """The recipe, names or paths, and overrides, in any order after the recipe."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a name as coco_panoptic_r50+cross_attention")
    parser.add_argument("words", nargs="*", metavar=metavar, help=f"{what}; {OVERRIDE} changes a setting")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="STEP|best|last|PATH",
        help="step of a checkpoint of the run, its best or last one, or a checkpoint folder or file of weights; "
        "default: the last one",
    )


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Which trained model, for `m2f.cluster.predict.trained_model.open_trained`."""
    parser.add_argument(
        "source",
        metavar="RECIPE|FOLDER",
        help="YAML file of a run, folder of a run or checkpoint, or Hugging Face folder",
    )


def count(text: str) -> int:
    """For `type=`: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {number}; it must be at least 1")
    return number


def list_faults(faults: Sequence[object], report: str | None) -> list[str]:
    """Lines for the first faults; the others are in the file that `--report` names."""
    return first_lines(faults, 20, f" in {report}" if report else "; --report FILE")


def use_token() -> None:
    """Called before Ray is imported, which reads its settings then: a token that is given is meant to be used."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names or paths, and overrides: words with `=` that are no existing file or folder."""
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    return [word for word in words if word not in overrides], overrides


def choose_datasets(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """The wanted data sets, all for none. Raises ConfigError for an unknown one."""
    for name in wanted:
        if name not in known:
            raise ConfigError(f"no data set {name!r} under `datasets` (known: {', '.join(known)})")
    return list(wanted or known)
