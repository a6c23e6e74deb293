"""Benchmark of post-processing one large image, against a baseline that resizes all queries to full size.

Both sides include the product of embeddings and features, which is the last operation of the published model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Measurement, compare
from benchmarks.peers.official_order import plain_instance, plain_panoptic, plain_semantic
from benchmarks.synthetic_batches import confident_predictions
from m2f.model.config import PostprocessConfig
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.inference.postprocess import instance, panoptic, semantic

SIZE = (1024, 2048)
CLASSES = 20
"""Number of classes, about that of Cityscapes, whose image size is SIZE."""
CONFIG = PostprocessConfig()
IS_THING = [k > 1 for k in range(CLASSES)]


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure `confident_predictions` at the size of a Cityscapes image; `tiny`: panoptic only."""
    class_logits, embeddings, features = (tensor.to(device) for tensor in confident_predictions(SIZE, CLASSES))
    torch.manual_seed(0)
    class_logits = class_logits + 0.1 * torch.randn(class_logits.shape).to(device)  # makes all scores distinct
    geometry = ImageGeometry(SIZE, SIZE, SIZE)
    inputs = (class_logits, embeddings, features, geometry)
    repeats = 20 if device.type != "cpu" else 1 if tiny else 5

    def dense() -> Tensor:
        return torch.einsum("qc,chw->qhw", embeddings, features)

    def our_panoptic() -> Sequence[Tensor]:
        result = panoptic(*inputs, IS_THING, CONFIG)
        assert len(result.segments) >= 8, "too few segments for meaningful times"
        return [result.segment_map.double()]

    def our_instance() -> Sequence[Tensor]:
        result = instance(*inputs, [True] * CLASSES, CONFIG)
        return _in_order(result.masks.sum((1, 2))[result.mask_index], result.labels, result.scores)

    def plain_instances() -> Sequence[Tensor]:
        masks, labels, scores = plain_instance(class_logits, dense(), geometry, CONFIG)
        return _in_order(masks.sum((1, 2)), labels, scores)

    measure = partial(
        compare,
        shape=f"100 queries, {SIZE[0]} x {SIZE[1]}",
        peer_name="plain procedure",
        repeats=repeats,
        device=device,
        memory=True,
    )
    panoptic_row = measure(
        "panoptic post-processing",
        ours=our_panoptic,
        peer=lambda: [plain_panoptic(class_logits, dense(), geometry, IS_THING, CONFIG).double()],
        tolerance=0.0,
    )
    if tiny:
        return [panoptic_row]
    semantic_row = measure(
        "semantic post-processing",
        ours=lambda: [semantic(*inputs, CONFIG).label_map.double()],
        peer=lambda: [plain_semantic(class_logits, dense(), geometry).double()],
        tolerance=0.0,
    )
    instance_row = measure("instance post-processing", ours=our_instance, peer=plain_instances, tolerance=1e-5)
    return [panoptic_row, semantic_row, instance_row]


def _in_order(areas: Tensor, labels: Tensor, scores: Tensor) -> Sequence[Tensor]:
    """Sort each tensor separately, because instances with almost equal scores may be in a different order."""
    return [values.double().sort().values for values in (areas, labels, scores)]
