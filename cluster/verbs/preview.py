"""`m2f preview`: draw a contact sheet of images and annotations from the shards."""

from __future__ import annotations

import argparse

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_out
from m2f.cluster.verbs.arguments import add_recipe_and_names, choose_datasets, count, split_overrides
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count

SUMMARY = "draw a contact sheet of images and annotations from the shards"
EXAMPLE = "m2f preview cells.yaml train --images 20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_and_names(parser, "DATASET", "name under `datasets` (default: the first)")
    parser.add_argument("--output", default="sheet.png", metavar="FILE", help="PNG file or URL (default: sheet.png)")
    parser.add_argument(
        "--images", type=count, default=12, metavar="N", help="number of images, evenly spaced (default: 12)"
    )


def run(args: argparse.Namespace) -> int:
    from m2f.cluster.recipe.load import load_recipe
    from m2f.data_pipeline.categories import drawn_name
    from m2f.data_pipeline.shards.manifest import Manifest
    from m2f.data_pipeline.shards.preview import spread_indices, write_contact_sheet
    from m2f.data_pipeline.storage.storage import Storage

    names, overrides = split_overrides(args.words)
    config = load_recipe(args.recipe, overrides)
    if len(names) > 1:
        raise ConfigError(f"preview takes one data set, not {len(names)}: {', '.join(names)}")
    name = choose_datasets(names, list(config.datasets))[0]
    storage = Storage(config.storage)
    manifest = Manifest.load(config.datasets[name].shards, storage)
    indices = spread_indices(manifest, args.images)
    write_contact_sheet(manifest, indices, storage, args.output)
    print_out(f"{args.output}: {len(indices)} of {format_count(manifest.num_samples, 'image')} of {name}")
    replaced = {drawn_name(c): c.name for c in manifest.categories.categories if drawn_name(c) != c.name}
    for drawn, original in replaced.items():
        print_out(f"{drawn!r} on the sheet is the class {original!r}")
    return ExitStatus.DONE
