from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_reader
from tests.data_pipeline.coco_set import IDS, POLYGON, CocoSet, H, W, mask_of, rle_of


@pytest.fixture
def coco(tmp_path):
    return CocoSet(tmp_path)


# Faults found when the annotation files are opened.


def _fault(function):
    return pytest.param(function, id=function.__name__.strip("_"))


def _no_images(coco):
    coco.images.clear()
    coco.panoptic.clear()
    coco.instances.clear()
    return r"json lists no image; the data set is empty"


def _unknown_category(coco):
    coco.panoptic[0]["segments_info"][0]["category_id"] = 17
    coco.instances[0]["category_id"] = 17
    return r"1 annotation cannot be used. Correct .* --skip-bad:\n.*category_id is 17, which `categories` does not"


def _repeated_image_id(coco):
    coco.images.append(coco.images[0] | {"file_name": "b.jpg"})
    return r"image ids must be unique; these appear more than once: 40"


def _same_key(coco):
    coco.images.append({"id": 41, "file_name": "a.png", "height": H, "width": W})
    return r"a.jpg and a.png would have the same key 'a'"


def _stray_annotation(coco):
    coco.panoptic.append(coco.panoptic[0] | {"image_id": 99})
    coco.instances.append(coco.instances[0] | {"image_id": 99, "id": 9})
    return r"1 annotation cannot be used.*\n.*annotations\[\d\] belongs to image 99, which `images` does not list"


def _invalid_size(coco):
    coco.images[0]["width"] = "wide"
    return r"images\[0\]: width is 'wide', not a whole number"


def _path_outside(coco):
    coco.images[0]["file_name"] = "../../secret.jpg"
    return r"file_name: the name '../../secret.jpg' is not a path inside its folder"


def _invalid_id(coco):
    coco.images[0]["id"] = 1.5
    return r"images\[0\]: id is 1.5, not a whole number"


def _invalid_color(coco):
    coco.categories[0]["color"] = [1, 2, "x"]
    return r"categories\[0\]: color is \[1, 2, 'x'\], not three whole numbers"


def _repeated_category(coco):
    coco.categories.append(coco.categories[0])
    return r"category ids must be unique.*3: cat, cat"


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
@pytest.mark.parametrize(
    "fault",
    [
        _fault(f)
        for f in (
            _no_images,
            _unknown_category,
            _repeated_image_id,
            _same_key,
            _stray_annotation,
            _invalid_size,
            _path_outside,
            _repeated_category,
            _invalid_id,
            _invalid_color,
        )
    ],
)
def test_invalid_annotation_files_are_refused(coco, fault, kind):
    message = fault(coco)
    coco.write()
    with pytest.raises(DataError, match=message):
        open_reader(getattr(coco, f"{kind}_source"))


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
def test_missing_or_invalid_json_files_are_refused(coco, kind):
    source = getattr(coco, f"{kind}_source")
    with pytest.raises(DataError, match=r"(images|panoptic.json) does not exist or is not a f.*; check the paths"):
        open_reader(source)
    coco.write()
    path = coco.root / f"{kind}.json"
    for content, message in (("{", "is not valid JSON"), ("[]", "has no list images, annotations, categories")):
        path.write_text(content)
        with pytest.raises(DataError, match=f"{kind}.json {message}"):
            open_reader(source)
    path.unlink()
    with pytest.raises(DataError, match=rf"{kind}.json does not exist or is not a file"):
        open_reader(source)


def test_an_annotation_file_that_may_not_be_read_is_named(coco, monkeypatch):
    def refuse(*_, **__):  # root, who runs the tests, may read every file
        raise PermissionError(13, "Permission denied")

    coco.write()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"panoptic\.json cannot be read: Permission denied"):
        open_reader(coco.panoptic_source)


def test_panoptic_image_without_an_entry_is_refused(coco):
    coco.images.append({"id": 41, "file_name": "b.jpg", "height": H, "width": W})
    coco.write()
    with pytest.raises(DataError, match=r"every image needs exactly one entry.*none or several: 41"):
        open_reader(coco.panoptic_source)


