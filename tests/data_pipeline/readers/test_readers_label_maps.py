from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.sources import LabelMapSource

CATEGORIES = [
    {"label": 0, "name": "sky", "color": [1, 2, 3], "isthing": 0},
    {"label": 4, "name": "car", "isthing": 1},
    {"label": 7, "name": "nothing", "ignore": True},
]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with two images and their label maps; the second image is in a subfolder."""
    for name in ("images/a.jpg", "images/sub/b.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, np.full((6, 8, 3), 90, np.uint8))[1].tobytes())
    labels = np.zeros((6, 8), np.uint8)
    labels[2:4, 3:7] = 4
    labels[5] = 255
    labels[0, 0] = 7
    for name in ("labels/a.png", "labels/sub/b.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(labels))
    (tmp_path / "classes.json").write_text(json.dumps(CATEGORIES))
    return tmp_path


def _source(folder):
    return LabelMapSource(images=f"{folder}/images", labels=f"{folder}/labels", categories=f"{folder}/classes.json")


def test_every_class_in_a_map_is_one_segment(folder):
    reader = open_reader(_source(folder))
    assert [(c.id, c.name, c.is_thing) for c in reader.categories.categories] == [(0, "sky", False), (4, "car", True)]
    assert reader.keys[0] == "a"
    assert reader.keys[1].startswith("sub-b-")
    sample = reader.read(0)
    assert (sample.image_id, sample.source, sample.height, sample.width) == (0, "images/a.jpg", 6, 8)
    sky, car = sample.annotation.segments
    assert (sky.id, sky.category_id, sky.area, sky.is_thing, sky.is_crowd, sky.map) == (1, 0, 31, False, False, "seg")
    assert (car.id, car.category_id, car.area, car.bbox) == (2, 4, 8, (3, 2, 4, 2))
    seg = sample.annotation.seg
    assert (seg == 0).sum() == 9  # both kinds of void
    assert (seg == 2).sum() == 8
    assert sample.annotation.inst is None


def test_subsets_keep_image_ids(folder):
    reader = open_reader(_source(folder)).subset([1])
    assert reader.read(0).image_id == 1
    assert reader.source(0) == "images/sub/b.png"


def test_linked_subfolders_are_read(folder):
    for name in ("images", "labels"):
        (folder / name / "sub").rename(folder / f"{name} elsewhere")
        (folder / name / "sub").symlink_to(folder / f"{name} elsewhere")
    reader = open_reader(_source(folder))
    assert [reader.source(index) for index in (0, 1)] == ["images/a.jpg", "images/sub/b.png"]
    (folder / "labels/sub").unlink()
    with pytest.raises(DataError, match=r"images/sub/b.png: it has no map \(.*labels/sub/b.png\)"):
        open_reader(_source(folder)).read(1)


def test_fingerprint_depends_on_the_categories(folder):
    before = source_fingerprint(_source(folder))
    (folder / "classes.json").write_text(json.dumps(CATEGORIES[:1]))
    assert source_fingerprint(_source(folder)) != before


def test_unknown_values_are_listed(folder):
    labels = np.zeros((6, 8), np.uint8)
    labels[0, :3] = (9, 30, 31)
    (folder / "labels/a.png").write_bytes(encode_png(labels))
    with pytest.raises(DataError, match=r"labels/a.png: pixel values 9, 30, 31 are neither categories nor void"):
        open_reader(_source(folder)).read(0)


def test_images_without_a_map_fail_when_they_are_read(folder):
    keys = open_reader(_source(folder)).keys
    (folder / "labels/a.png").unlink()
    reader = open_reader(_source(folder))
    assert reader.keys == keys
    assert reader.read(1).image_id == 1
    with pytest.raises(DataError, match=r"images/a.jpg: it has no map \(.*labels/a.png\)"):
        reader.read(0)


def test_maps_without_an_image_are_unusable(folder):
    (folder / "images/a.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 annotation cannot be used.*--skip-bad:\n  .*labels/a.png: its image a\.\* is "
    ):
        open_reader(_source(folder))
    reader = open_reader(_source(folder), skip_bad=True)
    assert (reader.keys, len(reader.unusable)) == (("sub-b-bd60e19f",), 1)
    assert reader.subset([0]).unusable == ()


def test_two_images_with_one_stem_are_refused(folder):
    (folder / "images/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a.jpg and a.png have the same stem; keep one of them"):
        open_reader(_source(folder))


def test_label_map_of_another_size_is_refused(folder):
    (folder / "labels/a.png").write_bytes(encode_png(np.zeros((6, 9), np.uint8)))
    with pytest.raises(DataError, match=r"images/a.jpg: the image is 8 x 6 pixels, but its annotation is 9 x 6"):
        open_reader(_source(folder)).read(0)


def test_colour_label_maps_are_refused(folder):
    colors = np.zeros((6, 8, 3), np.uint8)
    colors[0, 0, 2] = 1
    (folder / "labels/a.png").write_bytes(encode_png(colors))
    with pytest.raises(DataError, match=r"labels/a.png: a label map must be grey or have a palette"):
        open_reader(_source(folder)).read(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "is not a list"),
        ('[{"name": "x", "isthing": 1}]', "entry 0: the field 'label' is missing"),
        ('[{"label": 255, "name": "x", "isthing": 1}]', "255 is the label of 'x' and in the list of void labels"),
    ],
)
def test_invalid_categories_file_is_refused(folder, content, message):
    (folder / "classes.json").write_text(content)
    with pytest.raises(DataError, match=f"classes.json.*{message}"):
        open_reader(_source(folder))


def test_empty_and_missing_folders_are_refused(folder):
    for path in (folder / "images/a.jpg", folder / "images/sub/b.png"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"images contains no image \(.jpg, .jpeg, .png, .tif.*\); the data set is empty"
    ):
        open_reader(_source(folder))
    with pytest.raises(DataError, match=r"nowhere/images does not exist or is not a folder"):
        open_reader(_source(folder / "nowhere"))
    with pytest.raises(DataError, match=r"s3://bucket/images: raw data must be in a local or mounted folder"):
        open_reader(_source("s3://bucket"))
