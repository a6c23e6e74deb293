"""`--skip-bad` leaves out a bad annotation, but not its image or the whole file."""

import json
from dataclasses import replace

import numpy as np
import pytest

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.sources import CityscapesPanopticSource
from tests.data_pipeline.coco_set import IDS, CocoSet, H, W

INVALID_CATEGORIES = [17, "cat", None, 1.5, float("inf"), float("nan"), 10**30, [3]]


@pytest.fixture
def coco(tmp_path):
    return CocoSet(tmp_path)


def _refusal(coco, source):
    """Return the error message without --skip-bad, which must suggest this option."""
    coco.write()
    with pytest.raises(DataError, match="Correct them, or leave them out with --skip-bad") as caught:
        open_reader(source)
    return str(caught.value)


@pytest.mark.parametrize("category", INVALID_CATEGORIES)
def test_instance_with_an_invalid_category_is_left_out(coco, category):
    coco.instances[1]["category_id"] = category
    assert "instances.json: annotation 2: category_id is" in _refusal(coco, coco.instances_source)
    reader = open_reader(coco.instances_source, skip_bad=True)
    assert [s.source_id for s in reader.read(0).annotation.segments] == [1, 3]
    (unusable,) = reader.unusable
    assert unusable.source == coco.instances_source.instances_json
    assert unusable.message.startswith("annotation 2: category_id is")


@pytest.mark.parametrize("flag", ["0", "true", 2, -1, 0.5, [0]])
@pytest.mark.parametrize("kind", ["instances", "panoptic"])
def test_annotation_with_an_invalid_crowd_flag_is_left_out(coco, kind, flag):
    entry = coco.instances[1] if kind == "instances" else coco.panoptic[0]["segments_info"][1]
    entry["iscrowd"] = flag
    source = getattr(coco, f"{kind}_source")
    name = "annotation 2" if kind == "instances" else "annotation of image 40, segment 70000"
    assert f"{name}: iscrowd is {flag!r}; it must be 0, 1, true or false" in _refusal(coco, source)
    reader = open_reader(source, skip_bad=True)
    assert len(reader.unusable) == 1
    source_ids = [s.source_id for s in reader.read(0).annotation.segments]
    assert source_ids == ([1, 3] if kind == "instances" else [IDS[0]])


@pytest.mark.parametrize("category", INVALID_CATEGORIES)
def test_panoptic_segment_with_an_invalid_category_is_left_out(coco, category):
    coco.panoptic[0]["segments_info"][0]["category_id"] = category
    assert "annotation of image 40, segment 5: category_id is" in _refusal(coco, coco.panoptic_source)
    reader = open_reader(coco.panoptic_source, skip_bad=True)
    sample = reader.read(0)
    assert [s.source_id for s in sample.annotation.segments] == [IDS[1]]
    np.testing.assert_array_equal(sample.annotation.seg, coco.ids == IDS[1])
    assert sample.left_out == ()
    assert len(reader.unusable) == 1, "said once"


def test_instance_beside_a_panoptic_map_with_an_invalid_category_is_left_out(coco):
    coco.instances[0]["category_id"] = 90  # sky in the panoptic file, undefined in the instance file
    coco.write()
    document = json.loads((coco.root / "instances.json").read_text())
    document["categories"] = [{"id": 3, "name": "cat"}]
    (coco.root / "instances.json").write_text(json.dumps(document))
    source = replace(coco.panoptic_source, instances_json=f"{coco.root}/instances.json")
    with pytest.raises(DataError, match="annotation 1: category_id is 90, which `categories` does not define"):
        open_reader(source)
    sample = open_reader(source, skip_bad=True).read(0)
    assert [s.source_id for s in sample.annotation.segments if s.map == "inst"] == [2, 3]
    assert [s.category_id for s in sample.annotation.segments if s.map == "seg"] == [90, 3]


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
@pytest.mark.parametrize("image", [99, None, 1.5, [40]])
def test_annotation_of_an_unknown_image_is_left_out(coco, kind, image):
    entries = getattr(coco, kind)
    source = getattr(coco, f"{kind}_source")
    intact = (coco.write(), open_reader(source).read(0))[1]
    entries.append({**entries[0], "image_id": image, "id": 9})
    assert f"annotations[{len(entries) - 1}]" in _refusal(coco, source)
    reader = open_reader(source, skip_bad=True)
    assert len(reader.unusable) == 1
    assert reader.read(0).annotation.segments == intact.annotation.segments
    assert reader.subset([0]).unusable == (), "the driver has said it; tasks need not carry it"


