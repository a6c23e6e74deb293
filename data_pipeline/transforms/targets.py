"""Convert an annotation into the targets of one task, at source size, by one table look-up per map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.sample import DecodedSample, Segment
from m2f.model.structures import BACKGROUND_ID, ignore_id

MAX_UINT8_TARGETS = 254
"""Largest number of targets in a uint8 map: 0 is background, and 255 is ignored."""


@dataclass(frozen=True)
class ImageTargets:
    """Targets of one image. Target n covers the pixels of layer `layer[n]` that equal `local_id[n]`."""

    id_maps: np.ndarray
    """[Y, H, W] uint8, or int16 above 254 targets; see BACKGROUND_ID and ignore_id of `m2f.model.structures`."""
    labels: np.ndarray
    """[n] int64 contiguous classes."""
    layer: np.ndarray
    """[n] int64 index into the Y layers of `id_maps`."""
    local_id: np.ndarray
    """[n] int64 id in the layer; unique over all layers."""

    @property
    def ignore(self) -> int:
        """Return the id of ignored pixels, which the loss leaves out."""
        return ignore_id(torch.uint8 if self.id_maps.dtype == np.uint8 else torch.int16)


def image_targets(sample: DecodedSample, task: Task, labels: Mapping[int, int]) -> ImageTargets:
    """Return the targets of a sample for one task.

    - panoptic: one target per segment, without crowds. Crowd pixels and unlabelled pixels are ignored.
    - semantic: one target per class. Crowds count as pixels of their class; unlabelled pixels are ignored.
    - instance: one target per thing, without crowds, from `inst` if present, otherwise from the things of `seg`. Crowd
      pixels are ignored; all remaining pixels are background.

    Args:
        sample: a decoded sample.
        task: what the model predicts.
        labels: class by source category id, from `CategoryTable.labels(task)`.

    Raises:
        DataError: the sample has no map for the task, or a category that is missing in `labels`.
    """
    annotation = sample.annotation
    if task == "instance" and annotation.inst is not None:
        maps, kind = annotation.inst, "inst"
    elif annotation.seg is not None:
        maps, kind = annotation.seg[None], "seg"
    else:
        raise DataError(
            f"sample {sample.key!r} ({sample.source}) has no panoptic or semantic map, which task {task!r} needs; "
            "train with data.task instance, or shard the data set from a panoptic source"
        )
    segments = [s for s in annotation.segments if s.map == kind and (s.is_thing or task != "instance")]
    _check_categories(segments, labels, sample)
    if task == "semantic":
        classes = sorted({labels[s.category_id] for s in segments})
        id_of_class = {label: n for n, label in enumerate(classes, start=1)}
        target_of = {s.id: id_of_class[labels[s.category_id]] for s in segments}
        return _remap(maps, target_of, crowd=[], labels=classes, layers=[0] * len(classes), background=False)
    targets = [s for s in segments if not s.is_crowd]
    return _remap(
        maps,
        target_of={s.id: n for n, s in enumerate(targets, start=1)},
        crowd=[s.id for s in segments if s.is_crowd],
        labels=[labels[s.category_id] for s in targets],
        layers=[s.layer for s in targets],
        background=task == "instance",
    )


def target_polygons(sample: DecodedSample, task: Task) -> list[tuple[tuple[float, ...], ...] | None] | None:
    """Return the polygons of all targets of `image_targets`, in their order; None for a target without polygons.

    Returns None as a whole for other tasks than instance and for samples without instance layers.
    """
    if task != "instance" or sample.annotation.inst is None:
        return None
    segments = (s for s in sample.annotation.segments if s.map == "inst" and s.is_thing)
    return [segment.polygons for segment in segments if not segment.is_crowd]


def drop_empty_targets(targets: ImageTargets, size: tuple[int, int]) -> tuple[ImageTargets, int]:
    """Remove targets without a pixel in the first `size` rows and columns.

    Returns the remaining targets and the number of removed ones.
    """
    present = np.stack([present_ids(layer[: size[0], : size[1]]) for layer in targets.id_maps])
    keep = present[targets.layer, targets.local_id]
    if keep.all():
        return targets, 0
    visible = ImageTargets(targets.id_maps, targets.labels[keep], targets.layer[keep], targets.local_id[keep])
    return visible, int(np.count_nonzero(~keep))


def _check_categories(segments: list[Segment], labels: Mapping[int, int], sample: DecodedSample) -> None:
    unknown = sorted({s.category_id for s in segments} - set(labels))
    if unknown:
        raise DataError(
            f"sample {sample.key!r} ({sample.source}) has segments of categories {unknown[:10]}, which are not in the "
            "category table of its manifest; shard the data set again"
        )


def _remap(
    maps: np.ndarray,
    target_of: dict[int, int],
    crowd: list[int],
    labels: list[int],
    layers: list[int],
    background: bool,
) -> ImageTargets:
    small = len(labels) <= MAX_UINT8_TARGETS
    ignore = ignore_id(torch.uint8 if small else torch.int16)
    table = np.full(
        np.iinfo(maps.dtype).max + 1, BACKGROUND_ID if background else ignore, dtype=np.uint8 if small else np.int16
    )
    table[crowd] = ignore
    table[list(target_of)] = list(target_of.values())
    # cv2.LUT is eight times as fast as indexing, but supports only 8-bit maps.
    id_maps = np.stack([cv2.LUT(m, table) if m.dtype == np.uint8 else table[m] for m in maps])
    if crowd and len(id_maps) > 1:
        # A crowd lies in one layer. Its pixels are also ignored in all other layers, unless they belong to an instance.
        crowded = (id_maps == ignore).any(axis=0)
        id_maps[(id_maps == BACKGROUND_ID) & crowded] = ignore
    return ImageTargets(
        id_maps=id_maps,
        labels=np.asarray(labels, dtype=np.int64),
        layer=np.asarray(layers, dtype=np.int64),
        local_id=np.arange(1, len(labels) + 1, dtype=np.int64),
    )


def present_ids(layer: np.ndarray) -> np.ndarray:
    """Return a bool for each possible id: whether the id occurs in a map [H, W].

    Only the first pixel of each run in a row is looked up. This is five times as fast as a histogram of all pixels.
    """
    present = np.zeros(np.iinfo(layer.dtype).max + 1, dtype=bool)
    present[layer[:, 0]] = True
    rest = layer[:, 1:]
    present[rest[rest != layer[:, :-1]]] = True
    return present
