"""Tests of how `m2f init` and the readers find the images of COCO JSON and CVAT XML files."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from m2f.cluster.cli import main
from m2f.data_pipeline.readers import open_dataset
from m2f.data_pipeline.readers.coco_json import FOUND_BY_FILE_NAME
from tests.cluster.own_data.test_untidy_exports import folder, init_datasets, samples, write_coco
from tests.tool_exports import EXPORTS, write_image

__all__ = ["folder"]  # a fixture


def _files(dataset) -> list[Path]:
    reader, _ = open_dataset(dataset)
    return [reader.files(index)[0] for index in range(len(reader.keys))]


@pytest.mark.parametrize("missing", [{0}, {5}, {0, 1, 2, 3, 4}])
def test_missing_images_do_not_select_the_folder_of_another_split(missing, folder, capsys):
    names = [f"frame_{i}.png" for i in range(6)]
    for split in ("train", "test"):
        for number, name in enumerate(names):
            if split == "test" or number not in missing:
                write_image(folder / "images" / split / name, number)
        write_coco(folder / f"annotations/instances_{split}.json", names, list(range(6)))
    dataset = init_datasets()["train"]
    assert dataset.source.images.endswith("images/train")
    assert f"({6 - len(missing)} read)" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 5])
def test_a_missing_image_does_not_select_a_folder_of_copies(number, folder):
    names = [f"im{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        write_image(folder / "images_blurred" / name, 0)
        if i != number:
            write_image(folder / "images" / name, i)
    write_coco(folder / "annotations/instances_default.json", names, list(range(6)))
    assert init_datasets()["train"].source.images.endswith("set/images")


def test_a_stray_copy_beside_the_annotations_does_not_hide_the_images(folder):
    names = [f"im{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        write_image(folder / "pictures" / name, i)
    write_image(folder / "im0.png", 0)
    write_coco(folder / "all.json", names, list(range(6)))
    assert init_datasets()["train"].source.images.endswith("set/pictures")


def test_images_in_a_folder_of_another_split_are_reported(folder, capsys):
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        for number in numbers:
            write_image(folder / f"train/im{number}.png", number)
        write_coco(folder / f"{split}.json", [f"im{i}.png" for i in numbers], list(numbers))
    init_datasets()
    assert "val.json is used with the images in train, which names another split" in capsys.readouterr().out


LABEL_STUDIO = r"..\..\label-studio\media\upload\4\im{}.png"


@pytest.mark.parametrize("name", [LABEL_STUDIO, r"images\1/im{}.png", "/home/me/im{}.png", r"C:\me\im{}.png"])
def test_images_are_found_by_their_file_names_if_no_stated_path_exists(name, folder, capsys):
    for number in range(6):
        write_image(folder / f"images/im{number}.png", number)
    write_coco(folder / "result.json", [name.format(i) for i in range(6)], list(range(6)))
    datasets = init_datasets()
    assert f"6 {FOUND_BY_FILE_NAME}" in capsys.readouterr().out
    assert len(samples(datasets["train"])) == 5


def _cvat_project(folder: Path, subsets: list[str]) -> None:
    """Write a CVAT project with the same two frames in each subset."""
    EXPORTS["cvat"](folder)
    path = folder / "annotations.xml"
    text = path.read_text()
    for number in range(6):
        subset, frame = subsets[number // 2 % len(subsets)], f"frame_{number % 2 + number // 2 // len(subsets) * 2}"
        (folder / "images" / subset).mkdir(exist_ok=True)
        (folder / f"images/im{number}.png").rename(folder / f"images/{subset}/{frame}.png")
        text = text.replace(f'name="im{number}.png"', f'name="{frame}.png" subset="{subset}"')
    path.write_text(text)


def test_images_of_a_cvat_project_are_in_folders_of_subsets(folder):
    _cvat_project(folder, ["default", "other"])
    datasets = init_datasets()
    found = [path.relative_to(folder / "images") for name in ("train", "val") for path in _files(datasets[name])]
    frames = {"default": 4, "other": 2}
    assert sorted(map(str, found)) == [f"{s}/frame_{i}.png" for s, count in frames.items() for i in range(count)]


def test_cvat_subsets_named_after_splits_are_the_sets(folder, capsys):
    _cvat_project(folder, ["Train", "Validation", "default"])
    datasets = init_datasets()
    assert [(name, dataset.source.subset) for name, dataset in datasets.items()] == [
        ("train", "Train"),
        ("val", "Validation"),
    ]
    for dataset in datasets.values():
        parent = folder / "images" / dataset.source.subset
        assert _files(dataset) == [parent / "frame_0.png", parent / "frame_1.png"]
        assert len(samples(dataset)) == 2
    assert "not used, because other sets are named train: annotations.xml (subset 'default')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("listed", "stored"),
    [
        ("frame_00{}", "images/frame_00{}.PNG"),  # a task with a video
        ("a &amp; b {}.png", "pictures/a & b {}.png"),
        (r"sub\a{}.png", "images/sub/a{}.png"),
        ("a{}.png", "pictures/a{}.png"),
    ],
)
def test_names_in_cvat_files_are_found(listed, stored, folder, capsys):
    EXPORTS["cvat"](folder)
    path = folder / "annotations.xml"
    for number in range(6):
        path.write_text(path.read_text().replace(f"im{number}.png", listed.format(number)))
        target = folder / stored.format(number)
        target.parent.mkdir(exist_ok=True)
        (folder / f"images/im{number}.png").rename(target)
    (folder / stored.format(0)).unlink()
    assert main(["init", "set"]) == 0
    assert "6 images (5 read)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cvat", "cvat_coco"])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_with_accents_may_have_another_unicode_form(kind, forms, folder):
    EXPORTS[kind](folder)
    listed, stored = (unicodedata.normalize(form, "ü{}.png") for form in forms)
    (path,) = (path for path in folder.rglob("*") if path.suffix in (".xml", ".json"))
    for number in range(6):
        path.write_text(path.read_text().replace(f"im{number}.png", listed.format(number)))
        (image,) = folder.rglob(f"im{number}.png")
        image.rename(image.with_name(stored.format(number)))
    assert len(samples(init_datasets()["train"])) == 5


@pytest.mark.parametrize("kind", ["cvat", "cvat_coco"])
def test_exports_side_by_side_use_their_own_images(kind, folder):
    for job in ("job_0", "job_1"):
        (folder / job).mkdir()
        EXPORTS[kind](folder / job)
    used = [path for dataset in init_datasets().values() for path in _files(dataset)]
    assert len(used) == len(set(used)) == 12
    assert set(used) == set(folder.rglob("im*.png"))
