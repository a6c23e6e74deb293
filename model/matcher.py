"""Bipartite matching of predictions with ground truth, for all predictions and images of a micro-batch at once.

Paper section 3.1 (inherited from MaskFormer) with the cost on sampled points of section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from model.config import LossConfig
from model.point_sampling import LabelMaps, chunk_elements, sample_features
from model.structures import Predictions, Targets

TIE_BREAK = 2.0**-30
"""Largest tie-breaking term relative to the costs that an assignment uses; fp32 rounds at 2^-24, fp64 at 2^-53."""


class Matching(NamedTuple):
    """Assignment of queries to targets."""

    query_index: Tensor
    """[L, B, N] int64 on the host; -1 where a target has none: not valid, weight 0, or more targets than queries."""
    finite: Tensor
    """[L, B] bool on the device: whether every cost of the image was finite. If not, the assignment means nothing."""


@torch.no_grad()
def match(
    predictions: Predictions, targets: Targets, label_maps: LabelMaps, points: Tensor, config: LossConfig
) -> Matching:
    """Cheapest assignment for every prediction and image at the given points [L, B, P, 2].

    min(queries, targets) pairs per image. Equal costs go to the lowest query. One copy from device to host.
    """
    counted = targets.valid & (targets.weight > 0)[:, None]
    cost = matching_cost(predictions, targets, label_maps, points, config)
    finite = (cost.isfinite() | ~counted[:, None]).all(-1).all(-1)
    on_host = torch.cat((cost.flatten(), counted.flatten().float())).cpu().numpy()
    costs = on_host[: cost.numel()].reshape(cost.shape)
    columns = on_host[cost.numel() :].reshape(counted.shape) > 0
    query_index = np.full((cost.shape[0], *counted.shape), -1, dtype=np.int64)
    for image, valid in enumerate(columns):
        if valid.any():
            for layer in range(len(costs)):
                query_index[layer, image, valid] = assign(costs[layer, image][:, valid])
    return Matching(torch.from_numpy(query_index), finite)


def matching_cost(
    predictions: Predictions, targets: Targets, label_maps: LabelMaps, points: Tensor, config: LossConfig
) -> Tensor:
    """Cost [L, B, Q, N] of giving a target to a query, in fp32; columns of targets that are not valid mean nothing.

    class_weight * -p(label) + mask_weight * BCE + dice_weight * dice. Mask logits at the points are products of the
    embeddings with sampled features: sampling is linear, so this equals sampling the dense logits.
    """
    num_layers, num_images, num_queries, _ = predictions.class_logits.shape
    with torch.autocast(points.device.type, enabled=False):
        features = predictions.mask_features.float().permute(0, 2, 3, 1).contiguous()
        embeddings = predictions.mask_embeddings.float()
        per_point = num_images * (features.shape[-1] + 2 * num_queries + targets.labels.shape[1])
        layers = max(1, chunk_elements(points.device) // (per_point * points.shape[2]))
        mask_cost = torch.cat(
            [
                _mask_cost(
                    torch.einsum("lbqc,lbpc->lbqp", embedding, sample_features(features, at)),
                    label_maps.images(targets.layer, targets.local_id, at),
                    config,
                )
                for embedding, at in zip(embeddings.split(layers), points.split(layers), strict=True)
            ]
        )
        labels = targets.labels[None, :, None].expand(num_layers, -1, num_queries, -1)
        class_cost = -predictions.class_logits.float().softmax(-1).gather(-1, labels)
        return mask_cost.add_(class_cost, alpha=config.class_weight)


def _mask_cost(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """BCE and dice of all pairs [l, B, Q, N] from logits [l, B, Q, P] (overwritten) and labels [l, B, N, P].

    BCE(x, t) = softplus(x) - x * t, so its sum over points is a row sum and one product.
    """
    softplus = F.softplus(logits).sum(-1, keepdim=True)
    bce = (softplus - logits @ labels.transpose(-1, -2)) / logits.shape[-1]
    probabilities = logits.sigmoid_()
    area = probabilities.sum(-1, keepdim=True) + labels.sum(-1)[..., None, :]
    dice = 1 - (2 * (probabilities @ labels.transpose(-1, -2)) + 1) / (area + 1)
    return config.mask_weight * bce + config.dice_weight * dice


def assign(cost: np.ndarray) -> np.ndarray:
    """Query of each target [T], -1 where it has none, for a finite or non-finite cost [Q, T].

    A term far below the rounding of fp32 costs makes the optimum unique among equals: the lowest queries are taken, in
    the order of the targets. Non-finite entries count as 0 here; the caller has noted them.
    """
    cost = np.where(np.isfinite(cost), cost, 0).astype(np.float64)
    num_queries, num_targets = cost.shape
    preference = np.arange(num_queries)[:, None] * np.arange(num_targets, 0, -1) / (num_queries * num_targets)
    scale = max(1.0, float(np.abs(cost).min(axis=0).max()))
    queries, columns = linear_sum_assignment(cost + TIE_BREAK * scale * preference)
    assigned = np.full(num_targets, -1, dtype=np.int64)
    assigned[columns] = queries
    return assigned
