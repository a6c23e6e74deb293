"""Benchmarks of metrics against the reference tools.

- PQ of id maps in memory: against panopticapi's algorithm (a sort of 64-bit pairs, written here for the comparison), on
  the same maps and on two PNG files per image.
- mIoU of label maps in memory: against a bincount into a dense confusion matrix.
- AP in memory: against pycocotools on the same run-length encodings.
- PQ and AP from files, with all checks of `m2f score`: against tools that read the same files.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from benchmarks.measure import Measurement, compare
from benchmarks.peers import score_files
from m2f.eval.metrics.average_precision import AveragePrecisionState, InstanceDetections, InstanceTruth
from m2f.eval.metrics.mean_iou import MeanIoUState
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticQualityState, PanopticTruth, TruthSegment
from m2f.eval.metrics.rle import encode_masks, mask_areas
from m2f.eval.score.panoptic import PanopticFiles

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # number of threads of hotcoco, which reads this variable on first use
SIZE = (480, 640)
CLASSES = 20
"""Number of classes, about that of Cityscapes."""


def run(tiny: bool) -> list[Measurement]:
    """Measure PQ, mIoU and AP on generated images; times are per image."""
    count = 10 if tiny else 300
    images = [_id_maps(seed) for seed in range(count)]
    detections = [_detections(maps, seed) for seed, maps in enumerate(images)]
    rows = [*_panoptic_quality(images), _mean_iou(images), _average_precision(images, detections)]
    return [*rows, *_from_files(images, detections, 1 if tiny else 3)]


@dataclass(frozen=True)
class _IdMaps:
    """Annotated and predicted id map of one generated image."""

    truth: np.ndarray
    """[H, W] uint8 ids: things in front of stuff, with a strip of void (0)."""
    predicted: np.ndarray
    label_of: dict[int, int]
    """Class of every id in the two maps."""


def _id_maps(seed: int) -> _IdMaps:
    """Return two stuff segments behind eleven ellipses; the prediction is the truth moved by up to 6 pixels."""
    rng = np.random.default_rng(seed)
    truth = np.ones(SIZE, np.uint8)
    truth[: SIZE[0] // 2] = 2
    for i in range(3, 14):
        center = tuple(int(v) for v in rng.integers(0, SIZE[::-1]))
        axes = tuple(int(v) for v in rng.integers(8, 90, 2))
        cv2.ellipse(truth, center, axes, float(rng.integers(0, 180)), 0, 360, i, -1)
    truth[:, :8] = 0
    predicted = np.roll(truth, rng.integers(-6, 7, 2), axis=(0, 1))
    label_of = {i: i % 2 if i < 3 else int(rng.integers(2, CLASSES)) for i in range(1, 14)}
    return _IdMaps(truth, predicted, label_of)


def _present_labels(id_map: np.ndarray, maps: _IdMaps) -> dict[int, int]:
    """Return the class of every id that occurs in `id_map`, without void."""
    return {i: maps.label_of[i] for i in np.unique(id_map).tolist() if i}


def _pairs(images: Sequence[_IdMaps]) -> list[tuple[PanopticTruth, PanopticPrediction]]:
    pairs = []
    for maps in images:
        areas = np.bincount(maps.truth.ravel())
        segments = {i: TruthSegment(k, float(areas[i]), False) for i, k in _present_labels(maps.truth, maps).items()}
        prediction = PanopticPrediction(maps.predicted, _present_labels(maps.predicted, maps))
        pairs.append((PanopticTruth(maps.truth, segments), prediction))
    return pairs


def _panoptic_quality(images: Sequence[_IdMaps]) -> list[Measurement]:
    pairs = _pairs(images)
    files = [tuple(_as_png(id_map) for id_map in (maps.truth, maps.predicted)) for maps in images]

    def ours() -> Sequence[Tensor]:
        state = PanopticQualityState([k > 1 for k in range(CLASSES)])
        for image_id, (truth, prediction) in enumerate(pairs):
            state.update(image_id, truth, prediction)
        per_class = state.compute().per_class
        counts = [[c.iou, c.true_positives, c.false_positives, c.false_negatives] for c in per_class]
        return [torch.tensor(counts, dtype=torch.float64)]

    def from_png() -> Sequence[Tensor]:
        return _reference_quality(pairs, files)

    def from_maps() -> Sequence[Tensor]:
        table = np.zeros((CLASSES, 4))
        for truth, prediction in pairs:
            _count(table, truth.id_map.astype(np.uint32), prediction.id_map.astype(np.uint32), truth, prediction, int)
        return [torch.from_numpy(table)]

    peers = {"panopticapi's algorithm, same maps": from_maps, "the same, from PNG": from_png}
    return [
        _per_image(compare("PQ", _shape(images), ours, name, peer, tolerance=1e-12, repeats=3), len(images))
        for name, peer in peers.items()
    ]


def _reference_quality(
    pairs: Sequence[tuple[PanopticTruth, PanopticPrediction]], files: Sequence[tuple[bytes, ...]]
) -> Sequence[Tensor]:
    """Return IoU sums and counts [K, 4] by class, from two PNG files per image."""
    table = np.zeros((CLASSES, 4))
    for (truth, prediction), png in zip(pairs, files, strict=True):
        maps = [np.array(Image.open(io.BytesIO(data)), dtype=np.uint32) for data in png]
        t_map, p_map = (m[..., 0] + 256 * m[..., 1] + 65536 * m[..., 2] for m in maps)
        _count(table, t_map, p_map, truth, prediction, _to_large_id)
    return [torch.from_numpy(table)]


def _to_large_id(i: Any) -> Any:
    """Map an id to a larger one that uses all three colour channels, as ids in COCO do."""
    return i * 1_000_003 % 2**24


def _as_png(id_map: np.ndarray) -> bytes:
    large_ids = _to_large_id(id_map.astype(np.int64))
    buffer = io.BytesIO()
    Image.fromarray(np.stack([large_ids & 255, large_ids >> 8 & 255, large_ids >> 16], -1).astype(np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def _count(
    table: np.ndarray,
    t_map: np.ndarray,
    p_map: np.ndarray,
    truth: PanopticTruth,
    prediction: PanopticPrediction,
    to_map_id: Callable[[int], int],
) -> None:
    """Add IoU sum, true positives, false positives and false negatives of an image to `table` [K, 4].

    Like panopticapi, sort the id pairs of all pixels and match segments with dictionaries. `to_map_id` converts an id
    to its value in the maps.
    """
    segments = {to_map_id(i): s for i, s in truth.segments.items()}
    labels = {to_map_id(i): k for i, k in prediction.labels.items()}
    area = dict(zip(*(a.tolist() for a in np.unique(p_map, return_counts=True)), strict=True))
    keys, counts = np.unique(t_map.astype(np.uint64) * 2**24 + p_map.astype(np.uint64), return_counts=True)
    shared = {divmod(int(key), 2**24): int(n) for key, n in zip(keys, counts, strict=True)}
    matched_t, matched_p = set(), set()
    for (t, p), pixels in shared.items():
        if t in segments and p in labels and segments[t].label == labels[p]:
            iou = pixels / (area[p] + segments[t].area - pixels - shared.get((0, p), 0))
            if iou > 0.5:
                table[labels[p], :2] += iou, 1
                matched_t.add(t)
                matched_p.add(p)
    for t, segment in segments.items():
        table[segment.label, 3] += t not in matched_t
    for p, label in labels.items():
        table[label, 2] += p not in matched_p and shared.get((0, p), 0) / area[p] <= 0.5


def _from_files(images: Sequence[_IdMaps], detections: Sequence[InstanceDetections], repeats: int) -> list[Measurement]:
    """Measure AP and PQ on the same images, read from files."""
    coco, results = _as_coco(_truths(images), detections)
    pairs = _pairs(images)
    pngs = [tuple(_as_png(id_map) for id_map in (maps.truth, maps.predicted)) for maps in images]
    categories = [{"id": k, "name": str(k), "isthing": int(k > 1)} for k in range(CLASSES)]
    sides: dict[str, list[dict[str, Any]]] = {"truth": [], "found": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n, ((truth, prediction), data) in enumerate(zip(pairs, pngs, strict=True)):
            listed = [
                [
                    {"id": _to_large_id(i), "category_id": s.label, "area": int(s.area)}
                    for i, s in truth.segments.items()
                ],
                [{"id": _to_large_id(i), "category_id": k} for i, k in prediction.labels.items()],
            ]
            for (side, annotations), segments, png in zip(sides.items(), listed, data, strict=True):
                (folder / side).mkdir(exist_ok=True)
                (folder / side / f"{n}.png").write_bytes(png)
                entries = [segment | {"iscrowd": 0} for segment in segments]
                annotations.append({"image_id": n, "file_name": f"{n}.png", "segments_info": entries})
        image_entries = [{"id": n, "height": SIZE[0], "width": SIZE[1]} for n in range(len(images))]
        for side, annotations in sides.items():
            document = {"images": image_entries, "annotations": annotations, "categories": categories}
            (folder / f"{side}.json").write_text(json.dumps(document))
        panoptic = PanopticFiles(
            truth=folder / "truth.json",
            truth_masks=folder / "truth",
            predictions=folder / "found.json",
            prediction_masks=folder / "found",
        )
        files = score_files.ScoreFiles(*score_files.write_instances(folder, coco.dataset, results), panoptic)
        rows = score_files.run(files, _shape(images), lambda: _reference_quality(pairs, pngs), repeats)
    return [_per_image(row, len(images)) for row in rows]


def _mean_iou(images: Sequence[_IdMaps]) -> Measurement:
    def labels(id_map: np.ndarray, image: _IdMaps, void: int) -> np.ndarray:
        return np.array([void, *(image.label_of[i] for i in range(1, 14))], np.uint8)[id_map]

    maps = [(labels(s.truth, s, 255), labels(s.predicted, s, 0)) for s in images]

    def ours() -> Sequence[Tensor]:
        state = MeanIoUState(CLASSES)
        for image_id, (truth, predicted) in enumerate(maps):
            state.update(image_id, truth, predicted.astype(np.int64))
        return [torch.from_numpy(state.confusion()).double()]

    def peer() -> Sequence[Tensor]:
        confusion = np.zeros((CLASSES + 1) ** 2, dtype=np.int64)
        for truth, predicted in maps:
            truth = np.where(truth == 255, CLASSES, truth).astype(np.int64)
            index = (CLASSES + 1) * truth.ravel() + predicted.astype(np.int64).ravel()
            confusion += np.bincount(index, minlength=confusion.size)
        return [torch.from_numpy(confusion.reshape(CLASSES + 1, -1)[:CLASSES, :CLASSES]).double()]

    measurement = compare("mIoU", _shape(images), ours, "dense int64 matrix", peer, tolerance=0.0, repeats=5)
    return _per_image(measurement, len(images))


def _detections(maps: _IdMaps, seed: int) -> InstanceDetections:
    """Return 100 detections that share 40 masks of shifted things; half of them have a random class."""
    rng = np.random.default_rng(seed)
    ids = [i for i in _present_labels(maps.truth, maps) if i > 2]
    chosen = rng.choice(ids, 40)
    masks = np.stack([np.roll(maps.truth == i, rng.integers(-12, 13, 2), axis=(0, 1)) for i in chosen])
    index = rng.integers(0, 40, 100)
    labels = np.array([maps.label_of[int(chosen[m])] for m in index])
    labels = np.where(rng.random(100) < 0.5, labels, rng.integers(2, CLASSES, 100))
    return InstanceDetections(encode_masks(masks), index, labels, rng.random(100))


def _truths(images: Sequence[_IdMaps]) -> list[InstanceTruth]:
    truths = []
    for maps in images:
        things = {i: k for i, k in _present_labels(maps.truth, maps).items() if i > 2}
        masks = encode_masks(np.stack([maps.truth == i for i in things]))
        crowd = np.zeros(len(things), dtype=bool)
        truths.append(InstanceTruth(masks, np.array(list(things.values())), mask_areas(masks), crowd))
    return truths


def _average_precision(images: Sequence[_IdMaps], found: Sequence[InstanceDetections]) -> Measurement:
    truths = _truths(images)
    coco, results = _as_coco(truths, found)

    def ours() -> Sequence[Tensor]:
        state = AveragePrecisionState(CLASSES)
        for image_id, (truth, detections) in enumerate(zip(truths, found, strict=True)):
            state.update(image_id, truth, detections)
        return [torch.from_numpy(state.compute().precision)]

    def peer() -> Sequence[Tensor]:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
        return [torch.from_numpy(evaluation.eval["precision"])]

    measurement = compare("mask AP", _shape(images), ours, "pycocotools", peer, tolerance=0.0, repeats=3)
    return _per_image(measurement, len(images))


def _as_coco(truths: Sequence[InstanceTruth], found: Sequence[InstanceDetections]) -> tuple[COCO, list[dict[str, Any]]]:
    annotations, results = [], []
    for image_id, (truth, detections) in enumerate(zip(truths, found, strict=True)):
        for mask, label, area in zip(truth.masks, truth.labels.tolist(), truth.areas.tolist(), strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "area": area}
            annotations.append(annotation | {"iscrowd": 0, "segmentation": mask})
        for m, label, score in zip(
            detections.mask_index.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True
        ):
            result = {"image_id": image_id, "category_id": label, "score": score}
            results.append(result | {"segmentation": detections.masks[m]})
    coco = COCO()
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(truths))]
    categories = [{"id": k, "name": str(k)} for k in range(CLASSES)]
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco, results


def _shape(images: Sequence[_IdMaps]) -> str:
    return f"{len(images)} images, {SIZE[0]} x {SIZE[1]}"


def _per_image(measurement: Measurement, count: int) -> Measurement:
    return replace(measurement, ours=measurement.ours.per(count), theirs=measurement.theirs.per(count))
