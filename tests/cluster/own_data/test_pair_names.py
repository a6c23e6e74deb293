"""Tests of `m2f init` with names of images and maps that differ, and with masks that are not class maps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f.cluster.own_data.formats import choose_format, find_formats
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.sources import LabelMapSource
from m2f.model.errors import ConfigError
from tests.tool_exports import class_map, square, write_image

OWN_DATA = Path(__file__).parents[3] / "docs/own_data.md"


def write_map(path: Path, values: np.ndarray, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)


@pytest.mark.parametrize(
    ("image", "label_map", "suffixes"),
    [
        ("train/{}_sat.jpg", "train/{}_mask.png", ("_sat", "_mask")),
        ("imagesTr/case_{}_0000.png", "labelsTr/case_{}.png", ("_0000", "")),
        ("images/p{}/a_rgb.png", "labels/p{}/a_labelIds.png", ("_rgb", "_labelIds")),
        ("data/{}.jpg", "data/{}.png", ("", "")),
        ("data/{}.png", "data/{}-Segmentation.png", ("", "-Segmentation")),
        ("RGB/top_{}_RGB.tif", "Labels/top_{}_label.tif", ("_RGB", "_label")),
    ],
)
def test_images_may_have_a_suffix(image, label_map, suffixes, tmp_path):
    for number in range(3):
        write_image(tmp_path / image.format(number), number)
        write_map(tmp_path / label_map.format(number), class_map(number))
    (data_format,) = find_formats(tmp_path)
    (entry,) = data_format.sets
    assert (entry.source.image_suffix, entry.source.suffix) == suffixes
    samples = [open_reader(_with_classes(entry.source, tmp_path)).read(index) for index in range(3)]
    assert [len(sample.annotation.segments) for sample in samples] == [3, 3, 3]


def _with_classes(source: LabelMapSource, folder: Path) -> LabelMapSource:
    categories = folder / "names.json"
    categories.write_text(str([{"label": i, "name": f"c{i}", "isthing": 0} for i in range(3)]).replace("'", '"'))
    return LabelMapSource(**{**vars(source), "categories": str(categories)})


@pytest.mark.parametrize(
    "labels", [{"background": 0, "cell": 1, "dirt": 2}, {"0": "background", "1": "cell", "2": "dirt"}]
)
def test_dataset_json_of_nnunet_names_the_classes(labels, tmp_path):
    for number in range(2):
        write_image(tmp_path / f"imagesTr/case_{number}_0000.png", number)
        write_map(tmp_path / f"labelsTr/case_{number}.png", class_map(number))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert dict(find_formats(tmp_path)[0].classes) == {0: "background", 1: "cell", 2: "dirt"}


def test_an_image_suffix_changes_the_fingerprint(tmp_path):
    plain = _with_classes(LabelMapSource(images="a", labels="b", categories=""), tmp_path)
    changed = LabelMapSource(**{**vars(plain), "image_suffix": "_sat"})
    assert source_fingerprint(plain) != source_fingerprint(changed)


@pytest.mark.parametrize(
    ("images", "maps"),
    [("{}/{}.png", "{}annot/{}.png"), ("images/{}/seq/{}_rgb.png", "labels/{}/seq/{}_labelIds.png")],
)
def test_splits_may_repeat_the_names_of_images(images, maps, tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            write_image(tmp_path / images.format(split, number), number)
            write_map(tmp_path / maps.format(split, number), class_map(number))
    (data_format,) = find_formats(tmp_path)
    found = {entry.split: (entry.source.images, entry.source.labels) for entry in data_format.sets}
    folders = [str((tmp_path / text).parent).removesuffix("/seq") for text in (images, maps)]
    assert found == {split: tuple(text.format(split) for text in folders) for split in ("train", "val")}


def test_images_without_a_suffix_are_preferred(tmp_path):
    for number in range(3):
        write_image(tmp_path / f"images/{number}.png", number)
        write_image(tmp_path / f"m_depth/{number}_depth.png", number)
        write_map(tmp_path / f"masks/{number}.png", class_map(number))
    assert find_formats(tmp_path)[0].sets[0].source.images == str(tmp_path / "images")


@pytest.mark.parametrize("suffixes", [("", ""), ("_depth", "_rgb")])
def test_folders_that_may_have_the_images_as_well_are_named(suffixes, tmp_path):
    for number in range(3):
        for folder, suffix in zip(("depth", "rgb"), suffixes, strict=True):
            write_image(tmp_path / folder / f"s{number}{suffix}.png", number)
        write_map(tmp_path / f"masks/s{number}.png", class_map(number))
    (found,) = find_formats(tmp_path)
    assert [note for note in found.notes if "the images are those in depth/, but rgb/ may have them as well" in note]


def test_grey_copies_beside_images_are_no_maps_if_there_is_a_folder_of_maps(tmp_path):
    for number in range(3):
        write_image(tmp_path / f"images/{number}.jpg", number)
        write_map(tmp_path / f"images/{number}.png", class_map(number))
        write_map(tmp_path / f"masks/{number}.png", class_map(number))
    (entry,) = find_formats(tmp_path)[0].sets
    assert entry.source.labels == str(tmp_path / "masks")


def write_masks(folder: Path, ending: str, **options: int) -> None:
    """Write images, and masks of 0 and 255 that JPEG has changed."""
    for number in range(3):
        write_image(folder / f"images/{number}.png", number)
        write_map(folder / f"masks/{number}.jpg", 255 * (class_map(number) == 1).astype(np.uint8), **options)
        if ending != ".jpg":
            path = folder / f"masks/{number}.jpg"
            write_map(path.with_suffix(ending), np.array(Image.open(path)))
            path.unlink()


def test_masks_changed_by_jpeg_are_refused_with_a_script(tmp_path):
    write_masks(tmp_path, ".png", quality=70)
    with pytest.raises(ConfigError, match=r"values from 0 to 255\. They are probably masks .* docs/own_data\.md"):
        find_formats(tmp_path)


def test_maps_that_seem_to_number_objects_are_reported(tmp_path):
    for number, count in enumerate((3, 4, 3)):
        write_image(tmp_path / f"images/{number}.png", number)
        write_map(tmp_path / f"masks/{number}.png", np.tile(np.arange(count + 1, dtype=np.uint16), (8, 4)))
    (note,) = find_formats(tmp_path)[0].notes
    assert "1 to n, with n up to 4. If they number objects" in note


def test_folders_with_the_masks_of_one_class_are_refused_with_a_script(tmp_path):
    write_class_folders(tmp_path)
    with pytest.raises(ConfigError, match=r"maps in 2 folders: masks/cell, masks/dirt\. Each .* docs/own_data\.md"):
        find_formats(tmp_path)


def write_class_folders(folder: Path) -> None:
    for number in range(2):
        write_image(folder / f"images/{number}.png", number)
        for value, name in ((1, "cell"), (2, "dirt")):
            write_map(folder / f"masks/{name}/{number}.png", 255 * (class_map(number) == value).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ds/ann/a.jpg.json", r"1 \.json file in another form, for example ds/ann/a\.jpg\.json; export COCO JSON"),
        ("export.ndjson", r"1 \.ndjson file in another form, .* export COCO JSON"),
        ("data/train-00000.parquet", r"1 \.parquet file in another form, .* to PNG files"),
        ("gtFine/train/a/a_gtFine_labelIds.png", r"the layout of Cityscapes: take a recipe of configs/cityscapes"),
        ("images/ADE_train_00000001_seg.png", r"a layout of ADE20K: .* `ade20k_full` for the full release"),
        ("task-1-annotation-7-by-1-tag-cell-0.png", r"Label Studio exports .* export COCO instead"),
    ],
)
def test_other_forms_are_refused_with_a_remedy(name, message, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=message):
        choose_format(tmp_path, None)


def test_panoptic_files_of_cityscapes_are_no_coco_files(tmp_path):
    write_map(tmp_path / "gtFine/train/a/a_gtFine_labelIds.png", class_map(0))
    empty = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "gtFine/cityscapes_panoptic_train.json").write_text(json.dumps(empty))
    with pytest.raises(ConfigError, match="layout of Cityscapes"):
        choose_format(tmp_path, None)


def test_the_formats_of_a_folder_name_their_own_files(tmp_path):
    write_image(tmp_path / "0.png", 0)
    for name, annotation in (("a", {"image_id": 1, "segments_info": []}), ("b", {"image_id": 1})):
        images = [{"id": 1, "file_name": "0.png"}]
        document = {"images": images, "annotations": [annotation], "categories": [{"id": 1, "name": "x"}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    evidence = {data_format.kind: data_format.evidence for data_format in find_formats(tmp_path)}
    assert evidence == {
        f"coco_{k}": f"COCO annotations in {n}.json" for k, n in (("panoptic", "a"), ("instances", "b"))
    }


def test_colors_of_maps_without_a_legend_are_listed(tmp_path):
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 9, 255]], np.uint8)
    for number in range(2):
        write_image(tmp_path / f"images/{number}.png", number)
        write_map(tmp_path / f"labels/{number}.png", colors[np.minimum(class_map(number), 1 + number)])
    with pytest.raises(ConfigError, match=r"3 colours: \(0, 0, 0\), \(255, 0, 0\), \(0, 9, 255\)"):
        find_formats(tmp_path)


@pytest.mark.parametrize(("suffix", "ignored"), [("PNG", ""), ("", "__ignore__\n")])
def test_maps_of_labelme_conversions_have_the_classes_of_the_list(suffix, ignored, tmp_path):
    write_image(tmp_path / "JPEGImages/0.jpg", 0)
    (tmp_path / "SegmentationClass").mkdir()  # holds arrays if the maps are in SegmentationClassPNG
    for name in ("SegmentationClass", "SegmentationObject"):
        write_map(tmp_path / f"{name}{suffix}/0.png", class_map(0))
    (tmp_path / "class_names.txt").write_text(f"{ignored}_background_\ncell\ndirt")
    reader = open_reader(find_formats(tmp_path)[0].sets[0].source)
    names = {category.id: category.name for category in reader.categories.categories}
    assert names == {0: "background", 1: "cell", 2: "dirt"}
    assert [names[s.category_id] for s in reader.read(0).annotation.segments] == list(names.values())


def test_palettes_of_voc_must_be_equal(tmp_path):
    for number, colors in enumerate(([0, 0, 0, 128, 0, 0, 0, 128, 0], [0, 128, 0, 128, 0, 0, 0, 0, 0])):
        write_image(tmp_path / f"JPEGImages/{number}.jpg", number)
        for name in ("SegmentationClass", "SegmentationObject"):
            image = Image.fromarray(class_map(number)).convert("P")
            image.putpalette(colors)
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"{number}.png")
    with pytest.raises(ConfigError, match=r"0\.png and .*1\.png differ: value 0 is \(0, 0, 0\) .* Export RGB maps"):
        find_formats(tmp_path)


def test_an_inner_yolo_export_is_named(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / f"data/cells/{name}").mkdir(parents=True)
    (tmp_path / "data/cells/classes.txt").write_text("cell")
    with pytest.raises(ConfigError, match="data/cells/ seems to be a YOLO export: give `m2f init` that folder"):
        choose_format(tmp_path, None)


def test_a_mask_for_each_object_is_refused_with_a_script(tmp_path):
    write_object_masks(tmp_path)
    with pytest.raises(ConfigError, match=r"a/masks/ has 2 maps for the image in stage1_train/a/images/: one map for"):
        choose_format(tmp_path, None)


def write_object_masks(folder: Path) -> None:
    for number, name in enumerate("ab"):
        write_image(folder / f"stage1_train/{name}/images/{name}.png", number)
        for value in (1, 2):
            path = folder / f"stage1_train/{name}/masks/{name}{value}.png"
            write_map(path, 255 * (class_map(number) == value).astype(np.uint8))


def _run_script(number: int) -> None:
    """Run a script of the section `Masks to convert` in the current folder."""
    section = OWN_DATA.read_text().partition("## Masks to convert")[2]
    block = re.findall(r'^    python -c "\n(.*?)"\n', section, re.MULTILINE | re.DOTALL)[number]
    exec("\n".join(line[4:] for line in block.splitlines()), {})


def test_the_scripts_of_the_documentation_write_class_maps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_masks(tmp_path, ".jpg", quality=70)
    _run_script(0)
    assert set(np.unique(np.array(Image.open("labels/0.png")))) == {0, 255}
    write_class_folders(tmp_path / "classes")
    monkeypatch.chdir(tmp_path / "classes")
    _run_script(1)
    (tmp_path / "classes/masks").rename(tmp_path / "masks of classes")
    assert dict(find_formats(tmp_path / "classes")[0].classes) == {0: "background", 1: "cell", 2: "dirt"}
    np.testing.assert_array_equal(np.array(Image.open("labels/1.png")), class_map(1))


def test_the_script_of_the_documentation_combines_masks_of_objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_object_masks(tmp_path)
    _run_script(2)
    (data_format,) = find_formats(tmp_path / "voc")
    sample = open_reader(data_format.sets[0].source).read(0)
    left, top, right, bottom = square(0)
    assert sorted(s.area for s in sample.annotation.segments if s.is_thing) == [100, (right - left) * (bottom - top)]
