"""Tests of image names in exports: names with spaces, and annotation files that were moved away from their images."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.sources import LabelmeSource, VocSource
from tests import tool_exports


@pytest.mark.parametrize("ending", ["", "  1", " -1"])
def test_names_in_voc_lists_may_have_spaces(tmp_path, ending):
    """Lists of one class have a number after each name."""
    tool_exports.voc(tmp_path)
    new_name = "im0" if ending else "im 0"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (tmp_path / folder / "im0.png").rename(tmp_path / folder / f"{new_name}.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(f"{new_name}{ending}\nim1{ending}\n")
    source = VocSource(
        images=f"{tmp_path}/JPEGImages",
        class_maps=f"{tmp_path}/SegmentationClass",
        object_maps=f"{tmp_path}/SegmentationObject",
        image_set=f"{tmp_path}/ImageSets/Segmentation/train.txt",
        legend=f"{tmp_path}/labelmap.txt",
    )
    reader = open_reader(source)
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
