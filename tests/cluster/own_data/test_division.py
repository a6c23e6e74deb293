"""Tests of `m2f init` with folders that name no split: whole folders or parts for validation, and groups of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m2f.cluster.cli import main
from m2f.cluster.recipe.load import load_recipe
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_dataset
from tests.tool_exports import EXPORTS, class_map, write_image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = tmp_path / "set"
    export.mkdir()
    return export


def write_patients(folder: Path, layout: str, counts: list[int], name: str = "im{number}") -> None:
    """Write a folder per patient, with the given numbers of images."""
    for patient, count in enumerate(counts):
        root = folder / f"p{patient:02d}"
        inside = layout == "beside"
        for number in range(count):
            stem = name.format(patient=patient, number=number)
            write_image(root / ("" if inside else "images") / f"{stem}.png", number)
            path = root / (f"{stem}_mask.png" if inside else f"masks/{stem}.png")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode_png(class_map(number)))


def images_by_set() -> dict[str, list[str]]:
    """Return the paths of the images of each data set of the recipe, relative to the user's folder."""
    found = {}
    for name, dataset in load_recipe("set.yaml").datasets.items():
        reader, _ = open_dataset(dataset)
        paths = [reader.files(i)[0] for i in range(len(reader.keys))]
        found[name] = [path.relative_to(Path("set").resolve()).as_posix() for path in paths]
    return found


@pytest.mark.parametrize("layout", ["folders", "beside"])
@pytest.mark.parametrize("counts", [[1] * 10, [3, 1, 2, 2, 3, 1, 2, 2, 3, 1]])
def test_whole_folders_of_patients_are_used_for_validation(counts, layout, folder, capsys):
    write_patients(folder, layout, counts)
    assert main(["init", "set"]) == 0
    used = images_by_set()
    assert len(used) == 10
    val = [images for name, images in used.items() if name.startswith("val")]
    num_val = sum(map(len, val))
    assert 0.15 <= num_val / sum(counts) <= 0.25
    assert len({image for images in used.values() for image in images}) == sum(counts)
    message = f"{len(val)} of 10 sets are for validation as a whole, with {num_val} of {sum(counts)} images (20%)"
    assert f"no set is named val: {message}" in capsys.readouterr().out
    assert len(Path("set.yaml").read_text().splitlines()) <= 40


def test_all_images_of_unequal_folders_are_used_equally_often(folder):
    write_patients(folder, "folders", [3, 1, 2, 2, 3])
    assert main(["init", "set"]) == 0
    used = images_by_set()
    weights = {item.dataset: item.weight for item in load_recipe("set.yaml").data.train}
    assert weights == {name: len(images) for name, images in used.items() if name.startswith("train")}
    assert len(set(weights.values())) > 1


def test_few_unequal_folders_are_divided_except_those_with_one_image(folder):
    write_patients(folder, "folders", [1, 10])
    assert main(["init", "set"]) == 0
    used = images_by_set()
    assert {name: len(images) for name, images in used.items()} == {"train": 1, "train2": 8, "val": 2}


def test_one_of_two_folders_with_one_image_is_for_validation(folder):
    write_patients(folder, "folders", [1, 1])
    assert main(["init", "set"]) == 0
    assert images_by_set() == {"train": ["p00/images/im0.png"], "val": ["p01/images/im0.png"]}


def test_a_single_image_is_refused_without_naming_a_recipe_that_does_not_exist(folder, capsys):
    write_patients(folder, "folders", [1])
    assert main(["init", "set"]) == 2
    assert "at least 2 groups of images, but 1 image form 1; add images, or correct" in capsys.readouterr().err


def test_the_file_with_all_classes_is_used_for_training(folder):
    for task in range(5):
        (folder / f"task{task}").mkdir()
        EXPORTS["label_studio"](folder / f"task{task}")
    path = folder / "task2/result.json"
    document = json.loads(path.read_text())
    document["categories"].append({"id": 7, "name": "hair"})
    path.write_text(json.dumps(document))
    assert main(["init", "set"]) == 0
    used = images_by_set()
    (validation,) = [name for name in used if name.startswith("val")]
    assert not used[validation][0].startswith("task2/")
    first = load_recipe("set.yaml").data.train[0].dataset
    assert used[first][0].startswith("task2/")


def write_frames(folder: Path, name: str) -> None:
    """Write five patients with three frames each into one folder of images and one of maps."""
    for patient in range(5):
        for number in range(3):
            stem = name.format(patient=patient, number=number)
            write_image(folder / f"images/{stem}.png", number)
            path = folder / f"masks/{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(class_map(number)))


def test_an_expression_that_groups_no_images_is_refused(folder, capsys):
    write_frames(folder, "patient {patient} frame {number}")
    assert main(["init", "set", "--group", r"patient \d+"]) == 2
    message = capsys.readouterr().err
    assert r"--group 'patient \\d+' puts each of 15 images into a separate group" in message
    assert "Keys of these images: patient-" in message
    assert not Path("set.yaml").exists()
    assert main(["init", "set", "--group", "patient (["]) == 2
    assert "--group is 'patient ([', which is not a regular expression" in capsys.readouterr().err


def test_groups_are_counted_and_stay_in_one_part(folder, capsys):
    write_frames(folder, "patient {patient} frame {number}")
    assert main(["init", "set", "--group", r"patient-\d+"]) == 0
    assert "the images form 5 groups, for example patient-0, patient-1, patient-2" in capsys.readouterr().out
    train, val = ({Path(image).name[:9] for image in images_by_set()[name]} for name in ("train", "val"))
    assert (len(train), len(val)) == (4, 1)
    assert not train & val


@pytest.mark.parametrize("counts", [[3] * 5, [3, 3]])
def test_a_group_on_both_sides_is_refused(counts, folder, capsys):
    """The same patient may be in the folders of several batches."""
    write_patients(folder, "folders", counts, name="anna_{patient}_{number}")
    write_image(folder / "p00/images/other_0.png", 0)
    (folder / "p00/masks/other_0.png").write_bytes(encode_png(class_map(0)))
    assert main(["init", "set", "--group", "[^_]+"]) == 2
    message = capsys.readouterr().err
    assert "the group 'anna' is in the training images of one set and the validation images of another" in message


def test_options_without_an_effect_are_reported(folder, capsys):
    EXPORTS["yolo_seg"](folder)
    assert main(["init", "set", "--group", "im", "--val-share", "0.3"]) == 0
    printed = capsys.readouterr().out
    for name in ("--group", "--val-share"):
        assert f"{name} has no effect, because a set is named val" in printed
