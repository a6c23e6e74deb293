"""Tests of `m2f init` with untidy exports: repeated file names, tool-specific conventions, and unusual folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2f.cluster.cli import main
from m2f.cluster.own_data.formats import find_formats
from m2f.cluster.recipe.load import load_recipe
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_dataset, source_fingerprint
from m2f.data_pipeline.sources import CocoInstancesSource
from m2f.model.errors import ConfigError
from tests.tool_exports import CLASSES, EXPORTS, SIZE, class_map, rings, write_image

CATEGORIES = [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(CLASSES)]
RUNS = [0, 10 * SIZE, SIZE * (SIZE - 10)]
"""Column-major run lengths of a mask that covers the first ten columns."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = tmp_path / "set"
    export.mkdir()
    return export


def init_datasets(*arguments: str) -> Any:  # Any, because the tests read fields of different source kinds
    assert main(["init", "set", *arguments]) == 0
    return load_recipe("set.yaml").datasets


def samples(dataset):
    reader, _ = open_dataset(dataset)
    return [reader.read(index) for index in range(len(reader.keys))]


def write_coco(path: Path, names: list[str], numbers: list[int], masks: bool = False, **fields: object) -> None:
    images = [{"id": i, "file_name": name, "height": SIZE, "width": SIZE} for i, name in enumerate(names)]
    entries = [
        {"image_id": i, "category_id": k + 1, "iscrowd": 0, "segmentation": [ring], **fields}
        for i, number in enumerate(numbers)
        for k, ring in enumerate(rings(number))
    ]
    if masks:
        for entry in entries[1::2]:
            entry |= {"iscrowd": 1, "segmentation": {"counts": RUNS, "size": [SIZE, SIZE]}}
    entries = [{"id": i, **entry} for i, entry in enumerate(entries)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": CATEGORIES}))


def cvat_project(folder: Path) -> None:
    """Write a CVAT project with two subsets whose frames have the same names."""
    for subset, numbers in (("Train", [0, 1, 2]), ("Validation", [3, 4])):
        names = [f"frame_{i:06d}.png" for i in range(len(numbers))]
        for name, number in zip(names, numbers, strict=True):
            write_image(folder / "images" / subset / name, number)
        path = folder / f"annotations/instances_{subset}.json"
        write_coco(path, names, numbers, masks=True, attributes={"occluded": False})


def test_cvat_subsets_use_their_own_images(folder):
    cvat_project(folder)
    datasets = init_datasets()
    assert {name: Path(d.source.images).name for name, d in datasets.items()} == {"train": "Train", "val": "Validation"}


def test_painted_cvat_masks_are_objects(folder, capsys):
    cvat_project(folder)
    segments = [s for sample in samples(init_datasets()["train"]) for s in sample.annotation.segments]
    assert len(segments) == 6
    assert not any(segment.is_crowd for segment in segments)
    assert "masks with `iscrowd: 1` are treated as objects" in capsys.readouterr().out


def test_other_crowds_are_counted(folder, capsys):
    write_image(folder / "images/im0.png", 0)
    write_image(folder / "images/im1.png", 1)
    write_coco(folder / "all.json", ["im0.png", "im1.png"], [0, 1], masks=True)
    init_datasets()
    assert (
        "2 segments of these are crowds, which are ignored in training; if they are objects" in capsys.readouterr().out
    )


def test_crowds_as_objects_change_the_fingerprint(folder):
    write_coco(folder / "all.json", ["im0.png"], [0])
    source = {"images": "set", "instances_json": "set/all.json"}
    plain, changed = (CocoInstancesSource(**source, crowds_are_objects=value) for value in (False, True))
    assert source_fingerprint(plain) != source_fingerprint(changed)


def test_label_studio_paths_from_windows_are_resolved(folder):
    for number in range(4):
        write_image(folder / f"images/im{number}.png", number)
    write_coco(folder / "result.json", [f"images\\im{i}.png" for i in range(4)], list(range(4)))
    assert len(samples(init_datasets()["train"])) == 3


def write_yolo(folder: Path, splits: dict[str, range]) -> None:
    for split, numbers in splits.items():
        for number in numbers:
            write_image(folder / "images" / split / f"im{number}.png", number)
            label = folder / "labels" / split / f"im{number}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(
                "\n".join(f"{k} {' '.join(str(v / SIZE) for v in r)}" for k, r in enumerate(rings(number)))
            )


