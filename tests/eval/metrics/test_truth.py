"""Conversion of annotations to the truth that metrics use."""

import numpy as np
import pytest

from m2f.data_pipeline.sample import Annotation, DecodedSample, Segment
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.extra.cityscapes import cityscapes_truth
from m2f.eval.metrics.rle import decode_mask
from m2f.eval.metrics.truth import instance_truth, panoptic_truth, semantic_truth

LABELS = {7: 0, 9: 1, 40: 2}
THING_LABELS = {7: 0, 9: 1}


def segment(segment_id, category_id, *, thing=True, crowd=False, area=1.0, where="seg", layer=0):
    return Segment(
        id=segment_id,
        category_id=category_id,
        is_thing=thing,
        is_crowd=crowd,
        area=area,
        bbox=(0.0, 0.0, 1.0, 1.0),
        source_id=segment_id,
        map=where,
        layer=layer,
    )


def sample_of(seg, inst, *segments):
    return DecodedSample(
        key="a",
        image_id=5,
        source="photos/a.jpg",
        image=np.zeros((2, 4, 3), np.uint8),
        annotation=Annotation(
            seg=None if seg is None else np.array(seg, np.uint8),
            inst=None if inst is None else np.array(inst, np.uint8),
            segments=segments,
        ),
    )


PARTITION = [[1, 1, 2, 0], [1, 3, 3, 0]]


def test_panoptic_truth_has_all_segments_of_the_partition_in_order():
    sample = sample_of(
        PARTITION,
        [[[1, 1, 0, 0], [0, 0, 0, 0]]],
        segment(2, 7, crowd=True),
        segment(1, 9, area=3.5),
        segment(3, 40, thing=False),
        segment(1, 7, where="inst"),
    )
    truth = panoptic_truth(sample, LABELS)
    assert list(truth.segments) == [2, 1, 3]
    assert truth.segments[1].area == 3.5
    assert [s.label for s in truth.segments.values()] == [0, 1, 2]
    assert [s.is_crowd for s in truth.segments.values()] == [True, False, False]


def test_pixels_of_the_partition_are_counted_if_the_stated_area_is_0():
    truth = panoptic_truth(sample_of(PARTITION, None, segment(1, 9, area=0.0), segment(3, 40, area=0.0)), LABELS)
    assert {i: s.area for i, s in truth.segments.items()} == {1: 3.0, 3: 2.0}


def test_instances_come_from_their_layers_with_stated_areas():
    sample = sample_of(
        PARTITION,
        [[[1, 1, 0, 0], [0, 0, 0, 0]], [[2, 2, 2, 0], [0, 0, 0, 0]]],
        segment(1, 40, thing=False),
        segment(1, 7, where="inst", area=2.25),
        segment(2, 9, where="inst", layer=1, crowd=True),
    )
    truth = instance_truth(sample, THING_LABELS)
    assert [int(decode_mask(m).sum()) for m in truth.masks] == [2, 3]
    assert truth.areas.tolist() == [2.25, 1.0]
    assert truth.labels.tolist() == [0, 1]
    assert truth.is_crowd.tolist() == [False, True]


def test_instances_without_layers_are_the_things_of_the_partition():
    sample = sample_of(PARTITION, None, segment(1, 9), segment(2, 7), segment(3, 40, thing=False))
    truth = instance_truth(sample, THING_LABELS)
    assert truth.labels.tolist() == [1, 0]
    assert (decode_mask(truth.masks[0]) == (np.array(PARTITION) == 1)).all()
    assert instance_truth(sample_of(PARTITION, np.zeros((1, 2, 4))), THING_LABELS).masks == ()


def test_semantic_truth_keeps_crowds_and_ignores_void_and_unlisted_ids():
    sample = sample_of(PARTITION, None, segment(1, 9, crowd=True), segment(2, 7))
    labels = semantic_truth(sample, LABELS)
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[1, 1, 0, 255], [1, 255, 255, 255]]
    many = {category: label for label, category in enumerate(range(300))}
    wide = semantic_truth(sample_of(PARTITION, None, segment(1, 299)), many)
    assert wide.tolist() == [[299, 299, 65535, 65535], [299, 65535, 65535, 65535]]


def test_errors_for_missing_map_and_unknown_category_name_the_image():
    sample = sample_of(None, [[[1, 0, 0, 0], [0, 0, 0, 0]]], segment(1, 7, where="inst"))
    for make in (panoptic_truth, semantic_truth):
        with pytest.raises(EvaluationError, match=r"image 5 \(photos/a.jpg\) has no panoptic or semantic map"):
            make(sample, LABELS)
        with pytest.raises(EvaluationError, match="evaluate only the task `instance`, or shard"):
            make(sample, LABELS)
    with pytest.raises(EvaluationError, match=r"remove `cityscapes` from evaluation\.extra_metrics, or shard"):
        cityscapes_truth(sample)
    with pytest.raises(EvaluationError, match="so instances cannot be evaluated; shard the data set"):
        instance_truth(sample_of(None, None), THING_LABELS)
    with pytest.raises(EvaluationError, match=r"image 5 .*segment 1 has category 7"):
        instance_truth(sample, {9: 0})
