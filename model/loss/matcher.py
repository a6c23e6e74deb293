"""Bipartite matching of predictions to targets, for all predictions and images of a micro-batch at once.

See paper section 3.1 (inherited from MaskFormer). The cost is computed at sampled points (section 3.3), or over whole
masks as in MaskFormer (Table 5).
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2f.model.config import LossConfig
from m2f.model.loss.box_points import assign_to_boxes
from m2f.model.loss.host_copies import HostCopy
from m2f.model.loss.mask_losses import pairwise_sums
from m2f.model.loss.point_sampling import LabelMaps, chunk_elements, sample_features
from m2f.model.structures import Predictions, Targets

TIE_BREAK = 2.0**-30
"""Largest tie-breaking term relative to the costs. It lies between the rounding of fp32 (2^-24) and of fp64 (2^-53)."""


class Matching(NamedTuple):
    """Assignment of queries to targets, on the host."""

    query_index: np.ndarray
    """[L, B, N] int64; -1 if a target has no query: not valid, weight 0, or more targets than queries."""
    finite: np.ndarray
    """[L, B] bool: whether every cost of the image was finite. If not, the assignment is meaningless."""


@dataclass(frozen=True)
class PendingMatching:
    """A matching whose costs are being copied to the host."""

    costs: HostCopy
    """The costs [L, B, Q, N], followed by [B, N] flags that are 1 for targets to match and otherwise 0, flattened."""
    cost_shape: torch.Size
    """Shape (L, B, Q, N) of the costs."""

    def result(self) -> Matching:
        """Wait for the costs and solve the images in threads. Meanwhile the device continues with queued work."""
        num_layers, num_images, _, num_targets = self.cost_shape
        on_host = self.costs.wait()
        split = self.cost_shape.numel()
        costs = on_host[:split].reshape(self.cost_shape)
        columns = on_host[split:].reshape(num_images, num_targets) > 0
        query_index = np.full((num_layers, num_images, num_targets), -1, dtype=np.int64)
        finite = np.ones((num_layers, num_images), dtype=bool)

        def solve(image: int) -> None:
            is_matched = columns[image]
            cost = costs[:, image][..., is_matched]
            finite[:, image] = np.isfinite(cost).all(axis=(1, 2))
            query_index[:, image][:, is_matched] = assign(cost)

        list(_solvers().map(solve, range(num_images)))
        return Matching(query_index, finite)


@functools.cache
def _solvers() -> ThreadPoolExecutor:
    """Return a thread pool for assignments. scipy's solver releases the interpreter lock."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="m2f-assign")


@torch.no_grad()
def start_matching(
    predictions: Predictions,
    targets: Targets,
    label_maps: LabelMaps,
    points: Tensor | None,
    config: LossConfig,
    boxes: Tensor | None = None,
) -> PendingMatching:
    """Queue the computation of all costs and one copy of them to the host, and return immediately.

    The arguments are those of `matching_cost`. The host solves the assignment in `result`. Meanwhile the device runs
    the work that the caller has queued after this call.
    """
    is_counted = targets.valid & (targets.weight > 0)[:, None]
    cost = matching_cost(predictions, targets, label_maps, points, config, boxes)
    return PendingMatching(HostCopy(torch.cat((cost.flatten(), is_counted.flatten().float()))), cost.shape)


def match(
    predictions: Predictions,
    targets: Targets,
    label_maps: LabelMaps,
    points: Tensor | None,
    config: LossConfig,
    boxes: Tensor | None = None,
) -> Matching:
    """Return the cheapest assignment for every prediction and image; see `start_matching` for the arguments.

    There are min(queries, targets) pairs per image. Of queries with equal costs, the lowest is assigned.
    """
    return start_matching(predictions, targets, label_maps, points, config, boxes).result()


def matching_cost(
    predictions: Predictions,
    targets: Targets,
    label_maps: LabelMaps,
    points: Tensor | None,
    config: LossConfig,
    boxes: Tensor | None = None,
) -> Tensor:
    """Return the cost [L, B, Q, N] of assigning a target to a query, in fp32.

    The cost is class_weight * -p(label) + mask_weight * BCE (or focal loss) + dice_weight * dice. It is computed at
    `points` [L, B, P, 2], or over whole masks if `points` is None. With `boxes` [B, N, 4] of the targets,
    `matching_box_share` of the points move into them. Columns of targets that are not valid are meaningless.
    """
    num_layers, _, num_queries, _ = predictions.class_logits.shape
    with torch.autocast(predictions.class_logits.device.type, enabled=False):
        if points is None:
            mask_cost = _cost_of_whole_masks(predictions, targets, config)
        else:
            mask_cost = _cost_at_points(predictions, targets, label_maps, points, config, boxes)
        labels = targets.labels[None, :, None].expand(num_layers, -1, num_queries, -1)
        class_cost = -predictions.class_logits.float().softmax(-1).gather(-1, labels)
        return mask_cost.add_(class_cost, alpha=config.class_weight)


