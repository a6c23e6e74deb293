"""Cityscapes metrics, compared with a slow implementation of the benchmark's rules.

Both differ from cityscapesscripts 2.3.0 by at most 1.2e-16 on generated sets.
"""

import numpy as np
import pytest

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.cityscapes_ap import (
    OVERLAPS,
    THING_LABELS,
    VOID_LABELS,
    CityscapesAPState,
    CityscapesDetection,
    match_cityscapes,
)
from m2f.eval.metrics.cityscapes_iou import AVERAGE_PIXELS, GROUPS, INSTANCE_GROUPS, CityscapesIoUState

EVALUATED = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, *THING_LABELS]


def street(rng, size=(90, 110)):
    """Return instance ids with void, stuff, groups, small and partly hidden instances, and caravans."""
    ids = np.full(size, 7, np.uint16)
    ids[:30], ids[30:36], ids[80:] = 23, 0, 21
    count = dict.fromkeys((24, 25, 26, 29), 0)
    for _ in range(12):
        y, x = rng.integers(0, 80), rng.integers(0, 100)
        h, w = rng.integers(3, 40, 2)
        k = int(rng.choice(list(count)))
        ids[y : y + h, x : x + w] = k if rng.random() < 0.2 else k * 1000 + count[k]
        count[k] += 1
    return ids


def street_detections(rng, ids):
    found = []
    for value in np.unique(ids).tolist():
        label = value if value < 1000 else value // 1000
        for _ in range(3 if label in THING_LABELS else 1):
            mask = np.roll(ids == value, rng.integers(-4, 5, 2), axis=(0, 1))
            label = label if rng.random() < 0.8 and label in THING_LABELS else int(rng.choice([24, 25, 26, 27]))
            found.append(CityscapesDetection(mask, label, float(np.round(rng.random(), 1))))
    return [*found, CityscapesDetection(np.zeros_like(mask), 24, 0.9), CityscapesDetection(mask, 7, 0.9)]


