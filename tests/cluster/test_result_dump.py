"""Tests that `m2f score` computes the metrics of the evaluation from the files of `m2f eval --dump`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import ray
from pycocotools.coco import COCO

from m2f.cluster.cli import main
from m2f.cluster.evaluation.actor import EvaluationActor
from m2f.cluster.evaluation.evaluate import Pool, evaluate_sets
from m2f.cluster.evaluation.pool import EvaluationPool
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import parse_recipe
from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.image_file import decode_id_png, decode_index_png
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.sample import Annotation, DecodedSample
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.metrics.average_precision import InstanceDetections
from m2f.eval.metrics.rle import encode_masks
from m2f.eval.report.dump import ResultDump, image_file_name, join_dump
from tests.cluster.painted_scenes import CATEGORIES, SceneModel, write_painted_scenes

RECIPE = """
name: painted
output: {folder}/runs
datasets:
  val:
    shards: {folder}/shards
    source:
      kind: coco_panoptic
      images: {folder}/truth/images
      panoptic_json: {folder}/truth/panoptic.json
      panoptic_masks: {folder}/truth/panoptic
data:
  train: [{{dataset: val}}]
model:
  backbone: {{name: resnet10t}}
  postprocess: {{object_threshold: 0.5, overlap_threshold: 0.6}}
