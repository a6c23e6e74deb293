"""Copy-paste of things from a partner image (Ghiasi et al., "Simple Copy-Paste", CVPR 2021, section 3).

Both images are augmented independently. Then some things of the partner are pasted and cover the pixels under them.

The partner of a position is the sample at a later position, at a distance that is a multiple of `data.lanes`. If the
number of ranks divides `data.lanes`, one rank reads both samples anyway, so copy-paste needs no extra reads. All random
choices are functions of the seed and the position.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from m2f.data_pipeline.config import DataConfig
from m2f.data_pipeline.randomness import Stream, sample_rng
from m2f.data_pipeline.transforms.targets import MAX_UINT8_TARGETS, ImageTargets, present_ids
from m2f.model.structures import BACKGROUND_ID, ignore_id

_PASTE_PROBABILITY = 0.5  # probability that an object of the partner is pasted (the paper: "a random subset")


@dataclass(frozen=True)
class PasteResult:
    """Targets of an image after objects were pasted onto it."""

    targets: ImageTargets
    mask: np.ndarray
    """[H, W] bool: pixels of the pasted objects."""
    hidden: int
    """Number of targets removed because the pasted objects cover all their visible pixels."""


def partner_position(position: int, seed: int, config: DataConfig) -> int | None:
    """Return the position of the sample whose objects are pasted onto the sample at `position`; None for no paste."""
    if config.copy_paste is None:
        return None
    draw, distance = sample_rng(seed, position, Stream.COPY_PASTE).random(2).tolist()
    if draw >= config.copy_paste.probability:
        return None
    return position + config.lanes * (1 + int(distance * config.window))


def draw_objects(partner: ImageTargets, things: Collection[int], seed: int, position: int) -> np.ndarray:
    """Return [k] rows of the partner's targets to paste. Each visible thing is chosen with probability 1/2."""
    draws = sample_rng(seed, position, Stream.PASTED_OBJECTS).random(len(partner.labels))
    chosen = np.isin(partner.labels, list(things)) & (draws < _PASTE_PROBABILITY)
    return np.flatnonzero(chosen & _visible(partner))


def paste(base: ImageTargets, partner: ImageTargets, objects: np.ndarray, *, merge_classes: bool) -> PasteResult:
    """Paste some targets of `partner` onto `base`. Their id maps have the same height and width.

    All layers of the base are cleared under the objects. Objects keep their layers, so pasted objects can overlap each
    other. The inputs are not modified.

    Args:
        base: targets of the image that receives the objects.
        partner: targets of the image that the objects come from.
        objects: [k] rows of the partner's targets.
        merge_classes: merge an object into the base's target of the same class. The semantic task needs this, because
            it has one target per class.
    """
    labels = partner.labels[objects]
    id_by_label = {int(label): int(id_) for label, id_ in zip(base.labels, base.local_id, strict=True)}
    merged = np.array([merge_classes and int(label) in id_by_label for label in labels], dtype=bool)
    added = np.flatnonzero(~merged)
    first = int(base.local_id.max(initial=0)) + 1
    ids = np.array([id_by_label.get(int(label), 0) for label in labels], dtype=np.int64)
    ids[added] = first + np.arange(len(added))

    dtype, ignore = _id_dtype(first + len(added) - 1, base)
    pasted_ids = _pasted_id_maps(partner, objects, ids, dtype)
    mask = (pasted_ids != BACKGROUND_ID).any(axis=0)
    maps = _with_layers(base, max(len(base.id_maps), len(pasted_ids)), dtype, ignore)
    was_visible = _has_pixel(maps, base.layer, base.local_id)
    maps[:, mask] = BACKGROUND_ID
    maps[: len(pasted_ids)][pasted_ids != BACKGROUND_ID] = pasted_ids[pasted_ids != BACKGROUND_ID]
    hidden = was_visible & ~_has_pixel(maps, base.layer, base.local_id)
    keep = ~hidden
    targets = ImageTargets(
        id_maps=maps,
        labels=np.concatenate([base.labels[keep], labels[added]]),
        layer=np.concatenate([base.layer[keep], partner.layer[objects][added]]),
        local_id=np.concatenate([base.local_id[keep], ids[added]]),
    )
    return PasteResult(targets, mask, int(np.count_nonzero(hidden)))


def _pasted_id_maps(partner: ImageTargets, objects: np.ndarray, ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return [Y, H, W]: the new ids at the pixels of the objects, BACKGROUND_ID elsewhere."""
    table = np.full(np.iinfo(partner.id_maps.dtype).max + 1, BACKGROUND_ID, dtype=dtype)
    table[partner.local_id[objects]] = ids
    return table[partner.id_maps]


def _id_dtype(highest: int, base: ImageTargets) -> tuple[np.dtype, int]:
    wide = highest > MAX_UINT8_TARGETS or base.id_maps.dtype == np.int16
    return np.dtype(np.int16 if wide else np.uint8), ignore_id(torch.int16 if wide else torch.uint8)


def _with_layers(base: ImageTargets, layers: int, dtype: np.dtype, ignore: int) -> np.ndarray:
    """Return a copy of the id maps with `layers` layers. Pixels ignored in any old layer are ignored in new layers."""
    is_ignored = base.id_maps == base.ignore
    maps = np.empty((layers, *base.id_maps.shape[1:]), dtype=dtype)
    maps[: len(base.id_maps)] = base.id_maps
    maps[: len(base.id_maps)][is_ignored] = ignore
    maps[len(base.id_maps) :] = np.where(is_ignored.any(axis=0), ignore, BACKGROUND_ID)
    return maps


def _visible(targets: ImageTargets) -> np.ndarray:
    return _has_pixel(targets.id_maps, targets.layer, targets.local_id)


def _has_pixel(maps: np.ndarray, layer: np.ndarray, local_id: np.ndarray) -> np.ndarray:
    """Return [n] bool: whether a pixel with the id exists in the layer."""
    return np.stack([present_ids(id_map) for id_map in maps])[layer, local_id]
