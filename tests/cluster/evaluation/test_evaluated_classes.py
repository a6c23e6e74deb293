"""Tests that evaluation matches the classes of a data set to the model's by name, and rejects contradictions.

The model is that of the painted scenes. The metadata of its weights defines its classes.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from m2f.cluster.evaluation import actor as eval_actor
from m2f.cluster.evaluation.actor import EvaluationActor
from m2f.cluster.evaluation.evaluate import check_sets, evaluate_sets
from m2f.cluster.recipe.identity import identity_of
from m2f.cluster.recipe.load import parse_recipe
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import decode_id_png
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import CocoPanopticSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.report.coco_files import panoptic_png
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.identity import METADATA_KEY
from tests.cluster.painted_scenes import CATEGORIES, SceneModel, write_painted_scenes

RECIPE = """
name: painted
output: {folder}/runs
datasets: {{train: {{shards: {folder}/train}}}}
data: {{train: [{{dataset: train}}]}}
model:
  backbone: {{name: resnet10t}}
  postprocess: {{object_threshold: 0.5, overlap_threshold: 0.6}}
training: {{max_steps: 10}}
evaluation: {{tasks: [panoptic, instance, semantic], shortest_edge: 64, panels: 0}}
"""
CLASSES = tuple(Category(c["id"], c["name"], bool(c["isthing"]), tuple(c["color"])) for c in CATEGORIES)
REVERSED = [dict(c) for c in reversed(CATEGORIES)]
RENUMBERED = [c | {"id": i} for i, c in enumerate(CATEGORIES, start=1)]
RECOLOURED = [c | {"color": [1, 2, 3]} for c in CATEGORIES]
WITHOUT_BUOYS = [c for c in CATEGORIES if c["name"] != "buoy"]


class InProcessPool:
    """Fake pool that calls one actor directly."""

    def __init__(self, config):
        self.actor = EvaluationActor(config)

    def run(self, task, batches, on_result):
        for batch in batches:
            on_result(batch, self.actor.evaluate(task, batch))


class SceneSets:
    """Shards of the painted scenes with several category tables, and weights that state the model's classes."""

    def __init__(self, folder):
        self.folder = folder
        write_painted_scenes(folder / "truth", 9)
        self.document = json.loads((folder / "truth/panoptic.json").read_text())
        self.config = parse_recipe(RECIPE.format(folder=folder))
        self.weights = str(folder / "weights.safetensors")
        self.write_weights(CLASSES)
        self.add("train", CATEGORIES)

    def write_weights(self, classes):
        text = identity_of(self.config, classes).to_json()
        save_file({"a": torch.zeros(1)}, self.weights, metadata={METADATA_KEY: text})

    def add(self, name, categories):
        """Write shards of the same scenes with these categories, which may have another order, ids or colours."""
        names = {c["id"]: c["name"] for c in CATEGORIES}
        ids = {c["name"]: c["id"] for c in categories}
        document = {**self.document, "categories": list(categories), "annotations": []}
        for annotation in self.document["annotations"]:
            segments = [s | {"category_id": ids[names[s["category_id"]]]} for s in annotation["segments_info"]]
            document["annotations"].append(annotation | {"segments_info": segments})
        return self.write(name, document)

    def write(self, name, document):
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(document))
        source = CocoPanopticSource(
            images=str(self.folder / "truth/images"),
            panoptic_json=str(path),
            panoptic_masks=str(self.folder / "truth/panoptic"),
        )
        dataset = DatasetConfig(shards=str(self.folder / name), source=source)
        write_dataset(open_reader(source), dataset, Storage())
        self.config = replace(self.config, datasets={**self.config.datasets, name: dataset})
        return name

    def evaluate(self, name, weights=None):
        config = parse_recipe(
            RECIPE.format(folder=self.folder),
            [f"evaluation.sets=[{{dataset: {name}}}]"]
            + [f"datasets.{n}.shards={d.shards}" for n, d in self.config.datasets.items()],
        )
        (found,) = evaluate_sets(config, InProcessPool(config), weights or self.weights, 7, lambda *_: None)
        return found.results

    def check(self, name):
        overrides = [f"evaluation.sets=[{{dataset: {name}}}]", f"datasets.{name}.shards={self.folder / name}"]
        check_sets(parse_recipe(RECIPE.format(folder=self.folder), overrides))


