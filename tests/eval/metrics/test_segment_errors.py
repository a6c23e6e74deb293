"""Outcomes of segments: every outcome on a small example, agreement with panoptic quality, and instances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f.eval.metrics.average_precision import InstanceDetections, InstanceTruth
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticTruth, TruthSegment, match_panoptic
from m2f.eval.metrics.rle import encode_masks
from m2f.eval.metrics.segment_errors import (
    NO_SEGMENT,
    Outcome,
    SegmentErrorState,
    assign_outcomes,
    instance_candidates,
    panoptic_candidates,
)

CLASSES = 3


def strip(*lengths_and_ids, width=1):
    """Return a map of `width` equal rows; the arguments are (length, id) of runs."""
    return np.repeat([np.repeat([i for _, i in lengths_and_ids], [n for n, _ in lengths_and_ids])], width, axis=0)


def outcomes(truth_map, truth, predicted_map, labels):
    """Return sorted (truth class, predicted class, outcome, area). `truth` maps ids to a class or (class, crowd)."""
    segments = {}
    for i, label in truth.items():
        label, crowd = label if isinstance(label, tuple) else (label, False)
        segments[i] = TruthSegment(label, int((truth_map == i).sum()), crowd)
    record = assign_outcomes(
        panoptic_candidates(PanopticTruth(truth_map, segments), PanopticPrediction(predicted_map, labels))
    )
    rows = zip(record.truth, record.predicted, record.outcome, record.area, strict=True)
    return sorted((int(t), int(p), Outcome(o).name, int(a)) for t, p, o, a in rows)


@pytest.mark.parametrize(
    ("truth_map", "truth", "predicted_map", "labels", "expected"),
    [
        (strip((10, 1)), {1: 0}, strip((8, 7), (2, 0)), {7: 0}, [(0, 0, "MATCHED", 10)]),
        (strip((10, 1)), {1: 0}, strip((8, 7), (2, 0)), {7: 2}, [(0, 2, "CLASS", 10)]),
        (strip((10, 1)), {1: 0}, strip((5, 7), (5, 0)), {7: 0}, [(0, 0, "OUTLINE", 10)]),  # IoU 0.5 is no match
        (
            strip((10, 1)),
            {1: 0},
            strip((5, 7), (5, 0)),
            {7: 1},
            [(NO_SEGMENT, 1, "BACKGROUND", 5), (0, NO_SEGMENT, "MISSED", 10)],
        ),
        (
            strip((20, 1)),
            {1: 0},
            strip((1, 7), (19, 0)),
            {7: 0},
            [(NO_SEGMENT, 0, "BACKGROUND", 1), (0, NO_SEGMENT, "MISSED", 20)],
        ),
        (
            strip((20, 1)),
            {1: 0},
            strip((13, 7), (7, 8)),
            {7: 0, 8: 0},
            [(NO_SEGMENT, 0, "DUPLICATE", 7), (0, 0, "MATCHED", 20)],
        ),
        (strip((4, 1), (6, 0)), {1: 0}, strip((4, 7), (6, 8)), {7: 0, 8: 1}, [(0, 0, "MATCHED", 4)]),  # 8 covers void
        (strip((4, 1), (6, 2)), {1: 0, 2: (1, True)}, strip((4, 7), (6, 8)), {7: 0, 8: 1}, [(0, 0, "MATCHED", 4)]),
        (
            strip((4, 1), (6, 2)),
            {1: 0, 2: (1, True)},
            strip((4, 7), (6, 8)),
            {7: 0, 8: 2},
            [(NO_SEGMENT, 2, "BACKGROUND", 6), (0, 0, "MATCHED", 4)],
        ),
        (strip((4, 0)), {}, strip((4, 0)), {}, []),
    ],
    ids=[
        "match",
        "class",
        "outline",
        "half of another class",
        "far",
        "duplicate",
        "void",
        "crowd",
        "other crowd",
        "empty",
    ],
)
def test_every_outcome_is_assigned(truth_map, truth, predicted_map, labels, expected):
    assert outcomes(truth_map, truth, predicted_map, labels) == expected


@given(st.integers(0, 10_000))
def test_matches_and_errors_equal_those_of_panoptic_quality(seed):
    draw = np.random.default_rng(seed)
    truth_map, predicted_map = (np.kron(draw.integers(0, 5, (4, 4)), np.ones((2, 3), int)) for _ in range(2))
    predicted_map = np.where(draw.random(truth_map.shape) < 0.6, truth_map, predicted_map)
    segments = {
        i: TruthSegment(int(draw.integers(CLASSES)), int((truth_map == i).sum()), bool(draw.random() < 0.2))
        for i in np.unique(truth_map).tolist()
        if i
    }
    labels = {i: int(draw.integers(CLASSES)) for i in np.unique(predicted_map).tolist() if i}
    truth, prediction = PanopticTruth(truth_map, segments), PanopticPrediction(predicted_map, labels)
    ours, theirs = assign_outcomes(panoptic_candidates(truth, prediction)), match_panoptic(truth, prediction)
    matched = ours.outcome == Outcome.MATCHED
    assert sorted(ours.truth[matched]) == sorted(theirs.matched_label)
    assert sorted(ours.truth[~matched & (ours.truth != NO_SEGMENT)]) == sorted(theirs.false_negative)
    wrong = ours.predicted[~matched & (ours.predicted != NO_SEGMENT)]
    ignored = len(theirs.false_positive)
    assert ignored <= len(wrong) <= len(labels)  # a pair may contain a prediction that PQ ignores


def masks(*boxes, size=(20, 30)):
    planes = np.zeros((len(boxes), *size), bool)
    for plane, (top, left, height, width) in zip(planes, boxes, strict=True):
        plane[top : top + height, left : left + width] = True
    return encode_masks(planes)


def test_only_confident_instances_count():
    boxes = [(0, 0, 10, 10), (0, 15, 10, 10), (12, 0, 6, 20)]
    truth = InstanceTruth(
        masks(*boxes), np.array([0, 1, 2]), np.array([100.0, 100.0, 120.0]), np.array([False, False, True])
    )
    detections = InstanceDetections(
        masks((0, 0, 10, 9), (0, 1, 10, 9), (12, 0, 6, 5), (0, 15, 10, 10)),
        np.array([0, 1, 2, 3, 3]),
        np.array([0, 0, 2, 1, 0]),
        np.array([0.9, 0.8, 0.7, 0.4, 0.6]),
    )
    record = assign_outcomes(instance_candidates(truth, detections))
    rows = zip(record.truth, record.predicted, record.outcome, strict=True)
    assert sorted((int(t), int(p), Outcome(o).name) for t, p, o in rows) == [
        (NO_SEGMENT, 0, "DUPLICATE"),  # detection 1, on the first box; detection 2 is in the crowd and does not count
        (0, 0, "MATCHED"),
        (1, 0, "CLASS"),  # the right class has a score of only 0.4
    ]


def test_images_without_predictions_or_annotations_are_supported():
    empty = InstanceTruth((), np.zeros(0, int), np.zeros(0), np.zeros(0, bool))
    none = InstanceDetections((), np.zeros(0, int), np.zeros(0, int), np.zeros(0))
    one = InstanceTruth(masks((0, 0, 5, 5)), np.array([0]), np.array([25.0]), np.array([False]))
    assert len(assign_outcomes(instance_candidates(empty, none)).truth) == 0
    assert assign_outcomes(instance_candidates(one, none)).outcome.tolist() == [Outcome.MISSED]
    assert SegmentErrorState(CLASSES).compute().confusion.sum() == 0


def test_counts_by_class_size_and_pair_add_up():
    state = SegmentErrorState(CLASSES)
    truth_map = strip((40, 1), (10, 2), (10, 0), width=40)
    prediction = PanopticPrediction(strip((40, 5), (20, 6), width=40), {5: 0, 6: 2})
    truth = PanopticTruth(truth_map, {1: TruthSegment(0, 1600, False), 2: TruthSegment(1, 400, False)})
    for image_id in (3, 4):
        state.update(image_id, panoptic_candidates(truth, prediction))
    errors = SegmentErrorState.from_bytes(state.to_bytes()).compute()
    assert errors.confusion.tolist() == [[2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert errors.by_class[:, Outcome.MATCHED].tolist() == [2, 0, 0]
    assert errors.by_class[1, Outcome.CLASS] == 2
    assert errors.by_size.sum(axis=1).tolist() == [2, 2, 0]
    assert state.image_quality(3) == pytest.approx(1 / 2)
