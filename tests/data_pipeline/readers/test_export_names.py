"""Tests of file names in exports: spaces, upper-case endings, missing partners, and moved annotation files."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.sources import LabelmeSource, VocSource, YoloSegSource
from tests import tool_exports


def voc_source(folder: Path) -> VocSource:
    return VocSource(
        images=f"{folder}/JPEGImages",
        class_maps=f"{folder}/SegmentationClass",
        object_maps=f"{folder}/SegmentationObject",
        image_set=f"{folder}/ImageSets/Segmentation/train.txt",
        legend=f"{folder}/labelmap.txt",
    )


@pytest.mark.parametrize("ending", ["", "  1", " -1"])
def test_names_in_voc_lists_may_have_spaces(tmp_path, ending):
    """Lists of one class have a number after each name."""
    tool_exports.voc(tmp_path)
    new_name = "im0" if ending else "im 0"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (tmp_path / folder / "im0.png").rename(tmp_path / folder / f"{new_name}.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(f"{new_name}{ending}\nim1{ending}\n")
    reader = open_reader(voc_source(tmp_path))
    assert [reader.files(index)[0].stem for index in range(2)] == [new_name, "im1"]


def move(folder: Path, pattern: str, target: str) -> None:
    (folder / target).mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob(pattern)):
        path.rename(folder / target / path.name)


def labelme_images(folder: Path) -> dict[str, str]:
    """Return the path of each image by the name of its file, relative to the folder."""
    reader = open_reader(LabelmeSource(images=str(folder), annotations=str(folder)))
    files = [reader.files(index)[0] for index in range(len(reader.keys))]
    return {path.name: path.relative_to(folder).as_posix() for path in files}


def test_labelme_finds_images_that_are_no_longer_beside_their_files(tmp_path):
    tool_exports.labelme(tmp_path)
    move(tmp_path, "*.json", "annotations")
    move(tmp_path, "*.png", "images")
    assert labelme_images(tmp_path) == {f"im{i}.png": f"images/im{i}.png" for i in range(6)}


def test_labelme_guesses_no_image_if_several_or_used_ones_have_the_name(tmp_path):
    tool_exports.labelme(tmp_path)
    for number in range(3):
        move(tmp_path, f"im{number}.json", "annotations")
    move(tmp_path, "im0.png", "images")
    tool_exports.write_image(tmp_path / "copies/im0.png", 0)
    move(tmp_path, "im1.png", "images")
    (tmp_path / "im2.json").write_bytes((tmp_path / "annotations/im2.json").read_bytes())
    reader = open_reader(LabelmeSource(images=str(tmp_path), annotations=str(tmp_path)))
    found = {reader.files(index)[0].relative_to(tmp_path).as_posix() for index in range(len(reader.keys))}
    assert found >= {"annotations/im0.png", "images/im1.png", "annotations/im2.png", "im2.png"}


def test_voc_images_without_both_maps_fail_when_they_are_read(tmp_path):
    tool_exports.voc(tmp_path)
    folders = [tmp_path / name for name in ("JPEGImages", "SegmentationClass", "SegmentationObject")]
    for folder in folders[:2]:
        shutil.copy(folder / "im0.png", folder / "im9.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("im0\nim9\n")
    reader = open_reader(voc_source(tmp_path))
    assert reader.read(0).key == "im0"
    with pytest.raises(DataError, match=r"JPEGImages/im9.png: it has no map \(.*SegmentationObject/im9.png\)"):
        reader.read(1)
    (folders[1] / "im0.png").rename(folders[1] / "im0.PNG")
    assert open_reader(voc_source(tmp_path)).read(0).key == "im0"
    (folders[2] / "im0.png").unlink()
    with pytest.raises(DataError, match=r"none of 2 names has an image in .* and maps in"):
        open_reader(voc_source(tmp_path))


def test_annotations_with_upper_case_endings_are_read(tmp_path):
    tool_exports.yolo_seg(tmp_path)
    folders = {name: f"{tmp_path}/{name}/val" for name in ("images", "labels")}
    source = YoloSegSource(data_yaml=f"{tmp_path}/data.yaml", **folders)
    counts = [len(open_reader(source).read(index).annotation.segments) for index in (0, 1)]
    (path, other) = sorted((tmp_path / "labels/val").iterdir())
    path.rename(path.with_suffix(".TXT"))
    assert [len(open_reader(source).read(index).annotation.segments) for index in (0, 1)] == counts
    other.rename(other.with_name("lost.TXT"))
    with pytest.raises(DataError, match=r"lost.TXT: its image lost\.\* is not in"):
        open_reader(source)


def test_moved_labelme_files_belong_to_the_nearest_image_of_their_name(tmp_path):
    for site in ("a", "b"):
        (tmp_path / site / "labels").mkdir(parents=True)
        tool_exports.labelme(tmp_path / site)
        (tmp_path / site / "images").mkdir()
        for path in (tmp_path / site).glob("im*.*"):
            path.rename(path.parent / ("labels" if path.suffix == ".json" else "images") / path.name)
    source = LabelmeSource(images=str(tmp_path), annotations=str(tmp_path))
    reader = open_reader(source)
    for index in range(len(reader.keys)):
        image = reader.files(index)[0].relative_to(tmp_path)
        assert (image.parts[1], reader.read(index).source) == ("images", f"{tmp_path.name}/{image}")
    assert len(set(reader.keys)) == 2 * tool_exports.COUNT
    (tmp_path / "images").mkdir()
    (tmp_path / "b/images/im0.png").rename(tmp_path / "images/im0.png")  # it is equally near to both JSON files
    (tmp_path / "a/images/im0.png").unlink()
    reader = open_reader(source)
    missing = [path for index in range(len(reader.keys)) if not (path := reader.files(index)[0]).is_file()]
    assert {path.relative_to(tmp_path).as_posix() for path in missing} == {"a/labels/im0.png", "b/labels/im0.png"}


def test_labelme_files_that_contain_their_images_are_refused_with_a_remedy(tmp_path):
    tool_exports.labelme(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"imageData": "aGVsbG8="}))
    source = LabelmeSource(images=str(tmp_path), annotations=str(tmp_path))
    images = sorted(tmp_path.glob("*.png"))
    for path in images[1:]:
        path.unlink()
    assert len(open_reader(source).keys) == len(images)
    images[0].unlink()
    with pytest.raises(DataError, match=r"has none of the \d+ images of .* imageData\. Write them to files with the"):
        open_reader(source)
    document = Path("docs/own_data.md").read_text()
    command = re.search(r'python -c "(.*?)"', document, re.DOTALL)
    exec(textwrap.dedent(command[1]).replace("pathlib.Path()", f"pathlib.Path({str(tmp_path)!r})"), {})
    assert images[0].read_bytes() == b"hello"
