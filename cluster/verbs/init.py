"""`m2f init`: write a recipe for a folder of the user's own data."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from m2f.cluster.terminal import print_err, print_out
from m2f.model.errors import ConfigError

SUMMARY = "write a recipe for a folder of images and annotations"
EXAMPLE = "m2f init cells --task instance"


class _FormOption(argparse.Action):
    """Option `--form`, the earlier name of `--format`. It stores the value, and prints which option to use instead."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        print_err("m2f init: --form is now called --format; use --format")
        setattr(namespace, self.dest, values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder with the unpacked export of a labelling tool")
    parser.add_argument(
        "--output", metavar="FILE", help="recipe to write (default: FOLDER's name with .yaml, in the current folder)"
    )
    parser.add_argument("--format", metavar="KIND", help="format of the data, if several match")
    parser.add_argument("--form", dest="format", action=_FormOption, help=argparse.SUPPRESS)
    parser.add_argument(
        "--task",
        choices=("panoptic", "instance", "semantic"),
        help="task of the recipe (default: the task that the format is meant for)",
    )
    parser.add_argument(
        "--val-share",
        type=float,
        default=0.2,
        metavar="X",
        help="share of the images for validation if the data has no split, between 0 and 1 (default: 0.2)",
    )
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="put images whose keys start with the same match into the same split; a key is the file name without its "
        "extension, in which characters other than letters, digits and _ become -",
    )
    parser.add_argument("--tiles", action="store_true", help="cut images of more than 20 megapixels into tiles")
    parser.add_argument("--weights", metavar="FILE|URL|hub:OWNER/NAME", help="trained model to start from")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing recipe")


def run(args: argparse.Namespace) -> int:
    """Write the recipe. A message is printed first, because importing the readers takes some seconds."""
    folder = Path(args.folder)
    print_out(f"inspecting {folder}")
    output = Path(args.output or f"{folder.resolve().name}.yaml")
    if output.exists() and not args.overwrite:
        raise ConfigError(f"{output} exists; choose another file with --output, or replace it with --overwrite")
    if not 0 < args.val_share < 1:
        raise ConfigError(f"--val-share is {args.val_share:g}; it must be between 0 and 1")
    try:
        re.compile(args.group or "")
    except re.error as error:
        raise ConfigError(f"--group is {args.group!r}, which is not a regular expression: {error}") from error

    from m2f.cluster.own_data.init import init

    init(folder.resolve(), output, args)
    return 0
