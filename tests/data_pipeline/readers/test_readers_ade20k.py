"""ADE20K readers on generated layouts, and on the public samples if present."""

from __future__ import annotations

import json

import numpy as np
import pytest

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import decode_id_png, decode_index_png, encode_png
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.readers.ade20k_classes import CATEGORIES_150, categories_847
from m2f.data_pipeline.sources import Ade20kFullSource, Ade20kSource

H, W = 6, 10


def _write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(pixels))


@pytest.fixture
def write_challenge(tmp_path):
    """Return a function that writes one image with its maps and returns the source."""
    source = Ade20kSource(
        images=f"{tmp_path}/images",
        annotations=f"{tmp_path}/annotations",
        instances=f"{tmp_path}/annotations_instance",
    )

    def write(labels, instances):
        _write(tmp_path / "images/a.png", np.full((H, W, 3), 80, np.uint8))
        _write(tmp_path / "annotations/a.png", labels)
        _write(tmp_path / "annotations_instance/a.png", instances)
        return source

    return write


def _blank():
    return np.zeros((H, W), np.uint8), np.zeros((H, W, 3), np.uint8)


def test_class_lists_equal_the_published_ones():
    assert len(CATEGORIES_150.categories) == 150
    things = CATEGORIES_150.for_task("instance")
    assert len(things) == 100
    # Rows of the published table: number in the instance track, label, name.
    for number, label, name in (
        (1, 8, "bed"),
        (4, 13, "person"),
        (9, 21, "car"),
        (57, 89, "booth"),
        (100, 150, "flag"),
    ):
        assert (things[number - 1].id, things[number - 1].name) == (label, name)
    full = categories_847()
    assert (
        len(full.categories) == len({c.name for c in full.categories}) == len({c.color for c in full.categories}) == 847
    )
    assert [c.id for c in full.categories[:3]] == [2978, 312, 2420]
    assert full.by_id[401].is_thing
    assert full.by_id[401].name == "car"


def test_panoptic_map_is_stuff_with_instances_on_top(write_challenge):
    labels, instances = _blank()
    labels[0], labels[1], labels[2], labels[3] = 1, 3, 13, 21  # wall, sky, person, car
    instances[2, :4] = (4, 1, 0)
    instances[2, 4:6] = (4, 2, 0)  # the rest of the row has no instance, so it is void
    instances[1, 0] = (9, 3, 0)  # an instance replaces stuff
    source = write_challenge(labels, instances)
    annotation = open_reader(source).read(0).annotation
    assert [(s.category_id, s.is_thing, s.area) for s in annotation.segments] == [
        (1, False, 10),
        (3, False, 9),
        (13, True, 4),
        (13, True, 2),
        (21, True, 1),
    ]
    assert (annotation.seg == 0).sum() == H * W - 26
    semantic = Ade20kSource(images=source.images, annotations=source.annotations)
    segments = open_reader(semantic).read(0).annotation.segments
    assert [(s.category_id, s.area) for s in segments] == [(1, 10), (3, 10), (13, 10), (21, 10)]
    assert source_fingerprint(semantic) != source_fingerprint(source)


def test_invalid_challenge_maps_are_refused(write_challenge):
    labels, instances = _blank()
    labels[0, 0] = 151
    with pytest.raises(DataError, match=r"a.png: pixel values 151 are not classes of the challenge"):
        open_reader(write_challenge(labels, instances)).read(0)
    labels[0, 0] = 0
    instances[0, 0], instances[0, 1] = (101, 1, 0), (0, 2, 0)
    with pytest.raises(DataError, match=r"annotations_instance/a.png: .* red 101, green 1, red 0, green 2 are"):
        open_reader(write_challenge(labels, instances)).read(0)
    with pytest.raises(
        DataError, match=r"_instance/a.png: the instance map is 9 x 6 pixels, but the label map is 10 x 6"
    ):
        open_reader(write_challenge(labels, instances[:, 1:])).read(0)
    with pytest.raises(DataError, match=r"annotations/a.png: label maps of the challenge have 8 bits"):
        open_reader(write_challenge(labels.astype(np.uint16), np.zeros_like(instances))).read(0)


