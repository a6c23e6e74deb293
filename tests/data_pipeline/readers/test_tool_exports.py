from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import decode_rgb, encode_png
from m2f.data_pipeline.readers import dataset_fingerprint, open_dataset, open_reader, source_fingerprint
from m2f.data_pipeline.source_parts import PartConfig, TileConfig
from m2f.data_pipeline.sources import (
    CocoInstancesSource,
    CocoStuffSource,
    ColorMapSource,
    CvatSource,
    LabelMapSource,
    LabelmeSource,
    VocSource,
    YoloSegSource,
)
from tests import tool_exports
from tests.data_pipeline.coco_set import CocoSet


def _source(kind, folder):
    match kind:
        case "yolo_seg":
            return YoloSegSource(
                images=f"{folder}/images/train", labels=f"{folder}/labels/train", data_yaml=f"{folder}/data.yaml"
            )
        case "labelme":
            return LabelmeSource(images=str(folder), annotations=str(folder))
        case "cvat":
            return CvatSource(images=f"{folder}/images", annotations=f"{folder}/annotations.xml")
        case "voc":
            return VocSource(
                images=f"{folder}/JPEGImages",
                class_maps=f"{folder}/SegmentationClass",
                object_maps=f"{folder}/SegmentationObject",
                image_set=f"{folder}/ImageSets/Segmentation/train.txt",
                legend=f"{folder}/labelmap.txt",
            )
        case _:
            return ColorMapSource(
                images=f"{folder}/701_StillsRaw_full",
                labels=f"{folder}/LabeledApproved_full",
                legend=f"{folder}/label_colors.txt",
                suffix="_L",
            )


def _class_map(sample, categories):
    """Return class names [H, W] from the map or the layers."""
    names = np.full((sample.height, sample.width), "", object)
    for segment in sample.annotation.segments:
        ids = sample.annotation.seg if segment.map == "seg" else sample.annotation.inst[segment.layer]
        names[ids == segment.id] = categories.by_id[segment.category_id].name
    return names


def test_renamed_yolo_files_change_the_fingerprint(tmp_path):
    tool_exports.yolo_seg(tmp_path)
    source = _source("yolo_seg", tmp_path)
    before = source_fingerprint(source)
    texts = sorted(Path(source.labels).rglob("*.txt"))
    texts[-1].rename(texts[-1].with_name("z.txt"))  # keeps the order of the contents
    assert source_fingerprint(source) != before


@pytest.mark.parametrize("kind", ["yolo_seg", "labelme", "cvat", "voc", "color_maps"])
def test_every_export_format_gives_the_drawn_pixels(kind, tmp_path):
    tool_exports.EXPORTS[kind](tmp_path)
    reader = open_reader(_source(kind, tmp_path))
    assert len(reader.keys) == (4 if kind in ("yolo_seg", "voc") else 6)
    for index in range(len(reader.keys)):
        actual = _class_map(reader.read(index), reader.categories)
        expected = tool_exports.class_map(index)
        assert np.array_equal(actual == "cell", expected == 1)
        assert np.array_equal(actual == "dirt", expected == 2)
    assert len(source_fingerprint(_source(kind, tmp_path))) == 64


def test_yolo_lists_every_invalid_line_in_one_error(tmp_path):
    tool_exports.yolo_seg(tmp_path)
    (tmp_path / "labels/train/im0.txt").write_text(
        "0 0.5 0.5 0.2 0.2\n9 0 0 1 0 1 1\n0 0 0 1 0 1\n0 a b\n0 0 0 70 0 70 70\n"
    )
    (tmp_path / "labels/train/gone.txt").write_text("0 0 0 1 0 1 1\n")
    with pytest.raises(DataError) as error:
        open_reader(_source("yolo_seg", tmp_path))
    for text in ("6 annotations", "line 1 is a box", "line 2 has class 9", "line 3 has 5", "line 4", "line 5", "gone"):
        assert text in str(error.value)


