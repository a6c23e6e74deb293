"""Defects that do not reject an image: bad annotations, repeated ids, missing sizes, stray rings of two points."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.readers.coco_json import SIZES_FROM_FILES
from m2f.data_pipeline.readers.masks import (
    AREA_MISMATCH,
    FLAT_RINGS,
    NO_PIXELS,
    OUTSIDE,
    PARTLY_OUTSIDE,
    RENUMBERED_IDS,
    SHORT_RINGS,
    read_rle,
    share_outside,
)
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.write import commit_manifest, complete_parts, plan_shards, write_dataset, write_shard
from m2f.data_pipeline.sources import CocoPanopticSource
from m2f.data_pipeline.storage.storage import Storage
from tests.data_pipeline.coco_set import POLYGON, CocoSet, H, W


@pytest.fixture
def coco(tmp_path):
    return CocoSet(tmp_path)


def _read(coco):
    coco.write()
    return open_reader(coco.instances_source).read(0)


INVALID_CHANGES = [{"segmentation": None}, {"segmentation": [[1, 2, 3]]}, {"area": float("nan")}, {"bbox": "x"}]


@pytest.mark.parametrize("change", INVALID_CHANGES)
def test_bad_annotation_is_left_out_and_others_are_kept(coco, change):
    coco.instances[1] |= change
    sample = _read(coco)
    assert [s.source_id for s in sample.annotation.segments] == [1, 3]
    assert [s.id for s in sample.annotation.segments] == [1, 2]
    (message,) = sample.left_out
    assert message.startswith("images/a.jpg: annotation 2")


@pytest.mark.parametrize("change", INVALID_CHANGES)
def test_bad_annotation_beside_a_panoptic_map_is_left_out_and_others_are_kept(coco, change):
    coco.instances[0] |= change
    coco.write()
    root = coco.root
    source = CocoPanopticSource(
        images=f"{root}/images",
        panoptic_json=f"{root}/panoptic.json",
        panoptic_masks=f"{root}/masks",
        instances_json=f"{root}/instances.json",
    )
    sample = open_reader(source).read(0)
    assert [s.source_id for s in sample.annotation.segments if s.map == "inst"] == [2, 3]
    assert len(sample.left_out) == 1


@pytest.mark.parametrize("annotation_id", [1, "first", None, 1.5, 10**30, float("inf")])
def test_annotations_with_unusable_ids_are_renumbered(coco, annotation_id):
    coco.instances[1]["id"] = annotation_id
    sample = _read(coco)
    assert [s.source_id for s in sample.annotation.segments] == [1, 4, 3]
    assert sample.repairs == (RENUMBERED_IDS,)
    del coco.instances[1]["id"]
    assert _read(coco).repairs == (RENUMBERED_IDS,)


@pytest.mark.parametrize("names", [("height",), ("width",), ("height", "width")])
@pytest.mark.parametrize("kind", ["instances", "panoptic"])
def test_sizes_missing_in_the_json_are_read_from_the_files(coco, names, kind):
    for name in names:
        del coco.images[0][name]
    coco.write()
    sample = open_reader(getattr(coco, f"{kind}_source")).read(0)
    assert (sample.height, sample.width) == (H, W)
    assert sample.repairs == (SIZES_FROM_FILES,)


def test_missing_file_without_a_size_raises_error_when_it_is_read(coco):
    del coco.images[0]["height"]
    coco.files.clear()
    with pytest.raises(DataError, match=r"a.jpg does not exist"):
        _read(coco)


@pytest.mark.parametrize("ring", [[], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
@pytest.mark.parametrize("first", [True, False])
def test_rings_of_at_most_two_points_are_ignored(coco, ring, first):
    intact = _read(coco).annotation
    coco.instances[0]["segmentation"] = [ring, POLYGON] if first else [POLYGON, ring]
    sample = _read(coco)
    np.testing.assert_array_equal(sample.annotation.inst, intact.inst)
    assert sample.annotation.segments == intact.segments
    assert sample.repairs == (SHORT_RINGS,)
    assert read_rle([ring, POLYGON], H, W, "x") == read_rle([POLYGON], H, W, "x"), "as `m2f score` reads it"


def test_a_polygon_without_a_list_around_it_is_one_polygon(coco):
    intact = _read(coco).annotation
    coco.instances[0]["segmentation"] = POLYGON  # as VIA 2 writes it
    sample = _read(coco)
    np.testing.assert_array_equal(sample.annotation.inst, intact.inst)
    assert (sample.annotation.segments, sample.repairs) == (intact.segments, (FLAT_RINGS,))


def test_shard_parts_count_left_out_and_repaired_annotations(coco):
    coco.files["b.jpg"] = cv2.imencode(".jpg", np.zeros((H, W, 3), np.uint8))[1].tobytes()
    coco.images.append({"id": 41, "file_name": "b.jpg"})
    coco.instances[1]["area"] = -1
    coco.instances[2]["id"] = 1
    coco.write()
    dataset = DatasetConfig(shards=str(coco.root / "shards"), source=coco.instances_source)
    reader, storage = open_reader(coco.instances_source), Storage()
    with pytest.raises(DataError, match="1 annotation cannot be used"):
        write_dataset(reader, dataset, storage)
    plan = plan_shards(reader, dataset, "x")
    plan = replace(plan, target=f"{coco.root}/other")
    assert complete_parts(plan, storage) == ()
    part = write_shard(reader, plan, 0, storage)
    (problem,) = part.problems
    assert problem.is_in_shard
    assert dict(part.repairs) == {RENUMBERED_IDS: 1, SIZES_FROM_FILES: 1}
    commit_manifest(plan, [part], storage, skip_bad=True)
    assert complete_parts(plan, storage) == (part,), "the receipt keeps both"
    assert Manifest.load(plan.target, storage).num_samples == 2
    assert json.loads((coco.root / "other" / "dataset.json").read_text())["plan"] == plan.hash


def test_masks_without_pixels_and_wrong_areas_are_counted(coco):
    coco.instances[0]["segmentation"] = [[x / 1000 for x in POLYGON]]
    coco.instances[1]["area"] = 60 * 4
    coco.instances[2]["area"] = 41
    assert _read(coco).repairs == (NO_PIXELS, AREA_MISMATCH)
    coco.instances[0]["segmentation"] = [[x + 100 for x in POLYGON]]
    assert _read(coco).repairs == (OUTSIDE, AREA_MISMATCH)


BOX = [0.0, 0.0, 20.0, 0.0, 20.0, 10.0, 0.0, 10.0]


@pytest.mark.parametrize(
    ("dx", "dy", "share"),
    [(0, 0, 0), (-3, 0, 0.15), (-10, 0, 0.5), (0, 15, 0.5), (-10, 15, 0.75), (0, -10, 1), (30, 0, 1)],
)
def test_share_outside_counts_the_area_outside_the_frame(dx, dy, share):
    ring = [x + (dy if i % 2 else dx) for i, x in enumerate(BOX)]
    assert share_outside([ring], H, W) == pytest.approx(share)
    assert share_outside([ring[::-1]], W, H) == pytest.approx(share), "x and y exchanged, the other way round"
    assert share_outside([], H, W) == 0


def test_share_outside_is_exact_for_a_concave_polygon():
    """A U whose bridge is below the frame. Two legs of 5 x 10 pixels remain of 20 x 20 - 10 x 10 pixels."""
    ring = [0, 10, 5, 10, 5, 20, 15, 20, 15, 10, 20, 10, 20, 30, 0, 30]
    assert share_outside([ring], H, W) == pytest.approx(1 - 100 / 300)


@pytest.mark.parametrize(("x", "expected"), [(-3, ()), (-10, (PARTLY_OUTSIDE,)), (-20, (OUTSIDE,))])
@pytest.mark.parametrize("kind", ["instances", "both"])
def test_objects_that_extend_beyond_the_frame_are_counted(coco, x, expected, kind):
    ring = [value + (0 if i % 2 else x) for i, value in enumerate(BOX)]
    coco.instances[0] |= {"segmentation": [ring], "area": 200}
    coco.write()
    root = coco.root
    both = replace(coco.panoptic_source, instances_json=f"{root}/instances.json")
    source = coco.instances_source if kind == "instances" else both
    assert open_reader(source).read(0).repairs == expected


@pytest.mark.parametrize(
    ("area", "expected"), [(541, ()), (None, ()), (1200, (AREA_MISMATCH,)), (100, (AREA_MISMATCH,))]
)
def test_wrong_areas_of_panoptic_segments_are_counted(coco, area, expected):
    coco.panoptic[0]["segments_info"][0]["area"] = area
    assert coco.read_panoptic().repairs == expected


def test_pixels_of_panoptic_segments_with_a_stated_area_of_0_are_counted(coco):
    coco.panoptic[0]["segments_info"][0]["area"] = 0
    sample = coco.read_panoptic()
    assert sample.annotation.segments[0].area == (sample.annotation.seg == 1).sum() > 0
    assert sample.repairs == (AREA_MISMATCH,)
