"""Names of images in annotation files: which file in the folder of images they select."""

import hashlib
from pathlib import Path

import pytest

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.readers.coco_json import read_images
from m2f.data_pipeline.readers.files import make_key, stored_name
from m2f.data_pipeline.sources import CvatSource
from tests import tool_exports


def _names(folder, *names):
    images = [{"id": i, "file_name": name, "height": 1, "width": 1} for i, name in enumerate(names)]
    return [image.file_name for image in read_images({"images": images}, "a.json", folder)]


def test_a_stored_name_is_a_file_inside_the_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "a.png", folder / "b.png"):
        path.touch()
    assert stored_name(folder, "../a.png", str(tmp_path / "a.png"), "sub", "x" * 300, "b.png") == "b.png"
    assert stored_name(folder, "./b.png") == "./b.png"
    assert stored_name(folder, "../images/b.png") is None


def test_a_path_out_of_the_folder_is_refused_or_selects_a_file_in_the_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="is not a path inside its folder"):
        _names(folder, "../a.png")
    (folder / "a.png").touch()
    assert _names(folder, "../a.png") == ["a.png"]


def test_stated_paths_are_used_if_one_of_them_exists(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("train/a.png", "b.png"):
        (tmp_path / name).touch()
    assert _names(tmp_path, "train/a.png", "train/b.png") == ["train/a.png", "train/b.png"]
    assert _names(tmp_path, "train/b.png") == ["b.png"]


def test_repeated_file_names_select_no_image(tmp_path):
    (tmp_path / "a.png").touch()
    assert _names(tmp_path, "1/a.png", "2/a.png") == ["1/a.png", "2/a.png"]


@pytest.fixture
def project(tmp_path):
    """CVAT file with five images without a subset and one in the subset `b`, which has no folder."""
    tool_exports.cvat(tmp_path)
    path = tmp_path / "annotations.xml"
    path.write_text(path.read_text().replace('name="im5.png"', 'name="im5.png" subset="b"'))
    return tmp_path


def _source(folder: Path, subset: str | None) -> CvatSource:
    return CvatSource(images=f"{folder}/images", annotations=f"{folder}/annotations.xml", subset=subset)


@pytest.mark.parametrize(("subset", "numbers"), [(None, range(6)), ("", range(5)), ("b", [5])])
def test_a_cvat_source_may_be_one_subset(project, subset, numbers):
    reader = open_reader(_source(project, subset))
    assert list(reader.keys) == [f"im{number}" for number in numbers]
    assert all(reader.read(index).annotation.segments for index in range(len(numbers)))


def test_an_unknown_cvat_subset_is_refused(project):
    with pytest.raises(DataError, match=r"has no subset 'a', only '', 'b'; correct datasets"):
        open_reader(_source(project, "a"))


def test_missing_images_of_two_cvat_subsets_may_have_the_same_name(project):
    (project / "images/b").mkdir()
    path = project / "annotations.xml"
    path.write_text(path.read_text().replace("im5.png", "im0.png"))
    (project / "images/im0.png").unlink()
    reader = open_reader(_source(project, None))
    assert (reader.keys[0], reader.keys[5]) == ("im0", make_key("b/im0.png"))
    with pytest.raises(DataError, match=r"images/b/im0.png does not exist"):
        reader.read(5)


def test_a_cvat_subset_cannot_lead_out_of_the_folder(project):
    path = project / "annotations.xml"
    path.write_text(path.read_text().replace('"b"', '".."'))
    (project / "images/im5.png").rename(project / "im5.png")
    with pytest.raises(DataError, match="is not a path inside its folder"):
        open_reader(_source(project, None))


def test_a_cvat_subset_changes_the_fingerprint_and_none_keeps_it(project):
    source = _source(project, None)
    digest = hashlib.sha256(b"cvat")
    digest.update(hashlib.sha256((project / "annotations.xml").read_bytes()).digest())
    assert source_fingerprint(source) == digest.hexdigest()
    assert len({source_fingerprint(_source(project, subset)) for subset in (None, "", "b")}) == 3