@pytest.fixture(scope="module")
def scene_sets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPUs of this machine
        patch.setattr(eval_actor, "model_with_weights", lambda *_, **__: SceneModel())
        yield SceneSets(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def expected(scene_sets):
    return scene_sets.evaluate("train")


def by_name(results):
    return {row["name"]: {k: v for k, v in row.items() if k != "id"} for row in results.per_class()}


@pytest.mark.parametrize(
    ("name", "categories"), [("turned", REVERSED), ("renumbered", RENUMBERED), ("recoloured", RECOLOURED)]
)
def test_reordered_renumbered_and_recoloured_classes_give_the_same_metrics(scene_sets, expected, name, categories):
    found = scene_sets.evaluate(scene_sets.add(name, categories))
    assert 5 < expected.metrics()["PQ"] < 95
    assert found.metrics() == pytest.approx(expected.metrics(), abs=1e-9)
    assert by_name(found) == {n: pytest.approx(row, abs=1e-9) for n, row in by_name(expected).items()}
    assert found.subject.classes is None
    scene_sets.check(name)


def test_model_with_additional_class_is_evaluated_on_common_classes(scene_sets, expected):
    """The set lacks buoys. The AP of boats does not change, and no class loses matches or gains false positives."""
    whole = by_name(expected)
    name = scene_sets.write("less", without_buoys(scene_sets))
    results = scene_sets.evaluate(name)
    found = by_name(results)
    assert set(found) == {"sea", "boat", "sky"}
    assert found["boat"]["AP"] == pytest.approx(whole["boat"]["AP"], abs=1e-9)
    for each in found:
        assert found[each]["TP"] >= whole[each]["TP"]  # unlabelled buoy pixels count in no union
        assert found[each]["FP"] <= whole[each]["FP"]
    assert results.subject.classes == "3 classes in both; less lacks buoy"
    assert "SOME CLASSES: 3 classes in both; less lacks buoy" in results.table()
    assert json.loads(results.to_json())["classes"] == results.subject.classes
    scene_sets.check("less")


def test_model_without_a_class_of_the_set_is_evaluated_on_the_others(scene_sets, expected, monkeypatch):
    """The model has logits only for sea, boat and sky, so the buoys of the set are unlabelled."""

    class WithoutBuoys(SceneModel):
        def forward(self, images):
            predictions = super().forward(images)
            return predictions._replace(class_logits=predictions.class_logits[..., [0, 1, 2, 4]])

    monkeypatch.setattr(eval_actor, "model_with_weights", lambda *_, **__: WithoutBuoys())
    scene_sets.write_weights(CLASSES[:3])
    try:
        results = scene_sets.evaluate("train")
    finally:
        scene_sets.write_weights(CLASSES)
    assert set(by_name(results)) == {"sea", "boat", "sky"}
    assert results.subject.classes == "3 classes in both; the model lacks buoy"
    assert by_name(results)["boat"]["TP"] == by_name(expected)["boat"]["TP"]


@pytest.mark.parametrize(
    ("name", "changed", "rows"),
    [
        ("stuff", {"isthing": 0}, r"the model: id 7 'buoy' \(thing\); stuff: id 7 'buoy' \(stuff\)"),
        ("named", {"name": "float"}, r"the model: id 7 'buoy' \(thing\); named: id 7 'float' \(thing\)"),
    ],
)
def test_contradicting_classes_are_rejected_with_both_definitions(scene_sets, name, changed, rows):
    document = {**scene_sets.document, "categories": [*CATEGORIES[:3], CATEGORIES[3] | changed]}
    scene_sets.write(name, document)
    with pytest.raises(DataError, match=rows):
        scene_sets.evaluate(name)
    with pytest.raises(DataError, match=rows):
        scene_sets.check(name)


def test_weights_without_identity_use_the_classes_of_the_training_data(scene_sets, expected):
    old = str(scene_sets.folder / "old.safetensors")
    save_file({"a": torch.zeros(1)}, old)
    scene_sets.add("turned_again", REVERSED)
    assert scene_sets.evaluate("turned_again", old).metrics() == pytest.approx(expected.metrics(), abs=1e-9)


def test_weights_of_another_task_or_model_are_rejected(scene_sets):
    other = parse_recipe(RECIPE.format(folder=scene_sets.folder), ["data.task=semantic", "evaluation.tasks=[semantic]"])
    path = str(scene_sets.folder / "other.safetensors")
    save_file({"a": torch.zeros(1)}, path, metadata={METADATA_KEY: identity_of(other, CLASSES).to_json()})
    with pytest.raises(ConfigError, match=r"for the task semantic, but data\.task is panoptic"):
        scene_sets.evaluate("train", path)
    other = parse_recipe(RECIPE.format(folder=scene_sets.folder), ["model.transformer_decoder.attention=cross"])
    save_file({"a": torch.zeros(1)}, path, metadata={METADATA_KEY: identity_of(other, CLASSES).to_json()})
    with pytest.raises(ConfigError, match=r"model\.transformer_decoder\.attention: cross -> masked"):
        scene_sets.evaluate("train", path)


def without_buoys(scene_sets):
    """Return the JSON document without buoys, and write id maps in which their pixels are void."""
    masks = scene_sets.folder / "truth/panoptic"
    (masks / "void").mkdir()
    annotations = []
    for annotation in scene_sets.document["annotations"]:
        buoys = [s["id"] for s in annotation["segments_info"] if s["category_id"] == 7]
        ids = decode_id_png((masks / annotation["file_name"]).read_bytes())
        (masks / "void" / annotation["file_name"]).write_bytes(panoptic_png(np.where(np.isin(ids, buoys), 0, ids)))
        kept = [s for s in annotation["segments_info"] if s["id"] not in buoys]
        annotations.append(annotation | {"segments_info": kept, "file_name": f"void/{annotation['file_name']}"})
    return {**scene_sets.document, "annotations": annotations, "categories": WITHOUT_BUOYS}
