"""Boundaries, Boundary PQ and Boundary AP, compared with slow references and faster-coco-eval."""

import contextlib
import copy
import io
import logging

import cv2
import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f.eval.metrics.average_precision import AveragePrecisionState, InstanceDetections, InstanceTruth
from m2f.eval.metrics.boundary import INTERIOR, boundary_width, mask_boundaries, mask_boundary, outline_map
from m2f.eval.metrics.panoptic_quality import (
    PanopticPrediction,
    PanopticQualityState,
    PanopticTruth,
    TruthSegment,
    match_panoptic,
)
from m2f.eval.metrics.rle import decode_mask, encode_masks


def blobs(rng, size=(90, 120), ids=6):
    """Return an id map of overlapping ellipses on void."""
    id_map = np.zeros(size, np.int32)
    for i in range(1, ids + 1):
        center = tuple(int(v) for v in rng.integers(0, size[::-1]))
        axes = tuple(int(v) for v in rng.integers(4, 45, 2))
        cv2.ellipse(id_map, center, axes, float(rng.integers(0, 180)), 0, 360, i, -1)
    return id_map


def boundary_by_steps(mask, width):
    """Return the pixels that `width` erosions by one pixel remove. Pixels outside the image are background."""
    inside = np.pad(mask, 1)
    for _ in range(width):
        inside[1:-1, 1:-1] = np.lib.stride_tricks.sliding_window_view(inside, (3, 3)).all(axis=(2, 3))
    return mask & ~inside[1:-1, 1:-1]


@pytest.mark.parametrize("width", [1, 2, 7])
def test_boundary_equals_the_pixels_removed_by_repeated_erosion(width):
    rng = np.random.default_rng(width)
    for mask in (blobs(rng) > 0, rng.random((30, 41)) > 0.1, np.ones((9, 20), bool), np.zeros((5, 4), bool)):
        assert (mask_boundary(mask, width) == boundary_by_steps(mask, width)).all()


def test_width_is_a_share_of_the_diagonal_but_at_least_one_pixel():
    assert boundary_width((480, 640), 0.02) == 16
    assert boundary_width((10, 10), 0.02) == 1


def test_run_length_boundaries_equal_those_of_whole_masks():
    rng = np.random.default_rng(0)
    id_map = blobs(rng)
    masks = np.stack([id_map == i for i in range(8)])  # id 7 has no pixels
    found = mask_boundaries(encode_masks(masks), 0.03)
    width = boundary_width(id_map.shape, 0.03)
    assert all((decode_mask(rle) == boundary_by_steps(m, width)).all() for rle, m in zip(found, masks, strict=True))


@pytest.mark.parametrize("offset", [0, 700, 2**23])
def test_outlines_of_all_segments_equal_those_computed_one_by_one(offset):
    id_map = blobs(np.random.default_rng(1))
    id_map[id_map > 0] += offset
    outlines = outline_map(id_map, 3)
    assert (outlines[id_map == 0] == 0).all()
    for i in np.unique(id_map[id_map > 0]):
        assert ((outlines == i) == boundary_by_steps(id_map == i, 3)).all()
    assert set(np.unique(outlines)) == {INTERIOR, *np.unique(id_map)}


def slow_boundary_matches(truth, prediction, ratio):
    """Return matched (label, min of mask IoU and boundary IoU), computed one pair of masks at a time."""
    void, matched = truth.id_map == 0, []
    width = boundary_width(void.shape, ratio)
    for t, segment in sorted(truth.segments.items()):
        for p, label in sorted(prediction.labels.items()):
            a, b = truth.id_map == t, prediction.id_map == p
            if segment.is_crowd or segment.label != label or not (a & b).any():
                continue
            mask_iou = (a & b).sum() / (b.sum() + segment.area - (a & b).sum() - (void & b).sum())
            a, b = boundary_by_steps(a, width), boundary_by_steps(b, width)
            boundary_iou = (a & b).sum() / (b.sum() + a.sum() - (a & b).sum() - (void & b).sum())
            if min(mask_iou, boundary_iou) > 0.5:
                matched.append((segment.label, min(mask_iou, boundary_iou)))
    return matched


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_boundary_pq_equals_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    t_map = blobs(rng, (60, 80))
    p_map = np.roll(t_map, rng.integers(-2, 3, 2), axis=(0, 1))
    segments = {
        int(i): TruthSegment(int(i) % 3, float((t_map == i).sum()), bool(rng.random() < 0.2))
        for i in np.unique(t_map[t_map > 0])
    }
    truth = PanopticTruth(t_map, segments)
    prediction = PanopticPrediction(p_map, {int(i): int(i) % 3 for i in np.unique(p_map[p_map > 0])})
    record = match_panoptic(truth, prediction, 0.05)
    found = list(zip(record.matched_label.tolist(), record.matched_iou.tolist(), strict=True))
    assert found == slow_boundary_matches(truth, prediction, 0.05)


