"""Baseline with the published code's order of operations: dense masks of all queries, one image at a time.

It is written from the paper (sections 3.2 and 3.3) and from the known order of operations of the published code.
Callers pass the random points, so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2f.model.config import LossConfig, PostprocessConfig
from m2f.model.deform_attn.module import MSDeformAttn, SamplingGrid, ms_deform_attn_grid_sample
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.loss.points import DrawnPoints, RowIndex
from m2f.model.mask2former import Mask2Former
from m2f.model.structures import Predictions


def official_pixel_decoder(model: Mask2Former) -> Mask2Former:
    """Return a copy of the model whose pixel decoder computes in fp32 and samples level by level."""
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.attend = _sample_levels  # type: ignore[method-assign]
    decode = model.pixel_decoder.forward

    def in_fp32(features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast(features[0].device.type, enabled=False):
            return decode([feature.float() for feature in features])

    model.pixel_decoder.forward = in_fp32  # type: ignore[method-assign]
    return model


def _sample_levels(value: Tensor, offsets: Tensor, logits: Tensor, grid: SamplingGrid) -> Tensor:
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    locations = grid.reference[:, :, None, :, None] + offsets / grid.sizes
    return ms_deform_attn_grid_sample(value, grid.shapes, locations, weights)


def dense_attention_masks(
    predictions: Predictions, sizes: Sequence[tuple[int, int]], heads: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the mask logits of all predictions, and the attention masks from all but the last.

    Mask logits are [B, Q, h, w]. Attention masks are bool [B * heads, Q, T], True where attention is blocked.
    """
    masks = [torch.einsum("bqc,bchw->bqhw", e, predictions.mask_features) for e in predictions.mask_embeddings]
    blocked_masks = []
    for layer, mask in enumerate(masks[:-1]):
        resized = F.interpolate(mask, sizes[layer % len(sizes)], mode="bilinear", align_corners=False)
        repeated = resized.sigmoid().flatten(2).unsqueeze(1).repeat(1, heads, 1, 1).flatten(0, 1)
        blocked = (repeated < 0.5).bool().detach()
        blocked[blocked.all(-1)] = False
        blocked_masks.append(blocked)
    return masks, blocked_masks


def official_loss(
    predictions: Predictions,
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    truth: Sequence[Tensor],
    drawn: DrawnPoints,
    config: LossConfig,
) -> Tensor:
    """Return the total loss of a micro-batch; `truth` contains the masks [N, H, W] of each image."""
    num_masks = sum(len(image_labels) for image_labels in labels)
    total = predictions.class_logits.new_zeros(())
    for layer, (logits, classes) in enumerate(zip(masks, predictions.class_logits, strict=True)):
        pairs = [
            official_assignment(classes[b], logits[b], labels[b], truth[b], drawn.matching[layer, b], config)
            for b in range(len(labels))
        ]
        total = total + config.class_weight * _class_loss(classes, labels, pairs, config)
        mask, dice = _mask_losses(layer, logits, truth, pairs, drawn, config)
        total = total + (config.mask_weight * mask + config.dice_weight * dice) / num_masks
    return total


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """Sample maps [N, h, w] at points [N, P, 2] in [0, 1], bilinearly; return [N, P]."""
    return F.grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


