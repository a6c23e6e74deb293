"""Training loss: classification of all queries, and mask and dice losses of matched queries.

See paper sections 3.2 and 3.3 and Table 5. Mask losses are computed at points or at every pixel. Every prediction of
the decoder is matched and supervised independently. Each loss is a local sum divided by a normaliser of the whole
optimizer step. Adding up micro-batches and ranks therefore gives the loss of the step, however its images are grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m2f.model.config import LossConfig
from m2f.model.loss.assignment import Assignment, PendingPilots, Rows, assign_columns, assigned_rows
from m2f.model.loss.box_points import box_weights, importance_density, move_into_boxes, share_within, target_boxes
from m2f.model.loss.mask_losses import MaskLoss, row_losses
from m2f.model.loss.matcher import start_matching
from m2f.model.loss.point_sampling import LabelMaps, chunk_elements, most_uncertain, sample_maps
from m2f.model.loss.points import DrawnPoints, PointCounts, PointSource, RowIndex
from m2f.model.pilots import Pilots
from m2f.model.structures import Predictions, Targets


class Normalizers(NamedTuple):
    """Denominators of the losses: sums over all micro-batches and ranks of one optimizer step.

    They are scalar float tensors, and may stay on the host while the predictions are on an accelerator.
    """

    num_masks: Tensor
    """[] number of valid targets."""
    class_weight_sum: Tensor
    """[] sum of the class weights of all queries of one prediction: 1 if matched, otherwise `no_object_weight`."""
    num_micro_batches: Tensor
    """[] number of micro-batches with at least one real image, not only fillers."""


class Losses(NamedTuple):
    """Weighted losses of a micro-batch. `total` and `per_image` have the same sum; `terms` excludes pilots."""

    total: Tensor
    """[] sum of all losses."""
    terms: Tensor
    """[L, 3] class, mask and dice loss of every prediction."""
    per_image: Tensor
    """[B] sum of all losses of each image."""


def count_normalizers(targets: Targets, num_queries: int, config: LossConfig) -> Normalizers:
    """Return the contribution of one micro-batch to the normalisers.

    It depends only on counts of targets, so it is known before the first forward pass.
    """
    num_targets = targets.valid.sum(1)
    matched = num_targets.clamp(max=num_queries)
    class_weight = matched + config.no_object_weight * (num_queries - matched)
    return Normalizers(
        num_masks=(targets.weight * num_targets).sum(),
        class_weight_sum=(targets.weight * class_weight).sum(),
        num_micro_batches=(targets.weight > 0).any().float(),
    )


def compute_losses(
    predictions: Predictions,
    targets: Targets,
    points: PointSource,
    normalizers: Normalizers,
    config: LossConfig,
    num_classes: int,
    pilots: Pilots | None = None,
) -> Losses:
    """Compute the losses of one micro-batch in fp32.

    Every prediction stays in the graph even if nothing is matched; its gradient is then zero, not missing. A non-finite
    matching cost makes the loss of its image and all its gradients non-finite. With pilots, the first queries of the
    predictions are pilots, which are supervised by their known targets without matching.
    """
    num_pilots = 0 if pilots is None else pilots.target.shape[1]
    matchable = _without_first(predictions, num_pilots)
    num_layers, _, num_queries, _ = matchable.class_logits.shape
    with torch.autocast(predictions.class_logits.device.type, enabled=False):
        maps = _full_precision_maps(predictions.feature_maps)
        matchable = matchable._replace(earlier_features=tuple(maps[:-1]), mask_features=maps[-1])
        label_maps = LabelMaps.pack(targets.id_maps)
        drawn = points.draw(targets.position, num_layers, point_counts(config))
        matching_points = drawn.matching if config.matching == "points" else None
        boxes = target_boxes(targets) if config.matching_box_share or config.supervision_box_share else None
        matching_boxes = boxes if config.matching_box_share else None
        pending = None if pilots is None else PendingPilots.start(pilots, targets)
        matching = start_matching(matchable, targets, label_maps, matching_points, config, matching_boxes)
        # Does not depend on the assignment, so the device works while the host solves it.
        log_probabilities = predictions.class_logits.float().log_softmax(-1)

        assignment = assign_columns(matching.result(), pending)
        rows = assigned_rows(assignment, log_probabilities.device)
        layer, image, target = rows.index
        class_losses = _class_losses(log_probabilities, targets, rows, num_pilots, config, num_classes)
        embeddings = predictions.mask_embeddings[layer, image, rows.query].float()
        logits = _assigned_mask_logits(embeddings, maps, assignment)
        if config.supervision == "points":
            row_boxes = boxes[image, target] if boxes is not None and config.supervision_box_share else None
            mask, dice = _losses_at_points(logits, targets, label_maps, rows, drawn, config, row_boxes)
        else:
            mask, dice = _losses_of_whole_masks(logits, targets, rows.index, config.mask_loss)

        num_masks = normalizers.num_masks.clamp(min=1)
        shape = (num_layers, *assignment.target.shape)
        mask_losses, dice_losses = (
            _sum_per_image(values * rows.factor, rows, shape, num_pilots) for values in (mask, dice)
        )
        # Denominators of the class losses of queries and of pilots.
        denominators = [_class_denominator(targets, num_queries, normalizers, config), num_masks]
        matched, *piloted = [
            _weighted(kinds, (denominator, num_masks, num_masks), targets, config)
            for kinds, denominator in zip(
                zip(class_losses, mask_losses, dice_losses, strict=True), denominators, strict=False
            )
        ]
        losses = sum(piloted, start=matched)
        return Losses(total=losses.sum(1).sum(), terms=matched.sum(1), per_image=losses.sum((0, 2)))


def _full_precision_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return the feature maps [B, C, h, w] in fp32, copied at most once for matching and losses together.

    Both read the maps as channels-last. On a CPU the layout stays as it is: converting the gradient back would cost
    more than it saves.
    """
    if maps[0].device.type == "cpu":
        return [features.float() for features in maps]
    return [features.to(torch.float32, memory_format=torch.channels_last) for features in maps]


