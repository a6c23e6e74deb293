"""Tests of the sets that `m2f init` finds in the data.yaml of a YOLO export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from m2f.cluster.own_data.formats import find_formats
from m2f.data_pipeline.readers import open_reader
from m2f.model.errors import ConfigError
from tests.tool_exports import write_image

LINE = "0 0.1 0.1 0.6 0.1 0.6 0.6\n"


def write_yolo(folder: Path, data_yaml: str, images: Mapping[str, int], empty: str = "") -> None:
    """Write a data.yaml, and numbered images with labels in several folders.

    Args:
        folder: folder of the export.
        data_yaml: content of data.yaml without names.
        images: number of images by folder.
        empty: stem of the image without labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.yaml").write_text(f"{data_yaml}\nnames: {{0: cell}}\n")
    number = 0
    for name, count in images.items():
        labels = folder / name.replace("images", "labels", 1)
        labels.mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            write_image(folder / name / f"im{number}.png", number)
            if f"im{number}" != empty:
                (labels / f"im{number}.txt").write_text(LINE)
            number += 1


def found_keys(folder: Path) -> list[tuple[str | None, str]]:
    """Return the split of each set and its keys, joined."""
    (data_format,) = find_formats(folder)
    return [(entry.split, " ".join(open_reader(entry.source).keys)) for entry in data_format.sets]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_each_folder_of_a_list_is_a_set(tmp_path, val):
    write_yolo(
        tmp_path,
        f"path: .\ntrain: [images/train_a, images/train_b]\n{val}: images/val",
        {"images/train_a": 2, "images/train_b": 1, "images/val": 1},
    )
    assert found_keys(tmp_path) == [("train", "im0 im1"), ("train", "im2"), ("val", "im3")]


@pytest.mark.parametrize("prefix", ["./", "data/", "/content/set/"])
def test_lists_may_divide_one_folder(tmp_path, prefix):
    write_yolo(tmp_path, "path: .\ntrain: autosplit_train.txt\nval: autosplit_val.txt", {"images": 5}, empty="im4")
    for split, numbers in (("train", (0, 2, 3)), ("val", (1,))):
        (tmp_path / f"autosplit_{split}.txt").write_text("".join(f"{prefix}images/im{i}.png\n" for i in numbers))
    assert found_keys(tmp_path) == [("train", "im0 im2 im3"), ("val", "im1")]


def test_a_list_may_name_images_of_several_folders(tmp_path):
    write_yolo(tmp_path, "train: train.txt\nval: images/val", {"images/a/x": 2, "images/b": 1, "images/val": 1})
    (tmp_path / "train.txt").write_text("images/a/x/im0.png\nimages/b/im2.png\n")
    assert found_keys(tmp_path) == [("train", "a-x-im0-6e4c879c b-im2-08d017e8"), ("val", "im3")]


@pytest.mark.parametrize("images", ["images/site1/train", "site1/images/x/train"])
def test_the_last_folder_named_images_has_a_partner_with_labels(tmp_path, images):
    write_yolo(tmp_path / "images/set", f"train: {images}", {images: 2})
    (data_format,) = find_formats(tmp_path / "images/set")
    reader = open_reader(data_format.sets[0].source)
    assert [len(reader.read(index).annotation.segments) for index in range(2)] == [1, 1]


def test_labels_may_lie_beside_their_images(tmp_path):
    write_yolo(tmp_path / "images/set", "train: train", {"train": 2})
    reader = open_reader(find_formats(tmp_path / "images/set")[0].sets[0].source)
    assert [len(reader.read(index).annotation.segments) for index in range(2)] == [1, 1]


@pytest.mark.parametrize("value", ["images/trian", "[images/train, images/more]", "gone.txt", "empty.txt", "other.txt"])
def test_a_split_that_does_not_exist_is_refused(tmp_path, value):
    write_yolo(tmp_path, f"path: .\ntrain: {value}\nval: images/val", {"images/train": 2, "images/val": 1})
    (tmp_path / "empty.txt").touch()
    (tmp_path / "other.txt").write_text("images/train/im0.png\nimages/gone/im7.png\n")
    quoted = "images/more" if "more" in value else value
    with pytest.raises(ConfigError, match=rf"data\.yaml: train is '{quoted}', which is neither a folder nor a text"):
        find_formats(tmp_path)


def test_an_export_may_be_one_folder_deeper(tmp_path):
    write_yolo(tmp_path / "my export", "train: images/train", {"images/train": 2})
    (tmp_path / "__MACOSX/my export").mkdir(parents=True)
    assert found_keys(tmp_path) == [("train", "im0 im1")]


def test_exports_side_by_side_are_sets_whose_classes_are_matched_by_name(tmp_path):
    for name, classes in (("a", "cell\ndirt"), ("b", "dirt\ncell")):
        write_image(tmp_path / f"{name}/images/{name}.png", 0)
        (tmp_path / f"{name}/labels").mkdir()
        (tmp_path / f"{name}/labels/{name}.txt").write_text("0 0.1 0.1 0.6 0.1 0.6 0.6\n")
        (tmp_path / f"{name}/classes.txt").write_text(classes)
    (data_format,) = find_formats(tmp_path)
    readers = [open_reader(entry.source) for entry in data_format.sets]
    found = [reader.categories.by_id[reader.read(0).annotation.segments[0].category_id].name for reader in readers]
    assert (found, data_format.evidence[-14:]) == (["cell", "dirt"], ", in 2 folders")


@pytest.mark.parametrize("line", [b"\t- x", "# Gr\u00fcner Fleck".encode("cp1252")])
def test_a_damaged_data_yaml_is_named(tmp_path, line):
    write_yolo(tmp_path, "train: images/train", {"images/train": 2})
    path = tmp_path / "data.yaml"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ConfigError, match=r"data\.yaml is not valid YAML: .* \(UTF-8, spaces instead of tabs\)"):
        find_formats(tmp_path)
    path.write_bytes(b"replicas: 1\n" + line)
    assert find_formats(tmp_path) == []


def test_equal_images_for_training_and_validation_are_refused_with_a_remedy(tmp_path):
    """The data.yaml of coco128-seg names the same folder twice."""
    write_yolo(tmp_path, "train: images/train\nval: images/train", {"images/train": 2})
    with pytest.raises(ConfigError, match=r"data\.yaml: train and val are the same images, .* Remove val from"):
        find_formats(tmp_path)
