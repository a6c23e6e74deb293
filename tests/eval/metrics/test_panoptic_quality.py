"""Panoptic quality: single rules, comparison with a slow reference, and merging."""

import json
import random
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.panoptic_quality import (
    PanopticPrediction,
    PanopticQualityState,
    PanopticTruth,
    TruthSegment,
    match_panoptic,
)

NUM_CLASSES = 4
IS_THING = (True, True, False, False)


def truth_of(rows, segments):
    """Return the truth of a small map. `segments` maps ids to (label, crowd) or (label, crowd, area)."""
    id_map = np.array(rows, dtype=np.uint8)
    table = {}
    for i, (label, crowd, *area) in segments.items():
        table[i] = TruthSegment(label, area[0] if area else int((id_map == i).sum()), crowd)
    return PanopticTruth(id_map, table)


def prediction_of(rows, labels):
    return PanopticPrediction(np.array(rows, dtype=np.int32), labels)


def counts(record):
    return record.matched_label.tolist(), record.false_positive.tolist(), record.false_negative.tolist()


def slow_reference(truth, prediction):
    """Return matched (label, iou), labels of false positives and of false negatives, computed with whole masks."""
    t_map, p_map = truth.id_map.astype(int), prediction.id_map.astype(int)
    matched, used_t, used_p = [], set(), set()
    for t in sorted(truth.segments):
        for p in sorted(prediction.labels):
            segment = truth.segments[t]
            inter = int(((t_map == t) & (p_map == p)).sum())
            if inter == 0 or segment.is_crowd or segment.label != prediction.labels[p]:
                continue
            in_void = int(((t_map == 0) & (p_map == p)).sum())
            union = int((p_map == p).sum()) + segment.area - inter - in_void
            if inter / union > 0.5:
                matched.append((segment.label, inter / union))
                used_t.add(t)
                used_p.add(p)
    last_crowd = {}
    fn = []
    for t, segment in truth.segments.items():
        if segment.is_crowd:
            last_crowd[segment.label] = t
        elif t not in used_t:
            fn.append(segment.label)
    fp = []
    for p, label in prediction.labels.items():
        if p in used_p:
            continue
        here = p_map == p
        ignored = int((here & (t_map == 0)).sum())
        if label in last_crowd:
            ignored += int((here & (t_map == last_crowd[label])).sum())
        if not ignored / int(here.sum()) > 0.5:
            fp.append(label)
    return matched, sorted(fp), sorted(fn)