def _without_first(predictions: Predictions, count: int) -> Predictions:
    """Return the predictions without the first `count` queries."""
    if count == 0:
        return predictions
    return predictions._replace(
        class_logits=predictions.class_logits[:, :, count:], mask_embeddings=predictions.mask_embeddings[:, :, count:]
    )


def _weighted(kinds: Sequence[Tensor], denominators: Sequence[Tensor], targets: Targets, config: LossConfig) -> Tensor:
    """Return [L, B, 3] weighted losses from class, mask and dice losses [L, B] each."""
    weights = config.class_weight, config.mask_weight, config.dice_weight
    terms = zip(weights, denominators, kinds, strict=True)
    return torch.stack([weight / number * loss for weight, number, loss in terms], dim=-1) * targets.weight[:, None]


def point_counts(config: LossConfig) -> PointCounts:
    """Return how many points a configuration draws for each use."""
    matching = config.num_points if config.matching == "points" else 0
    if config.supervision == "masks":
        return PointCounts(matching, 0, 0)
    in_boxes = _points_in_box(config)
    others = config.num_points - in_boxes
    fresh = others - int(others * config.importance_sample_ratio)
    return PointCounts(matching, int(others * config.oversample_ratio), fresh + in_boxes)


def _points_in_box(config: LossConfig) -> int:
    """Return how many points of a matched mask are drawn in its target's box. They are the last of the fresh points."""
    return int(config.num_points * config.supervision_box_share)


