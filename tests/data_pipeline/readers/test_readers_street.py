"""Cityscapes and Mapillary Vistas readers on generated layouts, and on real samples if present."""

from __future__ import annotations

import json

import numpy as np
import pytest

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import decode_index_png, encode_png
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.readers.cityscapes import CATEGORIES
from m2f.data_pipeline.shards.codec import decode, encode
from m2f.data_pipeline.sources import CityscapesPanopticSource, CityscapesSource, CocoPanopticSource, MapillarySource
from m2f.data_pipeline.transforms.targets import image_targets

H, W = 6, 10


def _write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(pixels))


def _targets(sample, table, task):
    members = {name.removeprefix(f"{sample.key}."): data for name, data in encode(sample)}
    return image_targets(decode(members), task, table.labels(task))


def _class_map(annotation):
    """Return category ids [H, W]; -1 is void."""
    table = np.full(len(annotation.segments) + 1, -1)
    for segment in annotation.segments:
        table[segment.id] = segment.category_id
    return table[annotation.seg]


# Cityscapes.


@pytest.fixture
def street(tmp_path):
    """Write one image, and return its source and a function that writes its instance ids."""
    _write(tmp_path / "leftImg8bit/val/ulm/ulm_000001_000019_leftImg8bit.png", np.full((H, W, 3), 80, np.uint8))

    def write(ids):
        _write(tmp_path / "gtFine/val/ulm/ulm_000001_000019_gtFine_instanceIds.png", ids.astype(np.uint16))
        _write(tmp_path / "gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png", np.zeros((H, W), np.uint8))

    return CityscapesSource(images=f"{tmp_path}/leftImg8bit/val", annotations=f"{tmp_path}/gtFine/val"), write


def test_cityscapes_maps_give_instances_groups_and_void(street):
    source, write = street
    ids = np.full((H, W), 7)
    ids[0] = 3  # label "out of roi"
    ids[1, :4], ids[1, 4:6], ids[1, 6:] = 26000, 26001, 26  # two cars and a group of cars
    ids[2], ids[3] = 23, 29001  # sky and a caravan, which is not evaluated
    write(ids)
    reader = open_reader(source)
    sample = reader.read(0)
    assert (sample.key, sample.source) == ("ulm_000001_000019", "val/ulm/ulm_000001_000019_leftImg8bit.png")
    segments = [(s.source_id, s.category_id, s.is_thing, s.is_crowd, s.area) for s in sample.annotation.segments]
    assert segments == [
        (7, 7, False, False, 20),
        (23, 23, False, False, 10),
        (26, 26, True, True, 4),
        (26000, 26, True, False, 4),
        (26001, 26, True, False, 2),
    ]
    assert (sample.annotation.seg == 0).sum() == 20
    table = reader.categories
    assert (len(table.for_task("panoptic")), len(table.for_task("instance"))) == (19, 8)
    assert _targets(sample, table, "instance").labels.tolist() == [2, 2]
    assert _targets(sample, table, "panoptic").labels.tolist() == [0, 10, 13, 13]
    semantic = _targets(sample, table, "semantic")
    assert semantic.labels.tolist() == [0, 10, 13]
    assert (semantic.id_maps == 3).sum() == 10, "a group is its class in semantic segmentation"


def test_invalid_cityscapes_files_are_refused(street):
    source, write = street
    with pytest.raises(DataError, match=r"gtFine/val does not exist or is not a folder"):
        open_reader(source)
    ids = np.full((H, W), 7)
    ids[0, 0], ids[0, 1] = 34, 40002
    write(ids)
    with pytest.raises(DataError, match=r"instanceIds.png: pixel values 34, 40002 do not belong to a Cityscapes label"):
        open_reader(source).read(0)
    _write(
        open_reader(source).images / "ulm/ulm_000001_000020_leftImg8bit.png",
        np.zeros((H, W, 3), np.uint8),
    )
    with pytest.raises(DataError, match=r"000020_leftImg8bit.png: it has no map .*ulm/ulm_000001_000020_gtFine_"):
        open_reader(source).read(1)


