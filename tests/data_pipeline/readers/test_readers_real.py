"""Readers on real data sets, compared with the official tools."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.image_file import decode_id_png, decode_index_png
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards import codec
from m2f.data_pipeline.shards.preview import contact_sheet
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import (
    Ade20kFullSource,
    Ade20kSource,
    CityscapesPanopticSource,
    CityscapesSource,
    CocoInstancesSource,
    CocoPanopticSource,
    LabelMapSource,
    MapillarySource,
)
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.targets import image_targets


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
    reader = _coco_panoptic(root)
    segments_info = {a["image_id"]: a["segments_info"] for a in json.loads(path.read_text())["annotations"]}
    assert [len(segments_info[reader.read(i).image_id]) for i in range(len(reader.keys))] == [18, 32]
    for index in range(len(reader.keys)):
        sample = reader.read(index)
        areas = np.bincount(sample.annotation.seg.ravel())
        for segment, entry in zip(sample.annotation.segments, segments_info[sample.image_id], strict=True):
            assert (segment.source_id, segment.category_id) == (entry["id"], entry["category_id"])
            assert areas[segment.id] == segment.area == entry["area"]
        _round_trip(sample)
    assert len(reader.categories.for_task("panoptic")) == 133
    assert len(reader.categories.for_task("instance")) == 80


def _coco_panoptic(root):
    return open_reader(
        CocoPanopticSource(
            images=str(root / "val2017"),
            panoptic_json=str(root / "annotations" / "panoptic_val2017.json"),
            panoptic_masks=str(root / "panoptic_val2017"),
        )
    )


def test_coco_panoptic_equals_the_official_conversions(real_data):
    root = real_data / "coco_panoptic"
    reader = _coco_panoptic(root)
    detection = json.loads((root / "extra" / "panoptic_coco_detection_format.json").read_text())["annotations"]
    for index in range(len(reader.keys)):
        sample = reader.read(index)
        segments, seg = sample.annotation.segments, sample.annotation.seg
        entries = [entry for entry in detection if entry["image_id"] == sample.image_id]
        masks = [coco_mask.decode(entry["segmentation"]).astype(bool) for entry in entries]
        assert len(entries) == len(segments)
        for segment in segments:
            (match,) = [e for e, mask in zip(entries, masks, strict=True) if np.array_equal(mask, seg == segment.id)]
            assert (segment.category_id, segment.area, segment.bbox) == (
                match["category_id"],
                match["area"],
                tuple(match["bbox"]),
            )
            assert segment.is_crowd == bool(match["iscrowd"])
        # Two channels: the category, and the number within the category (255 = crowd).
        channels = decode_id_png((root / "extra" / "two_channel" / f"{sample.key}.png").read_bytes())
        categories = np.array([0, *(s.category_id for s in segments)])[seg]
        assert np.array_equal(categories, channels & 255)
        crowds = [s.id for s in segments if s.is_crowd]
        assert np.array_equal(np.isin(seg, crowds), channels >> 8 == 255)


def test_semantic_targets_of_coco_panoptic_equal_the_official_conversion(real_data):
    """The official script labels all segments, crowds included, with the index of their category in the JSON."""
    root = real_data / "coco_panoptic"
    reader = _coco_panoptic(root)
    document = json.loads((root / "annotations" / "panoptic_val2017.json").read_text())
    class_of = {c["id"]: n for n, c in enumerate(document["categories"])}
    entries = {entry["image_id"]: entry for entry in document["annotations"]}
    for index in range(len(reader.keys)):
        sample = reader.read(index)
        entry = entries[sample.image_id]
        ids = decode_id_png((root / "panoptic_val2017" / entry["file_name"]).read_bytes())
        expected = np.full(ids.shape, 255)
        for segment in entry["segments_info"]:
            expected[ids == segment["id"]] = class_of[segment["category_id"]]
        targets = image_targets(_round_trip(sample), "semantic", reader.categories.labels("semantic"))
        table = np.full(256, 255)
        table[targets.local_id] = targets.labels
        assert np.array_equal(table[targets.id_maps[0]], expected)


@pytest.mark.parametrize(
    ("images", "annotations", "objects"),
    [
        ("coco_instances/train2017", "coco_instances/annotations/instances_train2017.json", 1644),
        ("coco_instances/val2017", "coco_instances/annotations/instances_val2017.json", 815),
        ("dsb2018_nuclei/images/val", "dsb2018_nuclei/annotations/instances_val.json", 2725),
    ],
)
def test_layers_contain_every_official_mask(real_data, images, annotations, objects):
    official = COCO(str(real_data / annotations))
    reader = open_reader(
        CocoInstancesSource(images=str(real_data / images), instances_json=str(real_data / annotations))
    )
    num_objects, max_layers = 0, 0
    for index in range(len(reader.keys)):
        sample = reader.read(index)
        inst = sample.annotation.inst
        max_layers = max(max_layers, len(inst))
        for segment in sample.annotation.segments:
            annotation = official.anns[segment.source_id]
            assert np.array_equal(inst[segment.layer] == segment.id, official.annToMask(annotation))
            assert (segment.category_id, segment.area) == (annotation["category_id"], annotation["area"])
            assert segment.is_crowd == bool(annotation["iscrowd"])
            num_objects += 1
        if index % 16 == 0:
            _round_trip(sample)
    assert num_objects == objects
    assert max_layers == (1 if "nuclei" in images else 4)


def test_panoptic_nuclei_match_their_instances(real_data):
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


def test_camvid_label_maps_are_read_and_encoded_unchanged(real_data):
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


_LAYOUTS = {
    "ade20k": lambda root: Ade20kSource(
        images=f"{root}/ade20k_challenge_layout/images/training",
        annotations=f"{root}/ade20k_challenge_layout/annotations/training",
        instances=f"{root}/ade20k_challenge_layout/annotations_instance/training",
    ),
    "ade20k_full": lambda root: Ade20kFullSource(folder=f"{root}/ade20k_full"),
    "cityscapes": lambda root: CityscapesSource(
        images=f"{root}/cityscapes_layout_from_camvid/leftImg8bit/val",
        annotations=f"{root}/cityscapes_layout_from_camvid/gtFine/val",
    ),
    "cityscapes_panoptic": lambda root: CityscapesPanopticSource(
        images=f"{root}/cityscapes_layout_from_camvid/leftImg8bit",
        panoptic_json=f"{root}/cityscapes_layout_from_camvid/gtFine/cityscapes_panoptic_val.json",
        panoptic_masks=f"{root}/cityscapes_layout_from_camvid/gtFine/cityscapes_panoptic_val",
    ),
    "mapillary": lambda root: MapillarySource(
        images=f"{root}/mapillary_layout_from_camvid/validation/images",
        instances=f"{root}/mapillary_layout_from_camvid/validation/instances",
        config_json=f"{root}/mapillary_layout_from_camvid/config.json",
    ),
}


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_shards_of_every_layout_are_read_back_and_previewed(real_data, tmp_path, layout):
    source = _LAYOUTS[layout](real_data)
    reader = open_reader(source)
    manifest = write_dataset(reader, DatasetConfig(shards=str(tmp_path), source=source), Storage())
    assert sorted(manifest.key) == sorted(reader.keys)
    for row, key in enumerate(manifest.key):
        original, stored = reader.read(reader.keys.index(key)), manifest.read_sample(row, Storage())
        assert stored.annotation.segments == original.annotation.segments
        assert np.array_equal(stored.annotation.seg, original.annotation.seg)
        for task in ("panoptic", "instance", "semantic"):
            targets = image_targets(stored, task, reader.categories.labels(task))
            assert len(targets.labels) > 0
    assert contact_sheet(manifest, [0], Storage()).shape[1] > 640