def _class_denominator(targets: Targets, num_queries: int, normalizers: Normalizers, config: LossConfig) -> Tensor:
    """Return the denominator of the class loss.

    `global`: the sum of class weights over the optimizer step. `per_rank`: the sum of this micro-batch times the number
    of micro-batches, which gives the mean over micro-batches.
    """
    denominator = normalizers.class_weight_sum
    if config.class_norm == "per_rank":
        own_sum = count_normalizers(targets, num_queries, config).class_weight_sum
        denominator = own_sum * normalizers.num_micro_batches
    return torch.where(denominator > 0, denominator, 1.0)  # if all weights are 0, every numerator is 0 as well


def _class_losses(
    log_probabilities: Tensor,
    targets: Targets,
    rows: Rows,
    num_pilots: int,
    config: LossConfig,
    num_classes: int,
) -> list[Tensor]:
    """Return the weighted cross-entropy [L, B], summed over queries. Queries without a target learn "no object".

    With pilots, a second tensor [L, B] has their cross-entropy. Pilots without a target have no loss.
    """
    layer, image, target = rows.index
    labels = torch.full(log_probabilities.shape[:-1], num_classes, device=log_probabilities.device)
    labels[layer, image, rows.query] = targets.labels[image, target]
    losses = F.nll_loss(log_probabilities.flatten(0, 2), labels.flatten(), reduction="none").view_as(labels)
    learns_object = labels != num_classes
    weighted = losses * torch.where(learns_object, 1.0, config.no_object_weight)
    if num_pilots == 0:
        return [weighted.sum(-1)]
    pilot_losses = torch.where(learns_object, losses, 0.0)[:, :, :num_pilots]
    return [weighted[:, :, num_pilots:].sum(-1), pilot_losses.sum(-1)]


def _assigned_mask_logits(embeddings: Tensor, maps: Sequence[Tensor], assignment: Assignment) -> Tensor:
    """Return dense mask logits [R, h, w] of the rows of an assignment, from their embeddings [R, C].

    Computes one product per image and map [B, C, h, w]. The rows are in the order image, prediction; every map serves
    the same number of predictions.
    """
    pairs = (assignment.query_index >= 0).sum(axis=2)  # [L, B]
    rows = pairs.T.reshape(pairs.shape[1] * len(maps), -1).sum(1).tolist()
    features = [feature for image in zip(*map(_flat_features, maps), strict=True) for feature in image]
    products = [embedding @ feature for embedding, feature in zip(embeddings.split(rows), features, strict=True)]
    return torch.cat(products).unflatten(1, maps[0].shape[2:])


def _flat_features(features: Tensor) -> list[Tensor]:
    """Return the features [C, h * w] of each image, without a copy and so that gradients keep the memory format."""
    if features.is_contiguous(memory_format=torch.channels_last):
        return [pixels.T for pixels in features.permute(0, 2, 3, 1).flatten(1, 2)]
    return list(features.flatten(2))