@pytest.mark.parametrize("segment_id", ["five", None, 0, -1, 1.5, float("inf"), 1 << 24])
def test_panoptic_segment_with_an_invalid_id_is_left_out(coco, segment_id):
    coco.panoptic[0]["segments_info"][1]["id"] = segment_id
    assert "segments_info[1]: id is" in _refusal(coco, coco.panoptic_source)
    sample = open_reader(coco.panoptic_source, skip_bad=True).read(0)
    assert [s.source_id for s in sample.annotation.segments] == [IDS[0]]
    np.testing.assert_array_equal(sample.annotation.seg, coco.ids == IDS[0])
    (message,) = sample.left_out
    assert "pixels have ids that its JSON entry does not list: 70000" in message


def test_panoptic_segments_with_the_same_id_are_left_out(coco):
    coco.panoptic[0]["segments_info"].append({"id": IDS[1], "category_id": 90})
    assert "segment 70000: 2 segments have this id" in _refusal(coco, coco.panoptic_source)
    reader = open_reader(coco.panoptic_source, skip_bad=True)
    assert [s.source_id for s in reader.read(0).annotation.segments] == [IDS[0]]
    assert len(reader.unusable) == 2


@pytest.mark.parametrize("entry", [None, 5, "segment", []])
def test_invalid_entries_of_segments_info_are_left_out(coco, entry):
    coco.panoptic[0]["segments_info"].append(entry)
    assert "segments_info[2]: the field 'category_id' is missing" in _refusal(coco, coco.panoptic_source)
    assert len(open_reader(coco.panoptic_source, skip_bad=True).read(0).annotation.segments) == 2


@pytest.mark.parametrize("change", [{"area": float("nan")}, {"area": "large"}, {"bbox": [1, 2]}])
def test_panoptic_segment_with_invalid_numbers_is_left_out(coco, change):
    coco.panoptic[0]["segments_info"][0] |= change
    sample = coco.read_panoptic(skip_bad=True)
    assert [(s.id, s.source_id) for s in sample.annotation.segments] == [(1, IDS[1])]
    np.testing.assert_array_equal(sample.annotation.seg, coco.ids == IDS[1])
    (message,) = sample.left_out
    assert "masks/a.png: segment 5: " in message


def test_a_segment_without_pixels_and_pixels_without_a_segment_are_left_out(coco):
    coco.panoptic[0]["segments_info"].insert(0, {"id": 8, "category_id": 3})
    coco.ids[0] = 9
    sample = coco.read_panoptic(skip_bad=True)
    assert [(s.id, s.source_id) for s in sample.annotation.segments] == [(1, IDS[0]), (2, IDS[1])]
    assert (sample.annotation.seg[0] == 0).all()
    assert [m.split(": ", 1)[1] for m in sample.left_out] == [
        "segment 8 is in its JSON entry but has no pixel",
        "pixels have ids that its JSON entry does not list: 9",
    ]


@pytest.mark.parametrize("uses_label_ids", [True, False])
@pytest.mark.parametrize("invalid_category", [99, "road", None])
def test_invalid_category_does_not_change_the_cityscapes_table(tmp_path, uses_label_ids, invalid_category):
    """The JSON has no categories, so the reader infers from the segments whether ids are label ids or train ids."""
    name, ids = "ulm_000001_000019", np.full((H, W), 7, np.uint32)
    ids[:5], ids[5:9] = 11, 26001
    for folder, ending, pixels in (
        ("images", "_leftImg8bit.png", np.zeros((H, W, 3), np.uint8)),
        ("masks", "_gtFine_panoptic.png", np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}{ending}").write_bytes(encode_png(pixels))
    road, car = (7, 26) if uses_label_ids else (0, 13)
    segments = [
        {"id": 7, "category_id": road},
        {"id": 11, "category_id": invalid_category},
        {"id": 26001, "category_id": car},
    ]
    entry = {"image_id": name, "file_name": f"{name}_gtFine_panoptic.png", "segments_info": segments}
    (tmp_path / "panoptic.json").write_text(json.dumps({"annotations": [entry]}))
    root = str(tmp_path)
    source = CityscapesPanopticSource(
        images=f"{root}/images", panoptic_json=f"{root}/panoptic.json", panoptic_masks=f"{root}/masks"
    )
    reader = open_reader(source, skip_bad=True)
    names = [reader.categories.by_id[s.category_id].name for s in reader.read(0).annotation.segments]
    assert names == ["road", "car"]
    assert len(reader.unusable) == 1