def _cost_at_points(
    predictions: Predictions,
    targets: Targets,
    label_maps: LabelMaps,
    points: Tensor,
    config: LossConfig,
    boxes: Tensor | None,
) -> Tensor:
    """Return [L, B, Q, N] costs, computed for a few predictions at a time.

    Mask logits at the points are products of the embeddings with sampled features. Sampling is linear, so this equals
    sampling the dense logits, which is faster if the maps have fewer pixels than there are points.
    """
    _, num_images, num_queries, _ = predictions.class_logits.shape
    num_points, num_targets = points.shape[2], targets.labels.shape[1]
    num_in_boxes = 0 if boxes is None else int(num_points * config.matching_box_share)
    maps = predictions.feature_maps
    channels = predictions.mask_features.shape[1]
    per_point = num_images * (channels + 2 * num_queries + num_targets * (1 if boxes is None else 4))
    layers = max(1, chunk_elements(points.device) // (per_point * num_points))
    layers_per_map = len(points) // len(maps)  # predictions per feature map
    groups = zip(
        maps, predictions.mask_embeddings.float().split(layers_per_map), points.split(layers_per_map), strict=True
    )
    sample_logits = _sample_dense_logits if maps[0].shape[-2:].numel() < num_points else _multiply_sampled_features
    costs = []
    for feature_map, embeddings, points_of_map in groups:
        features = feature_map.float().permute(0, 2, 3, 1).contiguous()
        for embedding, chunk_points in zip(embeddings.split(layers), points_of_map.split(layers), strict=True):
            weights = None
            if boxes is not None:
                chunk_points, weights = assign_to_boxes(chunk_points, boxes, targets.valid, num_in_boxes)
            logits = sample_logits(embedding, features, chunk_points)
            labels = label_maps.images(targets.layer, targets.local_id, chunk_points)
            sums = pairwise_sums(logits, labels, config.mask_loss, weights)
            costs.append(sums.cost(num_points, config.mask_weight, config.dice_weight))
    return torch.cat(costs)


def _multiply_sampled_features(embeddings: Tensor, features: Tensor, points: Tensor) -> Tensor:
    """Return logits [l, B, Q, P] at points [l, B, P, 2] from embeddings [l, B, Q, C] and features [B, h, w, C]."""
    return torch.einsum("lbqc,lbpc->lbqp", embeddings, sample_features(features, points))


def _sample_dense_logits(embeddings: Tensor, features: Tensor, points: Tensor) -> Tensor:
    """Return the same as `_multiply_sampled_features`."""
    logits = torch.einsum("lbqc,bhwc->lbhwq", embeddings, features).flatten(0, 1)
    return sample_features(logits, points.flatten(0, 1)[None]).unflatten(1, points.shape[:2])[0].transpose(-1, -2)


def _cost_of_whole_masks(predictions: Predictions, targets: Targets, config: LossConfig) -> Tensor:
    """Return [L, B, Q, N] costs over all pixels of the stride-4 map, a piece of one prediction at a time.

    As in MaskFormer, targets are resized to the map by nearest-neighbour sampling.
    """
    num_images, num_queries = predictions.class_logits.shape[1:3]
    maps = predictions.feature_maps
    ids = F.interpolate(targets.id_maps.float(), predictions.mask_features.shape[-2:], mode="nearest").flatten(2)
    image = torch.arange(num_images, device=ids.device)[:, None]
    num_pixels = ids.shape[-1]
    per_pixel = num_images * (4 * num_queries + targets.labels.shape[1])
    step = max(1, chunk_elements(ids.device) // per_pixel)
    costs = []
    for layer, embedding in enumerate(predictions.mask_embeddings.float()):
        total, features = None, maps[layer % len(maps)].float().flatten(2)
        for pixels, piece in zip(features.split(step, dim=-1), ids.split(step, dim=-1), strict=True):
            labels = (piece[image, targets.layer] == targets.local_id[..., None]).float()
            sums = pairwise_sums(embedding @ pixels, labels, config.mask_loss)
            total = sums if total is None else total.plus(sums)
        assert total is not None  # a map has pixels
        costs.append(total.cost(num_pixels, config.mask_weight, config.dice_weight))
    return torch.stack(costs)


def assign(cost: np.ndarray) -> np.ndarray:
    """Return the query of each target [..., T], -1 if it has none, from costs [..., Q, T].

    A term far below the rounding of fp32 costs makes the optimum unique: ties go to the lowest queries, in the order of
    the targets. Non-finite costs count as 0; the caller records them.
    """
    *batch, num_queries, num_targets = cost.shape
    assigned = np.full((*batch, num_targets), -1, dtype=np.int64)
    if num_targets == 0:
        return assigned
    cost = np.where(np.isfinite(cost), cost, 0).astype(np.float64)
    preference = np.arange(num_queries)[:, None] * np.arange(num_targets, 0, -1) / (num_queries * num_targets)
    scale = np.abs(cost).min(axis=-2).max(axis=-1).clip(min=1.0)
    cost += TIE_BREAK * scale[..., None, None] * preference
    for place in np.ndindex(*batch):
        queries, columns = linear_sum_assignment(cost[place])
        assigned[place][columns] = queries
    return assigned