@pytest.mark.parametrize("complete", [True, False])
def test_yolo_image_lists_define_the_split(complete, folder):
    """A list defines the images of a set only if it names all images of a folder. Some tools list only some of them."""
    write_yolo(folder, {"train": range(4), "val": range(4, 6)})
    for split, numbers in (("train", range(4 if complete else 3)), ("val", range(4, 6))):
        (folder / f"{split}.txt").write_text("".join(f"data/images/{split}/im{i}.png\n" for i in numbers))
    (folder / "data.yaml").write_text("path: .\ntrain: train.txt\nval: val.txt\nnames: {0: cell, 1: dirt}\n")
    datasets = init_datasets()
    assert datasets["val"].source.images == f"{folder}/images/val"
    if complete:
        assert datasets["train"].source.images == f"{folder}/images/train"
        assert datasets["train"].part is None


def test_label_studio_yolo_export_reads_class_names_from_a_list(folder):
    write_yolo(folder, {".": range(4)})
    (folder / "classes.txt").write_text("cell\ndirt\n")
    (folder / "notes.json").write_text('{"categories": [{"id": 0, "name": "cell"}], "info": {}}')
    reader, _ = open_dataset(init_datasets()["train"])
    assert [c.name for c in reader.categories.categories] == ["cell", "dirt"]


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_a_yolo_export_with_only_boxes_is_refused(task, folder, capsys):
    write_yolo(folder, {"train": range(4), "val": range(4, 6)})
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: cell, 1: dirt}\n")
    for path in folder.rglob("im*.txt"):
        path.write_text("0 0.5 0.5 0.2 0.2\n")
    assert main(["init", "set", "--task", task]) == 2
    printed = capsys.readouterr()
    assert "6 images read, but none has a segment that can be used" in printed.err
    assert "line 1 is a box" in printed.out
    assert not Path("set.yaml").exists()


@pytest.mark.parametrize("named", [True, False])
def test_voc_uses_labelme_class_names_or_reports_the_default(named, folder, capsys):
    for number in range(4):
        write_image(folder / f"JPEGImages/im{number}.png", number)
        for name in ("SegmentationClass", "SegmentationObject"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"im{number}.png").write_bytes(encode_png(class_map(number)))
    if named:
        (folder / "class_names.txt").write_text("_background_\ncell\ndirt spot")
    reader, _ = open_dataset(init_datasets()["train"])
    expected = ["background", "cell", "dirt spot"] if named else ["background", "aeroplane", "bicycle"]
    assert [c.name for c in reader.categories.categories][:3] == expected
    message = "with class_names.txt" if named else "the classes of Pascal VOC, because labelmap.txt is missing"
    assert message in capsys.readouterr().out


def test_images_and_maps_are_paired_within_each_split(folder, capsys):
    for split, numbers in (("train", range(3)), ("validation", range(3, 5))):
        for index, number in enumerate(numbers):
            write_image(folder / f"{split}/images/{index:04d}.png", number)
            (folder / split / "masks").mkdir(exist_ok=True)
            (folder / f"{split}/masks/{index:04d}.png").write_bytes(encode_png(class_map(number)))
    (folder / "id2label.json").write_text('{"0": "ground", "1": "cell", "2": "dirt", "3": "rare"}')
    datasets = init_datasets()
    for name, split in (("train", "train"), ("val", "validation")):
        source = datasets[name].source
        assert (source.images, source.labels) == (f"{folder}/{split}/images", f"{folder}/{split}/masks")
    assert [row["name"] for row in json.loads(Path("set.classes.json").read_text())] == [
        "ground",
        "cell",
        "dirt",
        "rare",
    ]
    assert "edit it to name the classes" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_maps_beside_their_images_are_detected(ending, folder, capsys):
    for number in range(4):
        write_image(folder / f"im ({number}).{ending}", number)  # a PNG; the reader ignores the extension
        (folder / f"im ({number})_mask.png").write_bytes(encode_png(class_map(number)))
    datasets = init_datasets()
    assert len(samples(datasets["train"])) + len(samples(datasets["val"])) == 4
    assert "Next, after naming the classes in set.classes.json:\n  m2f shard" in capsys.readouterr().out


