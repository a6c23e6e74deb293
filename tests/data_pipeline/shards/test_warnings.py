"""Warnings about data: a single class, more objects than queries, areas that do not match the masks."""

import json
from dataclasses import replace

import numpy as np
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.shards.warnings import (
    area_warning,
    empty_class_warning,
    instance_warning,
    no_object_warning,
    objects_per_image,
    one_class_warning,
    query_warning,
)
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage
from tests.data_pipeline.coco_set import CocoSet


def _table(count):
    return CategoryTable(tuple(Category(i, f"c{i}", True, (0, 0, 0)) for i in range(count)))


def test_single_class_warning_is_only_for_semantic_training():
    assert "'c0' is the only class" in one_class_warning("train", _table(1), "semantic")
    assert one_class_warning("train", _table(1), "instance") is None
    assert one_class_warning("train", _table(2), "semantic") is None


def test_classes_without_a_pixel_are_named_in_semantic_training(make_manifest):
    manifest = make_manifest(50)
    absent = [entry.category.name for entry in manifest.statistics() if not entry.num_images]
    text = empty_class_warning("train", manifest, "semantic")
    assert (
        f"no image has a pixel of {len(absent)} of {len(manifest.categories.categories)} classes: {absent[0]}" in text
    )
    assert empty_class_warning("train", manifest, "panoptic") is None
    present = {category_id for row in range(50) for category_id in manifest.category_ids[row].tolist()}
    used = CategoryTable(tuple(c for c in manifest.categories.categories if c.id in present))
    assert empty_class_warning("train", replace(manifest, categories=used), "semantic") is None


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_objects_beyond_the_queries_are_counted(make_manifest, task):
    manifest = make_manifest(200)
    things = {c.id for c in manifest.categories.for_task(task)}
    expected = np.array([sum(int(i) in things for i in manifest.category_ids[row]) for row in range(200)])
    assert objects_per_image(manifest, task).tolist() == expected.tolist()
    assert query_warning("train", manifest, task, int(expected.max())) is None
    excess = expected[expected > 1]
    text = query_warning("train", manifest, task, 1)
    assert text.startswith(f"train: {len(excess)} of 200 images have more objects than the model has queries (1)")
    assert f"at least {(excess - 1).sum()} of {expected.sum()} objects" in text


def test_objects_beyond_the_instance_limit_are_counted(make_manifest):
    manifest = make_manifest(200)
    objects = objects_per_image(manifest, "instance")
    text = instance_warning("train", manifest, "instance", 1)
    assert text.startswith(f"train: {(objects > 1).sum()} of 200 images have more than 1 objects")
    assert instance_warning("train", manifest, "instance", int(objects.max())) is None
    assert instance_warning("train", manifest, "panoptic", 1) is None


def test_a_data_set_without_an_object_is_reported(make_manifest):
    manifest = make_manifest(20)
    assert no_object_warning("train", manifest, "instance") is None
    stuff = CategoryTable(tuple(replace(c, is_thing=False) for c in manifest.categories.categories))
    text = no_object_warning("train", replace(manifest, categories=stuff), "instance")
    assert text.startswith("train: none of 20 images has an object for the task instance")
    assert no_object_warning("train", replace(manifest, categories=stuff), "panoptic") is None


@pytest.mark.parametrize("void", [(255,), (0, 255)])
def test_a_class_whose_label_is_void_is_refused(tmp_path, void):
    path = tmp_path / "classes.json"
    entries = [{"label": 1, "name": "road", "isthing": 0}, {"label": 255, "name": "sky", "isthing": 0}]
    path.write_text(json.dumps(entries))
    with pytest.raises(DataError, match="entry 1: 255 is the label of 'sky' and in the list of void labels"):
        read_category_file(str(path), void)
    assert [c.name for c in read_category_file(str(path), ())[0].categories] == ["road", "sky"]
    path.write_text(json.dumps([entries[0], entries[1] | {"ignore": True}]))
    assert read_category_file(str(path), void)[1] == frozenset(void)


def _six_images(coco, factor):
    """Write the same image six times, with stated areas of `factor` times the pixels."""
    file, image = coco.files["a.jpg"], coco.images[0]
    segments, instances = coco.panoptic[0]["segments_info"], coco.instances
    segments[0]["area"] = factor * 520
    instances[0]["area"], instances[1]["area"] = factor * 70, factor * 60
    instances[0]["segmentation"] = instances[1]["segmentation"]
    coco.files = {f"{i}.jpg": file for i in range(6)}
    coco.images = [{**image, "id": i, "file_name": f"{i}.jpg"} for i in range(6)]
    coco.panoptic = [{**coco.panoptic[0], "image_id": i} for i in range(6)]
    coco.instances = [{**entry, "id": 3 * i + k, "image_id": i} for i in range(6) for k, entry in enumerate(instances)]
    coco.write()
    return coco


@pytest.mark.parametrize("factor", [1, 1.2, 0.85, 0])  # pixels are counted if 0 is stated
def test_small_area_differences_give_no_warning(tmp_path, factor):
    coco = _six_images(CocoSet(tmp_path), factor)
    source = coco.panoptic_source
    config = DatasetConfig(shards=str(tmp_path / "shards"), source=source)
    assert area_warning("train", write_dataset(open_reader(source), config, Storage())) is None


@pytest.mark.parametrize(("factor", "ratio"), [(0.7, "1.43"), (4, "0.25")])
def test_large_area_differences_give_a_warning(tmp_path, factor, ratio):
    coco = _six_images(CocoSet(tmp_path), factor)
    source = coco.panoptic_source
    config = DatasetConfig(shards=str(tmp_path / "shards"), source=source)
    text = area_warning("train", write_dataset(open_reader(source), config, Storage()))
    assert text.startswith(f"train: masks have {ratio} times as many pixels")


def test_area_warning_covers_instances_but_not_small_ones(tmp_path):
    coco = _six_images(CocoSet(tmp_path), 1)
    for entry in coco.instances:
        entry["area"] = 100  # the masks have 60 pixels
    coco.write()
    source = coco.instances_source
    config = DatasetConfig(shards=str(tmp_path / "shards"), source=source)
    assert "masks have 0.60 times" in area_warning("t", write_dataset(open_reader(source), config, Storage()))
    for entry in coco.instances:
        entry["area"] = 90
    coco.write()
    config = DatasetConfig(shards=str(tmp_path / "small"), source=source)
    assert area_warning("t", write_dataset(open_reader(source), config, Storage())) is None


def test_manifests_without_counted_pixels_give_no_area_warning(make_manifest):
    assert area_warning("train", make_manifest(50)) is None
