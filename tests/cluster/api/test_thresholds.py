"""Tests of the score thresholds per class that reach a given precision."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f.cluster.api.thresholds import ClassThreshold, ThresholdError, Thresholds, choose_thresholds
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.storage.ragged_table import Ragged
from m2f.eval.metrics.resampled import InstanceImages


def records(detections, truth):
    """Return the records of one image.

    `detections` are rows (label, score, correct, ignored). `truth` maps labels to the number of annotated instances.
    """
    columns = [np.array([row[i] for row in detections]) for i in range(4)] if detections else [np.zeros(0)] * 4
    label, score, correct, ignored = columns

    def ragged(values, kind):
        return Ragged(np.asarray(values).astype(kind), np.array([len(values)]))

    return InstanceImages(
        label=ragged(label, "int32"),
        score=ragged(score, "float64"),
        matched=ragged(correct, "uint16"),
        ignored=ragged(ignored, "uint16"),
        truth_label=ragged(list(truth), "int32"),
        truth_count=ragged(list(truth.values()), "int32"),
    )


def test_the_lowest_threshold_with_the_precision_is_chosen():
    rows = [(0, 0.9, 1, 0), (0, 0.8, 0, 0), (0, 0.7, 1, 0), (0, 0.6, 1, 0), (0, 0.5, 0, 0), (1, 0.9, 0, 0)]
    found = choose_thresholds(records(rows, {0: 4}), ["cat", "dog", "cow"], 0.75)
    assert found["cat"] == ClassThreshold(threshold=0.6, precision=0.75, recall=0.75, detections=4)
    assert found["dog"] == ClassThreshold(threshold=None, precision=None, recall=None, detections=0)
    assert found["cow"] == ClassThreshold(threshold=None, precision=None, recall=None, detections=0)


def test_equal_scores_pass_together_and_ignored_detections_do_not_count():
    rows = [(0, 0.9, 1, 0), (0, 0.5, 1, 0), (0, 0.5, 0, 0), (0, 0.95, 0, 1)]
    found = choose_thresholds(records(rows, {0: 2}), ["cat"], 0.9)["cat"]
    assert (found.threshold, found.precision, found.recall) == (0.9, 1.0, 0.5)


def test_matches_require_an_iou_of_at_least_half():
    rows = [(0, 0.9, 0b1111111110, 0)]  # matched at every IoU except 0.5, which real records cannot have
    assert choose_thresholds(records(rows, {0: 1}), ["cat"], 0.5)["cat"].threshold is None


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), st.booleans()), max_size=12),
    st.sampled_from([0.2, 0.5, 0.8, 1.0]),
)
def test_threshold_equals_that_of_an_exhaustive_search(rows, precision):
    found = choose_thresholds(records([(0, s, int(r), 0) for s, r in rows], {0: 20}), ["cat"], precision)["cat"]
    valid = []
    for limit in {score for score, _ in rows}:
        passed = [right for score, right in rows if score >= limit]
        if sum(passed) / len(passed) >= precision:
            valid.append(limit)
    assert found.threshold == min(valid, default=None)


def test_thresholds_round_trip_as_json_and_match_classes_by_name():
    classes = {"cat": ClassThreshold(threshold=0.4, precision=0.9, recall=0.5, detections=3)}
    classes["dog"] = ClassThreshold(threshold=None, precision=None, recall=0.0, detections=0)
    written = Thresholds(precision=0.9, dataset="val", fingerprint="f", classes=classes)
    read = Thresholds.from_json(written.to_json(), "file")
    assert read == written
    labels = [Category(7, name, True, (0, 0, 0)) for name in ("sky", "dog", "cat")]
    assert read.min_scores(labels).tolist() == [0.0, np.inf, 0.4]
    for text in ("[]", "{}", '{"iou": 0.5, "classes": {"a": 1}}', "x"):
        with pytest.raises(ThresholdError, match="file: cannot parse the thresholds"):
            Thresholds.from_json(text, "file")


@pytest.mark.parametrize("precision", [0.0, -1.0, 1.01])
def test_precision_out_of_range_is_rejected(precision):
    with pytest.raises(ThresholdError, match="--precision is"):
        choose_thresholds(records([], {}), ["cat"], precision)


def test_thresholds_of_classes_with_one_name_are_refused():
    with pytest.raises(ThresholdError, match="several thing classes have the name fish, but"):
        choose_thresholds(records([], {}), ["fish", "cat", "fish"], 0.9)
