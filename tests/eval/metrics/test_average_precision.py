"""Mask AP equals that of pycocotools, bit for bit."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import AveragePrecisionState
from m2f.eval.metrics.instance_matching import (
    InstanceDetections,
    InstanceTruth,
    class_agnostic_detections,
    class_agnostic_truth,
)
from m2f.eval.metrics.rle import encode_masks

STATS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def pycocotools_eval(num_classes, truths, detections, max_dets=(1, 10, 100), use_classes=True):
    """Run COCOeval and return it. Its category ids are labels + 1."""
    annotations, results = [], []
    for image_id, truth in truths.items():
        for mask, label, area, crowd in zip(truth.masks, truth.labels, truth.areas, truth.is_crowd, strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label) + 1, "iscrowd": int(crowd)}
                | {"area": float(area), "segmentation": mask, "bbox": [0, 0, 1, 1]}
            )
        found = detections[image_id]
        for index, label, score in zip(found.mask_index, found.labels, found.scores, strict=True):
            results.append(
                {"image_id": image_id, "category_id": int(label) + 1, "score": float(score)}
                | {"segmentation": copy.copy(found.masks[index])}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        sizes = {i: (t.masks or detections[i].masks or ({"size": [8, 8]},))[0]["size"] for i, t in truths.items()}
        coco.dataset = {
            "images": [{"id": i, "height": sizes[i][0], "width": sizes[i][1]} for i in truths],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(num_classes)],
            "annotations": annotations,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.maxDets = list(max_dets)
        evaluation.params.useCats = int(use_classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_equal_to_pycocotools(num_classes, truths, detections, max_dets=(1, 10, 100)):
    state = AveragePrecisionState(num_classes, max_dets)
    for image_id in sorted(truths, key=lambda i: -i):
        state.update(image_id, truths[image_id], detections[image_id])
    result, oracle = state.compute(), pycocotools_eval(num_classes, truths, detections, max_dets)
    assert result.precision.shape == oracle.eval["precision"].shape
    assert np.abs(result.precision - oracle.eval["precision"]).max() == 0.0
    assert np.abs(result.recall - oracle.eval["recall"]).max() == 0.0
    if max_dets[-1] == 100:  # pycocotools computes its first number only for 100 detections
        assert list(result.stats.values()) == oracle.stats.tolist()
    return result


def rectangle(rng, size):
    mask = np.zeros((size, size), dtype=bool)
    y, x = rng.integers(0, size - 4, 2)
    h, w = rng.integers(2, size, 2)
    mask[y : y + h, x : x + w] = True
    return mask


def truth_from(masks, labels, crowd, areas=None):
    rles = encode_masks(masks)
    pixels = masks.sum(axis=(1, 2)).astype(float)
    return InstanceTruth(
        rles, np.array(labels, dtype=np.int64), pixels if areas is None else areas, np.array(crowd, dtype=bool)
    )


def random_image(rng, num_classes, size=140):
    """Return truth with crowds and float areas, and detections: shifted, tied, shared by classes, some empty."""
    g = int(rng.integers(0, 7))
    masks = np.array([rectangle(rng, size) for _ in range(g)]).reshape(g, size, size)
    truth = truth_from(
        masks,
        rng.integers(0, num_classes, g),
        rng.random(g) < 0.2,
        masks.sum(axis=(1, 2)) * rng.choice([1.0, 0.97, 1.02], g),
    )
    found = [np.roll(m, rng.integers(-5, 6, 2), axis=(0, 1)) for m in masks for _ in range(3)]
    found += [rectangle(rng, size) for _ in range(3)] + [np.zeros((size, size), dtype=bool)]
    found = list(masks[:1]) + found
    d = 30
    detections = InstanceDetections(
        encode_masks(np.array(found)),
        rng.integers(0, len(found), d),
        rng.integers(0, num_classes, d),
        np.float32(np.round(rng.random(d), 1)).astype(np.float64),
    )
    return truth, detections


def random_set(seed, num_images=25, num_classes=4):
    rng = np.random.default_rng(seed)
    images = {int(i): random_image(rng, num_classes) for i in rng.choice(10_000, num_images, replace=False)}
    return {i: t for i, (t, _) in images.items()}, {i: d for i, (_, d) in images.items()}


NOTHING_ANNOTATED = InstanceTruth((), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool))
NOTHING_FOUND = InstanceDetections((), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


@pytest.mark.parametrize("seed", range(6))
def test_random_sets_equal_pycocotools(seed):
    result = assert_equal_to_pycocotools(4, *random_set(seed))
    assert list(result.stats) == STATS
    assert 0.0 < result.stats["AP"] < 1.0


@pytest.mark.parametrize("seed", range(3))
def test_class_agnostic_metrics_equal_pycocotools_without_classes(seed):
    """A further limit of 1000 detections does not change the metrics at 100."""
    truths, detections = random_set(seed)
    state = AveragePrecisionState(1, (1, 10, 100, 1000))
    for image_id in truths:
        truth, found = class_agnostic_truth(truths[image_id]), class_agnostic_detections(detections[image_id])
        state.update(image_id, truth, found)
    result = state.compute()
    oracle = pycocotools_eval(4, truths, detections, use_classes=False)
    assert np.abs(result.precision[..., :3] - oracle.eval["precision"]).max() == 0.0
    numbers = result.stats_at(100)
    assert [numbers[name] for name in STATS] == oracle.stats.tolist()
    assert numbers["AR1000"] >= numbers["AR100"] > 0


@pytest.mark.parametrize("max_dets", [(1, 3, 100), (2, 5, 8), (1, 10, 256)])
def test_other_detection_limits_equal_pycocotools(max_dets):
    assert_equal_to_pycocotools(2, *random_set(11, num_classes=2), max_dets=max_dets)


def test_empty_images_and_absent_classes_equal_pycocotools():
    truths, detections = random_set(3, num_images=6, num_classes=2)
    truths |= {20_001: NOTHING_ANNOTATED, 20_002: truths[min(truths)], 20_003: NOTHING_ANNOTATED}
    detections |= {20_001: detections[max(detections)], 20_002: NOTHING_FOUND, 20_003: NOTHING_FOUND}
    result = assert_equal_to_pycocotools(5, truths, detections)
    assert result.per_class[4] == -1.0


def test_ap_is_minus_one_without_annotations_and_zero_without_detections():
    truths, detections = random_set(5, num_images=3)
    assert set(assert_equal_to_pycocotools(4, dict.fromkeys(truths, NOTHING_ANNOTATED), detections).stats.values()) == {
        -1.0
    }
    state = AveragePrecisionState(4)  # pycocotools fails on an empty list of results
    for image_id, truth in truths.items():
        state.update(image_id, truth, NOTHING_FOUND)
    assert state.compute().stats["AP"] == 0.0
    assert AveragePrecisionState(4).compute().stats["AP"] == -1.0


@pytest.mark.parametrize("right_first", [True, False])
def test_tied_scores_in_an_image_keep_their_order(right_first):
    masks = np.zeros((2, 40, 40), dtype=bool)
    masks[0, :20], masks[1, 20:] = True, True
    order = [0, 1] if right_first else [1, 0]
    found = InstanceDetections(encode_masks(masks), np.array(order), np.zeros(2, np.int64), np.full(2, 0.5))
    result = assert_equal_to_pycocotools(1, {1: truth_from(masks[:1], [0], [False])}, {1: found})
    assert result.stats["AP"] == pytest.approx(1.0 if right_first else 0.5)


def test_crowd_matches_many_detections_after_ordinary_annotations():
    masks = np.zeros((4, 60, 60), dtype=bool)
    masks[0], masks[1, :30], masks[2, 30:], masks[3, :32] = True, True, True, True
    truth = truth_from(masks[[0, 1]], [0, 0], [True, False])
    found = InstanceDetections(
        encode_masks(masks[1:]), np.array([0, 1, 2, 1]), np.zeros(4, np.int64), np.array([0.9, 0.8, 0.7, 0.6])
    )
    assert assert_equal_to_pycocotools(1, {4: truth}, {4: found}).stats["AP50"] == pytest.approx(1.0)


def test_area_bounds_are_closed_on_both_sides():
    masks = np.zeros((1, 100, 100), dtype=bool)
    masks[0, :32, :32] = True
    found = InstanceDetections(encode_masks(masks), np.array([0]), np.array([0]), np.array([1.0]))
    stats = assert_equal_to_pycocotools(1, {1: truth_from(masks, [0], [False])}, {1: found}).stats
    assert stats["APs"] == stats["APm"] == pytest.approx(1.0)
    assert stats["APl"] == -1.0


def test_merging_in_any_order_gives_the_same_bits():
    truths, detections = random_set(8, num_images=9)
    whole, shards = AveragePrecisionState(4), [AveragePrecisionState(4) for _ in range(3)]
    for n, image_id in enumerate(truths):
        whole.update(image_id, truths[image_id], detections[image_id])
        shards[n % 3].update(image_id, truths[image_id], detections[image_id])
        shards[0].update(image_id, truths[image_id], detections[image_id])
    merged = AveragePrecisionState(4)
    for shard in reversed(shards):
        merged.merge(AveragePrecisionState.from_bytes(shard.to_bytes()))
    assert merged.to_bytes() == whole.to_bytes()
    assert (merged.compute().precision == whole.compute().precision).all()


def test_errors_for_bad_scores_classes_and_sizes_name_the_image():
    truths, detections = random_set(8, num_images=1)
    (image_id,) = truths
    found = detections[image_id]
    bad = InstanceDetections(found.masks, found.mask_index, found.labels, found.scores * np.nan)
    with pytest.raises(EvaluationError, match=f"image {image_id}: a detection's score is not finite"):
        AveragePrecisionState(4).update(image_id, truths[image_id], bad)
    with pytest.raises(EvaluationError, match=f"image {image_id}: the .* has classes from"):
        AveragePrecisionState(1).update(image_id, truths[image_id], found)
    small = InstanceDetections(encode_masks(np.ones((1, 8, 9), bool)), np.array([0]), np.array([0]), np.array([0.5]))
    with pytest.raises(EvaluationError, match=r"differ in size: \[\(8, 9\), \(140, 140\)\]"):
        AveragePrecisionState(4).update(image_id, truths[image_id], small)


def test_real_annotations_with_perturbed_predictions_equal_pycocotools(real_data):
    """Truth is real COCO polygons and crowds with their float areas; predictions are shifted annotations."""
    path = real_data / "coco_instances" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    label_of = {category["id"]: k for k, category in enumerate(content["categories"])}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    rng = np.random.default_rng(0)
    truths, detections = {}, {}
    for image_id in sorted(coco.getImgIds())[:40]:
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        size = coco.loadImgs(image_id)[0]
        masks = np.array([coco.annToMask(a) for a in annotations], dtype=bool)
        masks = masks.reshape(len(annotations), size["height"], size["width"])
        truths[image_id] = truth_from(
            masks,
            [label_of[a["category_id"]] for a in annotations],
            [a["iscrowd"] for a in annotations],
            np.array([a["area"] for a in annotations], dtype=float),
        )
        moved = [np.roll(m, rng.integers(-6, 7, 2), axis=(0, 1)) for m in masks] + [m[::-1] for m in masks[:2]]
        rles = encode_masks(np.array(moved).reshape(len(moved), size["height"], size["width"]))
        labels = np.concatenate([truths[image_id].labels, rng.integers(0, 80, len(moved) - len(masks))])
        index = rng.permutation(np.repeat(np.arange(len(moved)), 2))
        detections[image_id] = InstanceDetections(rles, index, labels[index], np.round(rng.random(len(index)), 2))
    assert sum(int(t.is_crowd.sum()) for t in truths.values()) > 0
    assert 0.05 < assert_equal_to_pycocotools(80, truths, detections).stats["AP"] < 0.95


def test_encoded_masks_decode_to_the_original_masks():
    masks = np.random.default_rng(0).random((3, 17, 23)) > 0.5
    decoded = coco_masks.decode(list(encode_masks(masks)))
    assert (decoded.transpose(2, 0, 1) == masks).all()
