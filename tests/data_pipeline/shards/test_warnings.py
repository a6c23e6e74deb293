"""Warnings about data that does not suit the model: a single class, more objects than queries."""

import json

import numpy as np
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.shards.warnings import objects_per_image, one_class_warning, query_warning


def _table(count):
    return CategoryTable(tuple(Category(i, f"c{i}", True, (0, 0, 0)) for i in range(count)))


def test_one_class_is_worth_a_word_in_semantic_training_only():
    assert "'c0' is the only class" in one_class_warning("train", _table(1), "semantic")
    assert one_class_warning("train", _table(1), "instance") is None
    assert one_class_warning("train", _table(2), "semantic") is None


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_objects_beyond_the_queries_are_counted(make_manifest, task):
    manifest = make_manifest(200)
    things = {c.id for c in manifest.categories.for_task(task)}
    expected = np.array([sum(int(i) in things for i in manifest.category_ids[row]) for row in range(200)])
    assert objects_per_image(manifest, task).tolist() == expected.tolist()
    assert query_warning("train", manifest, task, int(expected.max())) is None
    over = expected[expected > 1]
    text = query_warning("train", manifest, task, 1)
    assert text.startswith(f"train: {len(over)} of 200 images have more objects than the model has queries (1)")
    assert f"at least {(over - 1).sum()} of {expected.sum()} objects" in text


@pytest.mark.parametrize("void", [(255,), (0, 255)])
def test_a_class_whose_label_is_void_is_refused(tmp_path, void):
    path = tmp_path / "classes.json"
    entries = [{"label": 1, "name": "road", "isthing": 0}, {"label": 255, "name": "sky", "isthing": 0}]
    path.write_text(json.dumps(entries))
    with pytest.raises(DataError, match="entry 1: 255 is the label of 'sky' and in the list of void labels"):
        read_category_file(str(path), void)
    assert [c.name for c in read_category_file(str(path), ())[0].categories] == ["road", "sky"]
    path.write_text(json.dumps([entries[0], entries[1] | {"ignore": True}]))
    assert read_category_file(str(path), void)[1] == frozenset(void)
