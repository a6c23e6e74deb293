"""Find the number of classes of a recipe's model: from the shards, else the source, else the known public data set."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.categories import CategoryTable, Task
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_dataset
from m2f.data_pipeline.readers.ade20k_classes import CATEGORIES_150, categories_847
from m2f.data_pipeline.readers.cityscapes import CATEGORIES as CITYSCAPES
from m2f.data_pipeline.shards.manifest import DATASET_FILE, Manifest
from m2f.data_pipeline.sources import (
    Ade20kFullSource,
    Ade20kSource,
    CityscapesPanopticSource,
    CityscapesSource,
    CocoInstancesSource,
    CocoPanopticSource,
    MapillarySource,
)
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.config import ModelConfig
from m2f.model.errors import ConfigError


@dataclass(frozen=True)
class _Published:
    """Class counts of a public data set, whose classes never change."""

    name: str
    classes: int
    things: int

    @classmethod
    def from_table(cls, name: str, table: CategoryTable) -> _Published:
        """Return the counts of a data set whose classes m2f knows without a file."""
        return cls(name, len(table.for_task("panoptic")), len(table.for_task("instance")))

    def count(self, task: Task) -> int:
        """Return the number of classes of a model for the task."""
        return self.things if task == "instance" else self.classes


# The classes of these data sets are in an annotation file, which may not be downloaded yet.
_COCO, _COCO_INSTANCES = _Published("COCO", 133, 80), _Published("COCO", 80, 80)
_VISTAS = _Published("Mapillary Vistas 1.2", 65, 37)
_PUBLISHED_FILES: tuple[tuple[str, _Published], ...] = (
    (r"panoptic_(train|val)2017\.json$", _COCO),
    (r"instances_(train|val)2017\.json$", _COCO_INSTANCES),
    (r"v1\.2/panoptic/panoptic_2018\.json$", _VISTAS),
    (r"config_v1\.2\.json$", _VISTAS),
)
"""Patterns of the published file names, with the data set that each one identifies."""


@dataclass(frozen=True)
class CountedModel:
    """A recipe's model with its number of classes."""

    model: ModelConfig
    assumption: str | None = None
    """Message about the origin of the number if neither shards nor source exist; otherwise None."""


def with_class_count(config: RunConfig) -> CountedModel:
    """Return the recipe's model with `num_classes` set. Raises ConfigError if the number cannot be determined."""
    if config.model.num_classes is not None:
        return CountedModel(config.model)
    name = config.data.train[0].dataset
    dataset, task = config.datasets[name], config.data.task
    try:
        table = _category_table(dataset, Storage(config.storage))
    except DataError as error:
        published = _published_data_set(dataset)
        if published is None:
            raise ConfigError(
                f"{error}; write its shards with m2f shard, or set the number of classes: model.num_classes=80"
            ) from error
        number = published.count(task) + (dataset.background is not None and task != "instance")
        origin = f"assuming the {number} classes of {published.name}; neither shards nor source found"
        assumption = f"{config.name}: {origin}"
        return CountedModel(replace(config.model, num_classes=number), assumption)
    return CountedModel(replace(config.model, num_classes=len(table.for_task(task))))


def _category_table(dataset: DatasetConfig, storage: Storage) -> CategoryTable:
    """Return the category table of the shards, else of the source. Raises DataError if neither exists."""
    if dataset.source is None or storage.exists(join(dataset.shards, DATASET_FILE)):
        return Manifest.load(dataset.shards, storage).categories
    return open_dataset(dataset)[0].categories


def _published_data_set(dataset: DatasetConfig) -> _Published | None:
    match dataset.source:
        case Ade20kSource():
            return _Published.from_table("ADE20K", CATEGORIES_150)
        case Ade20kFullSource(categories=None):
            return _Published.from_table("ADE20K full", categories_847())
        case CityscapesSource() | CityscapesPanopticSource():
            return _Published.from_table("Cityscapes", CITYSCAPES)
        case CocoPanopticSource(panoptic_json=file) | CocoInstancesSource(instances_json=file):
            pass
        case MapillarySource(config_json=file):
            pass
        case _:
            return None
    return next((published for pattern, published in _PUBLISHED_FILES if re.search(pattern, file)), None)