@pytest.mark.parametrize("interval", [2, 226])
def test_binary_maps_may_be_empty_for_most_images(interval, folder):
    """MVTec and similar data of defects list hundreds of maps without an object first."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(450):
        empty = number < 205 or number % interval
        for name, value in (("images", 7), ("masks", 0 if empty else 255)):
            (folder / name / f"im{number:03d}.png").write_bytes(encode_png(np.full((4, 4), value, np.uint8)))
    (data_format,) = find_formats(folder)
    assert (data_format.sets[0].source.void, list(data_format.classes), data_format.notes) == ((), [0, 255], ())


def test_void_pixels_of_maps_are_reported(folder):
    for number in range(3):
        write_image(folder / f"images/im{number}.png", number)
        (folder / "masks").mkdir(exist_ok=True)
        (folder / f"masks/im{number}.png").write_bytes(encode_png(np.array([[0, 1], [2, 255]], np.uint8)))
    (data_format,) = find_formats(folder)
    assert data_format.sets[0].source.void == (255,)
    assert data_format.notes == ("pixels of value 255 have no label (source.void)",)


def test_object_maps_are_not_used_as_class_maps(folder):
    colors = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)
    for number in range(4):
        write_image(folder / f"JPEGImages/im{number}.png", number)
        for name, values in (("SegmentationClass", colors), ("SegmentationObject", colors[::-1] + 7)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"im{number}.png").write_bytes(encode_png(values[class_map(number)]))
    (folder / "labelmap.txt").write_text("background:0,0,0::\ncell:128,0,0::\ndirt:0,128,0::\n")
    assert set(init_datasets()) == {"train", "val"}


def test_failed_init_restores_the_class_file(folder, capsys):
    for number in range(20):
        write_image(folder / f"images/im{number}.png", number)
        (folder / "masks").mkdir(exist_ok=True)
        (folder / f"masks/im{number}.png").write_bytes(encode_png(class_map(number)[:1]))
    assert main(["init", "set"]) == 2
    assert "none of 20 images can be read" in capsys.readouterr().err
    assert not Path("set.classes.json").exists()
    Path("set.classes.json").write_text("named by hand")
    assert main(["init", "set", "--overwrite"]) == 2
    assert Path("set.classes.json").read_text() == "named by hand"


def test_a_recipe_that_does_not_load_is_not_left_behind(folder, monkeypatch):
    def refuse(path):
        raise ConfigError(f"{path} is refused")

    for number in range(4):
        write_image(folder / f"im{number}.png", number)
        (folder / f"im{number}_mask.png").write_bytes(encode_png(class_map(number)))
    monkeypatch.setattr("m2f.cluster.own_data.init.load_recipe", refuse)
    assert main(["init", "set"]) == 2
    assert not Path("set.yaml").exists()
    assert not Path("set.classes.json").exists()


@pytest.mark.parametrize("name", ["2024", "true", "null", "1e5", "0x10"])
def test_a_recipe_may_be_named_like_another_type_of_yaml(name, folder):
    EXPORTS["yolo_seg"](folder)
    assert main(["init", "set", "--output", f"{name}.yaml"]) == 0
    assert load_recipe(f"{name}.yaml").name == name


def write_hidden_copies(folder: Path) -> None:
    """Write the copies that macOS (`._NAME`) and notebooks leave beside every file."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
        checkpoints = path.parent / ".ipynb_checkpoints"
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / f"{path.stem}-checkpoint{path.suffix}").write_bytes(path.read_bytes())


def test_maps_may_have_upper_case_endings_and_hidden_copies(folder):
    for number in range(4):
        write_image(folder / f"images/im{number}.png", number)
        (folder / "masks").mkdir(exist_ok=True)
        (folder / f"masks/im{number}.PNG").write_bytes(encode_png(class_map(number)))
    write_hidden_copies(folder)
    datasets = init_datasets()
    assert len(samples(datasets["train"])) + len(samples(datasets["val"])) == 4


@pytest.mark.parametrize("name", ["cvat", "labelme", "voc", "yolo_seg", "cvat_coco", "label_maps", "color_maps"])
def test_hidden_copies_do_not_change_the_format(name, folder):
    EXPORTS[name](folder)
    formats = find_formats(folder)
    write_hidden_copies(folder)
    assert find_formats(folder) == formats


@pytest.mark.parametrize("name", ["cvat", "labelme", "voc", "cvat_coco", "label_maps", "color_maps"])
def test_a_linked_export_has_the_format_of_the_export(name, folder, tmp_path):
    (tmp_path / "disk").mkdir()
    EXPORTS[name](tmp_path / "disk")
    (folder / "linked").symlink_to(tmp_path / "disk")
    (folder / "linked/loop").symlink_to(folder)
    (expected,), (found,) = find_formats(tmp_path / "disk"), find_formats(folder)
    assert (found.kind, found.classes, len(found.sets)) == (expected.kind, expected.classes, len(expected.sets))