@pytest.mark.parametrize("prefix", ["", "./images/train/", "/content/set/images/train/", "images\\train\\"])
def test_a_yolo_list_selects_images(tmp_path, prefix):
    tool_exports.yolo_seg(tmp_path)
    plain = _source("yolo_seg", tmp_path)
    source = replace(plain, image_set=f"{tmp_path}/train.txt")
    (tmp_path / "train.txt").write_text(f"{prefix}im2.png\n{prefix}im0.png\n")
    assert open_reader(source).keys == ("im0", "im2")
    assert source_fingerprint(source) != source_fingerprint(plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("im0.png\nim4.png\n", r"train\.txt lists 1 image not in .*images/train: im4\.png"),
        ("images/val/im0.png\n", r"lists 1 image not in .*: images/val/im0\.png"),
        ("im0.png\n./im0.png\n", r"images in .*train\.txt must be unique; these appear more than once: im0\.png"),
    ],
)
def test_a_yolo_list_with_other_or_repeated_images_is_refused(tmp_path, text, message):
    tool_exports.yolo_seg(tmp_path)
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_reader(replace(_source("yolo_seg", tmp_path), image_set=f"{tmp_path}/train.txt"))


@pytest.mark.parametrize(("kind", "pattern"), [("yolo_seg", "labels/train/*.txt"), ("voc", "ImageSets/*/*.txt")])
def test_text_files_may_begin_with_a_byte_order_mark(kind, pattern, tmp_path):
    tool_exports.EXPORTS[kind](tmp_path)
    source = _source(kind, tmp_path)
    before = [sample.annotation.segments for sample in map(open_reader(source).read, range(4))]
    for path in tmp_path.glob(pattern):
        path.write_bytes(path.read_text().encode("utf-8-sig"))
    assert [sample.annotation.segments for sample in map(open_reader(source).read, range(4))] == before


def test_yolo_keypoints_are_not_read_as_polygons(tmp_path):
    tool_exports.yolo_seg(tmp_path)
    with (tmp_path / "data.yaml").open("a") as stream:
        stream.write("kpt_shape: [6, 2]\n")
    with pytest.raises(DataError, match=r"data\.yaml has `kpt_shape`: its labels are boxes with keypoints"):
        open_reader(_source("yolo_seg", tmp_path))