def slow_ap(images, label, overlap):
    """Return the AP of one class and overlap by the benchmark's rules; None if no annotated instance counts."""
    scored, num_truth, any_found = [], 0, False
    for ids, detections in images:
        masks = {int(v): ids == v for v in np.unique(ids) if v == label or v // 1000 == label}
        counted = [v for v, m in masks.items() if v >= 1000 and m.sum() >= 100]
        num_truth += len(counted)
        found = [d for d in detections if d.label == label and d.mask.any()]
        any_found |= bool(found)

        def overlaps(d, v, masks=masks):
            return (d.mask & masks[v]).sum() / (d.mask | masks[v]).sum() > overlap

        for v in counted:
            scores = sorted((d.score for d in found if overlaps(d, v)), reverse=True)
            scored += [(score, rank == 0) for rank, score in enumerate(scores)]
        for d in found:
            if any(overlaps(d, v) for v in masks):
                continue
            ignored = (d.mask & np.isin(ids, VOID_LABELS)).sum()
            for v, m in masks.items():
                ignored += (d.mask & m).sum() * ((v < 1000) + int(m.sum() < 100))
            if ignored / d.mask.sum() <= overlap:
                scored.append((d.score, False))
    if not num_truth:
        return None
    points = [(1.0, 0.0)]
    for threshold in sorted({score for score, _ in scored}, reverse=True):
        kept = [right for score, right in scored if score >= threshold]
        points.append((sum(kept) / len(kept), sum(kept) / num_truth))
    points.append((0.0, points[-1][1]))
    recalls = [points[0][1]] + [recall for _, recall in points]
    # The weight of a point is half the difference in recall between its two neighbours.
    return sum(p * (recalls[i + 2] - recalls[i]) / 2 for i, (p, _) in enumerate(points[:-1])) if any_found else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_instance_ap_equals_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    images = [(ids, street_detections(rng, ids)) for ids in (street(rng) for _ in range(5))]
    state, other = CityscapesAPState(), CityscapesAPState()
    for image_id, (ids, detections) in enumerate(images):
        (state if image_id % 2 else other).update(image_id, ids, iter(detections))
    other.merge(CityscapesAPState.from_bytes(state.to_bytes()))
    result = other.compute()
    expected = {k: [slow_ap(images, k, t) for t in OVERLAPS] for k in THING_LABELS}
    values = np.array([row for row in expected.values() if row[0] is not None])
    assert result.ap == pytest.approx(values.mean(), abs=1e-12)
    assert result.ap50 == pytest.approx(values[:, 0].mean(), abs=1e-12)
    assert 0.02 < result.ap < result.ap50 < 0.98
    for k, row in expected.items():
        known = result.per_class[k]
        assert known == (None if row[0] is None else pytest.approx((np.mean(row), row[0]), abs=1e-12))


def detection(mask, score=0.5, label=24):
    return CityscapesDetection(np.array(mask, bool), label, score)


def flags(record):
    return (record.correct != 0).tolist(), (record.wrong != 0).tolist()


def test_groups_small_instances_and_void_are_neither_right_nor_wrong():
    ids = np.full((30, 40), 7, np.uint16)
    ids[:10, :10], ids[10:19, :11], ids[20:, :10], ids[:, 30:] = 24, 24001, 0, 24000
    group, small, void = (ids == v for v in (24, 24001, 0))
    record = match_cityscapes(ids, [detection(m) for m in (group, small, void, ids == 7, ids == 24000)])
    assert flags(record) == ([False] * 4 + [True], [False] * 3 + [True, False])
    assert record.truth_label.tolist() == [24]


def test_iou_of_exactly_one_half_is_not_a_match_and_the_better_score_wins():
    ids = np.full((20, 20), 7, np.uint16)
    ids[:10] = 24000
    half = np.zeros((20, 20), bool)
    half[:5] = True
    record = match_cityscapes(ids, [detection(half), detection(ids == 24000, 0.2), detection(ids == 24000, 0.9)])
    assert flags(record) == ([False, False, True], [True, True, False])


def test_ap_is_none_for_classes_without_truth_and_zero_for_undetected_classes():
    assert CityscapesAPState().compute().ap is None
    state = CityscapesAPState()
    state.update(1, np.full((20, 20), 24000, np.uint16), [detection(np.ones((20, 20)), label=26)])
    result = state.compute()
    assert (result.ap, result.per_class[24], result.per_class[26]) == (0.0, (0.0, 0.0), None)
    with pytest.raises(EvaluationError, match="image 3: a mask has shape"):
        state.update(3, np.zeros((2, 2), np.uint16), [detection(np.ones((3, 2)))])


def slow_iou(images, labels, instance_labels=None):
    """Return the IoU of a set of labels. With `instance_labels` it is the iIoU, which weights pixels by instance."""
    tp = fn = fp = 0.0
    for ids, predicted in images:
        truth = np.where(ids < 1000, ids, ids // 1000)
        right = np.isin(predicted, labels)
        others = [k for k in EVALUATED if k not in labels]
        fp += (np.isin(truth, others) & right).sum()
        if instance_labels is None:
            tp += (np.isin(truth, labels) & right).sum()
            fn += (np.isin(truth, labels) & ~right).sum()
            continue
        for v in np.unique(ids[ids > 1000]):
            if v // 1000 in instance_labels:
                weight = AVERAGE_PIXELS[v // 1000] / (ids == v).sum()
                tp += ((ids == v) & right).sum() * weight
                fn += ((ids == v) & ~right).sum() * weight
    return tp / (tp + fp + fn) if tp + fp + fn else None


def test_iou_and_iiou_equal_the_slow_reference():
    rng = np.random.default_rng(0)
    images, state = [], CityscapesIoUState()
    for image_id in range(4):
        ids = street(rng)
        predicted = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
        wrong = rng.random(ids.shape) < 0.2
        predicted[wrong] = rng.choice([7, 8, 11, 24, 25, 26, 29, 0], int(wrong.sum()))
        images.append((ids, predicted))
        state.update(image_id, ids, predicted)
    result = CityscapesIoUState.from_bytes(state.to_bytes()).compute()
    expected = {k: slow_iou(images, [k]) for k in EVALUATED}
    assert result.per_class == expected
    assert result.iou == pytest.approx(np.mean([v for v in expected.values() if v is not None]), abs=1e-12)
    instances = {k: slow_iou(images, [k], [k]) for k in AVERAGE_PIXELS}
    for k, value in instances.items():
        assert result.per_class_iiou[k] == (None if value is None else pytest.approx(value, abs=1e-12))
    assert result.per_group == {name: slow_iou(images, labels) for name, labels in GROUPS.items()}
    groups = [slow_iou(images, labels, GROUPS[name]) for name, labels in INSTANCE_GROUPS.items()]
    assert list(result.per_group_iiou.values()) == pytest.approx(groups, abs=1e-12)
    assert result.group_iiou == pytest.approx(np.mean(groups), abs=1e-12)


def test_errors_for_unknown_label_ids_name_the_image():
    with pytest.raises(EvaluationError, match="image 2: the prediction has label id 255"):
        CityscapesIoUState().update(2, np.zeros((2, 2), np.uint16), np.full((2, 2), 255, np.uint8))
    with pytest.raises(EvaluationError, match="image 2: the truth has label id 40"):
        CityscapesIoUState().update(2, np.full((2, 2), 40001, np.uint16), np.zeros((2, 2), np.uint8))
    assert CityscapesIoUState().compute().iou is None
