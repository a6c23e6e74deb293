"""Tests of `m2f init` with folders of maps: rare values, lists of class names, and subfolders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f.cluster.cli import main
from m2f.cluster.own_data.formats import choose_format, find_formats
from m2f.cluster.own_data.write_recipe import category_text
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_reader
from m2f.model.errors import ConfigError
from tests.tool_exports import EXPORTS, class_map, write_image

NAMES = {0: "background", 1: "cell", 2: "dirt"}


def write_pair(image: Path, label_map: Path, values: np.ndarray) -> None:
    """Write a grey image and its map."""
    for path, pixels in ((image, np.full(values.shape, 7, np.uint8)), (label_map, values)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels))


def test_a_value_of_a_single_map_is_a_class(tmp_path):
    """Only every third map was read before, and the commands left out the images of a class that these lack."""
    for number in range(450):
        values = np.array([[0, 1], [2, 9 if number == 400 else 0]], np.uint8)
        write_pair(tmp_path / f"images/im{number:03d}.png", tmp_path / f"masks/im{number:03d}.png", values)
    (tmp_path / "masks/im001.png").write_bytes(b"damaged")
    (data_format,) = find_formats(tmp_path)
    assert list(data_format.classes) == [0, 1, 2, 9]


def test_too_many_values_are_refused_before_all_maps_are_read(tmp_path, monkeypatch):
    values = np.arange(100, dtype=np.uint8).reshape(10, 10)
    for number in range(201):
        write_pair(tmp_path / f"images/im{number}.png", tmp_path / f"masks/im{number}.png", values)
    monkeypatch.setattr("m2f.cluster.own_data.map_values.Progress", None)
    with pytest.raises(ConfigError, match="the maps have 100 different values, probably ids of objects"):
        find_formats(tmp_path)


def test_unreadable_maps_are_refused_with_the_error_of_the_first(tmp_path, capsys):
    write_pair(tmp_path / "images/im0.png", tmp_path / "masks/im0.png", np.zeros((4, 4), np.uint8))
    path = tmp_path / "masks/im0.png"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX"))
    assert main(["init", str(tmp_path), "--output", str(tmp_path / "set.yaml")]) == 2
    assert "masks/im0.png: " in capsys.readouterr().err


def test_map_values_without_a_class_are_not_left_out(tmp_path, monkeypatch, capsys):
    """The user's list lacks a class; --skip-bad would leave out all images of this class."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    EXPORTS["label_maps"](tmp_path / "set")
    (tmp_path / "set/classes.json").write_text(json.dumps([{"label": k, "name": NAMES[k]} for k in (0, 1)]))
    values = np.zeros((64, 64), np.uint8)
    for number in range(1, 6):
        (tmp_path / f"set/masks/im{number}_mask.png").write_bytes(encode_png(values))
    assert main(["init", "set"]) == 0
    printed = capsys.readouterr().out
    assert "Next, after adding the map values in 1 fault to the list of classes:\n  m2f shard set.yaml\n" in printed