@pytest.mark.parametrize(("text", "message"), [("cell\n\ndirt\n", "line 2 is empty"), ("\n", "contain no class")])
def test_yolo_class_lists_with_an_empty_line_are_refused(tmp_path, text, message):
    tool_exports.yolo_seg(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_reader(replace(_source("yolo_seg", tmp_path), data_yaml=f"{tmp_path}/classes.txt"))


@pytest.mark.parametrize("labels", ["images/train", "labels/val"])
def test_yolo_labels_that_fit_no_image_are_refused(tmp_path, labels):
    tool_exports.yolo_seg(tmp_path)
    (tmp_path / "images/train/classes.txt").write_text("cell\ndirt\n")
    with pytest.raises(DataError, match=rf"{labels} has no text file for any image in .*images/train"):
        open_reader(replace(_source("yolo_seg", tmp_path), labels=f"{tmp_path}/{labels}"), skip_bad=True)


def test_labelme_parts_of_a_group_are_one_object(tmp_path):
    tool_exports.labelme(tmp_path)
    path = tmp_path / "im0.json"
    document = json.loads(path.read_text())
    extra = {"label": "cell", "points": [[40, 2], [60, 8]], "shape_type": "rectangle", "group_id": 3}
    document["shapes"][0]["group_id"] = 3
    document["shapes"] += [extra, {"label": "cell", "points": [[1, 1]], "shape_type": "point"}]
    path.write_text(json.dumps(document))
    reader = open_reader(_source("labelme", tmp_path), skip_bad=True)
    assert [entry.message[:9] for entry in reader.unusable] == ["shapes[3]"]
    cell, dirt = reader.read(0).annotation.segments
    assert (cell.area, len(cell.polygons), dirt.area) == (22 * 22 + 20 * 6, 2, 100)


@pytest.mark.parametrize("points", [[[40, 2], [60, 8]], [[60, 2], [40, 8]], [[40, 2], [60, 2], [60, 8], [40, 8]]])
def test_labelme_rectangle_may_have_two_or_four_corners_in_any_order(tmp_path, points):
    tool_exports.labelme(tmp_path)
    path = tmp_path / "im0.json"
    document = json.loads(path.read_text())
    document["shapes"] = [{"label": "cell", "points": points, "shape_type": "rectangle"}]
    path.write_text(json.dumps(document))
    (cell,) = open_reader(_source("labelme", tmp_path)).read(0).annotation.segments
    assert (cell.area, cell.bbox) == (20 * 6, (40, 2, 20, 6))


def test_cvat_groups_join_polygons_and_masks(tmp_path):
    tool_exports.cvat(tmp_path)
    path = tmp_path / "annotations.xml"
    path.write_text(
        path.read_text()
        .replace('label="dirt"', 'label="cell" group_id="1"')
        .replace('label="cell" source="manual" occluded="0" points', 'label="cell" group_id="1" points')
    )
    (cell,) = open_reader(_source("cvat", tmp_path)).read(0).annotation.segments
    assert (cell.area, cell.polygons) == (22 * 22 + 100, None)


@pytest.mark.parametrize(
    ("shape", "inside", "outside"),
    [
        # 40 x 8 pixels; 30 degrees clockwise move the right end down and the left end up
        ('box xtl="12" ytl="28" xbr="52" ybr="36" rotation="30"', [(48, 41), (16, 23)], [(48, 32), (48, 23), (16, 41)]),
        ('ellipse cx="32" cy="32" rx="20" ry="4" rotation="30"', [(48, 41), (16, 23)], [(48, 32), (48, 23), (16, 41)]),
        ('ellipse cx="32" cy="32" rx="20" ry="4" rotation="90"', [(32, 50), (32, 14)], [(50, 32), (14, 32)]),
        ('box xtl="12" ytl="28" xbr="52" ybr="36"', [(50, 32), (14, 32)], [(48, 41), (16, 23)]),
    ],
)
def test_cvat_boxes_and_ellipses_are_turned_clockwise_about_their_centre(tmp_path, shape, inside, outside):
    tool_exports.cvat(tmp_path)
    path = tmp_path / "annotations.xml"
    mask = path.read_text().partition("<mask")[2].partition("</mask>")[0]
    path.write_text(path.read_text().replace(f"<mask{mask}</mask>", f'<{shape} label="dirt"/>'))
    sample = open_reader(_source("cvat", tmp_path)).read(0)
    (dirt,) = (s for s in sample.annotation.segments if s.category_id == 1)
    pixels = sample.annotation.inst[dirt.layer] == dirt.id
    assert all(pixels[y, x] for x, y in inside)
    assert not any(pixels[y, x] for x, y in outside)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotations>&x;</annotations>', "DOCTYPE"),
        ("<a>" * 99 + "</a>" * 99, "deeper than"),
        ("<annotations>", "not valid XML"),
        ("<annotations><track/></annotations>", "is a video export"),
    ],
)
def test_hostile_or_foreign_xml_is_refused(tmp_path, text, message):
    tool_exports.cvat(tmp_path)
    (tmp_path / "annotations.xml").write_text(text)
    with pytest.raises(DataError, match=message):
        open_reader(_source("cvat", tmp_path))


@pytest.mark.parametrize("runs", ["0, 99", "-1, 101", "1, x", "", "nan, 100", "0.5, 99.5"])
def test_damaged_cvat_masks_are_refused(tmp_path, runs):
    tool_exports.cvat(tmp_path)
    path = tmp_path / "annotations.xml"
    path.write_text(path.read_text().replace("0, 100", runs))
    with pytest.raises(DataError, match=r"6 annotations cannot be used"):
        open_reader(_source("cvat", tmp_path))


@pytest.mark.parametrize("change", [('left="45"', 'left="900"'), ('width="64"', 'width="9999999999"')])
def test_cvat_masks_outside_their_image_are_unusable(tmp_path, change):
    tool_exports.cvat(tmp_path)
    path = tmp_path / "annotations.xml"
    path.write_text(path.read_text().replace(*change))
    reader = open_reader(_source("cvat", tmp_path), skip_bad=True)
    assert len(reader.unusable) == 6


def test_invalid_field_of_a_shape_is_named(tmp_path):
    tool_exports.cvat(tmp_path)
    path = tmp_path / "annotations.xml"
    path.write_text(path.read_text().replace('left="45"', 'left="far"'))
    with pytest.raises(DataError, match=r"shape 1 \(mask\) has an invalid field: left is 'far', not a whole number"):
        open_reader(_source("cvat", tmp_path))


