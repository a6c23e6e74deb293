"""`m2f config`: print the complete recipe as it would run, or explain its settings."""

from __future__ import annotations

import argparse
import json

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_out
from m2f.cluster.verbs.arguments import add_overrides
from m2f.model.errors import ConfigError

SUMMARY = "print the complete recipe with all defaults, or explain its settings"
EXAMPLE = "m2f config --explain training.optimizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file; not needed with --explain")
    add_overrides(parser)
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="SECTION",
        help="show type, default and meaning of every setting (of SECTION, for example training.optimizer)",
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of recipes, for editors")


def run(args: argparse.Namespace) -> int:
    from m2f.cluster.recipe.explain import explain
    from m2f.cluster.recipe.load import dump_recipe, load_recipe
    from m2f.cluster.recipe.schema import recipe_schema

    if args.explain is not None:
        print_out(explain(args.explain).rstrip())
        return ExitStatus.DONE
    if args.schema:
        print_out(json.dumps(recipe_schema(), indent=1))
        return ExitStatus.DONE
    if args.recipe is None:
        raise ConfigError(
            "no recipe given; use m2f config RECIPE to print one, or m2f config --explain to explain all settings"
        )
    print_out(dump_recipe(load_recipe(args.recipe, args.overrides, for_training=True)).rstrip())
    return ExitStatus.DONE