LISTS = {
    "class_names.txt": "_background_\ncell\ndirt\n",
    "labels.txt": "__ignore__\n_background_\ncell\ndirt\n",
    "_classes.csv": "Pixel Value, Class\n0, background\n1, cell\n2, dirt\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\ndirt:0,0,9::\nbackground:0,0,0::\ncell:9,0,0::\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_beside_maps_name_the_classes(name, tmp_path):
    for number in range(2):
        write_image(tmp_path / f"images/im{number}.png", number)
        (tmp_path / "masks").mkdir(exist_ok=True)
        picture = Image.fromarray(class_map(number))
        if name == "labelmap.txt":
            picture.putpalette([0, 0, 0, 9, 0, 0, 0, 0, 9])
        picture.save(tmp_path / f"masks/im{number}.png")
    (tmp_path / name).write_text(LISTS[name])
    (data_format,) = find_formats(tmp_path)
    assert data_format.classes == NAMES
    assert data_format.notes == (f"the class names come from {name}: value 0 is 'background'",)


def write_palette_maps(folder: Path) -> None:
    """Write maps in which every second palette has the two classes in the other order."""
    for number in range(6):
        write_image(folder / f"images/im{number}.png", number)
        is_swapped = number % 2
        picture = Image.fromarray(np.array([0, 2, 1] if is_swapped else [0, 1, 2], np.uint8)[class_map(number)])
        picture.putpalette([0, 0, 0, 0, 0, 9, 9, 0, 0] if is_swapped else [0, 0, 0, 9, 0, 0, 0, 0, 9])
        (folder / "masks").mkdir(exist_ok=True)
        picture.save(folder / f"masks/im{number}.png")


def test_maps_with_different_palettes_are_read_by_colour(tmp_path):
    write_palette_maps(tmp_path)
    (tmp_path / "labelmap.txt").write_text(LISTS["labelmap.txt"])
    (data_format,) = find_formats(tmp_path)
    assert data_format.kind == "color_maps"
    assert data_format.evidence.endswith("palette maps whose palettes differ, with labelmap.txt")
    (entry,) = data_format.sets
    reader = open_reader(entry.source)
    for number in range(6):
        areas = {s.category_id: s.area for s in reader.read(number).annotation.segments}
        names = {c.id: c.name for c in reader.categories.categories}
        expected = np.bincount(class_map(number).ravel())
        assert {names[i]: area for i, area in areas.items()} == {NAMES[k]: count for k, count in enumerate(expected)}


@pytest.mark.parametrize("legend", [None, "background:0,0,0::\ncell:9,0,0::\n"])
def test_maps_with_different_palettes_are_refused_without_a_legend_of_all_colours(legend, tmp_path):
    write_palette_maps(tmp_path)
    if legend is not None:
        (tmp_path / "labelmap.txt").write_text(legend)
    message = (
        r"im1.png and .*im0.png differ: value 1 is \(0, 0, 9\) in the first, \(9, 0, 0\) in the second. If colours"
    )
    with pytest.raises(ConfigError, match=message):
        find_formats(tmp_path)


def test_palettes_may_differ_if_a_file_states_the_values(tmp_path):
    write_palette_maps(tmp_path)
    (tmp_path / "masks/_classes.csv").write_text(LISTS["_classes.csv"])
    (data_format,) = find_formats(tmp_path)
    assert (data_format.kind, data_format.classes) == ("label_maps", NAMES)


def test_palettes_may_differ_in_unused_colours(tmp_path):
    write_palette_maps(tmp_path)
    for number in range(6):
        picture = Image.fromarray(class_map(number))
        picture.putpalette([0, 0, 0, 9, 0, 0, 0, 0, 9, number, 1, 1])
        picture.save(tmp_path / f"masks/im{number}.png")
    (data_format,) = find_formats(tmp_path)
    assert (data_format.kind, list(data_format.classes)) == ("label_maps", [0, 1, 2])


@pytest.mark.parametrize(("name", "text"), [("classes.txt", "cell\ndirt\n"), ("labelmap.txt", LISTS["labelmap.txt"])])
def test_lists_that_do_not_name_all_values_are_reported(name, text, tmp_path):
    """A list without the background would name every class wrongly. Grey maps have no colours to match."""
    EXPORTS["label_maps"](tmp_path)
    (tmp_path / "masks" / name).write_text(text)
    (data_format,) = find_formats(tmp_path)
    assert data_format.classes == {0: None, 1: None, 2: None}
    assert data_format.notes == (f"not used, because it does not name all values of the maps: masks/{name}",)


def test_images_and_maps_may_be_in_subfolders_of_the_same_names(tmp_path):
    for patient in ("patient 1", "patient 2"):
        for number in range(3):
            image, label_map = (tmp_path / f"{name}/{patient}/{number}.png" for name in ("images", "masks"))
            write_pair(image, label_map, class_map(number))
    (data_format,) = find_formats(tmp_path)
    (entry,) = data_format.sets
    assert (entry.source.images, entry.source.labels) == (f"{tmp_path}/images", f"{tmp_path}/masks")
    assert list(data_format.classes) == [0, 1, 2]


def test_subfolders_below_splits_are_joined_within_their_split(tmp_path):
    for split, site in (("train", "siteA"), ("train", "siteB"), ("val", "siteC")):
        for number in range(2):
            name = f"{split}/{site}/{site}_{number}"
            write_pair(tmp_path / f"leftImg/{name}.png", tmp_path / f"gtFine/{name}_labels.png", class_map(number))
    (tmp_path / "classes.json").write_text(json.dumps([{"label": k, "name": name} for k, name in NAMES.items()]))
    (data_format,) = find_formats(tmp_path)
    assert {entry.split: len(open_reader(entry.source).keys) for entry in data_format.sets} == {"train": 4, "val": 2}


@pytest.mark.parametrize("ending", ["tif", "TIFF", "bmp"])
@pytest.mark.parametrize("name", ["masks/im0", "images/im0_mask"])
def test_tiff_and_bmp_maps_are_detected(tmp_path, ending, name):
    write_pair(tmp_path / "images/im0.png", tmp_path / "preview.png", np.zeros((2, 2), np.uint8))
    path = tmp_path / f"{name}.{ending}"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)).save(path)
    (data_format,) = find_formats(tmp_path)
    assert (data_format.kind, list(data_format.classes)) == ("label_maps", [0, 1, 2, 3])


