"""`m2f stats`: statistics of sharded data sets, from their manifests only."""

from __future__ import annotations

import argparse

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import add_recipe_and_names, choose_datasets, split_overrides
from m2f.model.format_count import format_count

SUMMARY = "show images, segments and pixels by class of sharded data sets"
EXAMPLE = "m2f stats cells.yaml train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_and_names(parser, "DATASET", "names under `datasets` (default: all)")


def run(args: argparse.Namespace) -> int:
    from m2f.cluster.recipe.load import load_recipe
    from m2f.data_pipeline.shards.manifest import Manifest
    from m2f.data_pipeline.shards.stats import class_table, format_class_table, pixels_note
    from m2f.data_pipeline.shards.warnings import data_warnings
    from m2f.data_pipeline.storage.storage import Storage

    names, overrides = split_overrides(args.words)
    config = load_recipe(args.recipe, overrides)
    storage = Storage(config.storage)
    for name in choose_datasets(names, list(config.datasets)):
        manifest = Manifest.load(config.datasets[name].shards, storage)
        size = sum(shard.size for shard in manifest.shards) / 1e6
        print_out(
            f"{name}: {format_count(manifest.num_samples, 'image')} in {format_count(len(manifest.shards), 'shard')}, "
            f"{size:,.1f} MB, {manifest.url}"
        )
        print_out(format_class_table(class_table(manifest)) + "\n")
        if note := pixels_note(manifest):
            print_err(f"{name}: {note}")
        for warning in data_warnings(name, manifest, config.data.task, config.model):
            print_err(warning)
    return ExitStatus.DONE
