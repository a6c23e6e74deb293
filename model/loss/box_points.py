"""Points in boxes around targets, with weights that keep every weighted sum of a loss unbiased.

Uniform points miss small targets: 12544 points on 1024 x 1024 pixels are one point per 84 pixels. This module draws
some of the points in boxes around targets. Every point, whether uniform or in a box, has the weight omega / q. Here
omega is the density of points in the unmodified loss (1 if uniform), and q is their density here. This is the balance
heuristic of Veach and Guibas, SIGGRAPH 1995. Weighted sums therefore have the same expectation as sums over points of
density omega.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2f.model.structures import Targets
from m2f.model.target_pixels import pixel_owners

GROWTH = 0.5
"""Share of its side by which a box grows in each direction, so that slightly misplaced predictions also lie inside."""
MIN_GROWTH = 4.0
"""Minimum growth in pixels: one pixel of the stride-4 map of mask logits."""


@torch.no_grad()
def target_boxes(targets: Targets) -> Tensor:
    """Return enlarged boxes [B, N, 4] (left, top, right, bottom) in [0, 1] around the pixels of every target.

    A target without pixels, including padding, gets the whole map.
    """
    height, width = targets.id_maps.shape[-2:]
    images, num_targets = targets.labels.shape
    device, longer_side = targets.id_maps.device, max(height, width)
    place = torch.arange(longer_side, device=device)
    # Columns, then rows, that every target occupies; the last index collects pixels without a target.
    number = torch.arange(num_targets, device=device).expand(images, -1)
    column = pixel_owners(targets, number, num_targets) * longer_side
    row = column + (num_targets + 1) * longer_side + place[:height, None]
    occupied = torch.zeros(images, 2 * (num_targets + 1) * longer_side, dtype=torch.bool, device=device)
    for index in (column + place[:width], row):
        occupied = occupied.scatter_(1, index.flatten(1), True)
    occupied = occupied.view(images, 2, num_targets + 1, longer_side)[:, :, :num_targets]
    low = torch.where(occupied, place, longer_side).amin(-1)  # [B, 2, N]
    high = torch.where(occupied, place + 1, 0).amax(-1)
    growth = ((high - low) * GROWTH).clamp(min=MIN_GROWTH)
    size = torch.full((2, 1), width, device=device)
    size[1] = height
    ends = torch.cat(((low - growth) / size, (high + growth) / size), 1).clamp(0, 1)
    whole_map = (torch.arange(4, device=device) // 2)[:, None]  # coordinates 0, 0, 1, 1
    return torch.where((high > 0).repeat(1, 2, 1), ends, whole_map).transpose(1, 2)


def move_into_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Map points [..., 2] of the unit square into their boxes [..., 4]. Both borders of a box belong to it."""
    low, high = boxes.split(2, dim=-1)
    return low + points * (high - low)


def assign_to_boxes(points: Tensor, boxes: Tensor, valid: Tensor, num_in_boxes: int) -> tuple[Tensor, Tensor]:
    """Move the last `num_in_boxes` points of each set into the boxes of the image's valid targets, in turn.

    Without valid targets, the points do not move.

    Args:
        points: [l, B, P, 2] in the unit square.
        boxes: [B, N, 4] boxes of the targets.
        valid: [B, N] bool; valid targets come first.
        num_in_boxes: points of each set that move.

    Returns:
        The points [l, B, P, 2].
        Weights [l, B, P], shared by all pairs of queries and targets; at most P / (P - num_in_boxes).
    """
    num_points = points.shape[2]
    if boxes.shape[1] == 0 or num_in_boxes == 0:
        return points, torch.ones_like(points[..., 0])
    num_valid = valid.sum(1, keepdim=True).clamp(min=1)  # without targets, the first box is the whole map
    box_index = torch.arange(num_in_boxes, device=points.device) % num_valid
    own_box = boxes.gather(1, box_index[..., None].expand(-1, -1, 4))
    uniform, assigned = points.split((num_points - num_in_boxes, num_in_boxes), dim=2)
    points = torch.cat((uniform, move_into_boxes(assigned, own_box)), dim=2)

    number = torch.arange(boxes.shape[1], device=points.device)
    points_per_box = (num_in_boxes - number + num_valid - 1).div(num_valid, rounding_mode="floor") * (
        number < num_valid
    )
    rate = points_per_box / (num_points * _areas(boxes))
    inside = _is_inside(points[..., None, :], boxes[:, None])
    density = (inside * rate[:, None]).sum(-1) + (num_points - num_in_boxes) / num_points
    return points, 1 / density


def box_weights(points: Tensor, boxes: Tensor, omega: Tensor | float, num_in_boxes: int) -> Tensor:
    """Return the weights [R, P] of points [R, P, 2], at most P / (P - num_in_boxes).

    `num_in_boxes` of the points lie in the row's box [R, 4]. The others have the density `omega` [R, P].
    """
    share = num_in_boxes / points.shape[1]
    in_box = _is_inside(points, boxes[:, None]) * (share / _areas(boxes))[:, None]
    return omega / ((1 - share) * omega + in_box)


def share_within(logits: Tensor, kept: Tensor) -> Tensor:
    """Return the share [R] of candidates that are at least as uncertain as the least uncertain one kept.

    `logits` [R, C] are those of the candidates; `kept` [R, K] are indices of the kept ones. Uncertainty is nearness to
    0. The share is K / C unless there are ties with the last one kept; on a constant map it is 1.
    """
    if kept.shape[1] == 0:
        return logits.new_ones(len(logits))
    distance = logits.abs()
    return (distance <= distance.gather(1, kept).amax(1, keepdim=True)).float().mean(1)


def importance_density(logits: Tensor, num_kept: int, num_others: int, share_within: Tensor) -> Tensor:
    """Return the density omega [R, P] of importance-sampled points.

    The first `num_kept` points of a row are the most uncertain candidates; the next `num_others` are uniform. The
    density has two values: a high one if the logit is at least as near to 0 as at the kept points, and a lower one
    elsewhere.

    Args:
        logits: [R, P] at all points of the rows.
        num_kept: number of kept candidates, which come first in every row.
        num_others: number of uniform points.
        share_within: [R] as returned by the function of this name.
    """
    total = num_kept + num_others
    if num_kept == 0:
        return torch.ones_like(logits)
    distance = logits.abs()
    limit = distance[:, :num_kept].amax(1, keepdim=True)
    return (distance <= limit) * (num_kept / total / share_within)[:, None] + num_others / total


def _is_inside(points: Tensor, boxes: Tensor) -> Tensor:
    low, high = boxes.split(2, dim=-1)
    return ((points >= low) & (points <= high)).all(-1)


def _areas(boxes: Tensor) -> Tensor:
    low, high = boxes.split(2, dim=-1)
    return (high - low).prod(-1)
