"""Mean IoU: its conventions on a small example, and comparison with plain definitions."""

import numpy as np
import pytest

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.mean_iou import MeanIoUState, ignore_label


def test_conventions_differ_in_absent_and_only_predicted_classes():
    state = MeanIoUState(4)  # class 2 is only predicted, class 3 does not occur
    state.update(1, np.array([[0, 0, 1, 255]]), np.array([[0, 2, 1, 3]]))
    result = state.compute()
    assert result.miou == (1 / 2 + 1) / 2
    assert result.miou_occurring == (1 / 2 + 1 + 0) / 3
    assert result.miou_all == (1 / 2 + 1) / 4
    assert result.fwiou == pytest.approx(1 / 2 * 2 / 3 + 1 / 3)
    assert result.macc == (1 / 2 + 1) / 2
    assert result.pacc == 2 / 3
    assert result.per_class == (0.5, 1.0, 0.0, None)
    assert result.truth_pixels == (2, 1, 0, 0)


@pytest.mark.parametrize("void", [255, 7, 0])
def test_void_in_predictions_counts_as_missed_but_not_as_false_positive(void):
    """The prediction is void at a pixel of class 1 and at an ignored pixel, which does not count."""
    truth, predicted = np.array([[1, 1, 1, 2, 255]]), np.array([[1, void, 2, 2, void]])
    state = MeanIoUState(3, 255, void)
    state.update(1, truth, predicted)
    result = state.compute()
    assert result.per_class == (None, 1 / 3, 1 / 2)
    assert (result.miou, result.pacc) == ((1 / 3 + 1 / 2) / 2, 2 / 4)
    assert result.macc == (1 / 3 + 1) / 2
    assert result.truth_pixels == (0, 3, 1)
    assert state.void_pixels().tolist() == [0, 1, 0]
    assert state.confusion().sum() == 3
    assert state.compute_for_classes([2]).miou == 1 / 2


def test_void_value_is_stored_and_prevents_merging_with_other_states():
    state = MeanIoUState(3, 255, 255)
    state.update(1, np.array([[1, 1]]), np.array([[255, 1]]))
    again = MeanIoUState.from_bytes(state.to_bytes())
    assert (again.void, again.compute()) == (255, state.compute())
    with pytest.raises(EvaluationError, match="different settings"):
        again.merge(MeanIoUState(3, 255))
    assert MeanIoUState.from_bytes(MeanIoUState(3).to_bytes()).void is None


def test_without_a_value_for_void_every_label_must_be_a_class():
    with pytest.raises(EvaluationError, match="the prediction has labels from 1 to 255"):
        MeanIoUState(3).update(1, np.array([[1, 1]]), np.array([[255, 1]]))


@pytest.mark.parametrize("num_classes", [3, 150, 847])
def test_confusion_equals_a_plain_count(num_classes):
    rng = np.random.default_rng(num_classes)
    dtype = np.uint8 if num_classes < 256 else np.uint16
    ignore = ignore_label(num_classes)
    state, expected = MeanIoUState(num_classes), np.zeros((num_classes, num_classes), dtype=np.int64)
    for image_id in range(4):
        truth = rng.integers(0, num_classes, (20, 30)).astype(dtype)
        truth[rng.random(truth.shape) < 0.1] = ignore
        predicted = rng.integers(0, num_classes, truth.shape)
        for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if t != ignore:
                expected[t, p] += 1
        state.update(image_id, truth, predicted)
    assert (state.confusion() == expected).all()
    iou = [
        expected[k, k] / (expected[k].sum() + expected[:, k].sum() - expected[k, k])
        for k in range(num_classes)
        if expected[k].sum()
    ]
    assert state.compute().miou == pytest.approx(np.mean(iou), abs=1e-12)


def test_counts_do_not_overflow():
    state = MeanIoUState(2)
    for image_id in range(40):
        state.update(image_id, np.zeros((8192, 4), np.uint8), np.zeros((8192, 4), np.int64))
    record = state.record(0)
    assert record.pixels.dtype == np.int64
    assert state.confusion().dtype == np.int64
    assert state.compute().truth_pixels[0] == 40 * 8192 * 4


def test_merging_counts_every_image_once():
    rng = np.random.default_rng(0)
    images = {i: (rng.integers(0, 5, (9, 9)).astype(np.uint8), rng.integers(0, 5, (9, 9))) for i in range(6)}
    whole, left, right = MeanIoUState(5), MeanIoUState(5), MeanIoUState(5)
    for i, pair in images.items():
        whole.update(i, *pair)
        if i < 4:
            left.update(i, *pair)
        if i >= 2:
            right.update(i, *pair)
    right.merge(MeanIoUState.from_bytes(left.to_bytes()))
    assert right.compute() == whole.compute()
    assert right.to_bytes() == whole.to_bytes()


def test_miou_is_none_without_labelled_pixels():
    state = MeanIoUState(2)
    assert state.compute().miou is None
    state.update(3, np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.int64))
    assert state.compute().miou is None
    assert MeanIoUState.from_bytes(state.to_bytes()).image_ids == (3,)


def test_errors_for_bad_labels_and_sizes_name_the_image():
    with pytest.raises(EvaluationError, match="image 9: the truth has labels from 0 to 7"):
        MeanIoUState(3).update(9, np.array([[0, 7]]), np.array([[0, 0]]))
    with pytest.raises(EvaluationError, match="image 9: the truth has shape"):
        MeanIoUState(3).update(9, np.zeros((1, 2), np.uint8), np.zeros((2, 1), np.int64))