def test_instances_of_an_invalid_or_unlisted_image_are_reported_beside_panoptic_annotations(coco):
    coco.instances += [coco.instances[0] | {"id": 8, "image_id": None}, coco.instances[0] | {"id": 9, "image_id": 99}]
    coco.write()
    source = replace(coco.panoptic_source, instances_json=f"{coco.root}/instances.json")
    reader = open_reader(source, skip_bad=True)
    assert [entry.message[:14] for entry in reader.unusable] == ["annotations[3]", "annotations[4]"]
    assert len(reader.read(0).annotation.segments) == 5


def test_image_ids_may_be_strings(coco):
    coco.images = [coco.images[0] | {"id": "berlin_1", "file_name": "b.jpg"}, coco.images[0] | {"id": "ulm_2"}]
    coco.panoptic = [coco.panoptic[0] | {"image_id": name} for name in ("ulm_2", "berlin_1")]
    coco.instances = [coco.instances[0] | {"image_id": "ulm_2"}]
    sample = (coco.write(), open_reader(coco.panoptic_source).read(1))[1]
    assert (sample.key, sample.image_id) == ("a", 1), "the position where ids are no numbers"
    assert [len(group) for _, group in open_reader(coco.instances_source).records] == [0, 1]
    coco.images[0]["id"] = coco.panoptic[1]["image_id"] = "000007"
    coco.images[1]["id"] = 8
    coco.panoptic[0]["image_id"] = "8"
    coco.write()
    assert [record.image.id for record in open_reader(coco.panoptic_source).records] == [7, 8]


def test_repeated_segment_ids_are_refused(coco):
    coco.panoptic[0]["segments_info"][0]["id"] = IDS[1]
    coco.write()
    with pytest.raises(DataError, match=r"2 annotations cannot.*\n.*image 40, segment 70000: 2 segments have this id"):
        open_reader(coco.panoptic_source)


# Faults found only when an image or mask is read.


def _truncated_image(coco):
    coco.files["a.jpg"] = coco.files["a.jpg"][:-30]
    return r"images/a.jpg: the JPEG file is truncated"


def _image_of_another_size(coco):
    coco.files["a.jpg"] = cv2.imencode(".jpg", np.zeros((H, W + 1, 3), np.uint8))[1].tobytes()
    return r"images/a.jpg: the image is 31 x 20 pixels, but its annotation is 30 x 20"


def _missing_image(coco):
    coco.files.clear()
    return r"images/a.jpg does not exist; the annotations refer to it"


def _no_image(coco):
    coco.files["a.jpg"] = b"<html>404</html>"
    return r"images/a.jpg: it is not a JPEG, PNG, TIFF"


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
@pytest.mark.parametrize(
    "fault",
    [_fault(f) for f in (_truncated_image, _image_of_another_size, _missing_image, _no_image)],
)
def test_invalid_images_are_refused(coco, fault, kind):
    message = fault(coco)
    with pytest.raises(DataError, match=message):
        getattr(coco, f"read_{kind}")()


def test_huge_images_are_refused_before_decoding(coco, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"a.jpg: 30 x 20 pixels exceed max_pixels \(599\)"):
        coco.read_instances(max_pixels=599)


