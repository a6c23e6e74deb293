import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.config import LargeScaleJitter, ScaleJitter, ShortestEdgeCrop
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.data_pipeline.shards import codec
from m2f.data_pipeline.sources import CocoPanopticSource
from m2f.data_pipeline.transforms.collate import (
    EVAL_PADDING,
    FILLER_POSITION,
    collate,
    collate_eval,
    padded_eval_size,
    show_image_in_fillers,
)
from m2f.data_pipeline.transforms.example import TrainTransform, make_example
from m2f.data_pipeline.transforms.targets import drop_empty_targets, image_targets

SKY, GRASS, DOG, CAT = 7, 9, 20, 30
TABLE = CategoryTable(
    (
        Category(SKY, "sky", False, (0, 0, 200)),
        Category(DOG, "dog", True, (200, 0, 0)),
        Category(GRASS, "grass", False, (0, 200, 0)),
        Category(CAT, "cat", True, (200, 200, 0)),
    )
)


def segment(id_, category, *, crowd=False, map_="seg", layer=0):
    return Segment(
        id=id_,
        category_id=category,
        is_thing=TABLE.by_id[category].is_thing,
        is_crowd=crowd,
        area=1.0,
        bbox=(0.0, 0.0, 1.0, 1.0),
        source_id=id_,
        map=map_,
        layer=layer,
    )


def sample_of(seg=None, inst=None, segments=(), key="a"):
    height, width = seg.shape if inst is None else inst.shape[1:]
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return DecodedSample(
        key=key, image_id=1, source="a.jpg", image=image, annotation=Annotation(seg=seg, inst=inst, segments=segments)
    )


@pytest.fixture
def panoptic():
    """Return a sample of six vertical stripes: void, sky, two dogs, a crowd of dogs, grass."""
    seg = np.repeat(np.arange(6, dtype=np.uint8), 4)[None].repeat(16, axis=0)
    segments = (segment(1, SKY), segment(2, DOG), segment(3, DOG), segment(4, DOG, crowd=True), segment(5, GRASS))
    return sample_of(seg, segments=segments)


def paint_labels(targets, shape):
    """Return the class of every fourth pixel of the first row; -1 is background, -2 is ignored."""
    out = np.full(shape, -1)
    for layer in targets.id_maps:
        out[layer == targets.ignore] = -2
    for label, layer, id_ in zip(targets.labels, targets.layer, targets.local_id, strict=True):
        out[targets.id_maps[layer] == id_] = label
    return out[0, ::4].tolist()


def test_panoptic_has_one_target_per_segment_and_ignores_crowd_and_void(panoptic):
    targets = image_targets(panoptic, "panoptic", TABLE.labels("panoptic"))
    assert targets.labels.tolist() == [0, 1, 1, 2]
    assert targets.id_maps.dtype == np.uint8
    assert paint_labels(targets, (16, 24)) == [-2, 0, 1, 1, -2, 2]


def test_semantic_has_one_target_per_class(panoptic):
    targets = image_targets(panoptic, "semantic", TABLE.labels("semantic"))
    assert targets.labels.tolist() == [0, 1, 2]
    assert paint_labels(targets, (16, 24)) == [-2, 0, 1, 1, 1, 2]


def test_instance_targets_are_the_things_of_a_panoptic_map(panoptic):
    targets = image_targets(panoptic, "instance", TABLE.labels("instance"))
    assert targets.labels.tolist() == [0, 0]
    assert paint_labels(targets, (16, 24)) == [-1, -1, 0, 0, -2, -1]


def test_instance_layers_keep_overlaps_and_ignore_crowds_in_all_layers():
    inst = np.zeros((2, 8, 8), np.uint8)
    inst[0, :, :4] = 1
    inst[1, :, 2:5] = 2
    inst[0, :4, 6:] = 3
    inst[1, 0, 6:] = 4
    segments = (
        segment(1, DOG, map_="inst"),
        segment(2, CAT, map_="inst", layer=1),
        segment(3, DOG, crowd=True, map_="inst"),
        segment(4, CAT, map_="inst", layer=1),
    )
    targets = image_targets(sample_of(inst=inst, segments=segments), "instance", TABLE.labels("instance"))
    assert targets.labels.tolist() == [0, 1, 1]
    assert targets.layer.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(targets.id_maps[0] == 1, inst[0] == 1)
    np.testing.assert_array_equal(targets.id_maps[1] == 2, inst[1] == 2)
    np.testing.assert_array_equal(targets.id_maps[1] == 3, inst[1] == 4)
    np.testing.assert_array_equal(targets.id_maps[0] == 255, inst[0] == 3)
    np.testing.assert_array_equal(targets.id_maps[1] == 255, (inst[0] == 3) & (inst[1] == 0))