def test_missing_cityscapes_image_raises_error_with_its_id(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    image = {"id": "ulm_1", "file_name": "ulm_1_gtFine_leftImg8bit.png", "height": H, "width": W}
    document = {
        "images": [image],
        "annotations": [{"image_id": "ulm_1", "file_name": "ulm_1.png", "segments_info": []}],
        "categories": [{"id": 7, "name": "road", "isthing": 0}],
    }
    (tmp_path / "p.json").write_text(json.dumps(document))
    source = CityscapesPanopticSource(
        images=f"{tmp_path}/images", panoptic_json=f"{tmp_path}/p.json", panoptic_masks=f"{tmp_path}/masks"
    )
    with pytest.raises(DataError, match=r"lacks 1 image of .*p.json, named <id>_leftImg8bit.png: ulm_1; set"):
        open_reader(source)


@pytest.mark.parametrize("ids", [{"road": 7, "car": 26}, {"road": 0, "car": 13}])
def test_a_panoptic_json_of_annotations_only_uses_label_ids_or_train_ids(street, tmp_path, ids):
    """The JSON has only the fields that DeepLab2 reads. Segment ids contain label ids in both variants."""
    colors = np.zeros((H, W, 3), np.uint8)
    colors[:] = 7, 0, 0
    colors[2:4, 2:5] = 26001 % 256, 26001 // 256, 0
    _write(tmp_path / "masks/ulm.png", colors)
    segments = [{"id": 7, "category_id": ids["road"]}, {"id": 26001, "category_id": ids["car"], "iscrowd": 0}]
    entry = {"image_id": "ulm_000001_000019", "file_name": "ulm.png", "segments_info": segments}
    (tmp_path / "p.json").write_text(json.dumps({"annotations": [entry]}))
    reader_source = CityscapesPanopticSource(
        images=f"{tmp_path}/leftImg8bit", panoptic_json=f"{tmp_path}/p.json", panoptic_masks=f"{tmp_path}/masks"
    )
    (tmp_path / "leftImg8bit").rename(tmp_path / "elsewhere")
    (tmp_path / "leftImg8bit").mkdir()
    (tmp_path / "leftImg8bit/linked").symlink_to(tmp_path / "elsewhere")
    reader = open_reader(reader_source)
    (sample,) = map(reader.read, range(len(reader.keys)))
    assert (sample.key, sample.height, sample.width) == ("ulm_000001_000019", H, W)
    names = [reader.categories.by_id[s.category_id].name for s in sample.annotation.segments]
    assert names == ["road", "car"]
    assert _targets(sample, reader.categories, "panoptic").labels.tolist() == [0, 13]
    assert [s.area for s in sample.annotation.segments] == [H * W - 6, 6]
    for invalid, message in (
        ({"annotations": [entry | {"segments_info": 7}]}, "segments_info is not a list"),
        ({"annotations": [entry | {"image_id": None}]}, "image_id is None"),
        ({"annotations": 7}, "has no list annotations"),
        ({"annotations": [entry], "images": 7}, "has no list images"),
    ):
        (tmp_path / "p.json").write_text(json.dumps(invalid))
        with pytest.raises(DataError, match=f"p.json.*{message}"):
            open_reader(reader_source)


@pytest.mark.parametrize("split", ["train", "val"])
def test_cityscapes_sample_matches_its_panoptic_and_label_files(real_data, split):
    root = real_data / "cityscapes_layout_from_camvid"
    gt = root / "gtFine"
    reader = open_reader(CityscapesSource(images=f"{root}/leftImg8bit/{split}", annotations=f"{gt}/{split}"))
    panoptic = open_reader(
        CityscapesPanopticSource(
            images=f"{root}/leftImg8bit/{split}",
            panoptic_json=f"{gt}/cityscapes_panoptic_{split}.json",
            panoptic_masks=f"{gt}/cityscapes_panoptic_{split}",
        )
    )
    assert sorted(panoptic.keys) == list(reader.keys)
    train_ids = reader.categories.labels("semantic")
    for index, key in enumerate(reader.keys):
        sample = reader.read(index)
        other = panoptic.read(panoptic.keys.index(key))
        assert other.image == sample.image
        segments = {(s.source_id, s.category_id, s.is_crowd, s.area, s.bbox) for s in sample.annotation.segments}
        assert segments == {(s.source_id, s.category_id, s.is_crowd, s.area, s.bbox) for s in other.annotation.segments}
        classes = _class_map(sample.annotation)
        prefix = gt / split / key.split("_")[0] / f"{key}_gtFine"
        labels = decode_index_png((prefix.parent / f"{prefix.name}_labelIds.png").read_bytes())
        is_evaluated = np.isin(labels, list(CATEGORIES.by_id))
        assert np.array_equal(classes, np.where(is_evaluated, labels.astype(int), -1))
        expected = decode_index_png((prefix.parent / f"{prefix.name}_labelTrainIds.png").read_bytes())
        assert np.array_equal(np.vectorize(lambda c: train_ids.get(c, 255))(classes), expected)
    assert any(s.is_crowd for i in range(len(reader.keys)) for s in reader.read(i).annotation.segments)


def test_cityscapes_dummy_files_are_read(real_data, tmp_path):
    root = real_data / "cityscapes_dummy"
    tiny = open_reader(CityscapesSource(images=f"{root}/tiny/leftImg8bit/test", annotations=f"{root}/tiny/gtFine/test"))
    segments = [[(s.source_id, s.area) for s in tiny.read(i).annotation.segments] for i in range(2)]
    assert segments == [[(27001, 1), (27002, 2)], [(12, 1), (31001, 2)]]
    folder = root / "deeplab2/gtFine/cityscapes_panoptic_dummy_trainId"  # its JSON lists no images and no categories
    reader = open_reader(
        CityscapesPanopticSource(
            images=f"{root}/deeplab2/leftImg8bit", panoptic_json=f"{folder}.json", panoptic_masks=str(folder)
        )
    )
    assert [c.name for c in reader.categories.categories] == [c.name for c in CATEGORIES.categories]
    annotation = reader.read(0).annotation
    pixels = np.bincount(annotation.seg.ravel())
    assert [s.source_id for s in annotation.segments if s.is_crowd] == [26]
    assert all(pixels[s.id] == s.area for s in annotation.segments)


# Mapillary Vistas.


LABELS = [
    {"name": "nature--sky", "readable": "Sky", "color": [1, 2, 3], "instances": False, "evaluate": True},
    {"name": "object--car", "color": [4, 5, 6], "instances": True, "evaluate": True},
    {"name": "void--unlabeled", "readable": "Unlabeled", "color": [0, 0, 0], "instances": False, "evaluate": False},
]


@pytest.fixture
def vistas(tmp_path):
    _write(tmp_path / "images/a.png", np.full((H, W, 3), 80, np.uint8))
    (tmp_path / "config.json").write_text(json.dumps({"labels": LABELS}))
    source = MapillarySource(
        images=f"{tmp_path}/images", instances=f"{tmp_path}/instances", config_json=f"{tmp_path}/config.json"
    )
    return source, lambda values: _write(tmp_path / "instances/a.png", values.astype(np.uint16)), tmp_path


def test_mapillary_maps_give_instances_and_void(vistas):
    source, write, folder = vistas
    values = np.zeros((H, W))
    values[1], values[2], values[3] = 256, 257, 512
    write(values)
    reader = open_reader(source)
    assert [(c.id, c.name, c.is_thing) for c in reader.categories.categories] == [
        (0, "Sky", False),
        (1, "object--car", True),
    ]
    annotation = reader.read(0).annotation
    assert [(s.source_id, s.category_id, s.area) for s in annotation.segments] == [
        (0, 0, 30),
        (256, 1, 10),
        (257, 1, 10),
    ]
    assert (annotation.seg == 0).sum() == 10
    before = source_fingerprint(source)
    (folder / "config.json").write_text(json.dumps({"labels": LABELS[:2]}))
    assert source_fingerprint(source) != before
    with pytest.raises(DataError, match=r"instances/a.png: pixel values 512 \(256 x label \+ instance\) do not"):
        open_reader(source).read(0)


def test_mapillary_maps_with_8_bits_are_refused(vistas):
    """In the folder `labels`, each value is a label; as instance maps, all would be the first label."""
    source, write, folder = vistas
    write(np.zeros((H, W)))
    (folder / "instances/a.png").write_bytes(encode_png(np.ones((H, W), np.uint8)))
    with pytest.raises(DataError, match=r"instances/a.png: instance maps have 16 bits, but this map has 8"):
        open_reader(source).read(0)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "has no list of up to 256 labels"),
        ({"labels": [LABELS[2]]}, "no label has `evaluate` true"),
        ({"labels": [{"name": "x", "instances": True}]}, r"labels\[0\]: the field 'evaluate' is missing"),
    ],
)
def test_invalid_mapillary_config_is_refused(vistas, document, message):
    source, write, folder = vistas
    write(np.zeros((H, W)))
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=f"config.json.*{message}"):
        open_reader(source)