def _losses_at_points(
    logits: Tensor,
    targets: Targets,
    label_maps: LabelMaps,
    rows: Rows,
    drawn: DrawnPoints,
    config: LossConfig,
    boxes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return BCE or focal loss [R] and dice [R] of masks at importance-sampled points (paper section 3.3).

    With `boxes` [R, 4] of the rows' targets, some of the points lie in them, and all points are weighted.
    """
    points, labels, share = _training_points(logits.detach(), targets, label_maps, rows, drawn, config, boxes)
    values = sample_maps(logits, points)
    weights = None
    if boxes is not None:
        in_box = _points_in_box(config)
        num_kept = config.num_points - point_counts(config).fresh
        num_others = config.num_points - in_box - num_kept
        omega = importance_density(values.detach(), num_kept, num_others, share)
        weights = box_weights(points, boxes, omega, in_box)
    return row_losses(values, labels, config.mask_loss, weights)


def _losses_of_whole_masks(logits: Tensor, targets: Targets, rows: RowIndex, kind: MaskLoss) -> tuple[Tensor, Tensor]:
    """Return BCE or focal loss [R] and dice [R] over every pixel of the input, as in MaskFormer.

    Masks are resized to the input a few rows at a time. Full-size tensors are not kept but recomputed in the backward
    pass.
    """
    row_map, local_id = _row_targets(targets, rows)
    maps = targets.id_maps.flatten(0, 1)
    step = max(1, chunk_elements(logits.device) // (8 * maps[0].numel()))  # logits, labels and their temporaries
    pieces = zip(logits.split(step), row_map.split(step), local_id.split(step), strict=True)
    losses = [
        checkpoint(_full_size_losses, *piece, maps, kind, use_reentrant=False, preserve_rng_state=False)
        for piece in pieces
    ]
    mask, dice = zip(*losses, strict=True)
    return torch.cat(mask), torch.cat(dice)


def _full_size_losses(
    logits: Tensor, row_map: Tensor, local_id: Tensor, maps: Tensor, kind: MaskLoss
) -> tuple[Tensor, Tensor]:
    resized = F.interpolate(logits[:, None], maps.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    labels = maps[row_map] == local_id[:, None, None]
    return row_losses(resized.flatten(1), labels.flatten(1).to(logits.dtype), kind)


def _row_targets(targets: Targets, rows: RowIndex) -> tuple[Tensor, Tensor]:
    """Return two tensors [R]: the index into the flattened first two axes of the id maps, and the id in that map."""
    row_map = rows.image * targets.id_maps.shape[1] + targets.layer[rows.image, rows.target]
    return row_map, targets.local_id[rows.image, rows.target]


@torch.no_grad()
def _training_points(
    logits: Tensor,
    targets: Targets,
    label_maps: LabelMaps,
    rows: Rows,
    drawn: DrawnPoints,
    config: LossConfig,
    boxes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the points of the losses and look up their labels, in chunks of rows.

    Returns:
        Points [R, P, 2]: the most uncertain candidates, fresh points, and fresh points in `boxes` [R, 4] if given.
        Soft labels [R, P].
        Shares [R] of candidates at least as uncertain as the last selected one; 1 without boxes.
    """
    counts = point_counts(config)
    in_box = _points_in_box(config)
    num_uncertain = config.num_points - counts.fresh
    candidates, fresh = drawn.of_rows(rows.draw)
    row_map, local_id = _row_targets(targets, rows.index)
    all_points = logits.new_empty(len(logits), config.num_points, 2)
    all_labels = logits.new_empty(len(logits), config.num_points)
    all_shares = logits.new_ones(len(logits))
    step = max(1, chunk_elements(logits.device) // (8 * counts.candidates))  # coordinates, logits and their temporaries
    for start in range(0, len(logits), step):
        chunk = slice(start, start + step)
        proposed = candidates[chunk]
        values = sample_maps(logits[chunk], proposed)
        chosen = most_uncertain(values, num_uncertain)
        all_points[chunk, :num_uncertain] = proposed.gather(1, chosen[..., None].expand(-1, -1, 2))
        all_points[chunk, num_uncertain:] = fresh[chunk]
        if boxes is not None:
            first = config.num_points - in_box
            all_points[chunk, first:] = move_into_boxes(all_points[chunk, first:], boxes[chunk, None])
            all_shares[chunk] = share_within(values, chosen)
        all_labels[chunk] = label_maps.rows(row_map[chunk], local_id[chunk], all_points[chunk])
    return all_points, all_labels, all_shares


def _sum_per_image(values: Tensor, rows: Rows, shape: tuple[int, ...], num_pilots: int) -> list[Tensor]:
    """Return sums [L, B] of the rows' values [R] over target columns and, with pilots, over pilot columns.

    Values are scattered into `shape` (L, B, M) first, so that the order of summation is the same on every device.
    """
    layer, image, _ = rows.index
    padded = values.new_zeros(shape).index_put((layer, image, rows.column), values)
    if num_pilots == 0:
        return [padded.sum(-1)]
    return [columns.sum(-1) for columns in padded.split([shape[2] - num_pilots, num_pilots], dim=-1)]