def random_pair(rng, size=24, wide_ids=False):
    """Return a truth, and a prediction made by moving, dropping and relabelling its segments."""
    ids = [int(i) for i in rng.choice(np.arange(1, 60000 if wide_ids else 30), size=8, replace=False)]
    t_map = np.zeros((size, size), dtype=np.uint16)
    p_map = np.zeros((size, size), dtype=np.int32)
    segments, labels = {}, {}
    for i in ids:
        y, x = rng.integers(0, size - 6, 2)
        h, w = rng.integers(3, size // 2, 2)
        t_map[y : y + h, x : x + w] = i
        dy, dx = rng.integers(0, 4, 2)
        p_map[y + dy : y + h, x + dx : x + w] = i + 7
        label = int(rng.integers(0, NUM_CLASSES))
        segments[i] = (label, bool(rng.random() < 0.25))
        labels[i + 7] = label if rng.random() < 0.8 else int(rng.integers(0, NUM_CLASSES))
    if rng.random() < 0.3:
        del segments[ids[0]]  # the annotation does not list all ids of the map
    table = {
        i: TruthSegment(label, int((t_map == i).sum()) + float(rng.integers(0, 3)), crowd)
        for i, (label, crowd) in segments.items()
    }
    present = set(np.unique(p_map).tolist())
    return PanopticTruth(t_map, table), PanopticPrediction(p_map, {i: v for i, v in labels.items() if i in present})


def test_iou_of_exactly_one_half_is_not_a_match():
    record = match_panoptic(truth_of([[1, 1, 0, 0]], {1: (0, False)}), prediction_of([[5, 0, 0, 0]], {5: 0}))
    assert counts(record) == ([], [0], [0])


def test_iou_above_one_half_is_a_match():
    record = match_panoptic(truth_of([[1, 1, 1]], {1: (0, False)}), prediction_of([[5, 5, 0]], {5: 0}))
    assert counts(record) == ([0], [], [])
    assert record.matched_iou.tolist() == [2 / 3]


def test_truth_void_is_excluded_from_the_union_but_predicted_void_is_not():
    truth = truth_of([[1, 1, 1, 1, 0, 0]], {1: (0, False)})
    assert match_panoptic(truth, prediction_of([[0, 5, 5, 5, 5, 5]], {5: 0})).matched_iou.tolist() == [3 / 4]


def test_crowd_pixels_stay_in_the_union():
    truth = truth_of([[1] * 10 + [2] * 8], {1: (0, False), 2: (0, True)})
    assert match_panoptic(truth, prediction_of([[5] * 18], {5: 0})).matched_iou.tolist() == [10 / 18]


def test_union_uses_the_area_stated_in_the_annotation():
    truth = truth_of([[1, 1, 1, 0]], {1: (0, False, 4)})
    assert match_panoptic(truth, prediction_of([[5, 5, 5, 0]], {5: 0})).matched_iou.tolist() == [3 / 4]


def test_unlisted_truth_id_is_neither_void_nor_segment():
    record = match_panoptic(truth_of([[9, 9, 9]], {}), prediction_of([[5, 5, 5]], {5: 0}))
    assert counts(record) == ([], [0], [])


def test_listed_segment_without_pixels_is_a_false_negative():
    assert counts(match_panoptic(truth_of([[0]], {3: (2, False, 7)}), prediction_of([[0]], {}))) == ([], [], [2])


def test_truth_whose_map_and_segments_share_no_id_is_refused():
    truth = truth_of([[1, 2, 0]], {3: (0, False, 7)})
    with pytest.raises(EvaluationError, match=r"image 12: the truth's map has the ids \[1, 2\], but .* has \[3\]"):
        PanopticQualityState(IS_THING).update(12, truth, prediction_of([[0] * 3], {}))


def test_an_area_far_below_the_pixels_is_refused_if_it_makes_an_iou_above_1():
    rows, prediction = [[1] * 200], prediction_of([[5] * 200], {5: 0})
    with pytest.raises(EvaluationError, match="image 12: segment 1 of the truth has 200 pixels, but states an area of"):
        PanopticQualityState(IS_THING).update(12, truth_of(rows, {1: (0, False, 0.5)}), prediction)
    assert match_panoptic(truth_of(rows, {1: (0, False, 199)}), prediction).matched_iou == 200 / 199
    small = match_panoptic(truth_of([[1] * 3], {1: (0, False, 1)}), prediction_of([[5] * 3], {5: 0}))
    assert small.matched_iou == 3


@pytest.mark.parametrize(("void", "expected"), [(2, [0]), (3, [])])
def test_prediction_is_ignored_only_if_more_than_half_is_void(void, expected):
    truth = truth_of([[0] * void + [1] * (4 - void)], {1: (1, False)})
    assert match_panoptic(truth, prediction_of([[5] * 4], {5: 0})).false_positive.tolist() == expected


@pytest.mark.parametrize(
    ("order", "expected"), [([1, 2], [0]), ([2, 1], [])], ids=["small crowd last", "large crowd last"]
)
def test_predictions_are_ignored_only_in_the_last_listed_crowd_of_their_class(order, expected):
    id_map = [[1, 1, 1, 2]]
    truth = truth_of(id_map, dict.fromkeys(order, (0, True)))
    assert match_panoptic(truth, prediction_of([[5] * 4], {5: 0})).false_positive.tolist() == expected


def test_predictions_in_crowds_of_another_class_are_false_positives():
    record = match_panoptic(truth_of([[1, 1]], {1: (1, True)}), prediction_of([[5, 5]], {5: 0}))
    assert counts(record) == ([], [0], [])


def test_predicted_only_class_counts_unless_its_predictions_are_ignored():
    state = PanopticQualityState(IS_THING)
    truth = truth_of([[1, 1, 1, 0, 0, 2]], {1: (0, False), 2: (3, False)})
    state.update(1, truth, prediction_of([[1, 1, 1, 3, 3, 2]], {1: 0, 3: 1, 2: 3}))
    state.update(2, truth_of([[1, 1]], {1: (0, False)}), prediction_of([[1, 2]], {1: 0, 2: 2}))
    quality = state.compute()
    assert not quality.per_class[1].occurs
    assert quality.per_class[2].false_positives == 1
    assert quality.things is not None
    assert quality.stuff is not None
    assert (quality.things.num_classes, quality.stuff.num_classes) == (1, 2)
    assert quality.stuff.pq == 0.5


def test_split_without_classes_is_none_without_affecting_the_others():
    state = PanopticQualityState(IS_THING)
    state.update(1, truth_of([[1]], {1: (0, False)}), prediction_of([[1]], {1: 0}))
    quality = state.compute()
    assert quality.stuff is None
    assert quality.all is not None
    assert quality.all.pq == 1.0
    assert PanopticQualityState(IS_THING).compute().all is None


def test_errors_for_inconsistent_predictions_name_the_image():
    truth = truth_of([[1, 1]], {1: (0, False)})
    with pytest.raises(EvaluationError, match=r"image 12: .*missing in the segment list: \[5\]"):
        PanopticQualityState(IS_THING).update(12, truth, prediction_of([[5, 5]], {}))
    with pytest.raises(EvaluationError, match=r"image 12: .*no pixels in the map: \[6\]"):
        PanopticQualityState(IS_THING).update(12, truth, prediction_of([[5, 5]], {5: 0, 6: 1}))
    with pytest.raises(EvaluationError, match=r"image 12: .*shape"):
        PanopticQualityState(IS_THING).update(12, truth, prediction_of([[5]], {5: 0}))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), wide_ids=st.booleans())
