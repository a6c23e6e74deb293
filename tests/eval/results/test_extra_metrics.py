"""Extra metrics: enabled in the settings, computed from the same predictions, and reported."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers.cityscapes import CATEGORIES, InstanceIds
from m2f.data_pipeline.sample import DecodedSample
from m2f.data_pipeline.transforms.collate import collate_eval
from m2f.eval.config import EXTRA_METRICS, EvaluationConfig, EvaluationSet, ExtraMetric, ExtraMetricEntry
from m2f.eval.errors import EvaluationError
from m2f.eval.inference.evaluator import Evaluator, detect, image_outputs
from m2f.eval.metrics.average_precision import AveragePrecisionState
from m2f.eval.metrics.boundary import BOUNDARY_RATIO
from m2f.eval.metrics.cityscapes_ap import CityscapesAPState
from m2f.eval.metrics.cityscapes_iou import CityscapesIoUState
from m2f.eval.metrics.extra.cityscapes import cityscapes_detections, cityscapes_truth
from m2f.eval.metrics.extra.task_metric import TaskMetric, task_metrics
from m2f.eval.metrics.instance_matching import class_agnostic_detections, class_agnostic_truth
from m2f.eval.metrics.mean_iou import MeanIoUState
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticQualityState
from m2f.eval.metrics.truth import instance_truth, panoptic_truth
from m2f.eval.results.results import EvaluationSubject
from m2f.eval.results.states import EvaluationStates, check_complete
from m2f.model.config import PostprocessConfig
from m2f.model.errors import ConfigError
from m2f.model.inference.postprocess import panoptic, semantic
from m2f.model.structures import Predictions

TASKS = ("panoptic", "instance", "semantic")
EXTRA = ("boundary", "class_agnostic", "cityscapes")
CARAVAN = 29
"""Label id of caravans. They are void in shards, but the benchmark's AP counts predictions there as wrong."""
SUBJECT = EvaluationSubject(dataset="streets", fingerprint="f" * 64)
POSTPROCESS = PostprocessConfig(object_threshold=0.3, overlap_threshold=0.3)
IS_THING = [c.is_thing for c in CATEGORIES.categories]


def street_ids(seed):
    """Return gtFine_instanceIds with void, caravans, groups, and large and small instances."""
    rng = np.random.default_rng(seed)
    ids = np.full((96, 128), 7, np.uint16)
    ids[:30], ids[30:36], ids[88:] = 23, 0, 21
    number = dict.fromkeys((24, 25, 26, 29), 0)
    for _ in range(10):
        y, x, h, w = rng.integers(0, 80), rng.integers(0, 110), rng.integers(4, 40), rng.integers(4, 40)
        label = int(rng.choice(list(number)))
        ids[y : y + h, x : x + w] = label if rng.random() < 0.2 else label * 1000 + number[label]
        number[label] += 1
    return ids


@lru_cache
def street(image_id):
    ids = street_ids(image_id)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ids.png")
        path.write_bytes(encode_png(ids))
        annotation = InstanceIds().decode([path], ids.size)
    image = np.full((*ids.shape, 3), image_id, np.uint8)
    return DecodedSample(key=f"s{image_id}", image_id=image_id, source="made", image=image, annotation=annotation)


