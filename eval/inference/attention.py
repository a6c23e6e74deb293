"""Attention inside and outside of objects (Mask2Former, Table I b), and pictures of it (Figure I)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

import cv2
import numpy as np
import torch
from torch import Tensor

from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.transforms.collate import EvalBatch
from m2f.data_pipeline.transforms.targets import ImageTargets, image_targets
from m2f.eval.report.panels import HeatMap
from m2f.eval.results.results import columns
from m2f.model.analysis.attention_maps import AttentionMap, foreground_mass
from m2f.model.config import LossConfig
from m2f.model.loss.matcher import match
from m2f.model.loss.point_sampling import LabelMaps
from m2f.model.structures import BACKGROUND_ID, Predictions, Targets

MATCHING_GRID = 112
"""Points per side of the grid on which predictions and objects are compared. By default, training also samples
112 x 112 points."""


@dataclass(frozen=True)
class MatchedObjects:
    """Objects of one image, each with its matched query of the last layer. Objects without a query are left out."""

    queries: Tensor
    """[n] int64 query indices."""
    labels: Tensor
    """[n] int64 contiguous classes."""
    masks: Tensor
    """[n, H, W] bool masks at the size of the model's input."""


def matched_objects(
    batch: EvalBatch, row: int, predictions: Predictions, task: Task, labels: Mapping[int, int], config: LossConfig
) -> MatchedObjects:
    """Match the last layer's predictions for image `row` of the batch with its targets.

    Matching is that of training, but at the points of a grid. `labels` maps category ids to classes.
    """
    height, width = (int(side) for side in batch.sizes[row])
    padded_height, padded_width = batch.images.shape[-2:]
    targets = _padded_targets(
        image_targets(batch.samples[row], task, labels), (height, width), (padded_height, padded_width)
    )
    last = Predictions(
        predictions.class_logits[-1:, row : row + 1],
        predictions.mask_embeddings[-1:, row : row + 1],
        predictions.mask_features[row : row + 1],
    )
    device = last.mask_features.device
    points = _grid(height / padded_height, width / padded_width)[None, None].to(device)
    on_device = targets.to(device)
    matching = match(last, on_device, LabelMaps.pack(on_device.id_maps), points, config)
    matched = torch.from_numpy(matching.query_index[0, 0])
    object_index = (matched >= 0).nonzero()[:, 0]
    masks = targets.id_maps[0, targets.layer[0, object_index]] == targets.local_id[0, object_index, None, None]
    return MatchedObjects(matched[object_index], targets.labels[0, object_index], masks)


class AttentionMass:
    """Mean share of attention on the matched object, by layer, over all matched queries of all images."""

    def __init__(self) -> None:
        self._shares: dict[int, list[float]] = {}
        self._levels: dict[int, str] = {}

    def update(self, maps: Sequence[AttentionMap], image: int, objects: MatchedObjects) -> None:
        """Add the objects of one image; `image` is its position in the batch for which the maps were recorded."""
        for attention in maps:
            weights = attention.weights[image].cpu()[objects.queries]
            shares = foreground_mass(weights, attention.shapes, objects.masks)
            self._shares.setdefault(attention.layer, []).extend(shares.tolist())
            self._levels[attention.layer] = attention.level_name

    @property
    def by_layer(self) -> dict[int, float | None]:
        """Share of attention on objects, 0 to 1, by layer; None for a layer without a matched query."""
        return {layer: fmean(shares) if shares else None for layer, shares in sorted(self._shares.items())}

    @property
    def by_level(self) -> dict[str, float | None]:
        """Mean share over the layers that attend to the same level, and over all layers as `average` (Table I b)."""
        groups: dict[str, list[float]] = {}
        for layer, share in self.by_layer.items():
            if share is not None:
                groups.setdefault(self._levels[layer], []).append(share)
        names = dict.fromkeys(self._levels[layer] for layer in sorted(self._levels))
        levels: dict[str, float | None] = {name: fmean(groups[name]) if name in groups else None for name in names}
        return levels | {"average": fmean(chain.from_iterable(groups.values())) if groups else None}

    def table(self) -> str:
        """Return a table of attention inside and outside of objects, by layer and by level, in per cent."""
        layers = [[f"layer {n}", self._levels[n], *_split(share)] for n, share in self.by_layer.items()]
        levels = [["all layers", name, *_split(share)] for name, share in self.by_level.items()]
        return columns(["attention", "level", "object", "elsewhere"], [*layers, *levels])


def attention_pictures(
    maps: Sequence[AttentionMap], image: int, query: int, size: tuple[int, int]
) -> tuple[HeatMap, ...]:
    """Return one heat map per feature level for one query of one image, from the last layer that attends to the level.

    `image` is the position in the batch. The maps are cropped to `size`, the image's (height, width) inside the padded
    input (Figure I a).
    """
    height, width = size
    last: dict[int, HeatMap] = {}
    for attention in maps:
        for stride, weights in zip(attention.strides, attention.level_maps(image, query), strict=True):
            cells = weights.repeat_interleave(stride, 0).repeat_interleave(stride, 1)[:height, :width]
            last[stride] = HeatMap(f"layer {attention.layer}, 1/{stride}", cells.cpu().numpy())
    return tuple(last.values())


def _split(share: float | None) -> tuple[float | None, float | None]:
    """Return the shares of attention on the object and elsewhere, in per cent."""
    return (None, None) if share is None else (100 * share, 100 * (1 - share))


def _grid(height: float, width: float) -> Tensor:
    """Return points [P, 2] (x, y) that evenly cover the part of the input that shows the image."""
    steps = (torch.arange(MATCHING_GRID) + 0.5) / MATCHING_GRID
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def _padded_targets(targets: ImageTargets, size: tuple[int, int], padded: tuple[int, int]) -> Targets:
    """Return the targets of one image, resized and padded like the model's input."""
    resized = np.full((len(targets.id_maps), *padded), BACKGROUND_ID, dtype=targets.id_maps.dtype)
    for layer, id_map in zip(resized, targets.id_maps, strict=True):
        layer[: size[0], : size[1]] = cv2.resize(id_map, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
    return Targets(
        id_maps=torch.from_numpy(resized)[None],
        labels=torch.from_numpy(targets.labels)[None],
        layer=torch.from_numpy(targets.layer)[None],
        local_id=torch.from_numpy(targets.local_id)[None],
        valid=torch.ones(1, len(targets.labels), dtype=torch.bool),
        weight=torch.ones(1),
        dataset=torch.zeros(1, dtype=torch.int64),
        position=torch.zeros(1, dtype=torch.int64),
    )
