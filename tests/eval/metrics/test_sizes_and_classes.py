"""COCO metrics by class and with other sizes equal pycocotools; PQ by size equals a slow reference."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import AveragePrecisionState, InstanceDetections, InstanceTruth
from m2f.eval.metrics.box_average_precision import detection_boxes, match_boxes, truth_boxes
from m2f.eval.metrics.panoptic_quality import (
    PanopticPrediction,
    PanopticQualityState,
    PanopticRecord,
    PanopticTruth,
    TruthSegment,
)
from m2f.eval.metrics.rle import encode_masks

NUM_CLASSES = 3
SIDE = 130


def some_masks(random, count):
    masks = np.zeros((count, SIDE, SIDE), dtype=bool)
    for mask in masks:
        y, x, h, w = random.integers(0, SIDE - 6), random.integers(0, SIDE - 6), *random.integers(3, SIDE, 2)
        mask[y : y + h, x : x + w] = True
    return masks


def some_images(seed, count=12):
    """Return truth with crowds, and detections with tied scores: shifted annotations and others."""
    random = np.random.default_rng(seed)
    images = {}
    for image_id in range(1, count + 1):
        masks = some_masks(random, random.integers(0, 6))
        labels = random.integers(0, NUM_CLASSES, len(masks))
        crowd = random.random(len(masks)) < 0.15
        truth = InstanceTruth(encode_masks(masks), labels, masks.sum(axis=(1, 2)).astype(float), crowd)
        shifted = [np.roll(mask, random.integers(-6, 7, 2), axis=(0, 1)) for mask in masks for _ in range(2)]
        found = np.concatenate([np.array(shifted).reshape(-1, SIDE, SIDE), some_masks(random, 4)]).astype(bool)
        near = np.concatenate([np.repeat(labels, 2), random.integers(0, NUM_CLASSES, 4)])
        scores = np.round(random.random(len(found)), 1)
        images[image_id] = truth, InstanceDetections(encode_masks(found), np.arange(len(found)), near, scores)
    return images


def pycocotools_run(images, classes, *, kind="segm", max_dets=(1, 10, 100), bounds=None):
    annotations, results = [], []
    for image_id, (truth, found) in images.items():
        for mask, label, area, crowd in zip(truth.masks, truth.labels, truth.areas, truth.is_crowd, strict=True):
            box = coco_masks.toBbox(mask).tolist()
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label) + 1})
            annotations[-1] |= {"iscrowd": int(crowd), "area": float(area), "segmentation": mask, "bbox": box}
        for mask, label, score in zip(found.masks, found.labels, found.scores, strict=True):
            result = {"image_id": image_id, "category_id": int(label) + 1, "score": float(score)}
            results.append(result | {"segmentation": dict(mask)})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": SIDE, "width": SIDE} for i in images],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(NUM_CLASSES)],
            "annotations": annotations,
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results), kind)
        run.params.maxDets = list(max_dets)
        run.params.catIds = [k + 1 for k in classes]
        if bounds is not None:
            medium, large = bounds
            run.params.areaRng = [[0, 1e10], [0, medium], [medium, large], [large, 1e10]]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def our_result(images, **settings):
    state = AveragePrecisionState(NUM_CLASSES, **settings)
    for image_id, (truth, found) in images.items():
        state.update(image_id, truth, found)
    assert type(state).from_bytes(state.to_bytes()).to_bytes() == state.to_bytes()
    return state.compute()


def test_metrics_of_every_class_equal_pycocotools():
    images = some_images(0)
    result = our_result(images)
    for label in range(NUM_CLASSES):
        assert list(result.class_stats(label).values()) == pycocotools_run(images, [label]).stats.tolist()


def test_other_area_bounds_and_limits_equal_pycocotools():
    images = some_images(1)
    result = our_result(images, max_dets=(1, 2, 5), area_bounds=(500, 4000))
    oracle = pycocotools_run(images, range(NUM_CLASSES), max_dets=(1, 2, 5), bounds=(500, 4000))
    np.testing.assert_array_equal(result.precision, oracle.eval["precision"])
    np.testing.assert_array_equal(result.recall, oracle.eval["recall"])
    usual, other = AveragePrecisionState(3), AveragePrecisionState(3, area_bounds=(500, 4000))
    with pytest.raises(EvaluationError, match="different settings"):
        usual.merge(other)


def test_box_ap_of_mask_boxes_equals_pycocotools():
    images = some_images(2)
    state = AveragePrecisionState(NUM_CLASSES)
    for image_id, (truth, found) in images.items():
        state.add(image_id, match_boxes(truth_boxes(truth), detection_boxes(found), 100))
    result, oracle = state.compute(), pycocotools_run(images, range(NUM_CLASSES), kind="bbox")
    np.testing.assert_array_equal(result.precision, oracle.eval["precision"])
    np.testing.assert_array_equal(result.recall, oracle.eval["recall"])
    assert list(result.stats.values()) == oracle.stats.tolist()
    assert 0.1 < result.stats["AP"] < 0.9


def random_panoptic(random):
    """Return truth made of bands, and predictions shifted by some columns, some of another class."""
    truth_map = np.zeros((SIDE, SIDE), dtype=np.int32)
    edges = np.sort(random.choice(np.arange(1, SIDE), 9, replace=False))
    truth_map[:] = 1 + np.searchsorted(edges, np.arange(SIDE), side="right")
    truth_map[: SIDE // 2] += 20
    predicted = np.roll(truth_map, random.integers(0, 9), axis=1)
    ids = np.unique(truth_map).tolist()
    labels = dict(zip(ids, random.integers(0, NUM_CLASSES, len(ids)).tolist(), strict=True))
    segments = {i: TruthSegment(label, float((truth_map == i).sum()), False) for i, label in labels.items()}
    predicted_labels = {i: labels[i] if random.random() < 0.7 else int(random.integers(0, NUM_CLASSES)) for i in ids}
    predicted_labels = {i: label for i, label in predicted_labels.items() if (predicted == i).any()}
    return PanopticTruth(truth_map, segments), PanopticPrediction(predicted, predicted_labels)


def slow_quality_of_size(images, low, high):
    """Return the mean PQ over classes of segments with low <= area < high, computed segment by segment."""
    sums = {label: [0.0, 0, 0, 0] for label in range(NUM_CLASSES)}
    for truth, prediction in images:
        found = set()
        for i, segment in truth.segments.items():
            best = 0.0
            for p, label in prediction.labels.items():
                a, b = truth.id_map == i, prediction.id_map == p
                iou = (a & b).sum() / (a | b).sum()
                if label == segment.label and iou > 0.5:
                    best = iou
                    found.add(p)
            if low <= segment.area < high:
                one = sums[segment.label]
                one[0] += best
                one[1 if best else 3] += 1
        for p, label in prediction.labels.items():
            if p not in found and low <= (prediction.id_map == p).sum() < high:
                sums[label][2] += 1
    values = [iou / (tp + fp / 2 + fn / 2) for iou, tp, fp, fn in sums.values() if tp + fp + fn]
    return sum(values) / len(values) if values else None


@pytest.mark.parametrize("bounds", [(32.0**2, 96.0**2), (300.0, 900.0)])
def test_panoptic_quality_by_size_counts_every_segment_once(bounds):
    random = np.random.default_rng(3)
    images = [random_panoptic(random) for _ in range(6)]
    state = PanopticQualityState([True] * NUM_CLASSES, area_bounds=bounds)
    for image_id, (truth, prediction) in enumerate(images):
        state.update(image_id, truth, prediction)
    result = state.compute()
    ranges = zip((0, *bounds), (*bounds, np.inf), strict=True)
    for (name, quality), (low, high) in zip(result.by_size.items(), ranges, strict=True):
        expected = slow_quality_of_size(images, low, high)
        assert (quality and quality.pq) == (expected and pytest.approx(expected)), name


def test_states_without_areas_still_load():
    """States of earlier versions lack the three area columns."""
    record = PanopticRecord(np.array([0, 1]), np.array([0.75, 1.0]), np.array([1]), np.zeros(0))
    state = PanopticQualityState([True, False])
    state.add(4, record)
    with np.load(io.BytesIO(state.to_bytes())) as arrays:
        kept = {name: arrays[name] for name in arrays.files if not name.endswith("_area")}
    assert len(kept) == 2 + 2 * 4
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **kept)
    loaded = PanopticQualityState.from_bytes(buffer.getvalue())
    assert loaded.compute().all == state.compute().all
    assert loaded.compute().by_size == {}
    state.merge(loaded)
