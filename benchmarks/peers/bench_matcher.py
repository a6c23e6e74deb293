"""Benchmark of matching alone: all predictions and images at once, against one image and prediction at a time.

The time of the peer does not include its dense mask logits. Both use the same points and must find the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import Measurement, compare
from benchmarks.peers.official_order import official_assignment
from benchmarks.synthetic_batches import LAYERS, dense_masks, make_batch, random_predictions
from m2f.model.config import LossConfig
from m2f.model.loss.criterion import point_counts
from m2f.model.loss.matcher import match
from m2f.model.loss.point_sampling import LabelMaps
from m2f.model.loss.points import CounterPoints


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Return one measurement per number of objects (on a GPU: per number of images)."""
    if device.type == "cpu":
        return [_case(1, 256 if tiny else 1024, count, device, repeats=3) for count in ((11,) if tiny else (11, 25))]
    return [_case(images, 1024, 11, device, repeats=20) for images in ((2,) if tiny else (1, 2, 8))]


@torch.no_grad()
def _case(images: int, size: int, objects: int, device: torch.device, repeats: int) -> Measurement:
    predictions = random_predictions(images, size, device)
    targets, config = make_batch(images, size, objects).targets.to(device), LossConfig()
    drawn = CounterPoints(seed=0).draw(targets.position, LAYERS, point_counts(config))
    truth = dense_masks(targets)
    logits = [predictions.mask_logits(layer) for layer in range(LAYERS)]

    def ours() -> Sequence[Tensor]:
        maps = LabelMaps.pack(targets.id_maps)
        return [torch.from_numpy(match(predictions, targets, maps, drawn.matching, config).query_index).double()]

    def official() -> Sequence[Tensor]:
        query_index = torch.full((LAYERS, images, objects), -1)
        for layer, masks in enumerate(logits):
            for b, image_truth in enumerate(truth):
                queries, columns = official_assignment(
                    predictions.class_logits[layer, b],
                    masks[b],
                    targets.labels[b],
                    image_truth,
                    drawn.matching[layer, b],
                    config,
                )
                query_index[layer, b, columns.cpu()] = queries.cpu()
        return [query_index.double()]

    shape_text = f"{images} x {size} x {size}, {objects} masks"
    return compare("matcher", shape_text, ours, "official order", official, 0.0, repeats, device, memory=True)