def test_id_maps_are_int16_above_254_targets():
    seg = np.arange(1, 301, dtype=np.uint16).reshape(15, 20)
    segments = tuple(segment(i, DOG) for i in range(1, 301))
    many = image_targets(sample_of(seg, segments=segments), "panoptic", TABLE.labels("panoptic"))
    assert many.id_maps.dtype == np.int16
    assert many.ignore == 32767
    assert sorted(many.id_maps.ravel().tolist()) == list(range(1, 301))
    few = image_targets(sample_of(seg, segments=segments[:254]), "panoptic", TABLE.labels("panoptic"))
    assert few.id_maps.dtype == np.uint8
    assert few.id_maps.max() == 255


def test_missing_map_and_unknown_category_are_refused(panoptic):
    inst = np.ones((1, 4, 4), np.uint8)
    with pytest.raises(DataError, match=r"'a' \(a.jpg\) has no panoptic or semantic map"):
        image_targets(sample_of(inst=inst), "semantic", TABLE.labels("semantic"))
    with pytest.raises(DataError, match=r"'a' \(a.jpg\).*\[9\]"):
        image_targets(panoptic, "panoptic", {SKY: 0, DOG: 1})


def test_targets_without_pixels_are_dropped_and_counted(panoptic):
    targets = image_targets(panoptic, "panoptic", TABLE.labels("panoptic"))
    targets.id_maps[targets.id_maps == 2] = 0
    remaining, dropped = drop_empty_targets(targets, (16, 24))
    assert dropped == 1
    assert remaining.labels.tolist() == [0, 1, 2]
    assert remaining.local_id.tolist() == [1, 3, 4]


def transform(task="panoptic", **changes):
    augment = changes.pop("augment", LargeScaleJitter(size=32, min_scale=0.5, max_scale=1.0))
    return TrainTransform(task=task, labels=TABLE.labels(task), augment=augment, drop_empty_targets=True, seed=0)


def test_batch_with_a_filler_has_empty_targets(panoptic):
    batch = collate([make_example(panoptic, 2, 40, transform()), None], (32, 32))
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.keys == ("a", "")
    targets = batch.targets
    assert targets.id_maps.shape == (2, 1, 32, 32)
    assert targets.labels.shape == (2, 8)
    assert targets.valid.sum(1).tolist() == [4, 0]
    assert targets.valid[0, :4].all()
    assert targets.weight.tolist() == [1.0, 0.0]
    assert targets.position.tolist() == [40, FILLER_POSITION]
    assert targets.dataset.tolist() == [2, 0]
    assert (targets.id_maps[1] == 255).all()
    assert batch.sizes[1].tolist() == [0, 0]


def test_fillers_of_a_step_show_its_first_image_as_far_as_it_fits(panoptic):
    examples = [make_example(panoptic, 0, position, transform()) for position in (40, 41)]
    batches = [collate([*examples, None], (64, 32)), collate([None], (32, 16)), collate([None], (32, 96))]
    targets = batches[0].targets
    show_image_in_fillers(batches)
    first, size = batches[0].images[0], batches[0].sizes[0]
    assert torch.equal(batches[0].images[2], first)
    assert torch.equal(batches[1].images[0], first[:, :32, :16])
    assert torch.equal(batches[2].images[0, :, :, :32], first[:, :32])
    assert (batches[2].images[0, :, :, 32:] == 128).all()
    height, width = size.tolist()
    sizes = [batch.sizes[-1].tolist() for batch in batches]
    assert sizes == [[height, width], [height, min(width, 16)], [height, width]]
    assert torch.equal(batches[0].images[1, :, :32].permute(1, 2, 0), torch.from_numpy(examples[1].image))
    assert batches[0].targets is targets
    assert targets.valid.sum(1).tolist() == [4, 4, 0]


def test_fillers_stay_grey_in_a_step_without_images():
    batches = [collate([None], (32, 32))]
    show_image_in_fillers(batches)
    assert (batches[0].images == 128).all()
    assert batches[0].sizes.tolist() == [[0, 0]]


def test_pixels_outside_the_size_of_an_example_are_padding(panoptic):
    for position in range(20):
        example = make_example(panoptic, 0, position, transform("instance"))
        h, w = example.size
        outside = np.ones((32, 32), bool)
        outside[:h, :w] = False
        assert (example.image[outside] == 128).all()
        assert (example.targets.id_maps[0][outside] == 255).all()


