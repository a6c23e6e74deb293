"""Data sets with two class tables: classes are matched by name, or refused."""

from __future__ import annotations

import json

import pytest

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.loading.loader import mixture_labels
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import CocoPanopticSource
from m2f.data_pipeline.storage.storage import Storage
from tests.data_pipeline.coco_set import CocoSet


@pytest.fixture
def coco(tmp_path):
    return CocoSet(tmp_path)


def source_with_instances(coco, categories):
    """Return a source whose panoptic table is 3 cat, 90 sky; `categories` is the table of the instances."""
    coco.write()
    document = {"images": coco.images, "annotations": coco.instances, "categories": categories}
    (coco.root / "instances.json").write_text(json.dumps(document))
    panoptic = coco.panoptic_source
    return CocoPanopticSource(
        images=panoptic.images,
        panoptic_json=panoptic.panoptic_json,
        panoptic_masks=panoptic.panoptic_masks,
        instances_json=str(coco.root / "instances.json"),
    )


@pytest.mark.parametrize("category_id", [1, 90])  # 90 is sky in the panoptic file
def test_instances_are_matched_by_name(coco, category_id):
    for entry in coco.instances:
        entry["category_id"] = category_id
    annotation = open_reader(source_with_instances(coco, [{"id": category_id, "name": "cat"}])).read(0).annotation
    categories = {(s.category_id, s.is_thing) for s in annotation.segments if s.map == "inst"}
    assert categories == {(3, True)}


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 3, "name": "kitten"}], "contradict|no category of that name"),
        ([{"id": 3, "name": "sky"}], r"'sky' \(thing\).*'sky' \(stuff\)"),
        ([{"id": 4, "name": "cat"}], r"3 annotations cannot be used.*\n.*annotation 1: category_id is 3, which"),
        ([{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}], "more than once: 3: cat, dog"),
    ],
    ids=["another name", "a thing that is stuff", "no such id", "one id for two names"],
)
def test_instances_of_other_classes_are_refused(coco, categories, message):
    with pytest.raises(DataError, match=message):
        open_reader(source_with_instances(coco, categories))


def test_used_class_missing_in_the_panoptic_file_is_refused(coco):
    coco.instances[1]["category_id"] = 4
    categories = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    with pytest.raises(DataError, match=r"has instances of dog, but .*panoptic\.json has no category of that name"):
        open_reader(source_with_instances(coco, categories))


def test_an_instance_file_without_categories_is_refused(coco):
    source = source_with_instances(coco, [])
    path = coco.root / "instances.json"
    document = json.loads(path.read_text())
    del document["categories"]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"instances\.json has no list categories"):
        open_reader(source)


def test_data_sets_of_a_mixture_are_matched_by_name(tmp_path):
    manifests = []
    for name, categories in (("a", [(3, "cat"), (5, "dog")]), ("b", [(3, "dog"), (7, "cat")])):
        folder = tmp_path / name
        folder.mkdir()
        coco = CocoSet(folder)
        coco.categories = [{"id": i, "name": n} for i, n in categories]
        coco.write()
        dataset = DatasetConfig(shards=str(folder / "shards"), source=coco.instances_source)
        write_dataset(open_reader(dataset.source), dataset, Storage())
        manifests.append(Manifest.load(dataset.shards, Storage()))
    assert mixture_labels(manifests, "instance") == [{3: 0, 5: 1}, {3: 1, 7: 0}]