training: {{max_steps: 10}}
evaluation: {{sets: [{{dataset: val}}], tasks: [panoptic, instance, semantic], shortest_edge: 64, panels: 2}}
"""


class SceneActor(EvaluationActor):
    """Evaluation actor with the model of the painted scenes."""

    def _model(self, *_):
        return SceneModel()


class RepeatingPool:
    """Fake pool that evaluates every batch twice, the first time in reverse order."""

    def __init__(self, config):
        self.actors = [SceneActor(config), SceneActor(config)]

    def run(self, task, batches, on_result):
        order = [*reversed(list(batches)), *batches]
        results = {b: self.actors[i % 2].evaluate(task, b) for i, b in enumerate(order)}
        for batch, result in results.items():
            on_result(batch, result)


def kill_once(marker: Path) -> None:
    """If the marker file exists, delete it and kill this process."""
    with contextlib.suppress(FileNotFoundError):
        marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class KillingStorage(Storage):
    """Storage that kills its process once, after four files, so that the predictions of a call are incomplete."""

    def __init__(self, marker: Path) -> None:
        super().__init__(known_reachable=True)
        self._marker, self._num_files = marker, 0

    def put(self, *args, **kwargs) -> None:
        super().put(*args, **kwargs)
        self._num_files += 1
        if self._num_files == 4:
            kill_once(self._marker)


class KilledActor(SceneActor):
    """Actor that is killed once while it stores predictions, and once before it returns each of calls 1 and 2."""

    def __init__(self, config, markers: Path) -> None:
        super().__init__(config)
        self._storage = KillingStorage(markers / "storing")
        self._markers = markers

    def evaluate(self, task, call: int) -> bytes:
        states = super().evaluate(task, call)
        kill_once(self._markers / f"returning_{call}")
        return states


@contextlib.contextmanager
def pool_of_killed_actors(config: RunConfig, markers: Path) -> Iterator[Pool]:
    """Yield a pool of `KilledActor` on Ray. On exit, assert that every kill has happened."""
    markers.mkdir()
    for name in ("storing", "returning_1", "returning_2"):
        (markers / name).touch()
    ray.init("local", num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(KilledActor)
    pool = EvaluationPool(lambda: actor.remote(config, markers), size=2, hang_s=config.evaluation.hang_s)
    try:
        yield pool
        assert not list(markers.iterdir())
    finally:
        pool.close()
        ray.shutdown()


def make_pool(kind: str, config: RunConfig, folder: Path) -> contextlib.AbstractContextManager[Pool]:
    return pool_of_killed_actors(config, folder) if kind == "killed" else contextlib.nullcontext(RepeatingPool(config))


@pytest.fixture(scope="module", params=["repeating", pytest.param("killed", marks=pytest.mark.cluster)])
def dumped(request, tmp_path_factory):
    """Return the folder with the ground truth and the dump, and the results of the evaluation."""
    folder = tmp_path_factory.mktemp("painted")
    write_painted_scenes(folder / "truth", 19)
    config = parse_recipe(RECIPE.format(folder=folder))
    write_dataset(open_reader(config.datasets["val"].source), config.datasets["val"], Storage())
    weights = folder / "weights.pth"
    weights.write_bytes(b"")  # SceneModel needs no weights, but their checksum is part of the results
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        with make_pool(request.param, config, folder / "markers") as pool:
            (evaluation,) = evaluate_sets(config, pool, str(weights), 7, lambda *_: None, dump=str(folder / "dump"))
    return folder, evaluation.results


def score(folder, kind, *arguments):
    output = folder / f"{kind}.json"
    assert main(["score", kind, *map(str, arguments), "--workers", "1", "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_dump_contains_only_result_files(dumped):
    folder, _ = dumped
    dump = folder / "dump/val"
    assert sorted(path.name for path in dump.iterdir()) == [
        *("categories.json", "instances.json", "labels", "labels.json", "panoptic", "panoptic.json")
    ]
    assert len(list((dump / "panoptic").iterdir())) == len(list((dump / "labels").iterdir())) == 19


def test_panoptic_dump_scores_like_the_evaluation(dumped):
    folder, results = dumped
    dump, truth = folder / "dump/val", folder / "truth"
    truth_files = "--truth", truth / "panoptic.json", "--truth-masks", truth / "panoptic"
    files = "--predictions", dump / "panoptic.json", "--prediction-masks", dump / "panoptic"
    scored = score(folder, "panoptic", *truth_files, *files)
    metrics = results.metrics()
    for split, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st")):
        for name in ("pq", "sq", "rq"):
            assert 100 * scored[split][name] == pytest.approx(metrics[name.upper() + suffix], rel=1e-12)
    assert 5 < metrics["PQ"] < 95
    rows = {str(row["id"]): row for row in results.per_class()}
    counts = {i: tuple(rows[i][n] for n in ("TP", "FP", "FN")) for i in rows}
    assert counts == {i: (q["tp"], q["fp"], q["fn"]) for i, q in scored["per_class"].items()}


def test_instance_dump_scores_like_the_evaluation(dumped):
    folder, results = dumped
    files = "--truth", folder / "truth/instances.json", "--predictions", folder / "dump/val/instances.json"
    scored = score(folder, "instances", *files)
    stats = results.instance.stats
    assert {name: scored[name] for name in stats} == stats
    assert 0.05 < stats["AP"] < 0.95
    assert stats["APs"] > 0


def test_semantic_dump_scores_like_the_evaluation(dumped):
    folder, results = dumped
    files = "--truth", folder / "truth/labels", "--predictions", folder / "dump/val/labels"
    scored = score(folder, "semantic", *files, "--num-classes", 201, "--ignore", 0)
    metrics = results.metrics()
    for name, published in (("mIoU", "mIoU"), ("mIoU_union", "mIoU_occurring"), ("fwIoU", "fwIoU"), ("pACC", "pACC")):
        assert 100 * scored[name] == pytest.approx(metrics[published], rel=1e-14)
    assert 5 < metrics["mIoU"] < 95


def test_dump_in_a_bucket_equals_a_local_dump(tmp_path, bucket):
    remote = f"{bucket}/dump/val"
    storage, table = Storage(), CategoryTable((Category(3, "boat", True, (1, 2, 3)),))
    image = np.zeros((4, 5, 3), np.uint8)
    for url in (remote, str(tmp_path)):
        for call in (1, 0, 1):
            empty = Annotation(seg=None, inst=None, segments=())
            sample = DecodedSample(key=f"k{call}", image_id=call, source="", image=image, annotation=empty)
            mask = encode_masks(np.ones((call, 4, 5), bool))
            dump = ResultDump(table)
            dump.add_instances(sample, InstanceDetections(mask, *np.zeros((2, call), int), np.ones(call)))
            dump.add_labels(sample, np.zeros((4, 5), int))
            dump.store(storage, url, call)
        join_dump(storage, url, 2, table)
    names = ["categories.json", "instances.json", "labels.json", "labels/k0.png", "labels/k1.png"]
    assert storage.list(remote) == tuple(f"{remote}/{name}" for name in names)
    assert all(storage.get(f"{remote}/{n}") == (tmp_path / n).read_bytes() for n in names)
    assert [entry["image_id"] for entry in json.loads((tmp_path / "instances.json").read_text())] == [1]


IMAGE = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "file_name": {"type": "string", "pattern": r"^[^/]+(/[^/]+)*\.(jpg|png)$"},
        "height": {"type": "integer", "minimum": 1},
        "width": {"type": "integer", "minimum": 1},
    },
    "required": ["id", "file_name", "height", "width"],
}
CATEGORY = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "name": {"type": "string"}, "isthing": {"enum": [0, 1]}},
    "required": ["id", "name", "isthing"],
}
SEGMENT = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 2**24 - 1},
        "category_id": {"type": "integer"},
        "area": {"type": "integer", "minimum": 1},
    },
    "required": ["id", "category_id", "area"],
}
PANOPTIC = {
    "type": "object",
    "properties": {
        "image_id": {"type": "integer"},
        "file_name": {"type": "string", "pattern": r"^[^/]+\.png$"},
        "segments_info": {"type": "array", "items": SEGMENT},
    },
    "required": ["image_id", "file_name", "segments_info"],
}
MASK = {
    "type": "object",
    "properties": {
        "size": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
        "counts": {"type": "string", "minLength": 1},
    },
    "required": ["size", "counts"],
    "additionalProperties": False,
}
INSTANCE = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "image_id": {"type": "integer"},
        "category_id": {"type": "integer"},
        "segmentation": MASK,
        "bbox": {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 4, "maxItems": 4},
        "area": {"type": "number", "minimum": 0},
        "iscrowd": {"enum": [0, 1]},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
    },
    "required": ["id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd", "score"],
}


@pytest.mark.parametrize(("name", "annotation"), [("panoptic", PANOPTIC), ("labels", INSTANCE)])
def test_json_files_follow_the_coco_schema(dumped, name, annotation):
    """pycocotools, FiftyOne and supervision read this format. The listed image files must exist, too."""
    folder, _ = dumped
    lists = {"images": IMAGE, "categories": CATEGORY, "annotations": annotation}
    document = json.loads((folder / f"dump/val/{name}.json").read_text())
    arrays = {key: {"type": "array", "items": item, "minItems": 1} for key, item in lists.items()}
    jsonschema.validate(document, {"type": "object", "properties": arrays, "required": list(arrays)})
    images, classes = ({entry["id"] for entry in document[key]} for key in ("images", "categories"))
    assert len(images) == len(document["images"]) == 19
    assert all((folder / "truth/images" / image["file_name"]).is_file() for image in document["images"])
    assert {entry["image_id"] for entry in document["annotations"]} <= images
    described = [s for entry in document["annotations"] for s in entry.get("segments_info", [entry])]
    assert {entry["category_id"] for entry in described} <= classes
    assert name == "panoptic" or len({entry["id"] for entry in document["annotations"]}) == len(described)


def test_pycocotools_reads_the_annotation_file(dumped):
    folder, _ = dumped
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "dump/val/labels.json"))
    results = json.loads((folder / "dump/val/instances.json").read_text())
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) == len(results)
    for annotation, result in zip(annotations, results, strict=True):
        assert annotation["segmentation"] == result["segmentation"]
        mask = coco.annToMask(annotation)
        assert annotation["area"] == mask.sum()
        x, y, width, height = (int(side) for side in annotation["bbox"])
        assert mask[y : y + height, x : x + width].sum() == mask.sum()


@pytest.mark.parametrize(
    ("source", "ending", "name"),
    [
        ("val2017/000000000139.jpg", "jpg", "000000000139.jpg"),
        ("leftImg8bit/aachen/a_000001.png", "png", "aachen/a_000001.png"),
        ("memory", "png", "k.png"),
        ("shards/0.tar: k", "jpg", "k.jpg"),
        ("images/../../secret.jpg", "jpg", "k.jpg"),
        ("/secret.jpg/a.gif", "jpg", "k.jpg"),
    ],
)
def test_image_file_name_is_derived_from_the_source(source, ending, name):
    image, empty = np.zeros((4, 5, 3), np.uint8), Annotation(seg=None, inst=None, segments=())
    sample = DecodedSample(key="k", image_id=1, source=source, image=image, annotation=empty, image_ext=ending)
    assert image_file_name(sample) == name


def test_maps_contain_segment_and_category_ids(dumped):
    folder, _ = dumped
    dump = folder / "dump/val"
    entry = json.loads((dump / "panoptic.json").read_text())["annotations"][0]
    ids = decode_id_png((dump / "panoptic" / entry["file_name"]).read_bytes())
    areas = {segment["id"]: segment["area"] for segment in entry["segments_info"]}
    assert areas == {i: int((ids == i).sum()) for i in np.unique(ids).tolist() if i}
    labels = decode_index_png((dump / "labels" / entry["file_name"]).read_bytes())
    assert set(np.unique(labels)) <= {category["id"] for category in CATEGORIES}
    assert [c["id"] for c in json.loads((dump / "categories.json").read_text())] == [3, 11, 200, 7]