def test_boundary_pq_is_lower_and_cannot_be_merged_with_plain_pq():
    state = PanopticQualityState([True], 0.02)
    t_map = np.zeros((64, 64), np.uint8)
    t_map[10:50, 10:50] = 1
    truth = PanopticTruth(t_map, {1: TruthSegment(0, 1600, False)})
    state.update(1, truth, PanopticPrediction(np.roll(t_map, 1, axis=1), {1: 0}))
    plain = PanopticQualityState([True])
    plain.update(1, truth, PanopticPrediction(np.roll(t_map, 1, axis=1), {1: 0}))
    assert state.compute().all is None or state.compute().all.pq < plain.compute().all.pq
    assert PanopticQualityState.from_bytes(state.to_bytes()).boundary_ratio == 0.02
    with pytest.raises(ValueError, match="different settings"):
        plain.merge(state)


def boundary_set(seed, num_images, num_classes):
    """Return truth with crowds, and shifted detections with tied scores and shared masks."""
    rng = np.random.default_rng(seed)
    truths, detections = {}, {}
    for image_id in range(1, num_images + 1):
        id_map = blobs(rng)
        masks = np.stack([id_map == i for i in np.unique(id_map[id_map > 0])])
        labels, crowd = rng.integers(0, num_classes, len(masks)), rng.random(len(masks)) < 0.2
        truths[image_id] = InstanceTruth(encode_masks(masks), labels, masks.sum((1, 2)).astype(float), crowd)
        moved = np.stack([np.roll(m, rng.integers(-2, 3, 2), axis=(0, 1)) for m in masks for _ in range(3)])
        index = rng.integers(0, len(moved), 25)
        found = np.where(rng.random(25) < 0.7, labels[index // 3], rng.integers(0, num_classes, 25))
        detections[image_id] = InstanceDetections(encode_masks(moved), index, found, np.round(rng.random(25), 1))
    return truths, detections


def faster_coco_boundary(num_classes, truths, detections):
    annotations, results = [], []
    for image_id, t in truths.items():
        for mask, label, area, crowd in zip(t.masks, t.labels, t.areas, t.is_crowd, strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label) + 1, "iscrowd": int(crowd)}
                | {"area": float(area), "segmentation": copy.copy(mask), "bbox": [0, 0, 1, 1]}
            )
        d = detections[image_id]
        results += [
            {"image_id": image_id, "category_id": int(k) + 1, "score": float(s), "segmentation": copy.copy(d.masks[i])}
            for i, k, s in zip(d.mask_index, d.labels, d.scores, strict=True)
        ]
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        height, width = next(iter(truths.values())).masks[0]["size"]
        coco.dataset = {
            "images": [{"id": i, "height": height, "width": width} for i in truths],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(num_classes)],
            "annotations": annotations,
        }
        coco.createIndex()
        evaluation = COCOeval_faster(coco, coco.loadRes(results), "boundary", boundary_cpu_count=1)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    logging.disable(logging.NOTSET)
    return evaluation


@pytest.mark.parametrize("seed", [0, 1])
def test_boundary_ap_equals_faster_coco_eval(seed):
    truths, detections = boundary_set(seed, num_images=12, num_classes=3)
    state = AveragePrecisionState(3, boundary_ratio=0.02)
    plain = AveragePrecisionState(3)
    for image_id in truths:
        state.update(image_id, truths[image_id], detections[image_id])
        plain.update(image_id, truths[image_id], detections[image_id])
    result, oracle = state.compute(), faster_coco_boundary(3, truths, detections)
    # pycocotools adds spacing(1) to the denominator and faster-coco-eval does not, so the last bit may differ.
    assert np.abs(result.precision - oracle.eval["precision"].reshape(result.precision.shape)).max() <= 2.3e-16
    assert list(result.stats.values()) == pytest.approx(list(oracle.stats[:12]), abs=1e-15)
    assert 0.0 < result.stats["AP"] < plain.compute().stats["AP"]
