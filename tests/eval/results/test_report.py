"""States of all tasks: serialisation, refusal of incomplete results, JSON, headline and table."""

import json
import re

import numpy as np
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import InstanceDetections, InstanceTruth
from m2f.eval.metrics.error_types import instance_errors, panoptic_errors
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticTruth, TruthSegment
from m2f.eval.metrics.rle import encode_masks
from m2f.eval.metrics.segment_errors import instance_candidates, panoptic_candidates
from m2f.eval.results.results import EvaluationSubject
from m2f.eval.results.states import EvaluationStates, check_complete

TABLE = CategoryTable(
    (
        Category(17, "cat", True, (255, 0, 0)),
        Category(80, "sky", False, (0, 0, 255)),
        Category(3, "tiny dog", True, (0, 255, 0)),
    )
)
TASKS = ("panoptic", "instance", "semantic")
SUBJECT = EvaluationSubject(dataset="toy_val", fingerprint="0123456789abcdef", step=1200)


def states_of(image_ids, tasks=TASKS):
    """Return states in which the cat of every image is exact, and a quarter of the sky is missing."""
    states = EvaluationStates.empty(TABLE, tasks)
    id_map = np.repeat([[1, 1, 2, 2, 2, 2]], 8, axis=0)
    predicted = np.where(np.arange(6) < 5, id_map, 0)
    cat = encode_masks(id_map[None] == 1)
    for image_id in image_ids:
        if states.panoptic is not None:
            truth = PanopticTruth(id_map, {1: TruthSegment(0, 16, False), 2: TruthSegment(1, 32, False)})
            prediction = PanopticPrediction(predicted, {1: 0, 2: 1})
            states.panoptic.update(image_id, truth, prediction)
            states.segments.update(image_id, panoptic_candidates(truth, prediction))
            states.errors.add(image_id, panoptic_errors(panoptic_candidates(truth, prediction)))
        if states.instance is not None:
            one = np.array([0])
            truth = InstanceTruth(cat, one, np.array([16.0]), np.array([False]))
            detections = InstanceDetections(cat, one, one, np.array([0.9]))
            states.instance.update(image_id, truth, detections)
            if states.panoptic is None:
                states.segments.update(image_id, instance_candidates(truth, detections))
                states.errors.add(image_id, instance_errors(truth, detections))
        if states.semantic is not None:
            states.semantic.update(image_id, (id_map - 1).astype(np.uint8), np.where(predicted > 0, id_map - 1, 0))
        states.panels[image_id] = b"png of " + str(image_id).encode()
    return states


def test_serialised_states_merge_to_the_same_bytes():
    whole = states_of([1, 2, 3])
    merged = states_of([3, 1])
    merged.merge(EvaluationStates.from_bytes(states_of([2, 3]).to_bytes()))
    assert merged.to_bytes() == whole.to_bytes()
    assert merged.image_ids == (1, 2, 3)
    assert merged.panels[2] == b"png of 2"


def test_states_of_other_tasks_and_other_bytes_are_refused():
    with pytest.raises(EvaluationError, match="cannot merge evaluations of"):
        states_of([1]).merge(states_of([2], tasks=("semantic",)))
    for payload in (b"", b"PK\x03\x04", b"something else"):
        with pytest.raises(EvaluationError, match="cannot read evaluation states"):
            EvaluationStates.from_bytes(payload)


def test_incomplete_results_are_not_published():
    states = states_of([1, 2, 3])
    check_complete(states, [3, 2, 1])
    with pytest.raises(EvaluationError, match=r"panoptic results .* 2 of 5 images are missing \(4, 9\)"):
        check_complete(states, [1, 2, 3, 4, 9])
    with pytest.raises(EvaluationError, match=r"1 of 2 images are unexpected \(3\)"):
        check_complete(states, [1, 2])
    assert states.instance is not None
    states.instance = EvaluationStates.empty(TABLE, TASKS).instance
    with pytest.raises(EvaluationError, match="instance results are not published: 3 of 3"):
        check_complete(states, [1, 2, 3])
    with pytest.raises(EvaluationError, match=r"12, \.\.\."):
        check_complete(states_of([1]), range(3, 40))


def test_headline_has_safe_names_and_values_in_per_cent():
    headline = states_of([1, 2]).compute(TABLE, SUBJECT).headline("val")
    assert all(re.fullmatch(r"[\w\-./ ]+", name) for name in headline)
    assert headline["val/PQ"] == pytest.approx(100 * (1 + 24 / 32) / 2)
    assert headline["val/PQ_th"] == 100.0
    assert headline["val/PQ_st"] == 75.0
    assert headline["val/AP"] == pytest.approx(100.0)
    assert {"val/PQ_small", "val/APs"} <= headline.keys()  # metrics by size are included
    assert "val/APl" not in headline
    assert headline["val/mIoU"] == pytest.approx(100 * (16 / 24 + 24 / 32) / 2)


def test_json_contains_all_results_and_null_for_undefined_ones():
    results = states_of([1, 2]).compute(TABLE, SUBJECT)
    content = json.loads(results.to_json())
    assert content["dataset"] == "toy_val"
    assert content["fingerprint"] == "0123456789abcdef"
    assert (content["step"], content["subset"], content["num_images"]) == (1200, None, 2)
    assert content["metrics"]["APl"] is None
    assert content["num_classes_averaged"] == {"PQ": 2, "PQ_th": 1, "PQ_st": 1, "AP": 1, "mIoU": 2}
    cat, sky, dog = content["per_class"]
    assert (cat["id"], cat["name"], cat["TP"], cat["FN"]) == (17, "cat", 2, 0)
    assert cat["AP"] == pytest.approx(100.0)
    assert sky["AP"] is None
    assert sky["PQ"] == 75.0
    assert (dog["PQ"], dog["AP"], dog["IoU"], dog["pixels"]) == (None, None, None, 0)


def test_table_is_aligned_and_labels_a_subset():
    results = states_of([1]).compute(TABLE, EvaluationSubject(dataset="v", fingerprint="ff", subset="first 1 of 9"))
    text = results.table()
    assert text.startswith("v: 1 image, SUBSET (first 1 of 9)")
    assert "tiny dog  thing" in text
    assert all(len(line) < 110 for line in text.splitlines())
    assert "tiny dog" not in results.table(per_class=False)


@pytest.mark.parametrize("task", TASKS)
def test_single_task_reports_only_its_own_metrics(task):
    results = states_of([1], tasks=(task,)).compute(TABLE, SUBJECT)
    names = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}
    assert [name in results.metrics() for name in names.values()] == [t == task for t in names]
    assert json.loads(results.to_json())["num_images"] == 1
    assert ("sky" in results.table()) == (task != "instance")
