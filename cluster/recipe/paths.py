"""Make local paths of a recipe absolute, because the processes of a cluster start in other folders."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.sources import SourceConfig
from m2f.model.weights.sources import is_path

_NO_PATHS = ("kind", "subset", "suffix", "image_suffix")
"""Settings of sources whose texts are not paths."""


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the recipe with relative paths resolved against the current directory; URLs stay unchanged."""
    backbone, cache = config.model.backbone, config.data.cache
    return replace(
        config,
        output=_absolute(config.output),
        datasets={name: _dataset(dataset) for name, dataset in config.datasets.items()},
        data=replace(config.data, cache=cache and replace(cache, folder=_absolute(cache.folder))),
        model=replace(
            config.model,
            weights=_weights(config.model.weights),
            backbone=replace(backbone, weights=_weights(backbone.weights)),
        ),
    )


def _dataset(dataset: DatasetConfig) -> DatasetConfig:
    source = None if dataset.source is None else _source(dataset.source)
    return replace(dataset, shards=_absolute(dataset.shards), source=source)


def _source(source: SourceConfig) -> SourceConfig:
    """Return the source with absolute paths. All its strings are paths, except those in `_NO_PATHS`."""
    paths: dict[str, Any] = {}
    for field in fields(source):
        value = getattr(source, field.name)
        if isinstance(value, str) and field.name not in _NO_PATHS:
            paths[field.name] = _absolute(value)
    return replace(source, **paths)


def _absolute(path: str) -> str:
    """Return the absolute path. `..` is removed only if symbolic links do not change the result."""
    if "://" in path:
        return path
    full = str(Path(path).expanduser().absolute())
    short = os.path.normpath(full)
    return short if os.path.realpath(short) == os.path.realpath(full) else full


def _weights(weights: str | None) -> str | None:
    return _absolute(weights) if weights is not None and is_path(weights) else weights
