"""Points in boxes around targets, and weights that keep what every weighted sum of a loss estimates.

Uniform points miss small targets: of 12544 points on 1024 x 1024 pixels, one falls on every 84. Here a part of the
points is drawn in boxes around targets, and every point, whichever part drew it, has the weight omega / q: the density
that the loss asks for (1 where it is uniform) over the density of all parts together (the balance heuristic of Veach
and Guibas, SIGGRAPH 1995). Weighted sums therefore have the expectation of sums at points of density omega.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2f.model.structures import Targets
from m2f.model.target_pixels import pixel_owners

GROWTH = 0.5
"""Share of its side by which a box grows in each direction: predictions that are a little off lie inside, too."""
MIN_GROWTH = 4.0
"""Pixels by which a box grows at least: one pixel of the map of mask logits."""


@torch.no_grad()
def target_boxes(targets: Targets) -> Tensor:
    """Grown boxes [B, N, 4] (left, top, right, bottom) in [0, 1] around the pixels of every target.

    A target without a pixel, and padding of the targets, has the whole map.
    """
    height, width = targets.id_maps.shape[-2:]
    images, num_targets = targets.labels.shape
    device, longer = targets.id_maps.device, max(height, width)
    place = torch.arange(longer, device=device)
    # Which columns, then which rows, every target occupies; the last one stands for pixels of no target.
    number = torch.arange(num_targets, device=device).expand(images, -1)
    column = pixel_owners(targets, number, num_targets) * longer
    row = column + (num_targets + 1) * longer + place[:height, None]
    occupied = torch.zeros(images, 2 * (num_targets + 1) * longer, dtype=torch.bool, device=device)
    for index in (column + place[:width], row):
        occupied = occupied.scatter_(1, index.flatten(1), True)
    occupied = occupied.view(images, 2, num_targets + 1, longer)[:, :, :num_targets]
    low = torch.where(occupied, place, longer).amin(-1)  # [B, 2, N]
    high = torch.where(occupied, place + 1, 0).amax(-1)
    growth = ((high - low) * GROWTH).clamp(min=MIN_GROWTH)
    size = torch.full((2, 1), width, device=device)
    size[1] = height
    ends = torch.cat(((low - growth) / size, (high + growth) / size), 1).clamp(0, 1)
    whole_map = (torch.arange(4, device=device) // 2)[:, None]  # ends 0, 0, 1, 1
    return torch.where((high > 0).repeat(1, 2, 1), ends, whole_map).transpose(1, 2)


def move_into_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Points [..., 2] of the unit square, mapped into their boxes [..., 4]; both ends of a box belong to it."""
    low, high = boxes.split(2, dim=-1)
    return low + points * (high - low)


def deal_to_boxes(points: Tensor, boxes: Tensor, valid: Tensor, num_in_boxes: int) -> tuple[Tensor, Tensor]:
    """Deal the last `num_in_boxes` of points [l, B, P, 2] to the boxes [B, N, 4] of their image's valid targets [B, N].

    One point for each target in turn. Without targets they stay where they are. Also returns the weights [l, B, P],
    which all pairs of queries and targets share, at most P / (P - num_in_boxes).
    """
    num_points = points.shape[2]
    if boxes.shape[1] == 0 or num_in_boxes == 0:
        return points, torch.ones_like(points[..., 0])
    dealers = valid.sum(1, keepdim=True).clamp(min=1)  # without targets the first box is the whole map
    turn = torch.arange(num_in_boxes, device=points.device) % dealers
    own_box = boxes.gather(1, turn[..., None].expand(-1, -1, 4))
    uniform, dealt = points.split((num_points - num_in_boxes, num_in_boxes), dim=2)
    points = torch.cat((uniform, move_into_boxes(dealt, own_box)), dim=2)

    number = torch.arange(boxes.shape[1], device=points.device)
    received = (num_in_boxes - number + dealers - 1).div(dealers, rounding_mode="floor") * (number < dealers)
    rate = received / (num_points * _areas(boxes))
    inside = _is_inside(points[..., None, :], boxes[:, None])
    density = (inside * rate[:, None]).sum(-1) + (num_points - num_in_boxes) / num_points
    return points, 1 / density


def box_weights(points: Tensor, boxes: Tensor, omega: Tensor | float, num_in_boxes: int) -> Tensor:
    """Weights [R, P] of points [R, P, 2], of which `num_in_boxes` lie in the row's box [R, 4] and the others have the
    density `omega` [R, P]; at most P / (P - num_in_boxes)."""
    share = num_in_boxes / points.shape[1]
    in_box = _is_inside(points, boxes[:, None]) * (share / _areas(boxes))[:, None]
    return omega / ((1 - share) * omega + in_box)


def share_within(logits: Tensor, kept: Tensor) -> Tensor:
    """Share [R] of the candidates, of logits [R, C], that are as near to 0 as one of those that are kept [R, K].

    K / C, but for candidates that are exactly as near as the last one kept: on a constant map, all of them.
    """
    if kept.shape[1] == 0:
        return logits.new_ones(len(logits))
    distance = logits.abs()
    return (distance <= distance.gather(1, kept).amax(1, keepdim=True)).float().mean(1)


def importance_density(logits: Tensor, num_kept: int, num_others: int, share_within: Tensor) -> Tensor:
    """Density omega [R, P] at points with these logits [R, P], of which importance sampling kept the first `num_kept`.

    Keeping the most uncertain candidates and adding `num_others` uniform points gives two densities: one where the
    logit is at least as near to 0 as at the kept points, a lower one elsewhere.

    Args:
        logits: at all points of the rows.
        num_kept: kept candidates, first in every row.
        num_others: uniform points that were added to them.
        share_within: [R] as the function of this name gives.
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
