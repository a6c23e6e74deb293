from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f.data_pipeline.categories import Category, distinct_color
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.readers.map_reader import pair_files
from m2f.data_pipeline.readers.masks import pixel_box
from m2f.data_pipeline.sources import HuggingFaceSource

H, W = 6, 8


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12), st.sampled_from([np.uint8, np.uint16, np.uint32]))
def test_partition_equals_a_slow_reference(seed, height, width, dtype):
    random = np.random.default_rng(seed)
    names = random.choice(200, size=9, replace=False) * (1 if dtype == np.uint8 else 300)
    values = names[random.integers(0, 9, (height, width))].astype(dtype)
    categories = [Category(i, str(i), i % 2 == 0, distinct_color(i)) for i in range(4)]
    # Some values are void, and some share a region.
    regions = {
        int(v): None if r == 5 else Region(categories[r % 4], int(r), is_crowd=r == 3)
        for v, r in zip(names, random.integers(0, 6, 9), strict=True)
    }
    annotation = partition(values, regions.__getitem__, Path("m.png"), "are wrong")
    assert len({s.source_id for s in annotation.segments}) == len(annotation.segments)
    assert [s.id for s in annotation.segments] == list(range(1, len(annotation.segments) + 1))
    expected = np.zeros((height, width), int)
    for segment in annotation.segments:
        members = [v for v, r in regions.items() if r is not None and r.source_id == segment.source_id]
        mask = np.isin(values, members)
        assert segment.area == mask.sum() > 0
        assert segment.bbox == pixel_box(mask)
        region = regions[members[0]]
        assert (segment.category_id, segment.is_crowd) == (region.category.id, region.is_crowd)
        expected[mask] = segment.id
    np.testing.assert_array_equal(annotation.seg, expected)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_box_of_a_mask_does_not_depend_on_its_type(dtype, order):
    mask = np.zeros((5, 9), dtype, order)
    mask[1:3, 4:8] = 1
    assert pixel_box(mask) == (4, 1, 4, 2)


def test_more_than_254_segments_take_16_bits():
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    thing = Category(1, "cell", True, (1, 2, 3))
    annotation = partition(values, lambda v: Region(thing, v), Path("m.png"), "")
    assert annotation.seg.dtype == np.uint16
    assert len(annotation.segments) == annotation.seg.max() == 600


def test_unknown_values_are_listed_with_the_file():
    with pytest.raises(DataError, match=r"m.png: pixel values 3, 7 are not in the table"):
        partition(np.array([[1, 3], [7, 3]], np.uint8), {1: None}.__getitem__, Path("m.png"), "are not in the table")


def test_generated_colours_differ():
    assert len({distinct_color(i) for i in range(1000)}) == 1000


def test_files_are_paired_by_stem(tmp_path):
    images, labels, other_labels = tmp_path / "images", tmp_path / "labels", tmp_path / "more"
    _touch(images, "b.JPG", "sub/a.jpeg", "notes.txt")
    _touch(labels, "b.png", "sub/a.png", "b.json")
    _touch(other_labels, "b.png", "sub/a.png")
    first, second = pair_files(images, labels, other_labels).records
    assert (first.index, first.key, first.image) == (0, "b", "b.JPG")
    assert first.maps == (labels / "b.png", other_labels / "b.png")
    assert (second.image, second.maps[0]) == ("sub/a.jpeg", labels / "sub/a.png")
    assert [r.key for r in pair_files(images, labels, base_names=True).records] == ["b", "a"]


