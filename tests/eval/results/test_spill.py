"""States that move their records to files give bit-identical results, and still detect conflicting images."""

from __future__ import annotations

import contextlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import AveragePrecisionState, DetectionRecord
from m2f.eval.metrics.mean_iou import MeanIoUState
from m2f.eval.metrics.panoptic_quality import PanopticQualityState, PanopticRecord
from m2f.eval.results.states import EvaluationStates


def detections(seed, count):
    rng = np.random.default_rng(seed)
    return DetectionRecord(
        label=np.sort(rng.integers(0, 3, count)),
        score=rng.random(count).round(1),
        matched=rng.integers(0, 1024, (count, 4)),
        ignored=rng.integers(0, 2, (count, 4)),
        truth_label=np.arange(3),
        truth_count=rng.integers(5, 9, (3, 4)),
    )


def ap_state(image_ids):
    state = AveragePrecisionState(3)
    for image_id in image_ids:
        state.add(image_id, detections(image_id, image_id % 4))  # some images have no detections
    return state


def test_ap_is_bit_identical_with_spilled_records(tmp_path):
    whole, state = ap_state(range(20)), AveragePrecisionState(3)
    for image_ids in ((17, 3, 4), (11, 0, 19, 18), (5,), (3, 17), tuple(range(20))):  # some images repeat after a spill
        state.merge(ap_state(image_ids))
        state.spill(tmp_path / "ap", 100)
    assert state.image_ids == whole.image_ids
    assert state.to_bytes() == whole.to_bytes()
    assert state.compute().precision.tobytes() == whole.compute().precision.tobytes()
    assert state.compute().recall.tobytes() == whole.compute().recall.tobytes()
    files = sorted((tmp_path / "ap").glob("*.parquet"))
    assert len(files) >= 3
    assert sum(pq.read_metadata(path).num_rows for path in files) == 20


def test_small_state_is_not_spilled(tmp_path):
    state = ap_state(range(5))
    state.spill(tmp_path / "ap", 10**6)
    assert not (tmp_path / "ap").exists()


@pytest.mark.parametrize("spilled", [False, True])
def test_different_result_for_the_same_image_is_refused(tmp_path, spilled):
    state = ap_state(range(5))
    if spilled:
        state.spill(tmp_path, 0)
    state.add(3, detections(3, 3))
    with pytest.raises(EvaluationError, match="image 3 was evaluated twice with different results"):
        state.add(3, detections(4, 3))


def test_other_metrics_are_bit_identical_with_spilled_records(tmp_path):
    rng = np.random.default_rng(0)
    semantic, whole_semantic = MeanIoUState(4), MeanIoUState(4)
    panoptic, whole_panoptic = PanopticQualityState([True, False]), PanopticQualityState([True, False])
    for image_id in (5, 2, 9):
        maps = rng.integers(0, 4, (2, 6, 7)).astype(np.uint8)
        record = PanopticRecord(
            matched_label=np.array([0, 1]),
            matched_iou=rng.random(2) / 2 + 0.5,
            false_positive=np.array([1]),
            false_negative=np.array([]),
        )
        for state in (semantic, whole_semantic):
            state.update(image_id, *maps)
        for state in (panoptic, whole_panoptic):
            state.add(image_id, record)
        semantic.spill(tmp_path / "semantic", 0)
        panoptic.spill(tmp_path / "panoptic", 0)
    assert semantic.compute() == whole_semantic.compute()
    assert panoptic.compute() == whole_panoptic.compute()
    assert panoptic.to_bytes() == whole_panoptic.to_bytes()


def test_spilled_state_merges_with_all_its_images(tmp_path):
    whole, parts = ap_state(range(20)), [ap_state(range(9)), ap_state(range(7, 20))]
    for n, part in enumerate(parts):
        part.spill(tmp_path / f"part{n}", 0)
        part.add(30 + n, detections(30 + n, 2))  # not spilled
        whole.add(30 + n, detections(30 + n, 2))
    merged = AveragePrecisionState(3)
    for part in (parts[1], parts[0], parts[1]):
        merged.merge(part)
    assert merged.to_bytes() == whole.to_bytes()
    parts[0].merge(parts[1])  # both have spilled records
    assert parts[0].to_bytes() == whole.to_bytes()


def test_conflicting_spilled_state_is_refused_before_any_record_is_merged(tmp_path):
    other, mine = ap_state(range(3)), ap_state(range(2))
    other.add(9, detections(8, 2))
    mine.add(9, detections(9, 2))
    other.spill(tmp_path / "other", 0)
    with pytest.raises(EvaluationError, match="image 9 was evaluated twice with different results"):
        mine.merge(other)
    assert mine.image_ids == (0, 1, 9)


@pytest.mark.parametrize(
    "state", [ap_state(range(4)), EvaluationStates(instance=ap_state(range(4)))], ids=["one", "all"]
)
def test_damaged_bytes_raise_evaluation_error(state):
    whole = state.to_bytes()
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= int(rng.integers(1, 256))
        for payload in (bytes(damaged), whole[: int(rng.integers(len(whole)))]):
            with contextlib.suppress(EvaluationError):  # damage to unused bytes of a zip file has no effect
                type(state).from_bytes(payload)
    with pytest.raises(EvaluationError, match=r"cannot read .*state.* from \d+ bytes .*; evaluate again"):
        type(state).from_bytes(whole[: len(whole) // 2])
