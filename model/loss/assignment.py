"""Pairs of queries and targets that the losses supervise: matched queries, and pilots, whose targets are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2f.model.loss.host_copies import HostCopy, to_device
from m2f.model.loss.matcher import Matching
from m2f.model.loss.points import RowIndex
from m2f.model.pilots import Pilots
from m2f.model.structures import Targets

_PILOT = 2**32
"""Offset added to a pilot's target index when points are drawn, so that pilot and matched query get different
points."""


class Assignment(NamedTuple):
    """Queries assigned to targets, on the host. Every image has M columns: its targets, followed by its pilots."""

    query_index: np.ndarray
    """[L, B, M] int64 index among all queries, pilots first; -1 if the column has no query."""
    finite: np.ndarray
    """[L, B] bool: whether every matching cost of the image was finite."""
    target: np.ndarray
    """[B, M] int64 target of every column."""
    draw: np.ndarray
    """[B, M] int64 key of every column's points: the target, with an offset for pilots."""


class Rows(NamedTuple):
    """The pairs of an assignment on the device, in the order image, prediction, column."""

    index: RowIndex
    """Prediction, image and target of every row."""
    draw: RowIndex
    """Keys of the points of every row."""
    column: Tensor
    """[R] int64 column of the assignment."""
    query: Tensor
    """[R] int64 index among all queries, pilots first."""
    factor: Tensor
    """[R] float: 1, or NaN if a matching cost of the image was not finite."""


@dataclass(frozen=True)
class PendingPilots:
    """The targets of the pilots while they are copied to the host."""

    copy: HostCopy
    """[2, B, N] int64: the target index, and 1 if the pilot is valid, else 0."""
    first_prediction: int
    """Index of the first prediction in which pilots have a loss."""

    @staticmethod
    def start(pilots: Pilots, targets: Targets) -> PendingPilots:
        """Queue the copy and return immediately. Pilots of images with weight 0 are marked as not valid."""
        is_counted = pilots.valid & (targets.weight > 0)[:, None]
        return PendingPilots(HostCopy(torch.stack((pilots.target, is_counted.long()))), pilots.first_prediction)


def assign_columns(matching: Matching, pilots: PendingPilots | None) -> Assignment:
    """Combine the matched pairs with the pilots' pairs. This waits for the copy of the pilots' targets."""
    query_index = matching.query_index
    num_layers, num_images, num_targets = query_index.shape
    target = np.broadcast_to(np.arange(num_targets), (num_images, num_targets))
    if pilots is None:
        return Assignment(query_index, matching.finite, target, target)
    pilot_targets, valid = pilots.copy.wait()
    pilot_index = np.arange(pilot_targets.shape[1])
    is_supervised = (np.arange(num_layers) >= pilots.first_prediction)[:, None, None] & (valid > 0)
    matched = np.where(query_index < 0, -1, query_index + len(pilot_index))
    return Assignment(
        query_index=np.concatenate((matched, np.where(is_supervised, pilot_index, -1)), axis=2),
        finite=matching.finite,
        target=np.concatenate((target, pilot_targets), axis=1),
        draw=np.concatenate((target, pilot_targets + _PILOT), axis=1),
    )


def assigned_rows(assignment: Assignment, device: torch.device) -> Rows:
    """Return the rows of an assignment, transferred to the device in one copy."""
    by_image = assignment.query_index.swapaxes(0, 1)
    image, layer, column = found = (by_image >= 0).nonzero()
    target, draw = assignment.target[image, column], assignment.draw[image, column]
    rows = (layer, image, target, draw, column, by_image[found], assignment.finite[layer, image])
    layers, images, targets, draws, columns, queries, finite = to_device(np.stack(rows), device)
    return Rows(
        index=RowIndex(layers, images, targets),
        draw=RowIndex(layers, images, draws),
        column=columns,
        query=queries,
        factor=torch.where(finite > 0, 1.0, torch.nan),
    )