def test_base_names_that_repeat_are_refused(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    _touch(images, "x/a.jpg", "y/a.jpg")
    _touch(labels, "x/a.png", "y/a.png")
    with pytest.raises(DataError, match="would have the same key 'a'"):
        pair_files(images, labels, base_names=True)


def test_images_without_a_map_are_records_and_maps_without_an_image_are_unusable(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    _touch(images, "a.jpg", "b.jpg", "d.jpg")
    _touch(labels, "b.png", "c.png", "d.webp", "e.webp")
    pairs = pair_files(images, labels)
    assert [(r.key, r.maps) for r in pairs.records] == [
        (name[0], (labels / name,)) for name in ("a.png", "b.png", "d.webp")
    ]
    assert [(u.source, u.message) for u in pairs.unusable] == [
        (str(labels / "c.png"), f"its image c.* is not in {images}")
    ]


def test_files_are_listed_with_both_folders_if_none_has_a_counterpart(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    _touch(images, "a.jpg")
    _touch(labels, "c.png")
    with pytest.raises(DataError, match=r"2 files in .*images \(.jpg.*labels \(.png\) have no counterpart .*: a, c"):
        pair_files(images, labels)


# Three-channel maps.


CLASSES = [
    {"label": 0, "name": "background", "isthing": 0, "ignore": True},
    {"label": 1, "name": "person", "isthing": 1},
    {"label": 2, "name": "grass", "isthing": 0, "color": [9, 8, 7]},
]


@pytest.fixture
def channels(tmp_path):
    """Return a function that writes the only map [H, W, 3] and opens a reader, the source, and the folder."""
    for name in ("images", "annotations"):
        (tmp_path / name).mkdir()
    (tmp_path / "images/a.png").write_bytes(encode_png(np.full((H, W, 3), 90, np.uint8)))
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    source = HuggingFaceSource(
        images=f"{tmp_path}/images", annotations=f"{tmp_path}/annotations", categories=f"{tmp_path}/classes.json"
    )

    def write(pixels):
        (tmp_path / "annotations/a.png").write_bytes(encode_png(pixels))
        return open_reader(source)

    return write, source, tmp_path


def test_three_channel_maps_give_classes_and_instances(channels):
    write, source, folder = channels
    pixels = np.zeros((H, W, 3), np.uint8)
    pixels[0, :3] = (1, 1, 0)
    pixels[1, :3] = (1, 2, 0)
    pixels[2, :3] = (1, 2, 1)  # instance 258
    pixels[3:5] = (2, 5, 0)
    pixels[4] = (2, 6, 0)
    pixels[5] = (255, 0, 0)
    sample = write(pixels).read(0)
    segments = [(s.category_id, s.source_id, s.is_thing, s.area) for s in sample.annotation.segments]
    assert segments == [(1, 257, True, 3), (1, 513, True, 3), (2, 2, False, 16), (1, 66049, True, 3)]
    assert (sample.annotation.seg == 0).sum() == H * W - 25
    assert (sample.key, sample.image_id, sample.height, sample.width) == ("a", 0, H, W)
    before = source_fingerprint(source)
    (folder / "classes.json").write_text(json.dumps(CLASSES[:2]))
    assert source_fingerprint(source) != before
    pixels[0, 0] = (9, 1, 0)
    with pytest.raises(DataError, match=r"annotations/a.png: pixel values 9, 2 of the red channel are neither"):
        write(pixels).read(0)


def test_grey_files_are_refused_as_three_channel_maps(channels):
    write, _, _ = channels
    with pytest.raises(DataError, match=r"a.png: this map must store ids in three 8-bit channels.*8-bit gray"):
        write(np.ones((H, W), np.uint8)).read(0)


def test_map_readers_are_picklable_and_subsets_keep_their_ids(channels):
    write, _, folder = channels
    pixels = np.zeros((H, W, 3), np.uint8)
    write(pixels)
    for name in ("images", "annotations"):
        (folder / name / "b.png").write_bytes((folder / name / "a.png").read_bytes())
    part = pickle.loads(pickle.dumps(write(pixels).subset([1])))
    assert (part.keys, part.source(0), part.read(0).image_id) == (("b",), "images/b.png", 1)
    assert part.read(0).annotation.segments == ()
    assert part.size_hint(0) > 12_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"isthing": "0"}, "isthing is '0'; it must be 0, 1, true"),
        ({"color": "red"}, "color is red, not three whole numbers"),
        ({"color": [0, 0, 256]}, "color is .*, not three whole numbers from 0 to 255"),
    ],
)
def test_invalid_categories_are_refused(channels, change, message):
    write, _, folder = channels
    (folder / "classes.json").write_text(json.dumps([CLASSES[1] | change]))
    with pytest.raises(DataError, match=f"classes.json: entry 0: {message}"):
        write(np.zeros((H, W, 3), np.uint8))


def test_grey_images_are_accepted_and_maps_of_other_sizes_refused(channels):
    write, _, folder = channels
    (folder / "images/a.png").unlink()
    (folder / "images/a.jpg").write_bytes(cv2.imencode(".jpg", np.full((H, W), 90, np.uint8))[1].tobytes())
    assert write(np.zeros((H, W, 3), np.uint8)).read(0).image_ext == "jpg"
    with pytest.raises(DataError, match=r"images/a.jpg: the image is 8 x 6 pixels, but its annotation is 9 x 6"):
        write(np.zeros((H, W + 1, 3), np.uint8)).read(0)


def test_huge_maps_are_refused_before_decoding(channels, monkeypatch):
    write, source, _ = channels
    write(np.zeros((H, W, 3), np.uint8))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"annotations/a.png: 8 x 6 pixels exceed max_pixels \(47\)"):
        open_reader(source, max_pixels=47).read(0)
