"""PQ of files by the engine: counts equal our matching, IoU sums equal it up to rounding, or the engine refuses."""

import collections

import numpy as np
import pytest
from PIL import Image

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.engine import EngineRefusedError, PanopticPair, match_panoptic_files
from m2f.eval.metrics.overlaps import InconsistentMapError, InconsistentTruthError
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticTruth, TruthSegment, match_panoptic
from m2f.eval.score.files import is_plain_id_map, read_ids


def write(path, id_map):
    rgb = np.stack([id_map & 255, id_map >> 8 & 255, id_map >> 16], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(path)
    return path


def random_pair(folder, seed):
    """Return a pair with crowds, void, inexact areas, ids without pixels, unlisted ids and id 0."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 50, 2)
    truth = np.zeros((height, width), np.int64)
    for i in rng.choice(2**24 - 1, rng.integers(0, 9), replace=False) + 1:
        y, x = rng.integers(0, height), rng.integers(0, width)
        truth[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = i
    predicted = np.roll(truth, rng.integers(-3, 4, 2), axis=(0, 1))
    predicted[rng.random(predicted.shape) < 0.05] = 0
    listed = rng.permutation(np.unique(truth[truth > 0])).tolist()
    label_of = {i: int(rng.integers(0, 4)) for i in listed}
    segments = {
        i: TruthSegment(label_of[i], float(max(1, (truth == i).sum() + rng.integers(-2, 3))), bool(rng.random() < 0.3))
        for i in listed
        if rng.random() < 0.9
    }
    found = np.unique(predicted[predicted > 0]).tolist()
    labels = {i: label_of[i] if rng.random() < 0.8 else int(rng.integers(0, 4)) for i in found}
    if rng.random() < 0.1:
        segments[int(rng.choice([2**24 + 5, 2**31 + 1, 2**40]))] = TruthSegment(1, 7.0, False)  # too large for a pixel
    if rng.random() < 0.1:
        segments[0] = TruthSegment(1, 7.0, bool(rng.random() < 0.5))
    if rng.random() < 0.05 and labels:
        labels.pop(next(iter(labels)))
    for odd in (0, 12345, 2**33):
        if rng.random() < 0.02:
            labels[odd] = 1
    maps = write(folder / "truth.png", truth), write(folder / "found.png", predicted)
    return PanopticPair(maps[0], segments, maps[1], labels)


def ours(pair):
    truth = PanopticTruth(read_ids(pair.truth_map), pair.segments)
    return match_panoptic(truth, PanopticPrediction(read_ids(pair.predicted_map), pair.labels))


def by_class(record):
    """Return {class: [matches, sum of their IoU, false positives, false negatives]}."""
    sums = collections.defaultdict(lambda: [0, 0.0, 0, 0])
    for label, iou in zip(record.matched_label.tolist(), record.matched_iou.tolist(), strict=True):
        sums[label][0] += 1
        sums[label][1] += iou
    for place, side in ((2, record.false_positive), (3, record.false_negative)):
        for label in side.tolist():
            sums[label][place] += 1
    return sums


def test_engine_counts_equal_our_matching_on_random_images(tmp_path):
    scored = refused = 0
    for seed in range(600):
        pair = random_pair(tmp_path, seed)
        try:
            expected = by_class(ours(pair))
        except InconsistentTruthError:  # the engine does not check the truth
            continue
        except InconsistentMapError:
            refused += 1
            with pytest.raises(EngineRefusedError):
                match_panoptic_files(pair)
            continue
        found = by_class(match_panoptic_files(pair))
        scored += 1
        assert found.keys() == expected.keys(), seed
        for label, (matches, iou, *errors) in found.items():
            assert [matches, *errors] == [expected[label][0], *expected[label][2:]], seed
            assert iou == pytest.approx(expected[label][1], abs=1e-12), seed
    assert scored > 400
    assert refused > 20


def test_damaged_files_are_refused_or_scored_as_by_our_matching(tmp_path):
    """If is_plain_id_map and the engine accept a damaged file, our matching gives the same result."""
    truth = np.zeros((40, 30), np.int64)
    truth[:20], truth[20:, :9] = 70001, 5
    segments = {70001: TruthSegment(0, 600.0, False), 5: TruthSegment(1, 180.0, False)}
    whole = write(tmp_path / "truth.png", truth).read_bytes()
    pair = PanopticPair(tmp_path / "truth.png", segments, tmp_path / "found.png", {70001: 0, 5: 1})
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 256))
        pair.predicted_map.write_bytes(damaged if rng.random() < 0.7 else damaged[: int(rng.integers(8, len(damaged)))])
        if not is_plain_id_map(pair.predicted_map):
            continue
        try:
            record = match_panoptic_files(pair)
        except EngineRefusedError:
            continue
        try:
            expected = ours(pair)
        except EvaluationError:
            pytest.fail("the engine reads what we refuse")
        assert by_class(record) == by_class(expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16"])
def test_other_png_modes_are_not_passed_to_the_engine(tmp_path, mode):
    Image.new(mode, (5, 4)).save(tmp_path / "x.png")
    assert not is_plain_id_map(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(b"no image")
    assert not is_plain_id_map(tmp_path / "x.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png", transparency=(0, 0, 0))
    assert not is_plain_id_map(tmp_path / "x.png")
    assert is_plain_id_map(write(tmp_path / "x.png", np.ones((4, 5), np.int64)))


def test_engine_refuses_a_fractional_area(tmp_path):
    id_map = write(tmp_path / "x.png", np.ones((4, 5), np.int64))
    with pytest.raises(EngineRefusedError, match="not an integer"):
        match_panoptic_files(PanopticPair(id_map, {1: TruthSegment(0, 20.5, False)}, id_map, {1: 0}))
