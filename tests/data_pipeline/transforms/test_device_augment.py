import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from m2f.data_pipeline.config import (
    CopyPasteConfig,
    DataConfig,
    DatasetConfig,
    LargeScaleJitter,
    MixtureItem,
    ScaleJitter,
    ShortestEdgeCrop,
    SyntheticSource,
)
from m2f.data_pipeline.loading.loader import LoaderSpec, build_loader
from m2f.data_pipeline.order.order import build_order
from m2f.data_pipeline.randomness import Stream, sample_rng
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.augment import augment, draw_params, plan_cut
from m2f.data_pipeline.transforms.augment_on_device import render, stack_cuts, stack_sources
from m2f.data_pipeline.transforms.collate import Batch, SourceBatch
from m2f.model.errors import ConfigError

LSJ = LargeScaleJitter(size=96, min_scale=0.1, max_scale=2.0)
STREET = ShortestEdgeCrop(shortest_edges=(40, 60, 110), max_size=300, crop=(64, 96))


def noise_image(rng, height, width):
    """Neighbouring pixels differ as much as they can, so that a shift by a fraction of a pixel shows."""
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def both_ways(config, canvas, count=40):
    """The same images by loader process and by tensors, with a filler between them."""
    rng = np.random.default_rng(0)
    images = [noise_image(rng, *rng.integers(20, 130, 2)) for _ in range(count)]
    params = [draw_params(sample_rng(1, n, Stream.AUGMENT), i.shape[:2], config) for n, i in enumerate(images)]
    slow = [
        augment(image, np.zeros((1, *image.shape[:2]), np.uint8), p, 255).image
        for image, p in zip(images, params, strict=True)
    ]
    cuts = [plan_cut(image.shape[:2], p) for image, p in zip(images, params, strict=True)]
    sources = [cut.source(image) for cut, image in zip(cuts, images, strict=True)]
    filler = np.zeros((1, 1, 3), np.uint8)
    fast = render(stack_sources([*sources, filler]), stack_cuts([*cuts, None]), canvas)
    assert fast.is_contiguous(memory_format=torch.channels_last)
    assert (fast[-1] == 128).all()
    return fast[:-1].permute(0, 2, 3, 1).numpy().astype(int), np.stack(slow).astype(int)


@pytest.mark.parametrize(
    ("config", "canvas", "levels"),
    [
        (LSJ, (96, 96), 1),
        (replace(LSJ, shrink="bilinear"), (96, 96), 2),
        (replace(STREET, color=False), (64, 96), 1),
    ],
)
def test_pixels_are_those_of_the_loader_within_rounding(config, canvas, levels):
    fast, slow = both_ways(config, canvas)
    difference = np.abs(fast - slow)
    assert difference.max() <= levels
    assert difference.mean() < 0.15


def test_colors_are_those_of_the_loader_within_the_rounding_of_hues():
    fast, slow = both_ways(STREET, (64, 96), count=120)
    difference = np.abs(fast - slow)
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.999) <= 8
    assert difference.max() <= 20


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    source = SyntheticSource(num_images=20, seed=4)
    config = DatasetConfig(shards=str(tmp_path_factory.mktemp("set")), source=source, shard_mb=0.3)
    return write_dataset(open_reader(source), config, Storage())


def micro_batches(manifest, data, steps, rank=0, world=1):
    order = build_order([manifest], 3, data)
    spec = LoaderSpec(global_batch=5, micro_batch=2, rank=rank, world=world, start_step=0, seed=3)
    loader = build_loader([manifest], order, data, Storage(), spec)
    found = [batch for step in itertools.islice(loader, steps) for batch in step.micro_batches]
    loader.close()
    return found


@pytest.mark.parametrize("augment_config", [LSJ, STREET, ScaleJitter(shortest_edges=(40, 60), max_size=120)])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_hands_over_sources_that_become_the_same_batches(written, augment_config, workers):
    """Fillers included; targets, sizes and counts are equal bit for bit."""
    if workers and augment_config is not LSJ:
        return
    data = DataConfig(train=(MixtureItem(dataset="a"),), augment=augment_config, workers=0, lanes=4, window=4)
    there = replace(data, augment_on="device", workers=workers)
    for expected, pending in zip(micro_batches(written, data, 3), micro_batches(written, there, 3), strict=True):
        assert isinstance(pending, SourceBatch)
        found = pending.to("cpu")
        assert isinstance(found, Batch)
        assert (found.keys, found.dropped_targets) == (expected.keys, expected.dropped_targets)
        assert torch.equal(found.sizes, expected.sizes)
        for field in fields(found.targets):
            assert torch.equal(getattr(found.targets, field.name), getattr(expected.targets, field.name))
        assert found.images.shape == expected.images.shape
        difference = (found.images.int() - expected.images.int()).abs().float()
        assert difference.mean() < 1
        assert torch.quantile(difference.flatten()[:100_000], 0.999) <= 8


def test_copy_paste_is_refused():
    with pytest.raises(ConfigError, match=r"set data\.augment_on to cpu"):
        DataConfig(train=(MixtureItem(dataset="a"),), augment_on="device", copy_paste=CopyPasteConfig())
