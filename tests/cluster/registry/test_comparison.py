"""Tests of the decision whether a checkpoint is better than a registered model."""

from dataclasses import replace

import numpy as np
import pytest

from m2f.cluster.compare.records import RunRecord
from m2f.cluster.compare.set_result import SetResult
from m2f.cluster.evaluation.queue import Entry
from m2f.cluster.registry.comparison import RegistryError, check_weights, compare_checkpoints
from m2f.cluster.registry.register import RegisterOptions, is_evaluation_of, register
from m2f.cluster.tracking.logged_models import EvaluatedCheckpoint
from m2f.data_pipeline.storage.ragged_table import Ragged
from m2f.eval.metrics.resampled import PanopticImages
from m2f.eval.results.images import ImageRecords
from m2f.model.errors import ConfigError

IMAGES = 40


def record(name, quality, seed=0, settings=None, fingerprint="f"):
    """Return the record of a run that matches one segment per image, with IoUs around `quality`."""
    ious = (quality + np.random.default_rng(seed).normal(0, 0.05, IMAGES)).clip(0.5, 1)
    one, none = np.ones(IMAGES, int), np.zeros(IMAGES, int)
    labels = np.zeros(IMAGES, np.int32)
    images = PanopticImages(
        matched_label=Ragged(labels, one),
        matched_iou=Ragged(ious, one),
        false_positive=Ragged(labels[:0], none),
        false_negative=Ragged(labels[:0], none),
    )
    result = SetResult(
        step=8,
        fingerprint=fingerprint,
        subset=None,
        num_images=IMAGES,
        metrics={"PQ": 100 * float(ious.mean()), "SQ": 1.0},
        per_class=(),
        settings=settings or {"batch_size": 1, "weights": name},
    )
    found = ImageRecords(image_ids=np.arange(IMAGES), panoptic=images)
    return RunRecord(name=name, source=name, results={"val": result}, images={"val": found})


def test_candidate_is_better_if_the_interval_is_above_zero():
    champion = record("champion", 0.7)
    verdict = compare_checkpoints(champion, record("new", 0.8, seed=1), "val")
    assert verdict.better
    assert verdict.interval.low > 0
    assert str(verdict).startswith("val/PQ of new minus champion: +")
    assert not compare_checkpoints(champion, record("new", 0.702, seed=1), "val", "PQ").better
    assert not compare_checkpoints(champion, record("new", 0.6, seed=1), "val").better
    assert not compare_checkpoints(champion, replace(champion, name="same"), "val").better


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "g"}, "different data"),
        ({"settings": {"batch_size": 2}}, r"different settings \(batch_size\)"),
    ],
)
def test_incomparable_evaluations_are_rejected(change, message):
    with pytest.raises(RegistryError, match=message):
        compare_checkpoints(record("champion", 0.7), record("new", 0.8, **change), "val")


def test_missing_set_or_metric_is_named():
    champion, new = record("champion", 0.7), record("new", 0.8)
    with pytest.raises(RegistryError, match=r"no results with images\.parquet for the set test .*sets: val"):
        compare_checkpoints(champion, new, "test")
    with pytest.raises(RegistryError, match="--metric is AP, which is not available for val; choose one of: PQ"):
        compare_checkpoints(champion, new, "val", "AP")
    with pytest.raises(RegistryError, match=r"no results with images\.parquet"):
        compare_checkpoints(replace(champion, images={}), new, "val")


def test_results_of_different_weights_are_rejected():
    candidate = record("new", 0.8, settings={"weights": "a" * 64})
    check_weights(candidate, "val", 8, "a" * 64)
    check_weights(candidate, "test", 8, "b" * 64)
    check_weights(candidate, "val", 8, "")
    message = r"new: the results of val at step 8 .*a{12}\).*b{12}\); evaluate that checkpoint again with m2f eval"
    with pytest.raises(RegistryError, match=message):
        check_weights(candidate, "val", 8, "b" * 64)
    with pytest.raises(RegistryError, match="not stated"):
        check_weights(record("old", 0.8, settings={"batch_size": 1}), "val", 8, "b" * 64)


def test_evaluations_are_matched_by_commit_not_by_step():
    checkpoint = EvaluatedCheckpoint(
        commit="00000008-2", name="step_00000008-2", url="x", step=8, run_name="r", weights=None
    )
    assert is_evaluation_of(Entry(8, "runs/r/checkpoints/step_00000008-2", 0, commit="00000008-2"), checkpoint)
    assert not is_evaluation_of(Entry(8, "runs/r/checkpoints/step_00000008-1", 0, commit="00000008-1"), checkpoint)
    assert is_evaluation_of(Entry(8, "runs/r/checkpoints/step_00000008-2", 0), checkpoint)
    assert not is_evaluation_of(Entry(8, "runs/r/checkpoints/step_00000008-1", 0), checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aliases": ("champion", "best model")}, "--alias is 'best model'; an alias has 1 to 255 letters"),
        ({"aliases": ("",)}, "--alias is ''"),
        ({"aliases": ("a" * 256,)}, "--alias is 'aaa"),
        ({"aliases": ("Latest",)}, "neither 'latest' nor 'v' with a number"),
        ({"if_better": "v1"}, "--if-better is 'v1'"),
        ({"if_better": "a/b"}, "--if-better is 'a/b'"),
        (
            {"name": "team/cells"},
            "--name is 'team/cells'; names contain neither '/' nor ':'",
        ),
        ({"name": " "}, "--name is ' '"),
        ({"name": ".."}, "--name is '..'"),
    ],
)
def test_names_that_mlflow_refuses_are_refused_before_the_run_is_read(options, message):
    with pytest.raises(ConfigError, match=message):
        register(RegisterOptions(source="nowhere", **options))
