"""Tests that names with path traversal or control characters are rejected."""

import zipfile

import numpy as np
import pytest

from m2f.cluster.predict.benchmark_zip import write_submission
from m2f.cluster.predict.inputs import ImageInput, number_images
from m2f.cluster.recipe.load import parse_recipe
from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.sample import Annotation, DecodedSample
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.errors import EvaluationError
from m2f.eval.report.dump import ResultDump
from m2f.eval.score.files import mask_file
from m2f.model.errors import ConfigError
from m2f.model.structures import PanopticResult

UNSAFE_NAMES = ("../../x", "/x", "a/../../x", "..", "a\x1b[2Jx", "a\\..\\x")


def make_sample(key):
    empty = Annotation(seg=None, inst=None, segments=())
    return DecodedSample(
        key=key, image_id=1, source="foreign.tar", image=np.zeros((4, 5, 3), np.uint8), annotation=empty
    )


@pytest.mark.parametrize("key", UNSAFE_NAMES)
def test_result_dump_rejects_unsafe_keys(tmp_path, key):
    import torch

    dump = ResultDump(CategoryTable((Category(3, "boat", True, (1, 2, 3)),)))
    dump.add_labels(make_sample("folder/inside"), np.zeros((4, 5), int))
    with pytest.raises(DataError, match=r"^foreign.tar: the name .* rename it"):
        dump.add_labels(make_sample(key), np.zeros((4, 5), int))
    with pytest.raises(DataError, match=r"^foreign.tar: the name .* rename it"):
        dump.add_panoptic(make_sample(key), PanopticResult(torch.zeros(4, 5, dtype=torch.int32), ()))
    dump.store(Storage(), str(tmp_path / "a" / "b"), 0)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(map(str, files)) == ["a/b/labels/folder/inside.png", "a/b/parts/images.000000"]


@pytest.mark.parametrize("url", ["s3://bucket/a\\x.png", "images/a\x1b[2Jx.png", "images/a\udcffx.png"])
def test_predictions_reject_unsafe_image_names(url):
    assert [image.name for image in number_images(["../a/b.png", "s3://c/b.png"])] == ["b", "b-2"]
    with pytest.raises(DataError, match=r"the name .* contains the character"):
        number_images([url])


def test_submission_rejects_unsafe_file_names(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.png").write_bytes(b"png")
    images = [ImageInput("a.jpg", "a", 1)]
    with zipfile.ZipFile(write_submission(tmp_path, "ade20k", "semantic", images, None, "m2f")) as archive:
        assert archive.namelist() == ["a.png"]
    (tmp_path / "labels/a\\..\\b.png").write_bytes(b"png")
    images.append(ImageInput("b.jpg", "a\\..\\b", 2))
    with pytest.raises(DataError, match="contains the character"):
        write_submission(tmp_path, "ade20k", "semantic", images, None, "m2f")


@pytest.mark.parametrize("name", [*UNSAFE_NAMES, 3, None])
def test_scoring_rejects_mask_paths_outside_the_folder(tmp_path, name):
    assert mask_file(tmp_path, {"file_name": "a/b.png"}, "here") == tmp_path / "a/b.png"
    with pytest.raises(EvaluationError, match=r"^here: file_name .* it must name a file in "):
        mask_file(tmp_path, {"file_name": name}, "here")


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a\\x"])
def test_recipe_rejects_data_set_names_that_leave_the_folder(name):
    recipe = """
name: a
datasets: {NAME: {shards: s}}
data: {train: [{dataset: NAME}]}
training: {max_steps: 1}
"""
    assert parse_recipe(recipe.replace("NAME", "city/val")).datasets
    with pytest.raises(ConfigError, match=r"datasets: the name .* choose another, because it is a folder name"):
        parse_recipe(recipe.replace("NAME", f"'{name}'"))