def test_a_damaged_labelme_file_is_named(folder, capsys):
    EXPORTS["labelme"](folder)
    damaged = max(folder.rglob("*.json"))
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert main(["init", "set"]) == 2
    assert f"{damaged} is not valid JSON" in capsys.readouterr().err


def test_unused_test_set_is_reported(folder, capsys):
    for split, numbers in (("train", [0, 1]), ("valid", [2]), ("test", [3])):
        for number in numbers:
            write_image(folder / split / f"im{number}.png", number)
        write_coco(folder / split / "_annotations.coco.json", [f"im{n}.png" for n in numbers], numbers)
    assert set(init_datasets()) == {"train", "val"}
    assert "the test set is not used" in capsys.readouterr().out


def write_coco_release(folder: Path, names: list[str]) -> None:
    """Write the layout of COCO's release, with annotation files of the given names for each split."""
    for split, numbers in (("train2017", [0, 1, 2]), ("val2017", [3])):
        for number in numbers:
            write_image(folder / split / f"im{number}.png", number)
        for name in names:
            write_coco(folder / f"annotations/{name}_{split}.json", [f"im{n}.png" for n in numbers], numbers)


def test_keypoint_files_of_the_coco_release_are_left_out(folder, capsys):
    write_coco_release(folder, ["instances", "person_keypoints"])
    for path in folder.glob("annotations/person_*.json"):
        document = json.loads(path.read_text())
        document["categories"] = [{"id": 1, "name": "person", "keypoints": ["nose"]}]
        path.write_text(json.dumps(document))
    datasets = init_datasets()
    files = {name: Path(dataset.source.instances_json).name for name, dataset in datasets.items()}
    assert files == {"train": "instances_train2017.json", "val": "instances_val2017.json"}
    assert "not used, because they annotate keypoints: annotations/person_keypoints_t" in capsys.readouterr().out


def test_two_files_with_the_same_images_are_refused(folder, capsys):
    write_coco_release(folder, ["instances", "stuff"])
    assert main(["init", "set"]) == 2
    message = capsys.readouterr().err
    assert "instances_train2017.json and " in message
    assert "stuff_train2017.json both use 3 images" in message
    assert not Path("set.yaml").exists()


def write_coco_files(folder: Path, files: dict[str, range]) -> None:
    """Write COCO files that list images of one folder."""
    for name, numbers in files.items():
        for number in numbers:
            write_image(folder / f"images/im{number}.png", number)
        write_coco(folder / name, [f"im{n}.png" for n in numbers], list(numbers))


def test_a_complete_file_beside_a_training_file_is_left_out(folder, capsys):
    write_coco_files(
        folder, {"annotations.json": range(6), "annotations_train.json": range(4), "annotations_val.json": range(4, 6)}
    )
    datasets = init_datasets()
    assert [sample.key for sample in samples(datasets["train"])] == [f"im{i}" for i in range(4)]
    assert [sample.key for sample in samples(datasets["val"])] == ["im4", "im5"]
    assert "not used, because other sets are named train: annotations.json;" in capsys.readouterr().out


def test_a_complete_file_beside_a_validation_file_is_refused(folder, capsys):
    write_coco_files(folder, {"annotations.json": range(6), "annotations_val.json": range(4, 6)})
    assert main(["init", "set"]) == 2
    message = capsys.readouterr().err
    assert "annotations.json and " in message
    assert "annotations_val.json both use 2 images" in message


def test_a_drawn_validation_set_is_reported(folder, capsys):
    EXPORTS["label_studio"](folder)
    init_datasets("--val-share", "0.3")
    assert "no set is named val: 2 of 6 images (33%) are for validation" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["labelme", "label_maps", "trainannot"])
def test_outer_folders_define_the_split(layout, folder):
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        for number in numbers:
            if layout == "labelme":
                images, maps = folder / split / "images", folder / split / "annotations"
            elif layout == "label_maps":
                images, maps = folder / split / "site/images", folder / split / "site/masks"
            else:
                images, maps = folder / split, folder / f"{split}annot"
            write_image(images / f"im{number}.png", number)
            maps.mkdir(parents=True, exist_ok=True)
            shape = {"label": "cell", "points": [[1, 1], [30, 1], [30, 20]], "shape_type": "polygon"}
            document = {"imagePath": f"../images/im{number}.png", "imageHeight": SIZE, "imageWidth": SIZE}
            if layout == "labelme":
                (maps / f"im{number}.json").write_text(json.dumps({**document, "shapes": [shape]}))
            else:
                (maps / f"im{number}.png").write_bytes(encode_png(class_map(number)))
    datasets = init_datasets()
    names = {name: [Path(s.source).stem for s in samples(dataset)] for name, dataset in datasets.items()}
    assert names == {"train": [f"im{i}" for i in range(4)], "val": ["im4", "im5"]}