def test_invalid_panoptic_masks_are_refused(coco):
    coco.ids[0, 0] = 12345
    with pytest.raises(DataError, match=r"masks/a.png: pixels have ids that its JSON entry does not list: 12345"):
        coco.read_panoptic()
    coco.ids[coco.ids != IDS[0]] = IDS[0]
    with pytest.raises(DataError, match=r"masks/a.png: segment 70000 is in its JSON entry but has no pixel"):
        coco.read_panoptic()
    coco.ids = coco.ids[:, :-2]
    with pytest.raises(DataError, match=r"masks/a.png: the mask is 28 x 20 pixels, but the image is 30 x 20"):
        coco.read_panoptic()
    coco.ids = np.full((H, W), IDS[0], np.uint32)
    coco.panoptic[0]["segments_info"][1]["id"] = 1 << 24
    with pytest.raises(DataError, match="16777216"):
        coco.read_panoptic()
    coco.panoptic[0]["segments_info"].pop()
    coco.write()
    (coco.root / "masks" / "a.png").write_bytes(coco.files["a.jpg"])
    with pytest.raises(DataError, match=r"masks/a.png: label maps must be PNG, TIFF or BMP"):
        open_reader(coco.panoptic_source).read(0)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "has no usable `segmentation`"),
        (None, "has no usable `segmentation`"),
        ([[1.0, 2.0, 3.0, 4.0]], "an even number of at least 6 coordinates"),
        ([POLYGON[:-1]], "an even number of at least 6 coordinates"),
        ({"size": [W, H], "counts": "abc"}, "its RLE is 20 x 30, but the image is 30 x 20"),
        ({"size": [H, W], "counts": [1, 2, 3]}, "do not add up to 30 x 20 pixels"),
        ({"size": [H, W], "counts": [-1, H * W + 1]}, "do not add up"),
        ({"size": [H, W], "counts": [1, "x"]}, "its RLE is damaged"),
        ({"size": [H, W], "counts": "zzzz"}, "its RLE is damaged"),
        ({"size": [H, W], "counts": ""}, "its RLE is damaged"),
        ({"size": [H, W], "counts": "\u00e9"}, "its RLE is damaged"),
        ({"size": [H, W], "counts": 5}, "its RLE is damaged"),
        ({"size": [H, W], "counts": rle_of(mask_of(5, 8, 15, 14))["counts"][:-2]}, "do not add up"),
        ({"size": [H, W], "counts": rle_of(np.ones((H + 1, W), np.uint8))["counts"]}, "do not add up"),
    ],
)
def test_invalid_segmentations_are_refused(coco, segmentation, message):
    coco.instances[1]["segmentation"] = segmentation
    with pytest.raises(DataError, match=f"images/a.jpg: annotation 2.*{message}"):
        coco.read_instances()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"area": float("nan")}, "area is nan; it must be a number from 0"),
        ({"area": -1}, "area is -1; it must be"),
        ({"area": "large"}, "area is 'large'; it must be"),
        ({"bbox": [0, 0, float("inf"), 1]}, r"bbox is \[0, 0, inf, 1\], not four finite numbers"),
        ({"bbox": [0, 0, 1]}, r"bbox is \[0, 0, 1\], not four"),
        ({"segmentation": [[0.0, 0.0, 5.0, 0.0, 1e12, 5.0]]}, "coordinates far outside the 30 x 20 pixels"),
        ({"segmentation": [[0.0, 0.0, 5.0, 0.0, float("nan"), 5.0]]}, "coordinates far outside"),
        ({"segmentation": [[0.0, 0.0, 5.0, 0.0, "x", 5.0]]}, "coordinates far outside"),
    ],
)
def test_invalid_numbers_are_refused(coco, change, message):
    coco.instances[1] |= change
    with pytest.raises(DataError, match=f"images/a.jpg: annotation 2.*{message}"):
        coco.read_instances()
    if "segmentation" not in change:
        coco.panoptic[0]["segments_info"][1] |= change
        with pytest.raises(DataError, match=f"masks/a.png: segment 70000.*{message}"):
            coco.read_panoptic()


def test_invalid_flags_segment_lists_and_grey_masks_are_refused(coco):
    coco.categories[0]["isthing"] = "0"
    with pytest.raises(DataError, match=r"panoptic.json: categories\[0\]: isthing is '0'; it must be 0, 1, true"):
        coco.read_panoptic()
    coco.categories[0]["isthing"] = 1
    coco.panoptic[0]["segments_info"] = None
    with pytest.raises(DataError, match=r"annotation of image 40: segments_info is not a list"):
        coco.read_panoptic()
    coco.panoptic[0]["segments_info"] = []
    coco.write()
    (coco.root / "masks" / "a.png").write_bytes(encode_png(np.zeros((H, W), np.uint8)))
    with pytest.raises(DataError, match=r"a.png: this map must store ids in three 8-bit channels"):
        open_reader(coco.panoptic_source).read(0)


def test_repeated_category_ids_are_found_in_linear_time():
    table = [Category(i, str(i), True, (0, 0, 0)) for i in range(10**5)]
    with pytest.raises(DataError, match=r"category ids must be unique.*7: 7, 7"):
        CategoryTable((*table, table[7]))


@pytest.mark.parametrize("empty", [True, False])
def test_annotations_with_only_boxes_are_refused(empty, coco):
    for entry in coco.instances:
        del entry["segmentation"]
        if empty:
            entry["segmentation"] = []
    coco.write()
    with pytest.raises(DataError, match="no annotation has a segmentation; boxes alone"):
        open_reader(coco.instances_source)
