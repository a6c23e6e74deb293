"""Hostile annotation files are refused with one clear error."""

import json

import pytest

from m2f.data_pipeline.categories import MAX_CATEGORIES, Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.readers.files import read_json
from m2f.data_pipeline.sources import CocoInstancesSource, LabelMapSource
from m2f.eval.errors import EvaluationError
from m2f.eval.score.files import read_categories
from m2f.eval.score.files import read_json as read_scored_json

MANY = 10**5


def test_too_many_categories_are_refused(tmp_path):
    entries = [{"label": i, "id": i, "name": "", "isthing": 1} for i in range(MANY)]
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.json").write_text(json.dumps(entries))
    paths = {name: str(tmp_path / name) for name in ("images", "labels")}
    with pytest.raises(DataError, match=rf"100000 categories exceed the limit of {MAX_CATEGORIES}"):
        open_reader(LabelMapSource(**paths, categories=str(tmp_path / "classes.json"), void=()))
    with pytest.raises(EvaluationError, match=r"lists 100000 categories, more than"):
        read_categories({"categories": entries}, tmp_path / "classes.json")
    assert CategoryTable(tuple(Category(i, "", True, (0, 0, 0)) for i in range(MAX_CATEGORIES)))


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, '{"images": [' + "9" * 10_000 + "]}"])
def test_json_that_cannot_be_parsed_is_refused(tmp_path, content):
    path = tmp_path / "huge.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"huge.json is not valid JSON"):
        read_json(str(path))
    with pytest.raises(EvaluationError, match=r"huge.json is not valid JSON"):
        read_scored_json(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret.jpg", "a/../../b.jpg"])
def test_file_names_outside_the_folder_are_refused(tmp_path, name):
    document = {
        "images": [{"id": 1, "file_name": name, "height": 4, "width": 4}],
        "annotations": [],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="is not a path inside its folder"):
        open_reader(CocoInstancesSource(images=str(tmp_path), instances_json=str(tmp_path / "a.json")))
