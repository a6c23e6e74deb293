"""Metrics of resampled image sets equal those of a state that contains each image as often as it was drawn."""

import time

import numpy as np
import pytest
from scipy import stats

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.storage.ragged_table import Ragged, read_table_bytes, table_bytes
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import NUM_AREAS, AveragePrecisionState, DetectionRecord
from m2f.eval.metrics.mean_iou import ConfusionRecord, MeanIoUState
from m2f.eval.metrics.panoptic_quality import PanopticQualityState, PanopticRecord
from m2f.eval.metrics.resampled import draw_weights
from m2f.eval.metrics.seed_interval import difference_interval, mean_interval
from m2f.eval.results.images import RESAMPLED_METRICS, image_records, image_table, read_image_records

NUM_CLASSES = 7


def detection_record(random, detections=30, num_classes=NUM_CLASSES):
    """Return a random record, in which some detections are ignored.

    Scores tie only between images. A matched detection is matched at all IoU thresholds up to a random one.
    """
    truth = np.unique(random.integers(0, num_classes, size=random.integers(0, 6)))
    count = random.integers(0, 3, size=len(truth))
    label = np.sort(random.integers(0, num_classes, size=detections))
    best = np.where(np.isin(label, truth) & (random.random(detections) < 0.5), random.integers(0, 11, detections), 0)
    matched = (1 << best) - 1
    ignored = np.where(random.random(detections) < 0.1, matched, 0)
    score = random.permutation(100)[:detections] / 100
    order = np.lexsort((-score, label))
    by_area = [np.repeat(column[:, None], NUM_AREAS, axis=1) for column in (matched[order], ignored[order], count)]
    return DetectionRecord(label[order], score[order], by_area[0], by_area[1], truth, by_area[2])


def panoptic_record(random):
    matched, wrong, missed = (random.integers(0, NUM_CLASSES, size=random.integers(0, 5)) for _ in range(3))
    return PanopticRecord(matched, random.uniform(0.5, 1, len(matched)), wrong, missed)


def confusion_record(random):
    cells = np.unique(random.integers(0, NUM_CLASSES**2, size=random.integers(0, 9)))
    return ConfusionRecord(cells, random.integers(1, 1000, size=len(cells)))


def empty_states():
    is_thing = [True] * NUM_CLASSES
    return PanopticQualityState(is_thing), AveragePrecisionState(NUM_CLASSES), MeanIoUState(NUM_CLASSES)


def some_states(seed, num_images=25):
    random = np.random.default_rng(seed)
    states = empty_states()
    for image_id in range(3, 3 + num_images):
        for state, make in zip(states, (panoptic_record, detection_record, confusion_record), strict=True):
            state.add(image_id, make(random))
    return states


def slow_values(states, image_ids):
    """Return PQ, AP, AP50, AP75 and mIoU in per cent of a list of images, which may contain duplicates."""
    copies = empty_states()
    for position, image_id in enumerate(image_ids):
        for copy, state in zip(copies, states, strict=True):
            copy.add(position, state.record(image_id))
    quality, precision, iou = (copy.compute() for copy in copies)
    averages = [precision.stats[name] for name in ("AP", "AP50", "AP75")]
    values = quality.all and quality.all.pq, *(average if average >= 0 else None for average in averages), iou.miou
    return [np.nan if value is None else 100 * value for value in values]


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_a_draw_equal_those_of_its_images(seed):
    states = some_states(seed)
    records = read_image_records(image_table(image_records(*states)))
    ids = records.image_ids.tolist()
    weights = np.concatenate([np.ones((len(ids), 1), np.int32), draw_weights(records.image_ids, 4)], axis=1)
    found = np.stack(list(records.resampled(weights, RESAMPLED_METRICS).values()))
    for draw in range(weights.shape[1]):
        expected = slow_values(states, np.repeat(ids, weights[:, draw]).tolist())
        np.testing.assert_allclose(found[:, draw], expected, atol=1e-10)


def test_metrics_of_an_image_equal_those_of_a_set_with_only_this_image():
    states = some_states(9, num_images=300)
    records = image_records(*states)
    found = np.stack(list(records.per_image_values().values()))
    for column, image_id in enumerate(records.image_ids.tolist()):
        np.testing.assert_allclose(
            found[:, column], np.delete(slow_values(states, [image_id]), [2, 3]), atol=1e-9, equal_nan=True
        )
    assert np.isnan(found).any()  # metrics of images in which nothing counts


def test_draws_depend_only_on_the_image_ids():
    ids = np.array([5, 9, 7])
    weights = draw_weights(ids, 50)
    assert (weights.sum(axis=0) == 3).all()
    np.testing.assert_array_equal(weights, draw_weights(ids.copy(), 50))
    assert (weights != draw_weights(np.array([5, 9, 8]), 50)).any()


def test_image_records_include_spilled_images(tmp_path):
    states = some_states(2)
    before = image_table(image_records(*states))
    for number, state in enumerate(states):
        state.spill(tmp_path / str(number), threshold_bytes=0)
    assert image_table(image_records(*states)) == before


def test_files_of_other_formats_are_refused():
    for payload in (b"", b"PAR1", table_bytes({"a": np.zeros(2)})):
        with pytest.raises(EvaluationError, match="not a file of image records"):
            read_image_records(payload)
    with pytest.raises(DataError, match="not a parquet table"):
        read_table_bytes(b"PAR1")


def test_tables_keep_empty_rows_and_missing_values():
    lists = Ragged(np.array([1, 2, 3], np.uint16), np.array([0, 3, 0]))
    back = read_table_bytes(
        table_bytes({"value": np.array([1.5, np.nan, 2]), "name": np.array(["a", "b", "c"]), "l": lists})
    )
    np.testing.assert_array_equal(back["value"], [1.5, np.nan, 2])
    assert back["l"].values.dtype == np.uint16
    assert back["l"].counts.tolist() == [0, 3, 0]
    assert back["name"].tolist() == ["a", "b", "c"]


def test_intervals_over_seeds_equal_students_and_welchs_t_intervals():
    first, second = [50.1, 50.9, 50.4], [51.0, 51.9, 52.3, 51.1]
    found = difference_interval(first, second)
    expected = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(found[1:], expected)
    assert found.value == pytest.approx(np.mean(second) - np.mean(first))
    np.testing.assert_allclose(mean_interval(first)[1:], stats.ttest_1samp(first, 0).confidence_interval(0.95))
    assert difference_interval([1.0, 1.0], [2.0, 2.0]) == (1.0, 1.0, 1.0)


@pytest.mark.slow
def test_a_thousand_draws_of_five_thousand_images_take_less_than_a_minute():
    random = np.random.default_rng(0)
    different = [detection_record(random, 100, 80) for _ in range(500)]
    state = AveragePrecisionState(80)
    for image_id in range(5000):
        state.add(image_id, different[image_id % 500])
    records = image_records(None, state, None)
    weights = draw_weights(records.image_ids, 1000)
    began = time.process_time()
    draws = records.resampled(weights)["AP"]
    assert time.process_time() - began < 60
    assert draws.std() > 0
    weights[:, :1] = 1
    assert records.resampled(weights[:, :1])["AP"][0] == pytest.approx(100 * state.compute().stats["AP"], abs=1e-10)