def test_cvat_mask_of_a_huge_stated_size_is_refused_before_allocation(tmp_path):
    tool_exports.cvat(tmp_path)
    path = tmp_path / "annotations.xml"
    side = 10**6
    hostile = path.read_text().replace('width="64" height="64"', f'width="{side}" height="{side}"')
    hostile = hostile.replace('rle="0, 100"', f'rle="0, {side**2}"').replace(
        'width="10" height="10"', f'width="{side}" height="{side}"'
    )
    assert str(side**2) in hostile
    path.write_text(hostile)
    with pytest.raises(DataError, match=r"of 1000000 x 1000000 pixels; the limit is"):
        open_reader(_source("cvat", tmp_path))


def test_image_list_with_invalid_utf8_is_refused(tmp_path):
    tool_exports.voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_bytes(b"im0\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"train.txt: its image \S+ is not in .*JPEGImages"):
        open_reader(_source("voc", tmp_path))


@pytest.mark.parametrize("points", [[[500, 500], [510, 510]], [[-50, -50], [4, 4]], [[1e300, 1], [4, 4]]])
def test_labelme_mask_outside_its_image_is_unusable(tmp_path, points):
    tool_exports.labelme(tmp_path)
    path = tmp_path / "im0.json"
    document = json.loads(path.read_text())
    document["shapes"][1]["points"] = points
    path.write_text(json.dumps(document))
    assert len(open_reader(_source("labelme", tmp_path), skip_bad=True).unusable) == 1


@pytest.mark.parametrize("mask", ["iVBÖ", "iVB", "AAAA", None])
def test_labelme_mask_that_is_no_png_is_unusable(tmp_path, mask):
    tool_exports.labelme(tmp_path)
    path = tmp_path / "im0.json"
    document = json.loads(path.read_text())
    document["shapes"][1]["mask"] = mask
    path.write_text(json.dumps(document))
    (fault,) = open_reader(_source("labelme", tmp_path), skip_bad=True).unusable
    assert "has a mask that is not a grey PNG" in fault.message


@pytest.mark.parametrize("kind", ["labelme", "yolo_seg"])
@pytest.mark.parametrize("copy", [".ipynb_checkpoints/im0-checkpoint", "._im0"])
def test_hidden_copies_of_annotations_change_neither_reader_nor_fingerprint(tmp_path, kind, copy):
    tool_exports.EXPORTS[kind](tmp_path)
    source = _source(kind, tmp_path)
    keys, fingerprint = open_reader(source).keys, source_fingerprint(source)
    original = tmp_path / ("im0.json" if kind == "labelme" else "labels/train/im0.txt")
    hidden = original.parent / (copy + original.suffix)
    hidden.parent.mkdir(exist_ok=True)
    hidden.write_text(original.read_text())
    assert (open_reader(source).keys, source_fingerprint(source)) == (keys, fingerprint)


@pytest.mark.parametrize("kind", ["labelme", "yolo_seg"])
def test_linked_subfolders_of_an_export_are_read(tmp_path, kind):
    folder, elsewhere = tmp_path / "set", tmp_path / "disk"
    for export in (folder, elsewhere):
        export.mkdir()
        tool_exports.EXPORTS[kind](export)
    source = _source(kind, folder)
    number, fingerprint = len(open_reader(source).keys), source_fingerprint(source)
    for name in {"labelme": ("",), "yolo_seg": ("images/train", "labels/train")}[kind]:
        (folder / name / "loop").symlink_to(folder / name)
        assert source_fingerprint(source) == fingerprint
        (folder / name / "siteB").symlink_to(elsewhere / name)
    reader = open_reader(source)
    assert len(reader.keys) == 2 * number
    images = [path for index in range(2 * number) for path in reader.files(index) if path.suffix == ".png"]
    assert sum("siteB" in path.parts for path in images) == number
    assert source_fingerprint(source) != fingerprint


@pytest.mark.parametrize("label", [None, "missing"])
def test_a_labelme_shape_without_a_label_is_unusable_and_defines_no_class(tmp_path, label):
    tool_exports.labelme(tmp_path)
    path = tmp_path / "im0.json"
    document = json.loads(path.read_text())
    if label is None:
        document["shapes"][1]["label"] = None
    else:
        del document["shapes"][1]["label"]
    path.write_text(json.dumps(document))
    reader = open_reader(_source("labelme", tmp_path), skip_bad=True)
    assert [category.name for category in reader.categories.categories] == ["cell", "dirt"]
    assert len(reader.unusable) == 1


def test_voc_ignores_hidden_copies_and_files_that_are_no_images(tmp_path):
    tool_exports.voc(tmp_path)
    (tmp_path / "SegmentationClass/._im0.png").write_bytes(b"resource fork")
    (tmp_path / "JPEGImages/im0.xml").write_text("<annotation/>")
    reader = open_reader(replace(_source("voc", tmp_path), image_set=None))
    assert len(reader.keys) == 6
    assert reader.files(0)[0].name == "im0.png"


def test_voc_names_a_list_without_images(tmp_path):
    tool_exports.voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(DataError, match=r"Segmentation/train\.txt names no image"):
        open_reader(_source("voc", tmp_path))


def test_voc_names_repeated_lines_of_its_list(tmp_path):
    tool_exports.voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("im0\nim1\nim0\n")
    with pytest.raises(DataError, match=r"Segmentation/train\.txt must be unique; these appear more than once: im0"):
        open_reader(_source("voc", tmp_path))


@pytest.mark.parametrize(
    "text", ["sky, clouds\ncell\n", "background;0,0,0\ncell:128,0,0::\n", "name,r,g,b\n128,0,0\ncell,1,2,3\n"]
)
def test_an_invalid_class_in_a_legend_is_not_skipped(tmp_path, text):
    """The line of a class is its id in VOC, so a skipped line would rename all classes after it."""
    tool_exports.voc(tmp_path)
    (tmp_path / "labelmap.txt").write_text(text)
    with pytest.raises(DataError, match=r"labelmap\.txt: '.*' is not a class"):
        open_reader(_source("voc", tmp_path))


def test_voc_uses_the_ids_of_its_legend(tmp_path):
    tool_exports.voc(tmp_path)
    (tmp_path / "labelmap.txt").write_text("2: dirt\n1: cell\n0: background\n")
    reader = open_reader(_source("voc", tmp_path))
    names = {category.id: category.name for category in reader.categories.categories}
    assert names == {0: "background", 1: "cell", 2: "dirt"}


def test_voc_names_two_images_of_one_map(tmp_path):
    tool_exports.voc(tmp_path)
    for name in ("im1", "unlisted"):
        (tmp_path / f"JPEGImages/{name}.jpg").touch()
        (tmp_path / f"JPEGImages/{name}.bmp").touch()
    with pytest.raises(DataError, match=r"without their endings must be unique; these appear more than once: im1$"):
        open_reader(_source("voc", tmp_path))


def test_voc_class_maps_with_16_bits_are_refused(tmp_path):
    tool_exports.voc(tmp_path)
    values = tool_exports.class_map(0).astype(np.uint16) + 256
    (tmp_path / "SegmentationClass/im0.png").write_bytes(encode_png(values))
    with pytest.raises(DataError, match=r"im0\.png: class maps have 8 bits, but this map has 16"):
        open_reader(_source("voc", tmp_path)).read(0)


def test_unknown_colours_are_refused(tmp_path):
    tool_exports.camvid(tmp_path)
    (tmp_path / "label_colors.txt").write_text("0 0 0\tVoid\n64 0 192\tdirt\n")
    with pytest.raises(DataError, match=r"\(128, 64, 128\)"):
        open_reader(_source("color_maps", tmp_path)).read(0)


def test_maps_may_have_a_suffix_and_classes_are_stuff_by_default(tmp_path):
    tool_exports.mask_pngs(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps([{"label": k, "name": str(k)} for k in range(3)]))
    source = LabelMapSource(
        images=f"{tmp_path}/images", labels=f"{tmp_path}/masks", categories=f"{tmp_path}/c.json", suffix="_mask"
    )
    reader = open_reader(source)
    assert [c.is_thing for c in reader.categories.categories] == [False] * 3
    assert len(reader.read(0).annotation.segments) == 3


def test_coco_stuff_pixels_are_ids_minus_one(tmp_path):
    tool_exports.write_image(tmp_path / "images/a.png", 0)
    (tmp_path / "maps").mkdir()
    values = np.full((64, 64), 255, np.uint8)
    values[:4] = 0
    values[4:8] = 91
    (tmp_path / "maps/a.png").write_bytes(encode_png(values))
    (tmp_path / "labels.txt").write_text("0: unlabeled\n1: person\n92: banner\n")
    source = CocoStuffSource(
        images=f"{tmp_path}/images", labels=f"{tmp_path}/maps", label_names=f"{tmp_path}/labels.txt"
    )
    person, banner = open_reader(source).read(0).annotation.segments
    assert (person.category_id, person.is_thing, banner.category_id, banner.is_thing) == (1, True, 92, False)


def _coco(tmp_path, **settings):
    tool_exports.label_studio(tmp_path)
    source = CocoInstancesSource(images=str(tmp_path), instances_json=f"{tmp_path}/result.json")
    return DatasetConfig(shards="unused", source=source, **settings)


def test_parts_share_no_image_and_together_contain_all(tmp_path):
    parts = [_coco(tmp_path, part=PartConfig(take=take, val_share=0.3)) for take in ("train", "val")]
    train, val = (set(open_dataset(part)[0].keys) for part in parts)
    assert (len(train), len(val), len(train | val)) == (4, 2, 6)
    assert len({dataset_fingerprint(part) for part in parts}) == 2
    with pytest.raises(DataError, match="at least 2 groups"):
        open_dataset(_coco(tmp_path, part=PartConfig(take="val", group="images")))


def test_a_background_makes_instances_panoptic(tmp_path):
    reader, _ = open_dataset(_coco(tmp_path, background="ground"))
    sample = reader.read(0)
    seg = [(s.area, s.is_thing) for s in sample.annotation.segments if s.map == "seg"]
    assert seg == [(484, True), (100, True), (64 * 64 - 584, False)]
    assert sum(s.map == "inst" for s in sample.annotation.segments) == 2


def test_large_images_are_cut_into_tiles(tmp_path):
    reader, _ = open_dataset(_coco(tmp_path, background="ground", tiles=TileConfig(above_megapixels=0.001, side=32)))
    assert len(reader.keys) == 24
    tiles = reader.subset([3, 4, 5, 6, 7])
    samples = [tiles.read(i) for i in range(1, 5)]
    assert "_y0_x0" in samples[0].key
    assert {(sample.height, sample.width) for sample in samples} == {(32, 32)}
    whole_image = reader.reader.read(1)
    areas = [s.area for sample in samples for s in sample.annotation.segments if s.map == "inst"]
    assert sum(areas) == sum(s.area for s in whole_image.annotation.segments if s.map == "inst")
    rows = [np.concatenate([_category_map(s) for s in samples[i : i + 2]], axis=1) for i in (0, 2)]
    assert np.array_equal(np.concatenate(rows), _category_map(whole_image))


def test_tiles_of_an_image_that_is_annotated_as_stored_ignore_its_exif_orientation(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # turn by 90 degrees
    coco = CocoSet(tmp_path)
    jpeg = coco.files["a.jpg"]
    coco.files["a.jpg"] = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    whole = coco.read_instances()
    tiles = TileConfig(above_megapixels=0.0001, side=10)
    reader, _ = open_dataset(DatasetConfig(shards="unused", source=coco.instances_source, tiles=tiles))
    samples = [reader.read(index) for index in range(len(reader.keys))]
    pixels = decode_rgb(whole.image)
    blocks = {pixels[y : y + 10, x : x + 10].tobytes() for y in (0, 10) for x in (0, 10, 20)}
    assert {decode_rgb(sample.image).tobytes() for sample in samples} == blocks
    area = sum(np.count_nonzero(sample.annotation.inst) for sample in samples)
    assert area == np.count_nonzero(whole.annotation.inst)


def _category_map(sample):
    ids = {s.id: s.category_id for s in sample.annotation.segments if s.map == "seg"}
    return np.vectorize(ids.__getitem__)(sample.annotation.seg)