class Guessing(nn.Module):
    """Model that predicts the annotated segments, shifted, some of another class. The seed is the grey level."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def normalise(self, images, sizes):
        return images

    def forward(self, images):
        assert len(images) == 1
        seed = int(images[0, 0, 0, 0])
        rng, annotation = np.random.default_rng(seed + 100), street(seed).annotation
        queries = [(s.category_id, annotation.seg == s.id) for s in annotation.segments]
        class_logits = torch.zeros(1, 1, len(queries), len(IS_THING) + 1)
        features = torch.zeros(1, len(queries), images.shape[2] // 4, images.shape[3] // 4)
        labels = CATEGORIES.labels("panoptic")
        for query, (category, mask) in enumerate(queries):
            label = labels[category] if rng.random() < 0.8 else labels[26]
            class_logits[0, 0, query, label] = 3 + 4 * rng.random()
            moved = torch.from_numpy(np.roll(mask, rng.integers(-3, 4, 2), (0, 1)))[::4, ::4]
            features[0, query] = moved * 12.0 - 6.0
        return Predictions(class_logits, torch.eye(len(queries))[None, None], features)


def evaluator(tasks=TASKS, extra=EXTRA):
    config = EvaluationConfig(tasks=tasks, extra_metrics=extra)
    return Evaluator(Guessing(), CATEGORIES, config, model_task="panoptic", postprocess=POSTPROCESS)


def batch_of(image_id):
    return collate_eval([street(image_id)], (0,), 96, 128)


@pytest.fixture(scope="module")
def evaluated():
    states = EvaluationStates.empty(CATEGORIES, TASKS, EXTRA)
    for image_id in range(1, 5):
        part = evaluator().evaluate_batch(batch_of(image_id))
        states.merge(EvaluationStates.from_bytes(part.to_bytes()))
    return states


def test_extra_metrics_equal_states_updated_directly(evaluated):
    boundary_panoptic = PanopticQualityState(IS_THING, BOUNDARY_RATIO)
    boundary_instance = AveragePrecisionState(8, boundary_ratio=BOUNDARY_RATIO)
    class_agnostic = AveragePrecisionState(1)
    cityscapes_instance, cityscapes_semantic = CityscapesAPState(), CityscapesIoUState()
    label_ids = np.array([c.id for c in CATEGORIES.categories])
    thing_of = np.cumsum(IS_THING) - 1
    for image_id in range(1, 5):
        batch, sample = batch_of(image_id), street(image_id)
        (output,) = image_outputs(batch, evaluator().predict(batch))
        result = panoptic(*output, IS_THING, POSTPROCESS)
        prediction = PanopticPrediction(result.segment_map.numpy(), {s.id: s.label for s in result.segments})
        boundary_panoptic.update(image_id, panoptic_truth(sample, CATEGORIES.labels("panoptic")), prediction)
        detections = detect(output, IS_THING, POSTPROCESS)
        detections = replace(detections, labels=thing_of[detections.labels])
        truth = instance_truth(sample, CATEGORIES.labels("instance"))
        boundary_instance.update(image_id, truth, detections)
        class_agnostic.update(image_id, class_agnostic_truth(truth), class_agnostic_detections(detections))
        ids = street_ids(image_id)
        things = np.array([c.id for c in CATEGORIES.for_task("instance")])
        in_shards = np.where(ids // 1000 == CARAVAN, 0, ids)
        cityscapes_instance.update(image_id, in_shards, cityscapes_detections(detections, things))
        label_map = semantic(*output, POSTPROCESS).label_map.numpy()
        cityscapes_semantic.update(image_id, ids, label_ids[label_map])
    metrics = evaluated.compute(CATEGORIES, SUBJECT).metrics()
    assert metrics["boundary_PQ"] == 100 * boundary_panoptic.compute().all.pq
    assert metrics["boundary_PQ_st"] == 100 * boundary_panoptic.compute().stuff.pq
    assert metrics["boundary_AP"] == 100 * boundary_instance.compute().stats["AP"]
    assert metrics["class_agnostic_AR100"] == 100 * class_agnostic.compute().stats["AR100"]
    assert metrics["cityscapes_AP"] == 100 * cityscapes_instance.compute().ap
    assert metrics["cityscapes_AP50"] == 100 * cityscapes_instance.compute().ap50
    assert metrics["cityscapes_IoU"] == 100 * cityscapes_semantic.compute().iou
    assert metrics["cityscapes_iIoU"] == 100 * cityscapes_semantic.compute().iiou
    assert 0 < metrics["boundary_PQ"] < metrics["PQ"]
    assert 0 < metrics["boundary_AP"] < metrics["AP"]
    assert metrics["class_agnostic_AR100"] > 0
    assert metrics["cityscapes_IoU"] == pytest.approx(metrics["mIoU_occurring"], abs=15)


def test_extra_metrics_are_in_every_output(evaluated):
    results = evaluated.compute(CATEGORIES, SUBJECT)
    content = json.loads(results.to_json())
    names = {"boundary_PQ", "boundary_AP", "class_agnostic_AR100", "cityscapes_AP50", "cityscapes_iIoU_categories"}
    assert names <= content["metrics"].keys()
    assert {f"val/{name}" for name in names} <= results.headline("val").keys()
    rows = {row["name"]: row for row in content["per_class"]}
    assert rows["road"]["boundary_AP"] is None
    assert rows["car"]["cityscapes_iIoU"] is not None
    assert {"boundary mask", "class-agnostic", "Cityscapes semantic"} <= {
        line.split("  ")[0] for line in results.table().splitlines()
    }
    plain = replace(SUBJECT, name="val_ms", test_time="6 scales, flipped too")
    assert evaluated.compute(CATEGORIES, plain).table().startswith("val_ms: 4 images, 6 scales, flipped too")


def test_missing_images_of_an_extra_metric_are_refused(evaluated):
    states = EvaluationStates.from_bytes(evaluated.to_bytes())
    check_complete(states, range(1, 5))
    states.extra["boundary_instance"] = EvaluationStates.empty(CATEGORIES, TASKS, EXTRA).extra["boundary_instance"]
    with pytest.raises(EvaluationError, match="boundary_instance results are not published: 4 of 4 images"):
        check_complete(states, range(1, 5))


@pytest.mark.parametrize("seed", range(4))
def test_cityscapes_ids_are_recovered_from_shards(seed):
    ids, found = street_ids(seed).astype(np.int64), cityscapes_truth(street(seed))
    evaluated_labels = [c.id for c in CATEGORIES.categories]
    label = np.where(ids < 1000, ids, ids // 1000)
    known = np.isin(label, evaluated_labels)
    assert np.array_equal(np.where(found < 1000, found, found // 1000), np.where(known, label, 0))
    assert np.array_equal(found >= 1000, known & (ids >= 1000))
    pairs = np.unique(np.stack([ids[known], found[known]]), axis=1).T
    assert len(pairs) == len(np.unique(ids[known])) == len(np.unique(found[known]))


def test_extra_metrics_without_an_applicable_task_are_refused():
    with pytest.raises(
        ConfigError, match=r"'class_agnostic', which applies to instance, but the tasks are \['semantic'\]"
    ):
        EvaluationConfig(tasks=("semantic",), extra_metrics=("class_agnostic",))
    other_set = EvaluationSet(dataset="val", tasks=("panoptic",))
    with pytest.raises(ConfigError, match=r"\['semantic', 'panoptic'\] \(evaluation\.tasks and the tasks of .*sets\)"):
        EvaluationConfig(tasks=("semantic",), sets=(other_set,), extra_metrics=("class_agnostic",))
    sets = (EvaluationSet(dataset="val", tasks=("semantic",)),)
    config = EvaluationConfig(sets=sets, tasks=TASKS, extra_metrics=EXTRA)
    assert config.for_set(sets[0]).extra_metrics == ("cityscapes",)
    assert set(EvaluationStates.empty(CATEGORIES, ("semantic",), EXTRA).metric_states()) == {
        "semantic",
        "cityscapes_semantic",
    }


class PixelCount(TaskMetric):
    key, task, title, prefix = "pixel_count", "semantic", "pixels", "made_"
    state_type = MeanIoUState

    def empty_state(self, categories):
        return MeanIoUState(len(categories.for_task("semantic")))

    def update(self, state, image):
        state.update(image.image_id, image.truth, image.prediction)

    def values(self, result):
        return {"pixels": float(sum(result.truth_pixels))}

    def class_values(self, result, category, label):
        return {"pixels": float(result.truth_pixels[label])}


def test_a_new_metric_needs_only_its_module_and_a_line_in_the_table(monkeypatch):
    module = ModuleType("made_metric")
    module.TASK_METRICS = (PixelCount(),)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(EXTRA_METRICS, "made", ExtraMetricEntry(module.__name__, ("semantic",)))
    states = EvaluationStates.empty(CATEGORIES, TASKS, ("made",))
    for image_id in (1, 2):
        part = evaluator(extra=("made",)).evaluate_batch(batch_of(image_id))
        states.merge(EvaluationStates.from_bytes(part.to_bytes()))
    results = states.compute(CATEGORIES, SUBJECT)
    rows = json.loads(results.to_json())["per_class"]
    assert results.metrics()["made_pixels"] == sum(row["pixels"] for row in rows) > 0
    assert [row["made_pixels"] for row in rows] == [row["pixels"] for row in rows]
    assert "made_pixels" in results.table()
    with pytest.raises(ConfigError, match=r"'made', which applies to semantic, but the tasks are \['instance'\]"):
        EvaluationConfig(tasks=("instance",), extra_metrics=("made",))


def test_the_table_of_extra_metrics_agrees_with_their_modules():
    for name, entry in EXTRA_METRICS.items():
        assert tuple(metric.task for metric in task_metrics([name])) == entry.tasks
        assert all(metric.empty_state(CATEGORIES).name == metric.state_type.name for metric in task_metrics([name]))
    keys = [metric.key for metric in task_metrics()]
    assert len(set(keys)) == len(keys)
    assert get_args(ExtraMetric) == tuple(EXTRA_METRICS)


def test_cityscapes_metrics_require_cityscapes_classes():
    other = replace(CATEGORIES, categories=CATEGORIES.categories[:-1])
    config = EvaluationConfig(tasks=TASKS, extra_metrics=("cityscapes",))
    with pytest.raises(ConfigError, match="the data set does not have the classes of Cityscapes"):
        Evaluator(Guessing(), other, config, model_task="panoptic", postprocess=POSTPROCESS)


def test_duplicate_and_invalid_set_names_are_refused():
    with pytest.raises(ConfigError, match="two sets are named 'val'; give each a unique `name`"):
        EvaluationConfig(sets=(EvaluationSet(dataset="val"), EvaluationSet(dataset="val", limit=5)))
    EvaluationConfig(sets=(EvaluationSet(dataset="val"), EvaluationSet(dataset="val", name="start", limit=5)))
    with pytest.raises(ConfigError, match="it is a folder name"):
        EvaluationSet(dataset="val", name="../val")
