"""Division of sets without a split into training and validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from m2f.cluster.own_data.sets import DataFormat, annotation_path, choose_sets
from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import format_list
from m2f.data_pipeline.readers import Reader, open_reader
from m2f.data_pipeline.readers.adapted.part import group_of
from m2f.data_pipeline.readers.adapted.tiles import TileReader
from m2f.data_pipeline.sources import SourceConfig
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count

Use = Literal["train", "val", "both"]
"""Use of a source: as a whole for training or validation, or divided into two parts (`datasets.<name>.part`)."""


def divide(sources: Sequence[SourceConfig], task: Task, val_share: float, group: str | None) -> tuple[Use, ...]:
    """Return the use of each source.

    Sources are often the folders of patients or batches, whose images resemble each other. If whole sources can give
    about the wanted share of the images to validation, each is used as a whole. Otherwise, each is divided, except
    those with a single group of images, which are used for training.

    Args:
        sources: sources of which none is for validation.
        task: task of the model.
        val_share: wanted share of the images for validation.
        group: regular expression for groups of images; see `PartConfig.group`.
    """
    if len(sources) == 1:
        return ("both",)
    readers = [open_reader(source, skip_bad=True) for source in sources]
    classes = [{(c.name, c.is_thing) for c in reader.categories.for_task(task)} for reader in readers]
    largest = max(range(len(sources)), key=lambda i: len(classes[i]))  # defines the model's classes: never validation
    sizes = [len(reader.keys) for reader in readers]
    whole_uses = _whole_uses(sizes, val_share, largest)
    share = sum(size for size, use in zip(sizes, whole_uses, strict=True) if use == "val") / sum(sizes)
    if abs(share - val_share) <= val_share / 2:
        return whole_uses
    num_groups = [len({group_of(key, group) for key in reader.keys}) for reader in readers]
    if max(num_groups) > 1:
        return tuple("both" if count > 1 else "train" for count in num_groups)
    last = max(i for i in range(len(sources)) if i != largest)
    return tuple("val" if i == last else "train" for i in range(len(sources)))


def _whole_uses(sizes: Sequence[int], val_share: float, never: int) -> tuple[Use, ...]:
    """Return uses in which the validation sources are spread evenly. The source at position `never` is not chosen."""
    uses: list[Use] = []
    num_seen = num_val = 0
    for index, size in enumerate(sizes):
        num_seen += size
        is_val = index != never and num_val + size / 2 <= val_share * num_seen
        num_val += size * is_val
        uses.append("val" if is_val else "train")
    return tuple(uses)


def division_note(data_format: DataFormat, datasets: Mapping[str, DatasetConfig], readers: Mapping[str, Reader]) -> str:
    """Return a message for the user on how sets without a split are divided.

    Args:
        data_format: format without a set for validation.
        datasets: data sets by name.
        readers: reader of each data set.
    """
    split = choose_sets(data_format).train[0].split
    origin = "no set is named val" if split in (None, "train") else f"the {split} set is split"
    sizes = {name: len(_image_keys(reader)) for name, reader in readers.items()}
    num_val = sum(size for name, size in sizes.items() if _is_val(name))
    total = sum(sizes.values())
    share = f"{num_val:,} of {format_count(total, 'image')} ({num_val / total:.0%})"
    if any(dataset.part is not None for dataset in datasets.values()):
        return f"{origin}: {share} are for validation"
    return f"{origin}: {sum(map(_is_val, sizes))} of {len(sizes)} sets are for validation as a whole, with {share}"


def group_note(group: str, datasets: Mapping[str, DatasetConfig], readers: Mapping[str, Reader]) -> str:
    """Return a message for the user about the groups of images.

    Raises ConfigError if no two images have the same group, or if a group is in training and in validation.

    Args:
        group: regular expression for groups of images; see `PartConfig.group`.
        datasets: data sets by name.
        readers: reader of each data set.
    """
    groups = {name: Counter(group_of(key, group) for key in _image_keys(reader)) for name, reader in readers.items()}
    total = sum(groups.values(), Counter[str]())
    keys = [key for reader in readers.values() for key in _image_keys(reader)]
    if max(total.values()) == 1:
        raise ConfigError(
            f"--group {group!r} puts each of {format_count(len(keys), 'image')} into a separate group. It is matched "
            "at the start of keys: paths of images without extension, in which - replaces all characters other than "
            f"A-Z, a-z, 0-9 and _. Such keys end with a digest. Keys of these images: {format_list(keys, 3)}"
        )
    for name in filter(_is_val, groups):
        for other in (other for other in groups if not _is_val(other)):
            if shared := sorted(groups[name].keys() & groups[other].keys()):
                sources = [datasets[n].source for n in (other, name)]
                listed = " and ".join(annotation_path(source) for source in sources if source is not None)
                are_whole = all(dataset.part is None for dataset in datasets.values())
                remedy = "Leave out --group, since no set is divided, or move" if are_whole else "Move"
                raise ConfigError(
                    f"--group {group!r}: the group {shared[0]!r} is in the training images of one set and the "
                    f"validation images of another: {listed}. {remedy} the sets into folders named train and val"
                )
    return f"the images form {format_count(len(total), 'group')}, for example {format_list(sorted(total), 3)}"


def _is_val(name: str) -> bool:
    return name.startswith("val")


def _image_keys(reader: Reader) -> Sequence[str]:
    """Return the keys of the images, also if the reader cuts them into tiles."""
    return reader.reader.keys if isinstance(reader, TileReader) else reader.keys
