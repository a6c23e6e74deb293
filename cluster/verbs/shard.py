"""`m2f shard`: write raw data sets as shards with a manifest."""

from __future__ import annotations

import argparse

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import add_recipe_and_names, choose_datasets, split_overrides
from m2f.model.errors import ConfigError, UserError

SUMMARY = "write raw data sets as shards; resumes after an interruption and rewrites shards of changed files"
EXAMPLE = "m2f shard cells.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_recipe_and_names(parser, "DATASET", "names under `datasets` (default: all that have a source)")
    parser.add_argument("--skip-bad", action="store_true", help="skip invalid annotations and samples")
    parser.add_argument("--redo", action="store_true", help="delete existing shards and write all shards again")
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="if a shard or data set fails, write the others and list all failures at the end",
    )


def run(args: argparse.Namespace) -> int:
    """Write the data sets one after another. Ray starts at most once, and only if there is enough work."""
    from contextlib import ExitStack

    from m2f.cluster.recipe.load import load_recipe

    names, overrides = split_overrides(args.words)
    config = load_recipe(args.recipe, overrides)
    with_source = [name for name, dataset in config.datasets.items() if dataset.source is not None]
    chosen = choose_datasets(names, list(config.datasets)) if names else with_source
    if not chosen:
        first = next(iter(config.datasets))
        raise ConfigError(f"no data set of {args.recipe} has a source; set datasets.{first}.source")
    print_err(f"sharding {', '.join(chosen)}: opening the source")
    from m2f.cluster.sharding.job import run_shard_job
    from m2f.data_pipeline.errors import DataError
    from m2f.data_pipeline.shards.manifest import Manifest
    from m2f.data_pipeline.shards.warnings import data_warnings
    from m2f.data_pipeline.storage.storage import Storage

    storage = Storage(config.storage)
    with ExitStack() as stack:
        failed = []
        for name in chosen:
            options = {"skip_bad": args.skip_bad, "keep_going": args.keep_going, "redo": args.redo, "ray_stack": stack}
            try:
                print_out(run_shard_job(name, config.datasets[name], config.cluster, storage, **options).summary())
            except UserError as error:
                if not args.keep_going:
                    raise
                failed.append(f"{name}: {error}")
                continue
            manifest = Manifest.load(config.datasets[name].shards, storage)
            for warning in data_warnings(name, manifest, config.data.task, config.model):
                print_err(warning)
    if failed:
        raise DataError(f"{len(failed)} of {len(chosen)} data sets are incomplete\n" + "\n".join(failed))
    return ExitStatus.DONE
