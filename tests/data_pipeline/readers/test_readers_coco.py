from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.readers.masks import stack_layers
from m2f.data_pipeline.readers.run_lengths import text_areas
from m2f.data_pipeline.sources import CocoPanopticSource
from tests.data_pipeline.coco_set import IDS, POLYGON, CocoSet, H, W, mask_of, rle_of


@pytest.fixture
def coco(tmp_path):
    return CocoSet(tmp_path)


def test_panoptic_segments_are_read_with_their_pixels(coco):
    sample = coco.read_panoptic()
    assert (sample.key, sample.image_id, sample.source) == ("a", 40, "images/a.jpg")
    assert sample.image == coco.files["a.jpg"]
    sky, cat = sample.annotation.segments
    assert (sky.id, sky.category_id, sky.is_thing, sky.is_crowd, sky.source_id) == (1, 90, False, False, 5)
    assert (cat.id, cat.category_id, cat.is_thing, cat.is_crowd, cat.source_id) == (2, 3, True, True, 70_000)
    assert (cat.area, cat.bbox, cat.map) == (50.0, (5.0, 4.0, 10.0, 5.0), "seg")
    assert np.array_equal(sample.annotation.seg == 2, coco.ids == IDS[1])
    assert np.array_equal(sample.annotation.seg == 0, coco.ids == 0)
    assert sample.annotation.inst is None


def test_missing_area_and_box_are_computed_from_the_pixels(coco):
    del coco.panoptic[0]["segments_info"][1]["area"]
    coco.panoptic[0]["segments_info"][1]["bbox"] = []
    cat = coco.read_panoptic().annotation.segments[1]
    assert (cat.area, cat.bbox) == (50.0, (5, 4, 10, 5))


def test_overlapping_instances_are_stored_in_layers(coco):
    sample = coco.read_instances()
    annotation = sample.annotation
    assert annotation.seg is None
    assert annotation.inst.shape == (2, H, W)  # the first two overlap; the crowd shares a layer with the first
    assert [(s.id, s.layer, s.is_crowd, s.source_id) for s in annotation.segments] == [
        (1, 0, False, 1),
        (2, 1, False, 2),
        (3, 0, True, 3),
    ]
    assert annotation.segments[0].area == 70.5
    polygon = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([POLYGON], H, W)))
    assert [segment.polygons for segment in annotation.segments] == [(tuple(POLYGON),), None, None]
    for segment, mask in zip(annotation.segments, (polygon, mask_of(5, 8, 15, 14), mask_of(0, 20, 4, 30)), strict=True):
        assert np.array_equal(annotation.inst[segment.layer] == segment.id, mask.astype(bool))


def test_instances_of_the_same_images_are_added_to_the_panoptic_map(coco):
    coco.write()
    source = CocoPanopticSource(
        **{f: getattr(coco.panoptic_source, f) for f in ("images", "panoptic_json", "panoptic_masks")},
        instances_json=coco.instances_source.instances_json,
    )
    annotation = open_reader(source).read(0).annotation
    assert annotation.seg is not None
    assert annotation.inst.shape == (2, H, W)
    assert [s.map for s in annotation.segments] == ["seg"] * 2 + ["inst"] * 3
    coco.images[0]["id"] = coco.instances[0]["image_id"] = 41
    coco.instances = coco.instances[:1]
    (coco.root / "instances.json").write_text(
        json.dumps({"images": coco.images, "annotations": coco.instances, "categories": coco.categories})
    )
    with pytest.raises(DataError, match=r"instances.json lacks 1 image of .*40"):
        open_reader(source)


def test_images_without_objects_are_kept(coco):
    coco.instances = []
    annotation = coco.read_instances().annotation
    assert annotation.segments == ()
    assert annotation.inst.shape == (1, H, W)
    assert not annotation.inst.any()


def test_more_than_254_instances_need_16_bits(coco):
    coco.instances = [
        coco.instances[1] | {"id": i, "segmentation": rle_of(mask_of(i // W, i % W, i // W + 1, i % W + 1))}
        for i in range(300)
    ]
    annotation = coco.read_instances().annotation
    assert annotation.inst.dtype == np.uint16
    assert annotation.inst.max() == 300


def test_a_mask_without_pixels_keeps_its_segment(coco):
    coco.instances = [coco.instances[1] | {"segmentation": rle_of(mask_of(0, 0, 0, 0)), "area": 0.3, "bbox": None}]
    annotation = coco.read_instances().annotation
    assert [(s.id, s.area, s.bbox) for s in annotation.segments] == [(1, 0.3, (0, 0, 0, 0))]
    assert not annotation.inst.any()


def test_layers_are_first_fit():
    masks = [mask_of(0, 0, 5, 5), mask_of(3, 3, 8, 8), mask_of(7, 7, 9, 9), mask_of(4, 4, 9, 9), mask_of(0, 20, 2, 22)]
    layers, layer_of, measured = stack_layers(masks, len(masks), H, W)
    assert layer_of == [0, 1, 0, 2, 0]
    assert measured[1] == (25, (3, 3, 5, 5))
    for number, (mask, layer) in enumerate(zip(masks, layer_of, strict=True), start=1):
        assert np.array_equal(layers[layer] == number, mask.astype(bool))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_area_of_compressed_run_lengths_equals_that_of_the_mask(seed, density):
    mask = (np.random.default_rng(seed).random((13, 300)) < density).astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    assert text_areas([rle["counts"].decode()], 13, 300).tolist() == [mask.sum()]


def test_readers_are_picklable_and_subsets_keep_their_samples(coco):
    coco.images.append({"id": 41, "file_name": "b.jpg", "height": H, "width": W})
    coco.files["b.jpg"] = coco.files["a.jpg"]
    coco.write()
    reader = open_reader(coco.instances_source)
    assert reader.keys == ("a", "b")
    part = pickle.loads(pickle.dumps(reader.subset([1])))
    assert part.keys == ("b",)
    assert part.read(0).image_id == 41
    assert part.source(0) == "images/b.jpg"
    assert part.size_hint(0) > len(coco.files["b.jpg"])


def test_names_become_safe_keys(coco):
    coco.images = [
        {"id": i, "file_name": name, "height": H, "width": W}
        for i, name in enumerate(
            ("img.v1.3.jpg", "img-v1-3.jpg", "train/x.jpg", "\u00e9t\u00e9.jpg", "l" * 150 + ".jpg")
        )
    ]
    coco.instances = []
    coco.write()
    keys = open_reader(coco.instances_source).keys
    assert keys[1] == "img-v1-3"
    assert len(set(keys)) == 5
    for key in keys:
        assert key.isascii()
        assert len(key) <= 80
        assert not set(key) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def test_fingerprint_depends_on_the_annotations_and_not_on_the_folder(coco, tmp_path):
    coco.write()
    before = source_fingerprint(coco.instances_source)
    (tmp_path / "moved").mkdir()
    moved = CocoSet(tmp_path / "moved")
    moved.write()
    assert source_fingerprint(moved.instances_source) == before
    assert source_fingerprint(moved.panoptic_source) != before
    moved.instances[0]["category_id"] = 90
    moved.write()
    assert source_fingerprint(moved.instances_source) != before
