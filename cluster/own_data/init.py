"""The steps of `m2f init`: detect the format, survey the data, choose settings, write the recipe and load it."""

from __future__ import annotations

import os
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from m2f.cluster.own_data.choices import choose_settings, detect_machine
from m2f.cluster.own_data.division import division_note, group_note
from m2f.cluster.own_data.formats import choose_format
from m2f.cluster.own_data.sets import DataFormat, annotation_path, choose_sets
from m2f.cluster.own_data.survey import Survey, survey
from m2f.cluster.own_data.write_recipe import (
    InitOptions,
    adds_background,
    build_datasets,
    category_file_path,
    category_text,
    choose_task,
    recipe_text,
)
from m2f.cluster.recipe.load import load_recipe
from m2f.cluster.terminal import print_out
from m2f.data_pipeline.categories import Task, require_classes
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import format_list
from m2f.data_pipeline.readers import Reader, open_dataset, open_reader
from m2f.data_pipeline.sources import CocoInstancesSource
from m2f.model.config import ModelConfig
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count
from m2f.model.weights.hub import hub_folder
from m2f.model.weights.sources import HUB

_BACKGROUND_NAMES = ("background", "unlabelled", "no object")
"""Names for an added class of the pixels without an object, the preferred one first."""


def published_model(weights: str | None) -> ModelConfig | None:
    """Return the model configuration of a Hugging Face folder or a model of the hub; None for other weights.

    Only the config files are downloaded. Raises WeightsError if the hub cannot be reached or has no such model.
    """
    if weights is None:
        return None
    from m2f.model.export.hugging_face import known_labels, read_hugging_face_config  # PyTorch takes seconds to import

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


def split_notes(data_format: DataFormat, folder: Path, options: InitOptions) -> list[str]:
    """Return messages for the user about sets and options that are not used."""
    chosen = choose_sets(data_format)
    beside = [entry for entry in chosen.unused if entry.split is None]
    notes = ["the test set is not used"] if len(beside) < len(chosen.unused) else []
    if beside:
        listed = format_list([os.path.relpath(annotation_path(entry.source), folder) for entry in beside])
        notes.append(f"not used, because other sets are named train: {listed}; name a set train or val to use it")
    if chosen.val:
        given = {"--group": options.group is not None, "--val-share": options.val_share != InitOptions.val_share}
        notes += [f"{name} has no effect, because a set is named val" for name, is_given in given.items() if is_given]
    return notes


def choose_background(data_format: DataFormat) -> str:
    """Return a name for the class of pixels without an object, if possible one that no class of the sources has."""
    chosen = choose_sets(data_format)
    readers = (open_reader(entry.source, skip_bad=True) for entry in (*chosen.train, *chosen.val))
    existing = {category.name for reader in readers for category in reader.categories.categories}
    return next((name for name in _BACKGROUND_NAMES if name not in existing), _BACKGROUND_NAMES[0])


def require_distinct_images(datasets: Mapping[str, DatasetConfig], readers: Mapping[str, Reader]) -> None:
    """Raise ConfigError if two data sets use the same image: it would be trained twice, or trained and validated.

    Args:
        datasets: data sets by name.
        readers: reader of each data set.
    """
    users: dict[str, str] = {}
    for name, reader in readers.items():
        images = {os.path.abspath(path) for i in range(len(reader.keys)) for path in reader.files(i)[:1]}
        if shared := sorted(images & users.keys()):
            used = [datasets[users[shared[0]]].source, datasets[name].source]
            listed = " and ".join(annotation_path(source) for source in used if source is not None)
            raise ConfigError(
                f"{listed} both use {format_count(len(shared), 'image')}, for example {shared[0]}. An image can be in "
                "one set only: remove it from one of the two, or move one of the two out of the folder"
            )
        users |= dict.fromkeys(images, name)


