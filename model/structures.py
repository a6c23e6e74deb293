"""Data types shared by model, criterion and post-processing.

Axis letters used in the package: L predictions (see Predictions), B images, Q queries, K classes, C channels, N padded
targets, Y id-map layers, P points, H x W input pixels, h x w stride-4 map.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

BACKGROUND_ID = 0
"""Id of pixels that belong to no segment and count as ordinary negatives."""

UNLABELLED = -1
"""Label of pixels without a class in a semantic prediction."""


def ignore_id(dtype: torch.dtype) -> int:
    """Return the id of void, crowd and padding in an id map of this dtype (uint8 or int16). No segment has this id."""
    return torch.iinfo(dtype).max


class Predictions(NamedTuple):
    """Output of the model: L supervised predictions. The last one is that of the last decoder layer.

    With supervised learnable queries (the default), L = decoder layers + 1, and prediction 0 is made from the initial
    queries before the decoder. Otherwise L = decoder layers, and prediction 0 is that of the first decoder layer. EoMT
    and PMT return one prediction before each block and one after the last; in evaluation only the last. This is a
    NamedTuple because ZeRO-3's hooks and torch.export do not look inside dataclasses.
    """

    class_logits: Tensor
    """[L, B, Q, K + 1]; "no object" is the last class."""
    mask_embeddings: Tensor
    """[L, B, Q, C] one embedding per query."""
    mask_features: Tensor
    """[B, C, h, w] per-pixel embeddings at stride 4, of the last prediction."""
    earlier_features: tuple[Tensor, ...] = ()
    """Per-pixel embeddings of each prediction before the last; empty if all predictions share `mask_features`."""

    @property
    def feature_maps(self) -> tuple[Tensor, ...]:
        """Return M maps of per-pixel embeddings [B, C, h, w]. M is 1 if all predictions share one, otherwise L."""
        return (*self.earlier_features, self.mask_features)

    def mask_logits(self, layer: int = -1) -> Tensor:
        """Return dense mask logits [B, Q, h, w] of one prediction, computed in fp32."""
        maps = self.feature_maps
        with torch.autocast(self.mask_features.device.type, enabled=False):
            features = maps[layer % len(maps)].float()
            return torch.einsum("bqc,bchw->bqhw", self.mask_embeddings[layer].float(), features)


@dataclass(frozen=True)
class Targets:
    """Ground truth of a micro-batch as id maps.

    Target n of image b covers the pixels with `id_maps[b, layer[b, n]] == local_id[b, n]`. Masks are never stacked; the
    label of a point is one gather and one comparison.
    """

    id_maps: Tensor
    """[B, Y, H, W] uint8, or int16 for more than 254 ids. Y = 1 unless instances overlap. See BACKGROUND_ID and
    ignore_id."""
    labels: Tensor
    """[B, N] int64 contiguous classes; 0 if not valid."""
    layer: Tensor
    """[B, N] int64 index into the Y layers of `id_maps`."""
    local_id: Tensor
    """[B, N] int64 id inside the layer."""
    valid: Tensor
    """[B, N] bool; valid targets come first in every row."""
    weight: Tensor
    """[B] float32: 1, or 0 for a filler, which only completes a rank's micro-batch and must not affect losses."""
    dataset: Tensor
    """[B] int64 index of the data set in the mixture."""
    position: Tensor
    """[B] int64 position in the data order. Loss points, pilots and EoMT's masks derive random numbers from it."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """Return the targets on another device."""
        return Targets(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> Targets:
        """Return the targets in pinned host memory."""
        return Targets(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass(frozen=True)
class PanopticSegment:
    """One segment of a panoptic prediction."""

    id: int
    """Value in the segment map, starting from 1."""
    label: int
    """Contiguous class index."""
    is_thing: bool
    """Whether the class is a thing class."""
    score: float
    """Class probability of the query; the highest one if stuff segments were merged."""
    area: int
    """Area in pixels."""


@dataclass(frozen=True)
class PanopticResult:
    """Panoptic prediction of one image at its original size."""

    segment_map: Tensor
    """[H, W] int32 segment ids; 0 is void."""
    segments: tuple[PanopticSegment, ...]
    """Segments in the order of the queries; empty if no query passes the thresholds."""


@dataclass(frozen=True)
class InstanceResult:
    """Instance prediction of one image, sorted by descending score, then query, then class.

    Several classes of one query share one mask: instance i has the mask `masks[mask_index[i]]`.
    """

    masks: Tensor
    """[U, H, W] bool, one per distinct query."""
    mask_index: Tensor
    """[D] int64 index into `masks`."""
    labels: Tensor
    """[D] int64 contiguous class of every instance."""
    scores: Tensor
    """[D] float32 class probability times the mean mask probability inside the mask."""


@dataclass(frozen=True)
class SemanticResult:
    """Semantic prediction of one image at its original size."""

    label_map: Tensor
    """[H, W] int64 contiguous classes; UNLABELLED if no class reached the requested minimum score."""
