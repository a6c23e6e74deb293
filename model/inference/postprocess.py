"""Panoptic, instance and semantic results at the original size, from the last prediction of one image.

The results equal those of the official procedure (MaskFormer, section 3.4: mask-classification inference), with bounded
memory. Queries are filtered before their masks are upsampled, and masks are upsampled in bands of rows.
`max(0).indices` equals `argmax(0)` (the first of equal values) and takes a quarter of the time on CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m2f.model.config import PostprocessConfig
from m2f.model.inference.class_scores import ClassScores
from m2f.model.inference.mask_resize import ImageGeometry, MaskResize
from m2f.model.structures import UNLABELLED, InstanceResult, PanopticResult, PanopticSegment, SemanticResult

MASK_GROUP_BYTES = 2**28
"""Maximum size of the full-size instance masks that are computed together, in bytes."""


@torch.no_grad()
def panoptic(
    class_logits: Tensor,
    mask_embeddings: Tensor,
    mask_features: Tensor,
    geometry: ImageGeometry,
    is_thing: Sequence[bool],
    config: PostprocessConfig,
) -> PanopticResult:
    """Return the panoptic result for class_logits [Q, K + 1], mask_embeddings [Q, C] and mask_features [C, h, w].

    Queries above `object_threshold` compete for pixels by score * mask probability. A pixel also needs a mask
    probability of at least 0.5, and a segment must keep `overlap_threshold` of its own mask. Stuff of one class is one
    segment. `is_thing` has one entry per class.
    """
    num_classes = class_logits.shape[-1] - 1
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = ((labels != num_classes) & (scores > config.object_threshold)).nonzero()[:, 0]
    if not len(kept):
        return PanopticResult(torch.zeros(geometry.original_size, dtype=torch.int32, device=kept.device), ())
    scores, labels = scores[kept], labels[kept]

    winner = torch.empty(geometry.original_size, dtype=torch.int64, device=kept.device)
    inside = torch.empty(geometry.original_size, dtype=torch.bool, device=kept.device)
    mask_area = torch.zeros(len(kept), dtype=torch.int64, device=kept.device)
    for rows, logits in _bands(mask_embeddings[kept], mask_features, geometry):
        probabilities = logits.sigmoid_()
        mask_area += (probabilities >= 0.5).sum((1, 2))
        winner[rows] = (scores[:, None, None] * probabilities).max(0).indices
        inside[rows] = probabilities.gather(0, winner[rows][None])[0] >= 0.5

    won_area = torch.bincount(winner.flatten(), minlength=len(kept))
    painted_area = torch.bincount(winner[inside], minlength=len(kept))
    table = torch.stack((labels, won_area, mask_area, painted_area)).tolist()
    ids, segments = _merge([_Candidate(*c) for c in zip(*table, scores.tolist(), strict=True)], is_thing, config)
    segment_map = torch.where(inside, torch.tensor(ids, dtype=torch.int32, device=kept.device)[winner], 0)
    return PanopticResult(segment_map, segments)


class _Candidate(NamedTuple):
    """A kept query with its pixel counts: pixels it won, pixels of its own mask, and pixels in both."""

    label: int
    won_area: int
    mask_area: int
    painted_area: int
    score: float


def _merge(
    candidates: list[_Candidate], is_thing: Sequence[bool], config: PostprocessConfig
) -> tuple[list[int], tuple[PanopticSegment, ...]]:
    """Return the segment id of every candidate (0 if dropped) and the segments, in the order of the queries."""
    ids, segments = [], {}
    stuff_ids: dict[int, int] = {}
    for candidate in candidates:
        if not candidate.painted_area or candidate.won_area / candidate.mask_area < config.overlap_threshold:
            ids.append(0)
            continue
        thing = is_thing[candidate.label]
        segment_id = len(segments) + 1
        if not thing:
            segment_id = stuff_ids.setdefault(candidate.label, segment_id)
        area, score = candidate.painted_area, candidate.score
        if (merged := segments.get(segment_id)) is not None:
            area, score = area + merged.area, max(score, merged.score)
        segments[segment_id] = PanopticSegment(segment_id, candidate.label, thing, score, area)
        ids.append(segment_id)
    return ids, tuple(segments.values())


def instance(
    class_logits: Tensor,
    mask_embeddings: Tensor,
    mask_features: Tensor,
    geometry: ImageGeometry,
    is_thing: Sequence[bool],
    config: PostprocessConfig,
) -> InstanceResult:
    """Return the instance result for class_logits [Q, K + 1], mask_embeddings [Q, C] and mask_features [C, h, w].

    Selects the `max_instances` best (query, class) pairs over all classes, then keeps things only (an instance model
    has no other classes). `is_thing` has one entry per class. If scores are equal, the lower query comes first, then
    the lower class.
    """
    groups: list[Tensor] = []
    ranking = stream_instances(class_logits, mask_embeddings, mask_features, geometry, is_thing, config, groups.append)
    masks = groups[0] if len(groups) == 1 else torch.cat(groups)
    return InstanceResult(masks, *ranking)


class InstanceRanking(NamedTuple):
    """Fields of an InstanceResult without its masks."""

    mask_index: Tensor
    """[D] int64 index into the masks."""
    labels: Tensor
    """[D] int64 contiguous class of every instance."""
    scores: Tensor
    """[D] float32 scores, descending."""


@torch.no_grad()
def stream_instances(
    class_logits: Tensor,
    mask_embeddings: Tensor,
    mask_features: Tensor,
    geometry: ImageGeometry,
    is_thing: Sequence[bool],
    config: PostprocessConfig,
    consume: Callable[[Tensor], None],
) -> InstanceRanking:
    """Compute the result of `instance`, but pass the masks to `consume` in groups [n, H, W] bool, at least once.

    The masks of a large image therefore need not all be in memory. A group has at most MASK_GROUP_BYTES, or one mask.
    """
    num_classes = class_logits.shape[-1] - 1
    flat_scores = class_logits.float().softmax(-1)[:, :num_classes].flatten()
    best = flat_scores.sort(descending=True, stable=True).indices[: config.max_instances].sort().values
    best = best[torch.tensor(is_thing, dtype=torch.bool, device=best.device)[best % num_classes]]
    queries, mask_index = (best // num_classes).unique(return_inverse=True)

    height, width = geometry.original_size
    group_size = max(1, MASK_GROUP_BYTES // (height * width))
    group_scores = []
    for group in queries.split(group_size):
        masks, mask_scores = _masks_and_scores(mask_embeddings[group], mask_features, geometry)
        consume(masks)
        group_scores.append(mask_scores)

    scores = flat_scores[best] * torch.cat(group_scores)[mask_index]
    scores, order = scores.sort(descending=True, stable=True)
    return InstanceRanking(mask_index[order], best[order] % num_classes, scores)


def _masks_and_scores(mask_embeddings: Tensor, mask_features: Tensor, geometry: ImageGeometry) -> tuple[Tensor, Tensor]:
    """Return masks [n, H, W] bool and the mean mask probabilities [n] inside them."""
    count, device = len(mask_embeddings), mask_embeddings.device
    masks = torch.empty(count, *geometry.original_size, dtype=torch.bool, device=device)
    inside_sum = torch.zeros(count, dtype=torch.float64, device=device)
    area = torch.zeros(count, dtype=torch.int64, device=device)
    if count:
        for rows, logits in _bands(mask_embeddings, mask_features, geometry):
            masks[:, rows] = logits > 0
            area += masks[:, rows].sum((1, 2))  # summing all masks at once would convert them all to int64
            inside_sum += logits.sigmoid_().mul_(masks[:, rows]).sum((1, 2))
    return masks, (inside_sum / (area + 1e-6)).float()


@torch.no_grad()
def semantic(
    class_logits: Tensor,
    mask_embeddings: Tensor,
    mask_features: Tensor,
    geometry: ImageGeometry,
    config: PostprocessConfig,
    min_score: float | None = None,
) -> SemanticResult:
    """Return the semantic result for class_logits [Q, K + 1], mask_embeddings [Q, C] and mask_features [C, h, w].

    The class of a pixel maximises the sum over queries of class probability * mask probability. If sums are equal,
    the lower class is chosen. `semantic_resize` selects whether masks or these sums are resized to the original size.
    Pixels whose best sum is below `min_score` become UNLABELLED.
    """
    scores = ClassScores(class_logits, mask_embeddings, mask_features, geometry, config.semantic_resize)
    label_map = torch.empty(geometry.original_size, dtype=torch.int64, device=class_logits.device)
    for rows in scores.bands():
        label_map[rows] = _best_class(scores.at(rows), min_score)
    return SemanticResult(label_map)


def _best_class(scores: Tensor, min_score: float | None) -> Tensor:
    """Return the class with the highest score, [rows, W] for scores [K, rows, W]; UNLABELLED below `min_score`."""
    best = scores.max(0)
    return best.indices if min_score is None else torch.where(best.values >= min_score, best.indices, UNLABELLED)


def _bands(mask_embeddings: Tensor, mask_features: Tensor, geometry: ImageGeometry) -> Iterator[tuple[slice, Tensor]]:
    """Yield mask logits [Q, rows, W] at the original size, band by band, with their rows."""
    resize = MaskResize(mask_embeddings, mask_features, geometry)
    for rows in resize.bands(len(mask_embeddings)):
        yield rows, resize.original(rows)