def test_labelme_files_outside_the_named_splits_are_reported(folder, capsys):
    for name in ("train", "val", "extra"):
        (folder / name).mkdir()
        EXPORTS["labelme"](folder / name)
    datasets = init_datasets()
    assert {name: Path(d.source.annotations).name for name, d in datasets.items()} == {"train": "train", "val": "val"}
    assert "not used, because other sets are named train: extra;" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "inner"), [("labelme", [""]), ("label_maps", ["images", "masks"])])
def test_test_set_inside_the_training_folder_is_refused(kind, inner, folder, capsys):
    EXPORTS[kind](folder)

    def move(name, pattern):
        for path in (folder / part for part in inner):
            (path / name).mkdir()
            for file in [file for file in path.glob(pattern) if file.is_file()]:
                file.rename(path / name / file.name)

    move("test", "im[45]*")
    assert main(["init", "set"]) == 2
    message = f"{folder / inner[-1]} contains the set test/, which is not used"
    assert message in capsys.readouterr().err
    move("train", "*")
    keys = {Path(sample.source).stem for dataset in init_datasets().values() for sample in samples(dataset)}
    assert keys == {"im0", "im1", "im2", "im3"}


def test_several_folders_of_maps_for_the_same_images_are_refused(folder, capsys):
    EXPORTS["label_maps"](folder)
    (folder / "instance_masks").mkdir()
    for path in folder.glob("masks/*"):
        (folder / "instance_masks" / path.name).write_bytes(path.read_bytes())
    assert main(["init", "set"]) == 2
    assert "set/images has maps in 2 folders: instance_masks, masks. Keep" in capsys.readouterr().err


def test_voc_uses_every_release_and_reports_lists_without_a_split(folder, capsys):
    for year in ("VOC2007", "VOC2012"):
        (folder / year).mkdir()
        EXPORTS["voc"](folder / year)
    (folder / "VOC2012/ImageSets/Segmentation/trainval.txt").write_text("im0\nim4\n")
    datasets = init_datasets()
    assert {name: len(samples(d)) for name, d in datasets.items()} == {"train": 4, "train2": 4, "val": 2, "val2": 2}
    message = "not used, because other sets are named train: VOC2012/ImageSets/Segmentation/trainval.txt;"
    assert message in capsys.readouterr().out


def test_two_training_lists_of_voc_are_refused(folder, capsys):
    EXPORTS["voc"](folder)
    (folder / "ImageSets/Segmentation/train_aug.txt").write_text("im0\nim1\n")
    assert main(["init", "set"]) == 2
    message = capsys.readouterr().err
    assert "train.txt and " in message
    assert "train_aug.txt both use 2 images" in message


def test_damaged_json_files_are_reported(folder, capsys):
    EXPORTS["roboflow"](folder)
    damaged = folder / "valid/_annotations.coco.json"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    init_datasets()
    printed = capsys.readouterr().out
    assert "not used, because they are not valid JSON: valid/_annotations.coco.json" in printed


def test_maps_without_images_are_reported(folder, capsys):
    for split, name in (("train", "im"), ("val", "other")):
        for number in range(4):
            write_image(folder / f"{split}/images/im{number}.png", number)
            (folder / split / "masks").mkdir(exist_ok=True)
            (folder / f"{split}/masks/{name}{number}.png").write_bytes(encode_png(class_map(number)))
    init_datasets()
    printed = capsys.readouterr().out
    assert "no folder has images with the names of these maps, or they are not PNG, TIFF or BMP: val/masks" in printed


def test_lists_of_images_beside_maps_are_reported(folder, capsys):
    EXPORTS["label_maps"](folder)
    (folder / "train.txt").write_text("im0\n")
    init_datasets()
    printed = capsys.readouterr().out
    assert "not used, because folders named train and val divide maps, not lists: train.txt" in printed


def test_the_name_of_the_whole_folder_does_not_mark_maps(folder):
    inner = folder / "segmentation"
    for number in range(4):
        write_image(inner / f"train/im{number}.png", number)
        (inner / "train_labels").mkdir(exist_ok=True)
        (inner / f"train_labels/im{number}.png").write_bytes(encode_png(class_map(number)))
    (found,) = find_formats(inner)
    assert [entry.split for entry in found.sets] == ["train"]