def test_full_release_encoding_and_own_categories(tmp_path):
    _write(tmp_path / "street/ADE_train_1.jpg", np.zeros((H, W, 3), np.uint8))  # a PNG: the name does not matter
    seg = np.zeros((H, W, 3), np.uint8)
    seg[0] = (10, 145, 25)  # 256 + 145 = 401: car
    seg[1] = (10, 145, 30)
    seg[2], seg[3] = (10, 56, 4), (10, 56, 9)  # 312: two buildings; stuff, so one segment
    seg[4] = (20, 1, 7)  # 513: not one of the 847 categories
    _write(tmp_path / "street/ADE_train_1_seg.png", seg)
    _write(tmp_path / "street/ADE_train_1_parts_1.png", seg)
    sample = open_reader(Ade20kFullSource(folder=str(tmp_path))).read(0)
    assert sample.key == "ADE_train_1"
    segments = [(s.category_id, s.is_thing, s.area) for s in sample.annotation.segments]
    assert segments == [(312, False, 20), (401, True, 10), (401, True, 10)]
    categories_file = tmp_path / "own.json"
    categories_file.write_text(json.dumps([{"label": 513, "name": "clod", "isthing": 1}]))
    source = Ade20kFullSource(folder=str(tmp_path), categories=str(categories_file))
    assert [s.category_id for s in open_reader(source).read(0).annotation.segments] == [513]
    (tmp_path / "street/ADE_train_1_seg.png").unlink()
    with pytest.raises(DataError, match=r"_seg.png\) have no counterpart .*: street/ADE_train_1"):
        open_reader(source)


def _official_panoptic(labels, colors):
    """Return [H, W] ids and their classes, made as in the official preparation: stuff first, then instances."""
    things = {number: c.id for number, c in enumerate(CATEGORIES_150.for_task("instance"), start=1)}
    ids, classes = np.zeros(labels.shape, int), {}
    for label in np.unique(labels):
        if label != 0 and label not in things.values():
            classes[len(classes) + 1] = int(label)
            ids[labels == label] = len(classes)
    for number in np.unique(colors[..., 1]):
        if number != 0:
            mask = colors[..., 1] == number
            (thing,) = np.unique(colors[..., 0][mask])
            classes[len(classes) + 1] = things[int(thing)]
            ids[mask] = len(classes)
    return ids, classes


@pytest.mark.parametrize("split", ["training", "validation"])
def test_challenge_sample_equals_the_official_preparation(real_data, split):
    root = real_data / "ade20k_challenge_layout"
    names = [line.split("\t")[4].strip() for line in (root / "objectInfo150.txt").read_text().splitlines()[1:]]
    assert [c.name for c in CATEGORIES_150.categories] == names
    folders = {
        "images": f"{root}/images/{split}",
        "annotations": f"{root}/annotations/{split}",
        "instances": f"{root}/annotations_instance/{split}",
    }
    sample = open_reader(Ade20kSource(**folders)).read(0)
    labels = decode_index_png((root / "annotations" / split / f"{sample.key}.png").read_bytes())
    ids = decode_id_png((root / "annotations_instance" / split / f"{sample.key}.png").read_bytes())
    expected, classes = _official_panoptic(labels, np.stack([ids & 255, ids >> 8 & 255], axis=-1))
    segments = {s.id: s for s in sample.annotation.segments}
    pairs = {(int(a), int(b)) for a, b in zip(sample.annotation.seg.ravel(), expected.ravel(), strict=True)}
    assert len(pairs) == len(segments) + 1 == len(classes) + 1, "the same partition, under other ids"
    assert all(segments[a].category_id == classes[b] for a, b in pairs if a)
    folders.pop("instances")
    semantic = open_reader(Ade20kSource(**folders)).read(0).annotation
    table = np.array([0, *(s.category_id for s in semantic.segments)])
    assert np.array_equal(table[semantic.seg], labels)


def test_full_release_sample_matches_its_json_and_instance_masks(real_data):
    root = real_data / "ade20k_full"
    reader = open_reader(Ade20kFullSource(folder=str(root)))
    ious = []
    for index, key in enumerate(reader.keys):
        annotation = reader.read(index).annotation
        (description,) = root.rglob(f"{key}.json")
        objects = json.loads(description.read_text("latin-1"))["annotation"]["object"]
        whole_objects = [o for o in objects if o["parts"]["part_level"] == 0]
        assert {s.category_id for s in annotation.segments} == {o["name_ndx"] for o in whole_objects} & set(
            reader.categories.by_id
        )
        for entry in whole_objects:
            category = reader.categories.by_id.get(entry["name_ndx"])
            assert category is None or entry["name"].startswith(category.name)
            if category is None or not category.is_thing:
                continue
            visible = decode_index_png((description.parent / entry["instance_mask"]).read_bytes()) == 255
            masks = [annotation.seg == s.id for s in annotation.segments if s.category_id == category.id]
            ious.append(max(np.count_nonzero(m & visible) / np.count_nonzero(m | visible) for m in masks))
    assert len(ious) > 50
    assert min(ious) > 0.96
    assert np.mean(np.array(ious) == 1) > 0.95