def test_small_and_wide_maps_with_different_layers_share_a_batch():
    wide = np.arange(1, 301, dtype=np.uint16).reshape(1, 15, 20)
    many = tuple(segment(i, DOG, map_="inst") for i in range(1, 301))
    inst = np.zeros((3, 15, 20), np.uint8)
    inst[2, 3:9, 3:9] = 1
    inst[0, 10:, 10:] = 2
    few = (segment(1, CAT, map_="inst", layer=2), segment(2, DOG, map_="inst", crowd=True))
    crop = ShortestEdgeCrop(shortest_edges=(15,), max_size=20, crop=(15, 20), color=False)
    crop_transform = transform("instance", augment=crop)
    examples = [
        make_example(sample_of(inst=wide, segments=many), 0, 0, crop_transform),
        make_example(sample_of(inst=inst, segments=few), 0, 1, crop_transform),
    ]
    targets = collate(examples, (15, 20)).targets
    assert targets.id_maps.dtype == torch.int16
    assert targets.id_maps.shape == (2, 3, 15, 20)
    assert targets.labels.shape == (2, 304)
    assert targets.id_maps[0, 1:].eq(0).all()
    assert targets.id_maps[1, 2].eq(1).sum() == 36
    assert targets.id_maps[1, 0].eq(32767).sum() == 50
    assert targets.id_maps[1].ne(255).all()
    assert targets.valid.sum(1).tolist() == [300, 1]
    assert targets.labels[1, 0] == 1


def test_targets_of_real_images_have_the_areas_stated_by_coco(real_data):
    folder = real_data / "coco_panoptic"
    source = CocoPanopticSource(
        images=str(folder / "val2017"),
        panoptic_json=str(folder / "annotations" / "panoptic_val2017.json"),
        panoptic_masks=str(folder / "panoptic_val2017"),
    )
    reader = open_reader(source)
    labels = reader.categories.labels("panoptic")
    annotations = json.loads(Path(source.panoptic_json).read_text())["annotations"]
    for index in range(len(reader.keys)):
        encoded = reader.read(index)
        members = {name.removeprefix(f"{encoded.key}."): data for name, data in codec.encode(encoded)}
        targets = image_targets(codec.decode(members), "panoptic", labels)
        actual = [
            (int(label), int((targets.id_maps[layer] == id_).sum()))
            for label, layer, id_ in zip(targets.labels, targets.layer, targets.local_id, strict=True)
        ]
        segments = next(a for a in annotations if a["image_id"] == encoded.image_id)["segments_info"]
        expected = [(labels[s["category_id"]], s["area"]) for s in segments if not s["iscrowd"]]
        assert sorted(actual) == sorted(expected)


def test_images_of_several_sizes_are_padded_to_the_largest(panoptic):
    varied = dataclasses.replace(transform(), augment=ScaleJitter(shortest_edges=(40, 50), max_size=60))
    assert varied.canvas is None
    examples = [make_example(panoptic, 0, position, varied) for position in range(12)]
    assert {example.size for example in examples} == {(40, 60)}  # max_size limits an image of 16 x 24
    tall = make_example(sample_of(np.ones((30, 20), np.uint8), segments=(segment(1, SKY),)), 0, 5, varied)
    batch = collate([examples[0], tall, None], varied.canvas)
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.sizes.tolist() == [[40, 60], list(tall.size), [0, 0]]
    np.testing.assert_array_equal(batch.images[0, :, :40, :60].permute(1, 2, 0), examples[0].image)
    np.testing.assert_array_equal(batch.targets.id_maps[0, 0, :40, :60], examples[0].targets.id_maps[0])
    assert (batch.images[0, :, 40:] == 128).all()
    assert (batch.targets.id_maps[0, 0, :, 60:] == 255).all()
    assert collate([None], None).images.shape == (1, 3, 32, 32)


def test_bilinear_evaluation_images_equal_pillow(panoptic):
    size = (8, 12)
    area, bilinear = (
        collate_eval([panoptic], [3], shortest_edge=8, max_size=100, shrink=shrink).images[0, :, :8, :12]
        for shrink in ("area", "bilinear")
    )
    pillow = np.asarray(Image.fromarray(panoptic.image).resize(size[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(bilinear.permute(1, 2, 0), pillow)
    assert not torch.equal(area, bilinear)


def test_an_evaluation_batch_is_resized_and_padded_and_keeps_the_truth(panoptic):
    wide = sample_of(np.zeros((20, 60), np.uint8), key="b")
    batch = collate_eval([panoptic, wide], [3, 8], shortest_edge=40, max_size=100)
    assert batch.sizes.tolist() == [[40, 60], [33, 100]]
    assert batch.images.shape == (2, 3, 64, 128)
    assert batch.images[0, :, 40:, :].permute(1, 2, 0).eq(torch.tensor(EVAL_PADDING)).all()
    assert batch.images[1, :, :33, 100:].permute(1, 2, 0).eq(torch.tensor(EVAL_PADDING)).all()
    assert batch.indices == (3, 8)
    square = collate_eval([wide], [8], shortest_edge=40, max_size=100, square=True)
    assert square.images.shape == (1, 3, 128, 128)
    assert square.sizes.tolist() == [[33, 100]]
    assert padded_eval_size((20, 60), 40, 100, square=True) == (128, 128)
    assert torch.equal(square.images[0, :, :64], batch.images[1])
    assert square.images[0, :, 64:].permute(1, 2, 0).eq(torch.tensor(EVAL_PADDING)).all()
    assert batch.samples[1] is wide
