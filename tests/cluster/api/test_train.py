"""Tests of the Python API from arrays to scores: `m2f.Dataset`, `m2f.train`, `m2f.load` and `m2f.evaluate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import m2f
from m2f.cluster.api.model import to_overrides
from m2f.cluster.api.train import _write_missing_shards
from m2f.cluster.recipe.load import dump_recipe, load_recipe, recipe_from_tree
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers.custom import CustomReader
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.verify import verify
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import CustomSource
from m2f.data_pipeline.storage.storage import Storage

SIZE = (48, 64)


def scene(number):
    """Return a dark image with two bright rectangles, and its id map.

    In the id map, 0 is unlabelled, 1 is the ground, and 2 and 3 are the boxes.
    """
    random = np.random.default_rng(number)
    image = random.integers(0, 60, (*SIZE, 3), dtype=np.uint8)
    ids = np.ones(SIZE, np.int32)
    ids[:2] = 0
    for segment, left in ((2, 4), (3, 36)):
        top = int(random.integers(4, 20))
        image[top : top + 20, left : left + 22] = (40 * segment, 220, 90)
        ids[top : top + 20, left : left + 22] = segment
    return image, ids


@pytest.fixture(scope="module")
def scenes():
    return [scene(number) for number in range(8)]


def panoptic_set(scenes):
    truth = [m2f.PanopticImage(ids, {1: 0, 2: 1, 3: 1}) for _, ids in scenes]
    return m2f.Dataset([image for image, _ in scenes], truth, ["ground", "box"], is_thing=[False, True])


def tiny_recipe(folder):
    return {
        "name": "tiny",
        "output": str(folder / "runs"),
        "datasets": {
            "train": {"shards": str(folder / "arrays")},
            "val": {
                "shards": str(folder / "val"),
                "source": {"kind": "synthetic", "num_images": 3, "image_id_start": 101},
            },
        },
        "data": {
            "train": [{"dataset": "train"}],
            "augment": {"kind": "lsj", "size": 64, "min_scale": 0.9, "max_scale": 1.1},
            "workers": 0,
        },
        "model": {
            "backbone": {"name": "resnet10t", "norm": "group", "options": {"channels": [8, 16, 16, 32]}},
            "pixel_decoder": {"conv_dim": 16, "mask_dim": 16, "num_layers": 1, "num_heads": 2, "feedforward_dim": 32},
            "transformer_decoder": {
                "num_queries": 8,
                "num_layers": 1,
                "hidden_dim": 16,
                "num_heads": 2,
                "feedforward_dim": 32,
            },
            "loss": {"num_points": 64},
            "postprocess": {"object_threshold": 0.0, "overlap_threshold": 0.0},
        },
        "training": {
            "max_steps": 2,
            "global_batch": 2,
            "micro_batch": 2,
            "checkpoint": {"every_steps": 1, "keep": 5},
            "log_every_steps": 1,
        },
        "evaluation": {"sets": [{"dataset": "train"}], "shortest_edge": 48, "max_size": 64, "panels": 0},
        "cluster": {"num_workers": 1},
    }


# Data sets


def test_panoptic_arrays_are_written_as_shards(scenes, tmp_path):
    data = panoptic_set(scenes)
    assert data.write(tmp_path / "shards") == data.write(tmp_path / "shards") == 8
    assert verify(str(tmp_path / "shards"), Storage(), "full").faults == ()
    manifest = Manifest.load(str(tmp_path / "shards"), Storage())
    assert [(c.id, c.name, c.is_thing) for c in manifest.categories.categories] == [
        (1, "ground", False),
        (2, "box", True),
    ]
    with pytest.raises(m2f.UserError, match="belongs to another shard plan"):
        panoptic_set(scenes[:7]).write(tmp_path / "shards")


def test_label_maps_and_instances_are_written_as_shards(scenes, tmp_path):
    images = [image for image, _ in scenes]
    maps = [np.where(ids == 0, 255, np.minimum(ids, 2) - 1).astype(np.uint8) for _, ids in scenes]
    assert m2f.Dataset(images, maps, ["ground", "box"]).write(tmp_path / "maps") == 8
    masks = [m2f.Instances(np.stack([ids == 2, ids >= 2]), [0, 0]) for _, ids in scenes]  # overlapping masks
    assert m2f.Dataset(images, masks, ["box"]).write(tmp_path / "instances") == 8
    unlabelled = [np.where(ids == 255, -1, ids.astype(np.int64)) for ids in maps]
    assert m2f.Dataset(images, unlabelled, ["ground", "box"], ignore=-1).write(tmp_path / "maps") == 8  # equal shards
    for name in ("maps", "instances"):
        assert verify(str(tmp_path / name), Storage(), "full").faults == ()


def test_class_names_and_things_may_be_given_by_label(scenes):
    names = {1: "box", 0: "ground"}
    table = m2f.Dataset([scenes[0][0]], [np.zeros(SIZE, np.uint8)], names, is_thing={1: True, 0: False})._table
    assert [(category.name, category.is_thing) for category in table.categories] == [("ground", False), ("box", True)]


def test_maps_of_one_class_and_void_are_written_if_void_is_named(scenes, tmp_path):
    maps = [np.zeros(SIZE, np.uint8), np.full(SIZE, 255, np.uint8)]
    images = [image for image, _ in scenes[:2]]
    assert m2f.Dataset(images, maps, ["ground", "box"], ignore=255).write(tmp_path) == 2


def test_masks_may_be_uncompressed_run_lengths(scenes):
    image, ids = scenes[0]
    mask = ids == 2
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    counts = np.diff(changes, prepend=0, append=mask.size).tolist()
    runs = m2f.Instances([{"size": list(SIZE), "counts": counts}], [0])
    written = m2f.Dataset([image], [runs], ["box"])._annotation(0, runs)
    assert (written.inst[0].astype(bool) == mask).all()
    assert written.segments[0].area == mask.sum()


def test_class_255_of_label_maps_is_a_class_if_there_are_256_or_more(scenes):
    label_map = np.full(SIZE, 255, np.uint16)
    label_map[0] = 65535
    names = [str(label) for label in range(256)]
    written = m2f.Dataset([scenes[0][0]], [label_map], names)._annotation(0, label_map)
    assert [segment.category_id for segment in written.segments] == [256]
    assert (written.seg[0] == 0).all()
    unlabelled = m2f.Dataset([scenes[0][0]], [label_map], names[:255])._annotation(0, label_map[1:])
    assert unlabelled.segments == ()


def test_label_maps_of_every_array_type_give_equal_shards(scenes, tmp_path):
    image, ids = scenes[0]
    label_map = np.where(ids == 0, 255, np.minimum(ids, 2) - 1).astype(np.uint8)
    np.save(tmp_path / "map.npy", label_map)
    masked = np.ma.masked_array(np.where(ids == 0, 0, label_map), mask=ids == 0)
    mapped = np.load(tmp_path / "map.npy", mmap_mode="r")
    for truth in (label_map, mapped, masked, torch.from_numpy(label_map), label_map.tolist()):
        # A second write into the folder is refused unless its data is equal.
        assert m2f.Dataset([image], [truth], ["ground", "box"]).write(tmp_path / "shards") == 1


def test_stated_areas_of_segments_are_stored(scenes):
    image, ids = scenes[0]
    truth = m2f.PanopticImage(ids, {1: 0, 2: 1, 3: 1}, areas={2: 7.5})
    segments = m2f.Dataset([image], [truth], ["ground", "box"], is_thing=[False, True])._annotation(0, truth).segments
    assert {segment.source_id: segment.area for segment in segments} == {
        1: (ids == 1).sum(),
        2: 7.5,
        3: (ids == 3).sum(),
    }


@pytest.mark.parametrize("area", [np.nan, np.inf, 1e30, -1.0])
def test_areas_that_are_no_number_of_pixels_are_refused_before_anything_is_written(scenes, tmp_path, area):
    image, ids = scenes[0]
    panoptic = m2f.PanopticImage(ids, {1: 0, 2: 1, 3: 1}, areas={2: area})
    instances = m2f.Instances(np.stack([ids == 2]), [1], areas=[area])
    for truth in (panoptic, instances):
        with pytest.raises(m2f.UserError, match=r"annotation 0.* area"):
            m2f.Dataset([image], [truth], ["ground", "box"], is_thing=[False, True]).write(tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "message"), [("", "the name of the folder is empty"), ("s3://", "bucket is missing")]
)
def test_folders_without_a_name_are_refused_before_anything_is_written(scenes, tmp_path, monkeypatch, folder, message):
    def refuse(*words, **options):
        raise AssertionError("something is written")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Storage, "put", refuse)
    data = panoptic_set(scenes[:1])
    with pytest.raises(m2f.UserError, match=message):
        data.write(folder)
    config = DatasetConfig(shards=folder, source=CustomSource(version=1))
    reader = CustomReader.of(data._table, ("0",), lambda name: (b"", data._annotation(0, data.annotations[0])), 10**6)
    with pytest.raises(m2f.UserError, match=message):
        write_dataset(reader, config, Storage())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": []}, "2 images and 0 annotations"),
        ({"images": np.zeros((2, *SIZE, 3), np.uint8)}, r"for several images give list\(images\)"),
        ({"is_thing": None}, "is_thing is missing"),
        ({"is_thing": [True]}, "2 names and 1 values of is_thing"),
        ({"is_thing": {1: True, 2: False}}, r"is_thing has the labels \[1, 2\]; they must be 0 to 1"),
        ({"is_thing": ["thing", "stuff"]}, r"is_thing is \['thing', 'stuff'\]; give a list"),
        (
            {"annotations": [m2f.PanopticImage(np.full(SIZE, 5), {})] * 2},
            "annotation 0: pixel values 5 have no valid label",
        ),
        ({"annotations": [np.zeros((3, 3, 3), np.uint8)] * 2}, r"it must be integers \[H, W\]"),
        (
            {"annotations": [np.full(SIZE, 7, np.uint8)] * 2, "names": np.array(["ground", "box"])},
            "annotation 0: pixel values 7 are not below 2",
        ),
        (
            {"annotations": [np.zeros(SIZE, np.uint8), np.full(SIZE, 255, np.uint8)]},
            r"the label maps have only the values 0 and 255.*set ignore=255 if 255 is void",
        ),
        ({"channels": "BGR"}, "channels is 'BGR'; it must be 'rgb' or 'bgr'"),
        ({"ignore": "255"}, "ignore is '255'; it must be an integer"),
        ({"ignore": 1.5}, "ignore is 1.5; it must be an integer"),
        ({"annotations": [None, None]}, r"annotation 0 is a object map of shape \[\]"),
        ({"names": "box"}, "the class names are 'box'; give a list"),
        ({"names": None}, "the class names are None; give a list"),
        ({"names": ["ground", ""]}, "the class names contain ''"),
        ({"names": {1: "ground", 2: "box"}}, r"the class names have the labels \[1, 2\]"),
        ({"annotations": [np.full(SIZE, -2, np.int64)] * 2}, "annotation 0 has values from -2 to -2"),
        ({"annotations": [np.zeros(SIZE, np.uint8), np.zeros((9, 9), np.uint8)]}, "image 1: .*9 x 9"),
        ({"annotations": [m2f.Instances(np.zeros((1, *SIZE), bool), [4])] * 2}, "annotation 0 has the label 4"),
        ({"annotations": [m2f.Instances(np.ones((1, *SIZE), np.int64), [0])] * 2}, "annotation 0 has a mask of int64"),
        (
            {"annotations": [m2f.Instances(np.ones((2, *SIZE), bool), [0, 0], areas=[9.0])] * 2},
            "annotation 0: areas has 1 entries for 2 masks",
        ),
        (
            {"annotations": [m2f.Instances(np.ones((1, *SIZE), bool), [0.5])] * 2},
            "annotation 0: labels has 0.5 for mask 0; give whole numbers",
        ),
        (
            {"annotations": [m2f.Instances(np.ones((1, *SIZE), bool), [0], is_crowd=["0"])] * 2},
            r"annotation 0: is_crowd is \['0'\]; give one number per mask",
        ),
        (
            {"annotations": [m2f.Instances([{"size": [-1, -1], "counts": [1]}], [0])] * 2},
            r"annotation 0: mask 0 has the size \[-1, -1\]; give its height and width in pixels",
        ),
        (
            {"annotations": [m2f.PanopticImage(np.ones(SIZE, int), {1: 0}, crowds=[True])] * 2},
            "annotation 0: crowds has True, which is not a segment id",
        ),
        (
            {"annotations": [m2f.Instances([{"size": list(SIZE), "counts": [9, 9]}], [0])] * 2},
            "annotation 0: mask 0: the run lengths of its RLE do not add up",
        ),
        (
            {"annotations": [np.zeros(SIZE, np.uint8), m2f.PanopticImage(np.zeros(SIZE, int), {})]},
            "use only one of PanopticImage",
        ),
    ],
)
def test_invalid_annotations_are_rejected_with_their_position(scenes, tmp_path, change, message):
    data = panoptic_set(scenes[:2])
    values = {name: getattr(data, name) for name in ("images", "annotations", "names", "is_thing")}
    with pytest.raises(m2f.UserError, match=message):
        m2f.Dataset(**values | change).write(tmp_path / "shards")


# Recipes as dictionaries


def test_dictionary_recipe_equals_the_yaml_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe_from_tree(tiny_recipe(tmp_path))))
    settings = {"training.optimizer.lr": 2e-4, "evaluation.tasks": ["semantic"], "seed": 3, "name": "off", "log": None}
    del settings["log"]
    overrides = to_overrides(settings)
    expected = ["training.optimizer.lr=0.0002", "evaluation.tasks=[semantic]", "seed=3", "name='off'"]
    assert [text.strip() for text in overrides] == expected
    changed = recipe_from_tree(tiny_recipe(tmp_path), overrides)
    assert changed == load_recipe(path, overrides)
    assert (changed.name, changed.training.optimizer.lr) == ("off", 2e-4)


def test_nested_settings_change_only_what_they_name(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe["training"]["optimizer"] = {"lr": 3e-4}
    nested = {"training": {"max_steps": 100, "checkpoint": {"keep": 2}}, "evaluation": {}}
    dotted = {"training.max_steps": 100, "training.checkpoint.keep": 2}
    changed = recipe_from_tree(recipe, to_overrides(nested))
    assert changed == recipe_from_tree(recipe, to_overrides(dotted))
    assert (changed.training.optimizer.lr, changed.training.global_batch, changed.training.checkpoint.every_steps) == (
        3e-4,
        2,
        1,
    )


def test_lists_sections_with_kind_and_names_with_a_dot_replace_the_value_of_the_recipe():
    settings = {
        "evaluation": {"sets": [{"dataset": "val"}], "test_time": {"kind": "whole"}},
        "cluster.resources_per_worker": {"node:10.0.0.1": 0.5},
    }
    assert [text.strip() for text in to_overrides(settings)] == [
        "evaluation.sets=[{dataset: val}]",
        "evaluation.test_time={kind: whole}",
        "cluster.resources_per_worker={'node:10.0.0.1': 0.5}",
    ]


def test_settings_may_be_numbers_of_numpy_and_paths(tmp_path):
    settings = {"seed": np.int64(3), "training.optimizer.lr": np.float32(0.5), "output": tmp_path / "elsewhere"}
    changed = recipe_from_tree(tiny_recipe(tmp_path) | {"name": np.str_("tiny")}, to_overrides(settings))
    assert (changed.seed, changed.training.optimizer.lr, changed.name) == (3, 0.5, "tiny")
    assert changed.output == str(tmp_path / "elsewhere")
    with pytest.raises(m2f.UserError, match=r"`training.max_steps.1` has the type object; only"):
        to_overrides({"training": {"max_steps": [1, object()]}})


def test_all_problems_of_a_dictionary_recipe_are_reported():
    with pytest.raises(m2f.UserError, match=r"(?s)the recipe: \d problems.*training.max_stepz.*did you mean"):
        m2f.train({"name": "x", "output": "y", "training": {"max_stepz": 3}})
    with pytest.raises(m2f.UserError, match="can be set"):
        m2f.train({"name": object()})


def test_unknown_launcher_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(m2f.UserError, match="launcher is 'slurm'; it must be 'ray' or 'local'"):
        m2f.train(tiny_recipe(tmp_path), launcher="slurm")
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_are_written_once(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe["data"]["train"] = [{"dataset": "val"}]
    recipe["evaluation"]["sets"] = [{"dataset": "val"}]
    config = recipe_from_tree(recipe)
    _write_missing_shards(config, Storage())
    folder = Path(config.datasets["val"].shards)
    assert verify(str(folder), Storage(), "full").faults == ()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    _write_missing_shards(config, Storage())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written


# Runs


@pytest.mark.slow
def test_run_from_arrays_has_metrics_checkpoints_and_a_model(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    panoptic_set(scenes).write(tmp_path / "arrays")
    recipe = tiny_recipe(tmp_path)
    recipe["evaluation"]["sets"].append({"dataset": "train", "name": "few", "limit": 2})
    run = m2f.train(recipe, launcher="local")
    assert run.status == "finished"
    assert list(run.checkpoints) == [1, 2]
    assert max(run.evaluations) == 2
    assert [step for step, _ in run.curves["loss/total"]] == [1, 2]
    assert {"train/PQ", "few/PQ"} <= run.metrics.keys()

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    found = m2f.evaluate(run.folder)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert list(found) == ["train", "few"]
    assert found["train"].metrics()["PQ"] == run.metrics["train/PQ"]
    few = m2f.evaluate(run.folder, checkpoint=1, settings={"evaluation.sets": [{"dataset": "train", "limit": 1}]})
    assert few["train"].num_images == 1

    model = run.load()
    assert (model.task, model.names, model.is_thing) == ("panoptic", ("ground", "box"), (False, True))
    results = model.predict([image for image, _ in scenes])
    again = m2f.load(run.checkpoints[2]).predict(Image.fromarray(scenes[0][0]))
    assert (results[0].panoptic == again.panoptic).all()
    truth = [m2f.PanopticImage(ids, {1: 0, 2: 1, 3: 1}) for _, ids in scenes]
    predicted = [
        m2f.PanopticImage(one.panoptic, {i: int(label) for i, label in enumerate(one.labels, start=1)})
        for one in results
    ]
    scores = m2f.evaluate_panoptic(truth, predicted, class_names=model.names, is_thing=model.is_thing)
    assert scores.metrics()["PQ"] == pytest.approx(run.metrics["train/PQ"], abs=1e-9)