@pytest.mark.parametrize("mode", ["RGB", "LA"])
def test_maps_with_equal_channels_are_label_maps(tmp_path, mode):
    values = np.array([[0, 255], [0, 0]], np.uint8)
    for number in range(2):
        write_pair(tmp_path / f"images/im{number}.png", tmp_path / f"masks/im{number}.png", values * number)
        Image.fromarray(values * number).convert(mode).save(tmp_path / f"masks/im{number}.png")
    (data_format,) = find_formats(tmp_path)
    assert (data_format.kind, list(data_format.classes)) == ("label_maps", [0, 255])
    colors = np.zeros((2, 2, 3), np.uint8)
    colors[0, 0] = (255, 0, 0)
    Image.fromarray(colors).save(tmp_path / "masks/im1.png")  # the first map alone, which is black, does not decide
    if mode == "RGB":
        with pytest.raises(ConfigError, match=r"add class_dict.csv beside it, .* for example `road,128,64,128`"):
            find_formats(tmp_path)


def test_a_class_with_value_255_is_not_void(tmp_path):
    write_pair(tmp_path / "images/im0.png", tmp_path / "masks/im0.png", np.array([[0, 128], [255, 255]], np.uint8))
    rows = [{"label": value, "name": f"class {value}"} for value in (0, 128, 255)]
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    (data_format,) = find_formats(tmp_path)
    assert (data_format.sets[0].source.void, data_format.notes) == ((), ())
    assert len(open_reader(data_format.sets[0].source).read(0).annotation.segments) == 3
    (tmp_path / "classes.json").write_text(json.dumps(rows[:2]))
    (data_format,) = find_formats(tmp_path)
    assert data_format.sets[0].source.void == (255,)


def test_only_binary_maps_have_a_background_and_a_foreground():
    assert '"foreground"' in category_text({0: None, 1: None})
    assert '"foreground"' in category_text({0: None, 255: None})
    assert '"class 128"' in category_text({0: None, 128: None})


@pytest.mark.parametrize(("name", "ending"), [("labelme", ".json"), ("cvat", ".xml"), ("voc", ".png"), ("voc", ".txt")])
def test_upper_case_endings_are_found(tmp_path, name, ending):
    EXPORTS[name](tmp_path)
    before = [entry.split for entry in find_formats(tmp_path)[0].sets]
    for path in [path for path in tmp_path.rglob(f"*{ending}") if path.parent.name != "JPEGImages"]:
        path.rename(path.with_suffix(ending.upper()))
    (data_format,) = find_formats(tmp_path)
    assert (data_format.kind, [entry.split for entry in data_format.sets]) == (name, before)
    assert open_reader(data_format.sets[0].source).read(0).annotation.segments


@pytest.mark.parametrize(
    ("images", "maps"),
    [("img_dir/train", "ann_dir/train"), ("labelled images", "annotation"), ("originals", "painted")],
)
def test_maps_are_found_in_folders_of_other_names(tmp_path, images, maps):
    write_image(tmp_path / images / "im0.png", 0)
    write_pair(tmp_path / "planning/im1.png", tmp_path / maps / "im0.png", class_map(0))
    (data_format,) = find_formats(tmp_path)
    source = data_format.sets[0].source
    assert (source.images, source.labels) == (str(tmp_path / images), str(tmp_path / maps))


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("jpg", r"masks/ has 2 JPEG files; if these are maps, export them as PNG, because JPEG changes values\. docs"),
        ("GIF", r"masks/ has 2 GIF files; .* because GIF files are not read"),
        ("png", r"masks/ has 2 maps, but no folder has images with their names; if the export lacks the images, copy"),
    ],
)
def test_unpaired_maps_are_refused_with_the_cause(tmp_path, ending, message):
    (tmp_path / "masks").mkdir()
    for name in ("a", "b"):
        Image.fromarray(class_map(0)).save(tmp_path / f"masks/{name}.{ending}")
    with pytest.raises(ConfigError, match=message):
        choose_format(tmp_path, None)