def require_objects(found: Survey, added: str | None) -> None:
    """Raise ConfigError if no image that was read has a segment, because a model would learn nothing.

    Args:
        found: survey of all data sets.
        added: name of the class that `adds_background` adds, which does not count; None if no class is added.
    """
    if not any(count for name, count in found.class_counts if name != added):
        raise ConfigError(
            f"{format_count(found.num_read, 'image')} read, but none has a segment that can be used. If the "
            "annotations are only boxes, export polygons or masks instead; otherwise, correct the faults above"
        )


def choose_first_set(datasets: Mapping[str, DatasetConfig], readers: Mapping[str, Reader], task: Task) -> str:
    """Return the first training set that has the classes of all training sets. Its classes become those of the model.

    Raises ConfigError if there is none, because training would refuse these sets.

    Args:
        datasets: data sets by name.
        readers: reader of each data set.
        task: task of the model.
    """
    classes = {
        name: dict.fromkeys((category.name, category.is_thing) for category in reader.categories.for_task(task))
        for name, reader in readers.items()
        if name.startswith("train")
    }
    union = {entry for class_names in classes.values() for entry in class_names}
    if first := next((name for name, class_names in classes.items() if class_names.keys() == union), None):
        return first
    sources = {name: datasets[name].source for name in classes}
    listed = [
        f"  {annotation_path(source)}: {format_list((name for name, _ in classes[dataset]), 12)}"
        for dataset, source in sources.items()
        if source is not None
    ]
    raise ConfigError(
        "the files define different classes, and none has all of them. Give every file the complete list of classes, "
        "for example by exporting from one project, or train with one of them:\n" + "\n".join(listed)
    )


def next_steps(output: Path, found: Survey, unnamed: Path | None) -> str:
    """Return the commands that follow `m2f init`. `unnamed` is a file with classes that the user must name, or None."""
    name = shlex.quote(str(output))
    skip_bad, notes = " --skip-bad" if found.faults else "", []
    if unnamed is not None:
        notes.append(f", after naming the classes in {unnamed}")
    if found.num_unknown:  # --skip-bad would leave out every image of a class that the list lacks
        skip_bad = ""
        notes.append(
            f", after adding the map values in {format_count(found.num_unknown, 'fault')} to the list of classes"
        )
    return f"Next{''.join(notes)}:\n  m2f shard {name}{skip_bad}\n  m2f train {name}"


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
    for note in (*data_format.notes, *split_notes(data_format, folder, options)):
        print_out(note)
    added = choose_background(data_format) if adds_background(data_format, options) else None
    if added is not None:
        options = replace(options, background=added)
        print_out(f"pixels without an object get the class {added!r}")
    with _write_category_file(data_format, options, args.overwrite), _restored_on_failure(output):
        datasets = build_datasets(data_format, options)
        opened = {name: open_dataset(dataset) for name, dataset in datasets.items()}
        readers = {name: reader for name, (reader, _) in opened.items()}
        found = survey(tuple(opened.values()))
        require_distinct_images(datasets, readers)
        for name, reader in readers.items():
            require_classes(reader.categories, choose_task(data_format, options), name)
        first = choose_first_set(datasets, readers, choose_task(data_format, options))
        print_out("\n".join([*found.lines(), *crowd_notes(data_format, found)]))
        require_objects(found, added)
        if not choose_sets(data_format).val:
            print_out(division_note(data_format, datasets, readers))
            if options.group is not None:
                print_out(group_note(options.group, datasets, readers))
        if found.largest_megapixels > 20 and not options.tiles:
            size = f"{found.largest_megapixels:.0f} megapixels"
            print_out(f"the largest image has {size}; use --tiles to cut such images")
        names = sorted((name for name in datasets if name.startswith("train")), key=lambda name: name != first)
        num_samples = {name: len(readers[name].keys) for name in names}
        choices = choose_settings(found, sum(num_samples.values()), detect_machine())
        text = recipe_text(data_format, options, choices, datasets, num_samples)
        output.write_text(text, encoding="utf-8")
        load_recipe(output)
    unnamed = None if all(data_format.classes.values()) else category_file_path(options)
    steps = next_steps(output, found, unnamed)
    print_out(f"wrote {output} for task {choose_task(data_format, options)}. {steps}")
