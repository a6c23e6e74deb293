"""Flags and numbers in annotation files: readers accept 0, 1, true and false, and name the value they refuse."""

import json
import math

import numpy as np
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.readers.coco_json import id_text, read_images
from m2f.data_pipeline.shards.external_tars import ExternalFormat, decode_labels
from m2f.data_pipeline.sources import LabelMapSource
from tests.data_pipeline.coco_set import CocoSet

BAD_FLAGS = ["0", "false", 2, math.nan, [1]]


@pytest.fixture
def coco(tmp_path):
    return CocoSet(tmp_path)


@pytest.mark.parametrize("value", BAD_FLAGS)
def test_invalid_crowd_flag_is_refused(coco, value):
    coco.panoptic[0]["segments_info"][0]["iscrowd"] = value
    with pytest.raises(DataError, match=r"panoptic.json: annotation of image 40, segment 5: iscrowd is .*0, 1, true"):
        coco.read_panoptic()


@pytest.mark.parametrize("value", [0, 1, True, False, None])
def test_valid_crowd_flags_are_read(coco, value):
    coco.instances[0]["iscrowd"] = coco.panoptic[0]["segments_info"][0]["iscrowd"] = value
    assert coco.read_instances().annotation.segments[0].is_crowd == bool(value)
    assert coco.read_panoptic().annotation.segments[0].is_crowd == bool(value)


@pytest.mark.parametrize("value", BAD_FLAGS)
def test_invalid_ignore_flag_is_refused(tmp_path, value):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps([{"label": 1, "name": "a", "isthing": 0, "ignore": value}]))
    with pytest.raises(DataError, match="entry 0: ignore is"):
        read_category_file(str(path), ())


@pytest.mark.parametrize("value", BAD_FLAGS)
def test_invalid_crowd_flag_in_an_external_tar_is_refused(value):
    table = CategoryTable((Category(1, "a", True, (1, 2, 3)),))
    tar_format = ExternalFormat(labels="panoptic", images=("jpg",), map="png", json="json")
    listed = {"segments_info": [{"id": 1, "category_id": 1, "iscrowd": value}]}
    members = {"png": encode_png(np.full((2, 3, 3), (1, 0, 0), np.uint8)), "json": json.dumps(listed).encode()}
    with pytest.raises(DataError, match="sample x: member json: segment 1: iscrowd is"):
        decode_labels(members, tar_format, table, (2, 3), "sample x")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("categories", "id", math.inf),
        ("categories", "id", 2**31),
        ("categories", "id", -(10**30)),
        ("instances", "category_id", math.inf),
        ("instances", "area", math.inf),
        ("instances", "area", 10**400),
        ("instances", "area", 1e300),
        ("instances", "bbox", [0, 0, 10**400, 1]),
        ("images", "height", math.inf),
    ],
)
def test_numbers_out_of_range_are_refused(coco, kind, name, value):
    getattr(coco, kind)[0][name] = value
    with pytest.raises(DataError, match=name):
        coco.read_instances()


def test_label_values_out_of_range_are_refused(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps([{"label": 10**12, "name": "a", "isthing": 0}]))
    with pytest.raises(DataError, match="entry 0: label is 1000000000000"):
        read_category_file(str(path), LabelMapSource.void)


@pytest.mark.parametrize("image_id", [10**30, "5" * 5000, "street/a", "9223372036854775808"])
def test_image_ids_may_have_any_size_and_type(image_id):
    document = {"images": [{"id": image_id, "file_name": "a.jpg", "height": 2, "width": 3}]}
    (image,) = read_images(document, "x.json")
    assert (image.id, image.source_id) == (0, str(image_id))
    assert id_text({"image_id": "007"}, "image_id", "x") == "7"