@torch.no_grad()
def official_assignment(
    classes: Tensor, logits: Tensor, labels: Tensor, truth: Tensor, points: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Match one image and one prediction; return the indices of queries and of their targets."""
    x, t = (_sample(maps, points.expand(len(maps), -1, -1)).float() for maps in (logits, truth))
    positive = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    negative = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
    mask_cost = (positive @ t.T + negative @ (1 - t).T) / x.shape[1]
    p = x.sigmoid()
    dice_cost = 1 - (2 * (p @ t.T) + 1) / (p.sum(-1)[:, None] + t.sum(-1) + 1)
    class_cost = -classes.softmax(-1)[:, labels]
    cost = config.mask_weight * mask_cost + config.class_weight * class_cost + config.dice_weight * dice_cost
    queries, targets = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(queries, device=x.device), torch.as_tensor(targets, device=x.device)


def _class_loss(
    classes: Tensor, labels: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], config: LossConfig
) -> Tensor:
    no_object = classes.shape[-1] - 1
    expected = torch.full(classes.shape[:2], no_object, device=classes.device)
    for image, (queries, targets) in enumerate(pairs):
        expected[image, queries] = labels[image][targets]
    weight = torch.ones(no_object + 1, device=classes.device)
    weight[-1] = config.no_object_weight
    return F.cross_entropy(classes.transpose(1, 2), expected, weight)


def _mask_losses(
    layer: int,
    logits: Tensor,
    truth: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    drawn: DrawnPoints,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Return the mask loss and the dice loss, summed over the matched masks of one prediction."""
    matched = torch.cat([logits[image, queries] for image, (queries, _) in enumerate(pairs)])
    expected = torch.cat([truth[image][targets] for image, (_, targets) in enumerate(pairs)])
    image = torch.cat([torch.full_like(targets, image) for image, (_, targets) in enumerate(pairs)])
    target = torch.cat([targets for _, targets in pairs])
    candidates, fresh = (points[:] for points in drawn.of_rows(RowIndex(torch.full_like(image, layer), image, target)))
    with torch.no_grad():
        uncertain = int(config.num_points * config.importance_sample_ratio)
        most_uncertain = _sample(matched, candidates).abs().neg().topk(uncertain, dim=1).indices
        points = torch.cat((candidates.gather(1, most_uncertain[..., None].expand(-1, -1, 2)), fresh), dim=1)
        t = _sample(expected, points)
    x = _sample(matched, points)
    mask = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1).sum()
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
    return mask, dice.sum()


def _at_original_size(masks: Tensor, geometry: ImageGeometry) -> Tensor:
    """Resize mask logits [Q, h, w] of all queries to [Q, H, W], the original size."""
    masks = F.interpolate(masks[None], geometry.padded_size, mode="bilinear")
    masks = masks[..., : geometry.resized_size[0], : geometry.resized_size[1]]
    return F.interpolate(masks, geometry.original_size, mode="bilinear")[0]


def plain_semantic(class_logits: Tensor, masks: Tensor, geometry: ImageGeometry) -> Tensor:
    """Return the label map [H, W]: the class with the largest sum of class probability times mask probability."""
    masks = _at_original_size(masks, geometry).sigmoid()
    return torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], masks).argmax(0)


def plain_instance(
    class_logits: Tensor, masks: Tensor, geometry: ImageGeometry, config: PostprocessConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks [N, H, W], labels [N] and scores [N] of the best pairs of query and class."""
    logits = _at_original_size(masks, geometry)
    num_classes = class_logits.shape[-1] - 1
    scores, pairs = class_logits.softmax(-1)[:, :-1].flatten().topk(config.max_instances)
    logits = logits[pairs // num_classes]
    masks = (logits > 0).float()
    mask_scores = (logits.sigmoid().flatten(1) * masks.flatten(1)).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    return masks, pairs % num_classes, scores * mask_scores


def plain_panoptic(
    class_logits: Tensor,
    masks: Tensor,
    geometry: ImageGeometry,
    is_thing: Sequence[bool],
    config: PostprocessConfig,
) -> Tensor:
    """Return the segment map [H, W] int32: upsample all queries, filter them, and paint them one by one."""
    masks = _at_original_size(masks, geometry).sigmoid()
    scores, labels = class_logits.softmax(-1).max(-1)
    keep = (labels != class_logits.shape[-1] - 1) & (scores > config.object_threshold)
    scores, labels, masks = scores[keep], labels[keep], masks[keep]
    winner = (scores[:, None, None] * masks).argmax(0)
    segment_map = torch.zeros(geometry.original_size, dtype=torch.int32, device=masks.device)
    stuff, last = {}, 0
    for k, label in enumerate(labels.tolist()):
        inside = masks[k] >= 0.5
        painted = inside & (winner == k)
        if not painted.any() or (winner == k).sum().item() / inside.sum().item() < config.overlap_threshold:
            continue
        if label in stuff:
            segment_map[painted] = stuff[label]
            continue
        last += 1
        segment_map[painted] = last
        if not is_thing[label]:
            stuff[label] = last
    return segment_map
