"""The steps of `m2f init`: detect the format, survey the data, choose settings, write the recipe and load it."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2f.cluster.own_data.choices import choose_settings, detect_machine
from m2f.cluster.own_data.formats import choose_format
from m2f.cluster.own_data.sets import DataFormat
from m2f.cluster.own_data.survey import Survey, survey
from m2f.cluster.own_data.write_recipe import (
    InitOptions,
    build_datasets,
    category_file_path,
    category_text,
    choose_task,
    recipe_text,
)
from m2f.cluster.recipe.load import load_recipe
from m2f.cluster.terminal import print_out
from m2f.data_pipeline.readers import open_dataset
from m2f.data_pipeline.sources import CocoInstancesSource
from m2f.model.config import ModelConfig
from m2f.model.errors import ConfigError
from m2f.model.export.hugging_face import known_labels, read_hugging_face_config
from m2f.model.format_count import format_count
from m2f.model.weights.hub import hub_folder
from m2f.model.weights.sources import HUB


def published_model(weights: str | None) -> ModelConfig | None:
    """Return the model configuration of a Hugging Face folder or a model of the hub; None for other weights.

    Only the config files are downloaded. Raises WeightsError if the hub cannot be reached or has no such model.
    """
    if weights is None:
        return None
    folder = hub_folder(weights, weights=False) if weights.startswith(HUB) else Path(weights)
    return None if known_labels(folder) is None else read_hugging_face_config(folder).config


@contextmanager
def _restored_on_failure(path: Path) -> Iterator[None]:
    """If the block fails, restore the content of a file, or remove the file if it did not exist."""
    before = path.read_bytes() if path.exists() else None
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        raise


@contextmanager
def _write_category_file(data_format: DataFormat, options: InitOptions, overwrite: bool) -> Iterator[None]:
    """Write a file of classes if the format has none. If the block fails, the previous state is restored.

    Raises ConfigError if the file exists, unless `overwrite` is set.
    """
    path = category_file_path(options)
    if not data_format.classes:
        yield
        return
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another recipe with --output, or replace both with --overwrite")
    with _restored_on_failure(path):
        path.write_text(category_text(data_format.classes), encoding="utf-8")
        yield
    todo = "" if all(data_format.classes.values()) else ": edit it to name the classes"
    print_out(f"wrote {path}{todo}")


def crowd_notes(data_format: DataFormat, found: Survey) -> list[str]:
    """Return messages for the user about crowd annotations."""
    painted = [
        s.source for s in data_format.sets if isinstance(s.source, CocoInstancesSource) and s.source.crowds_are_objects
    ]
    if painted:
        return [
            "masks with `iscrowd: 1` are treated as objects, because CVAT sets it for every painted mask "
            "(source.crowds_are_objects)"
        ]
    if not found.num_crowds:
        return []
    hint = "; if they are objects, set source.crowds_are_objects" if data_format.kind == "coco_instances" else ""
    return [f"{format_count(found.num_crowds, 'segment')} of these are crowds, which are ignored in training{hint}"]


def init(folder: Path, output: Path, args: Namespace) -> None:
    """Write the recipe, and a file of classes if the format has none; then print the next commands.

    Raises UserError if no format or several formats fit, or no image can be read.
    """
    options = InitOptions(
        name=re.sub(r"[^\w-]", "-", output.stem),
        output=output.absolute() if output.parent != Path() else output,
        task=args.task,
        group=args.group,
        val_share=args.val_share,
        tiles=args.tiles,
        weights=args.weights,
        published=published_model(args.weights),
    )
    data_format = choose_format(folder, args.format)
    print_out(f"{data_format.kind}: {data_format.evidence}")
    if len({entry.split == "test" for entry in data_format.sets}) > 1:
        print_out("the test set is not used")
    datasets = build_datasets(data_format, options)
    with _write_category_file(data_format, options, args.overwrite), _restored_on_failure(output):
        found = survey(tuple(datasets.values()))
        print_out("\n".join([*found.lines(), *crowd_notes(data_format, found)]))
        if found.largest_megapixels > 20 and not options.tiles:
            size = f"{found.largest_megapixels:.0f} megapixels"
            print_out(f"the largest image has {size}; use --tiles to cut such images")
        num_train = sum(len(open_dataset(d)[0].keys) for name, d in datasets.items() if name.startswith("train"))
        text = recipe_text(data_format, options, choose_settings(found, num_train, detect_machine()))
        output.write_text(text, encoding="utf-8")
        load_recipe(output)
    skip_bad = " --skip-bad" if found.faults else ""
    reminder = (
        "" if all(data_format.classes.values()) else f", after naming the classes in {category_file_path(options)}"
    )
    print_out(
        f"wrote {output} for task {choose_task(data_format, options)}. Next{reminder}:\n"
        f"  m2f shard {output}{skip_bad}\n  m2f train {output}"
    )
