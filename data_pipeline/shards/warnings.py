"""Warnings about data sets that do not suit the task or the model, computed from the manifest."""

from __future__ import annotations

import numpy as np

from m2f.data_pipeline.categories import CategoryTable, Task
from m2f.data_pipeline.errors import format_list
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.model.config import ModelConfig

_MIN_CHECKED_AREA = 100
"""Smallest mean size in pixels of an image's objects of one category for `area_warning`. In smaller objects, the border
is a large part of the area."""
_MIN_CHECKED_ROWS = 5
"""Smallest number of such pairs of image and category for `area_warning`."""
_NORMAL_RATIO = (0.8, 1.25)
"""Normal range of counted pixels divided by stated areas. Polygons gain and lose pixels along their border."""


def data_warnings(name: str, manifest: Manifest, task: Task, model: ModelConfig) -> list[str]:
    """Return all warnings for one data set of a recipe, one line each."""
    warnings = (
        one_class_warning(name, manifest.categories, task),
        empty_class_warning(name, manifest, task),
        no_object_warning(name, manifest, task),
        query_warning(name, manifest, task, model.transformer_decoder.num_queries),
        instance_warning(name, manifest, task, model.postprocess.max_instances),
        area_warning(name, manifest),
    )
    return [f"warning: {text}" for text in warnings if text is not None]


def one_class_warning(name: str, categories: CategoryTable, task: Task) -> str | None:
    """Return a warning if semantic training has a single class, since mIoU is 100 from the start; otherwise None."""
    classes = categories.for_task(task)
    if task != "semantic" or len(classes) != 1:
        return None
    return (
        f"{name}: {classes[0].name!r} is the only class, so every prediction is correct from the start; add the "
        "background as a class, or train with data.task=instance"
    )


def empty_class_warning(name: str, manifest: Manifest, task: Task) -> str | None:
    """Return a warning if a data set for semantic training has no pixel of some classes; otherwise None."""
    if task != "semantic":
        return None
    empty = [entry.category.name for entry in manifest.statistics() if not entry.num_images]
    if not empty:
        return None
    return (
        f"{name}: no image has a pixel of {len(empty)} of {len(manifest.categories.categories)} classes: "
        f"{format_list(empty)}. If images show them, check the values of the label maps"
    )


def no_object_warning(name: str, manifest: Manifest, task: Task) -> str | None:
    """Return a warning if no image has an object that training can use; otherwise None.

    For semantic training, `empty_class_warning` names the classes instead.
    """
    if task == "semantic" or objects_per_image(manifest, task).any():
        return None
    return (
        f"{name}: none of {manifest.num_samples:,} images has an object for the task {task}. If images show objects, "
        "export them as polygons or masks; boxes alone cannot be used"
    )


def query_warning(name: str, manifest: Manifest, task: Task, num_queries: int) -> str | None:
    """Return a warning if images have more objects than the model has queries; otherwise None.

    The model cannot predict the surplus objects. Crowds do not count. Semantic targets are one segment per class.
    """
    objects = objects_per_image(manifest, task)
    has_excess = objects > num_queries
    if not has_excess.any():
        return None
    num_lost = int((objects[has_excess] - num_queries).sum())
    return (
        f"{name}: {int(has_excess.sum()):,} of {len(objects):,} images have more objects than the model has queries "
        f"({num_queries}), up to {int(objects.max())}; at least {num_lost:,} of {int(objects.sum()):,} objects cannot "
        "be predicted. Raise model.transformer_decoder.num_queries"
    )


def instance_warning(name: str, manifest: Manifest, task: Task, max_instances: int) -> str | None:
    """Return a warning if images have more objects than an instance result keeps; otherwise None.

    Panoptic results have no such limit, and all their segments count in PQ.
    """
    objects = objects_per_image(manifest, task)
    num_excess = int((objects > max_instances).sum())
    if task != "instance" or not num_excess:
        return None
    return (
        f"{name}: {num_excess:,} of {len(objects):,} images have more than {max_instances} objects, up to "
        f"{int(objects.max())}, but predictions keep {max_instances} objects per image. Raise "
        "model.postprocess.max_instances. AP counts 100 detections per class and image"
    )


def area_warning(name: str, manifest: Manifest) -> str | None:
    """Return a warning if the stated areas differ from the counted pixels throughout the data set; otherwise None.

    The median ratio decides, so single objects do not cause a warning. Old manifests without counted pixels are not
    checked.
    """
    if manifest.category_pixels is None:
        return None
    pixels, areas = manifest.category_pixels.values, manifest.category_areas.values
    is_checked = np.maximum(pixels, areas) >= _MIN_CHECKED_AREA * manifest.category_counts.values.astype(np.int64)
    if np.count_nonzero(is_checked) < _MIN_CHECKED_ROWS:
        return None
    ratio = float(np.median(pixels[is_checked] / np.maximum(areas[is_checked].astype(np.float64), 1.0)))
    if _NORMAL_RATIO[0] <= ratio <= _NORMAL_RATIO[1]:
        return None
    return (
        f"{name}: masks have {ratio:.2f} times as many pixels as the areas stated by the source (median). Check "
        "`m2f preview`: images or annotations may have been rescaled, or the areas may be those of boxes"
    )


def objects_per_image(manifest: Manifest, task: Task) -> np.ndarray:
    """Return [N] int64: number of targets of each image for a task, without crowds."""
    ids = manifest.category_ids
    is_target = np.isin(ids.values, list(manifest.categories.labels(task)))
    counted = is_target if task == "semantic" else np.where(is_target, manifest.category_counts.values, 0)
    return np.bincount(ids.rows(), counted, minlength=manifest.num_samples).astype(np.int64)