def test_mapillary_sample_matches_its_panoptic_and_label_files(real_data):
    root = real_data / "mapillary_layout_from_camvid"
    for split in ("training", "validation"):
        folder = root / split
        source = MapillarySource(
            images=f"{folder}/images", instances=f"{folder}/instances", config_json=f"{root}/config.json"
        )
        reader = open_reader(source)
        panoptic = open_reader(
            CocoPanopticSource(
                images=f"{folder}/images",
                panoptic_json=f"{folder}/panoptic/panoptic_2018.json",
                panoptic_masks=f"{folder}/panoptic",
            )
        )
        assert list(reader.keys) == sorted(panoptic.keys)
        for index, key in enumerate(reader.keys):
            annotation, other = reader.read(index).annotation, panoptic.read(panoptic.keys.index(key)).annotation
            labels = decode_index_png((folder / "labels" / f"{key}.png").read_bytes())
            assert np.array_equal(_class_map(annotation), np.where(labels == 11, -1, labels.astype(int)))
            # The JSON numbers categories from 1. It marks blobs below 25 pixels as void; the instance maps keep them.
            category_by_id = {s.id: s.category_id + 1 for s in annotation.segments}
            for segment in other.segments:
                (local_id,) = np.unique(annotation.seg[other.seg == segment.id])
                assert category_by_id[local_id] == segment.category_id
            assert np.count_nonzero((annotation.seg != 0) & (other.seg == 0)) < 0.01 * labels.size
            assert len(other.segments) <= len(annotation.segments)


@pytest.mark.parametrize(("version", "year"), [("v1.2", 2018), ("v2.0", 2020)])
def test_mapillary_dummy_files_are_read(real_data, version, year):
    root = real_data / "mapillary_dummy"
    folder = root / "val"
    source = MapillarySource(
        images=f"{folder}/images",
        instances=f"{folder}/{version}/instances",
        config_json=f"{root}/config_{version}.json",
    )
    reader = open_reader(source)
    segments = [[(s.category_id, s.area) for s in reader.read(i).annotation.segments] for i in range(2)]
    assert segments == [[(0, 15), (1, 10)], [(1, 5), (2, 10), (2, 10)]]
    panoptic = open_reader(
        CocoPanopticSource(
            images=f"{folder}/images",
            panoptic_json=f"{folder}/{version}/panoptic/panoptic_{year}.json",
            panoptic_masks=f"{folder}/{version}/panoptic",
        )
    )
    first, second = (panoptic.read(i).annotation.segments for i in range(2))
    assert [(s.category_id, s.is_crowd, s.area) for s in first] == [(1, True, 15), (10, False, 10)]
    assert all(s.bbox[2] > 0 for s in (*first, *second)), "empty boxes are measured"
