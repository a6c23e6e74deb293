"""Synthetic batches with a given number of objects: id maps for our code, dense masks for peers."""

from __future__ import annotations

import torch
from torch import Tensor

from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.structures import Predictions, Targets

CLASSES = 133
"""Number of classes, as in COCO panoptic."""
OBJECTS = 10
"""Number of objects per image, about as many as in COCO."""
LAYERS, QUERIES, CHANNELS = 10, 100, 256
"""Predictions with a loss, queries and channels of the paper's R50 model."""


def make_batch(images: int, size: int, objects: int, seed: int = 0) -> Batch:
    """Return a batch of random images [size, size], each divided into `objects` regions around random centres."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(0, 1, size)
    coordinates = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    id_maps = torch.empty(images, 1, size, size, dtype=torch.uint8)
    for id_map in id_maps:
        nearest, distance = torch.zeros(size, size), torch.full((size, size), torch.inf)
        for number, centre in enumerate(torch.rand(objects, 2, generator=generator), start=1):
            square_distance = (coordinates - centre[:, None, None]).square().sum(0)
            nearest[square_distance < distance] = number
            distance = torch.minimum(distance, square_distance)
        id_map[0] = nearest
    shape = (images, objects)
    targets = Targets(
        id_maps=id_maps,
        labels=torch.randint(0, CLASSES, shape, generator=generator),
        layer=torch.zeros(shape, dtype=torch.int64),
        local_id=torch.arange(1, objects + 1).repeat(images, 1),
        valid=torch.ones(shape, dtype=torch.bool),
        weight=torch.ones(images),
        dataset=torch.zeros(images, dtype=torch.int64),
        position=torch.arange(images),
    )
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    return Batch(
        images=pixels.contiguous(memory_format=torch.channels_last),
        targets=targets,
        keys=tuple(map(str, range(images))),
        sizes=torch.full((images, 2), size),
        dropped_targets=0,
    )


def random_predictions(images: int, size: int, device: torch.device) -> Predictions:
    """Return ten random predictions of 100 queries (nine decoder layers and the initial queries) for square images."""
    generator = torch.Generator().manual_seed(0)
    shape = (LAYERS, images, QUERIES)
    tensors = (
        torch.randn(*shape, CLASSES + 1, generator=generator),
        torch.randn(*shape, CHANNELS, generator=generator) / CHANNELS**0.5,
        torch.randn(images, CHANNELS, size // 4, size // 4, generator=generator),
    )
    return Predictions(*(tensor.to(device) for tensor in tensors))


def dense_masks(targets: Targets) -> list[Tensor]:
    """Return the masks [N, H, W] float32 of the valid targets of each image, in the form that peers expect."""
    images = zip(targets.id_maps, targets.layer, targets.local_id, targets.valid, strict=True)
    return [(maps[layer[valid]] == ids[valid, None, None]).float() for maps, layer, ids, valid in images]


def confident_predictions(size: tuple[int, int], num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last prediction for one image of `size` (height, width) pixels, with confident queries.

    The tensors are class logits [100, K + 1], mask embeddings [100, 256] and mask features [256, H / 4, W / 4]. Twelve
    queries with high class scores cover the image; the scores of the other 88 are low.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.linalg.qr(torch.randn(256, 100, generator=generator))[0].T.contiguous()
    centers = torch.rand(100, 2, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0] // 4), torch.linspace(0, 1, size[1] // 4), indexing="ij")
    distance = ((torch.stack((y, x)) - centers) * torch.tensor([1.0, 2.0])[:, None, None]).square().sum(1).sqrt()
    nearest_query = distance[:12].argmin(0)
    logits = (
        torch.where(nearest_query == torch.arange(100)[:, None, None], 5.0, -5.0)
        + torch.randn(100, *nearest_query.shape, generator=generator) * 0.5
    )
    features = (embeddings.T @ logits.flatten(1)).view(256, *nearest_query.shape)
    class_logits = torch.full((100, num_classes + 1), -4.0)
    class_logits[torch.arange(100), torch.arange(100) % num_classes] = torch.where(torch.arange(100) < 12, 5.0, -1.0)
    class_logits[12:, -1] = 1.0
    return class_logits, embeddings, features