def test_matches_equal_the_slow_reference(seed, wide_ids):
    truth, prediction = random_pair(np.random.default_rng(seed), wide_ids=wide_ids)
    matched, fp, fn = slow_reference(truth, prediction)
    record = match_panoptic(truth, prediction)
    assert counts(record) == ([label for label, _ in matched], fp, fn)
    assert record.matched_iou.tolist() == [iou for _, iou in matched]


def test_sums_equal_one_pass_over_the_images_in_order():
    state = PanopticQualityState(IS_THING)
    pairs = {i: random_pair(np.random.default_rng(i)) for i in range(30)}
    for i in reversed(pairs):
        state.update(i, *pairs[i])
    iou, tp, fp, fn = (np.zeros(NUM_CLASSES) for _ in range(4))
    for truth, prediction in pairs.values():
        matched, fps, fns = slow_reference(truth, prediction)
        for label, value in matched:
            iou[label] += value
            tp[label] += 1
        np.add.at(fp, fps, 1)
        np.add.at(fn, fns, 1)
    quality = state.compute()
    assert [c.pq for c in quality.per_class] == (iou / (tp + fp / 2 + fn / 2)).tolist()
    assert [c.false_positives for c in quality.per_class] == fp.tolist()
    assert quality.all is not None
    assert quality.all.pq == pytest.approx(np.mean(iou / (tp + fp / 2 + fn / 2)), abs=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), num_shards=st.integers(1, 5))
def test_merging_is_bit_identical_for_any_sharding_order_and_repetition(seed, num_shards):
    rng = random.Random(seed)
    pairs = {i: random_pair(np.random.default_rng(i), size=16) for i in range(9)}
    whole = PanopticQualityState(IS_THING)
    shards = [PanopticQualityState(IS_THING) for _ in range(num_shards)]
    for i, pair in pairs.items():
        whole.update(i, *pair)
        for shard in {rng.randrange(num_shards), rng.randrange(num_shards)}:
            shards[shard].update(i, *pair)
    shards += rng.sample(shards, 1)
    rng.shuffle(shards)
    merged = PanopticQualityState(IS_THING)
    for shard in shards:
        merged.merge(PanopticQualityState.from_bytes(shard.to_bytes()))
    assert merged.compute() == whole.compute()
    assert merged.to_bytes() == whole.to_bytes()


def test_merge_refuses_and_names_an_image_with_two_different_results():
    truth, prediction = truth_of([[1, 1]], {1: (0, False)}), prediction_of([[5, 5]], {5: 0})
    state, other = PanopticQualityState(IS_THING), PanopticQualityState(IS_THING)
    state.update(77, truth, prediction)
    other.update(77, truth, replace(prediction, labels={5: 1}))
    other.update(78, truth, prediction)
    with pytest.raises(EvaluationError, match="image 77 was evaluated twice"):
        state.merge(other)
    assert state.image_ids == (77,)
    with pytest.raises(EvaluationError, match="different settings"):
        state.merge(PanopticQualityState((True,)))


def test_image_quality_is_computed_per_image():
    state = PanopticQualityState(IS_THING)
    truth = truth_of([[1, 1]], {1: (0, False)})
    state.update(1, truth, prediction_of([[5, 5]], {5: 0}))
    state.update(2, truth, prediction_of([[5, 5]], {5: 1}))
    state.update(3, truth_of([[0, 0]], {}), prediction_of([[0, 0]], {}))
    assert [state.image_quality(i) for i in (1, 2, 3)] == [1.0, 0.0, None]


@pytest.mark.parametrize("payload", [b"", b"not an archive", b"PK\x03\x04 broken"])
def test_from_bytes_refuses_other_content(payload):
    with pytest.raises(EvaluationError, match="cannot read a stored state"):
        PanopticQualityState.from_bytes(payload)


def test_real_panoptic_truth_moved_by_twelve_pixels_scores_as_panopticapi(real_data):
    """Two example images, shifted right and filled with void. panopticapi 7bb4655 gives PQ 0.4291689770."""
    folder = real_data / "coco_panoptic"
    content = json.loads((folder / "annotations" / "panoptic_val2017.json").read_text())
    labels = {category["id"]: k for k, category in enumerate(content["categories"])}
    state = PanopticQualityState([bool(category["isthing"]) for category in content["categories"]])
    for annotation in content["annotations"]:
        blue, green, red = cv2.split(cv2.imread(str(folder / "panoptic_val2017" / annotation["file_name"])).astype(int))
        ids = red + 256 * green + 65536 * blue
        moved = np.pad(ids, ((0, 0), (12, 0)))[:, :-12]
        segments = {
            s["id"]: TruthSegment(labels[s["category_id"]], s["area"], bool(s["iscrowd"]))
            for s in annotation["segments_info"]
        }
        present = set(np.unique(moved).tolist())
        found = {i: segment.label for i, segment in segments.items() if i in present}
        state.update(annotation["image_id"], PanopticTruth(ids, segments), PanopticPrediction(moved, found))
    quality = state.compute().all
    assert quality is not None
    assert quality.pq == pytest.approx(0.4291689770, abs=5e-11)
