"""The readers on genuine data sets, against the official tools."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from data_pipeline import codec
from data_pipeline.config import CocoInstancesSource, CocoPanopticSource, LabelMapSource
from data_pipeline.image_file import decode_index_png
from data_pipeline.readers import open_reader


def _round_trip(sample):
    members = {name.removeprefix(f"{sample.key}."): data for name, data in codec.encode(sample)}
    decoded = codec.decode(members)
    assert decoded.annotation.segments == sample.annotation.segments
    for ours, theirs in (
        (decoded.annotation.seg, sample.annotation.seg),
        (decoded.annotation.inst, sample.annotation.inst),
    ):
        assert (ours is None and theirs is None) or np.array_equal(ours, theirs)
    return decoded


def test_coco_panoptic_areas_equal_the_json(real_data):
    root = real_data / "coco_panoptic"
    path = root / "annotations" / "panoptic_val2017.json"
    reader = open_reader(
        CocoPanopticSource(
            images=str(root / "val2017"), panoptic_json=str(path), panoptic_masks=str(root / "panoptic_val2017")
        )
    )
    truth = {a["image_id"]: a["segments_info"] for a in json.loads(path.read_text())["annotations"]}
    assert [len(truth[reader.read(i).image_id]) for i in range(len(reader.keys))] == [18, 32]
    for index in range(len(reader.keys)):
        sample = reader.read(index)
        areas = np.bincount(sample.annotation.seg.ravel())
        for segment, entry in zip(sample.annotation.segments, truth[sample.image_id], strict=True):
            assert (segment.source_id, segment.category_id) == (entry["id"], entry["category_id"])
            assert areas[segment.id] == segment.area == entry["area"]
        _round_trip(sample)
    assert len(reader.categories.for_task("panoptic")) == 133
    assert len(reader.categories.for_task("instance")) == 80


@pytest.mark.parametrize(
    ("images", "annotations", "objects"),
    [
        ("coco_instances/train2017", "coco_instances/annotations/instances_train2017.json", 1644),
        ("coco_instances/val2017", "coco_instances/annotations/instances_val2017.json", 815),
        ("dsb2018_nuclei/images/val", "dsb2018_nuclei/annotations/instances_val.json", 2725),
    ],
)
def test_layers_hold_every_official_mask(real_data, images, annotations, objects):
    official = COCO(str(real_data / annotations))
    reader = open_reader(
        CocoInstancesSource(images=str(real_data / images), instances_json=str(real_data / annotations))
    )
    seen, most_layers = 0, 0
    for index in range(len(reader.keys)):
        sample = reader.read(index)
        inst = sample.annotation.inst
        most_layers = max(most_layers, len(inst))
        for segment in sample.annotation.segments:
            annotation = official.anns[segment.source_id]
            assert np.array_equal(inst[segment.layer] == segment.id, official.annToMask(annotation))
            assert (segment.category_id, segment.area) == (annotation["category_id"], annotation["area"])
            assert segment.is_crowd == bool(annotation["iscrowd"])
            seen += 1
        if index % 16 == 0:
            _round_trip(sample)
    assert seen == objects
    assert most_layers == (1 if "nuclei" in images else 4)


def test_nuclei_in_panoptic_form_agree_with_their_instances(real_data):
    root = real_data / "dsb2018_nuclei"
    reader = open_reader(
        CocoPanopticSource(
            images=str(root / "images" / "val"),
            panoptic_json=str(root / "annotations" / "panoptic_val.json"),
            panoptic_masks=str(root / "panoptic_val"),
            instances_json=str(root / "annotations" / "instances_val.json"),
        )
    )
    for index in range(0, len(reader.keys), 5):
        annotation = reader.read(index).annotation
        nuclei = [s.id for s in annotation.segments if s.map == "seg" and s.is_thing]
        assert np.array_equal(np.isin(annotation.seg, nuclei), annotation.inst.any(axis=0))


def test_camvid_label_maps(real_data):
    root = real_data / "camvid"
    source = LabelMapSource(
        images=str(root / "images" / "val"), labels=str(root / "labels" / "val"), categories=str(root / "classes.json")
    )
    reader = open_reader(source)
    assert len(reader.keys) == 101
    assert len(reader.categories.categories) == 11
    for index in range(0, 101, 7):
        sample = _round_trip(reader.read(index))
        labels = decode_index_png((root / "labels" / "val" / f"{sample.key}.png").read_bytes())
        table = np.full(256, 11)
        for segment in sample.annotation.segments:
            table[segment.id] = segment.category_id
        assert np.array_equal(table[sample.annotation.seg], np.where(labels == 255, 11, labels))
