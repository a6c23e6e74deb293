from __future__ import annotations

import json
import pickle

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from data_pipeline.categories import Category, CategoryTable
from data_pipeline.config import CocoInstancesSource, CocoPanopticSource
from data_pipeline.errors import DataError
from data_pipeline.image_file import encode_png
from data_pipeline.readers import open_reader, source_fingerprint
from data_pipeline.readers.masks import _decompress, stack_layers

H, W = 20, 30
IDS = (5, 70_000)
POLYGON = [2.0, 2.0, 12.0, 2.0, 12.0, 9.0, 2.0, 9.0]


def _mask(top, left, bottom, right):
    mask = np.zeros((H, W), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def _rle(mask, compressed=True):
    if compressed:
        rle = coco_mask.encode(np.asfortranarray(mask))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.ravel(order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return {"size": [H, W], "counts": np.diff([0, *starts, flat.size]).tolist()}


class CocoSet:
    """A tiny data set on disk that tests break on purpose before they read it."""

    def __init__(self, root):
        self.root = root
        self.images = [{"id": 40, "file_name": "a.jpg", "height": H, "width": W}]
        self.categories = [
            {"id": 3, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
            {"id": 90, "name": "sky", "isthing": 0},
        ]
        self.panoptic = [
            {
                "image_id": 40,
                "file_name": "a.png",
                "segments_info": [
                    {"id": IDS[0], "category_id": 90, "area": 400, "bbox": [0, 0, W, H], "iscrowd": 0},
                    {"id": IDS[1], "category_id": 3, "area": 50, "bbox": [5, 4, 10, 5], "iscrowd": 1},
                ],
            }
        ]
        self.instances = [
            {"id": 1, "image_id": 40, "category_id": 3, "area": 70.5, "bbox": [2, 2, 10, 7], "iscrowd": 0}
            | {"segmentation": [POLYGON]},
            {"id": 2, "image_id": 40, "category_id": 3, "area": 60, "bbox": [8, 5, 6, 10], "iscrowd": 0}
            | {"segmentation": _rle(_mask(5, 8, 15, 14))},
            {"id": 3, "image_id": 40, "category_id": 3, "area": 40, "bbox": [20, 0, 10, 4], "iscrowd": 1}
            | {"segmentation": _rle(_mask(0, 20, 4, 30), compressed=False)},
        ]
        self.ids = np.full((H, W), IDS[0], np.uint32)
        self.ids[4:9, 5:15] = IDS[1]
        self.ids[19] = 0
        pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
        self.files = {"a.jpg": cv2.imencode(".jpg", pixels)[1].tobytes()}

    def write(self):
        for folder in ("images", "masks"):
            (self.root / folder).mkdir(exist_ok=True)
        for name, data in self.files.items():
            (self.root / "images" / name).write_bytes(data)
        rgb = np.stack([self.ids & 255, self.ids >> 8 & 255, self.ids >> 16], axis=-1)
        (self.root / "masks" / "a.png").write_bytes(encode_png(rgb.astype(np.uint8)))
        for name in ("panoptic", "instances"):
            document = {"images": self.images, "categories": self.categories, "annotations": getattr(self, name)}
            (self.root / f"{name}.json").write_text(json.dumps(document))

    @property
    def panoptic_source(self):
        root = str(self.root)
        return CocoPanopticSource(
            images=f"{root}/images", panoptic_json=f"{root}/panoptic.json", panoptic_masks=f"{root}/masks"
        )

    @property
    def instances_source(self):
        return CocoInstancesSource(images=f"{self.root}/images", instances_json=f"{self.root}/instances.json")

    def read_panoptic(self, **options):
        self.write()
        return open_reader(self.panoptic_source, **options).read(0)

    def read_instances(self, **options):
        self.write()
        return open_reader(self.instances_source, **options).read(0)


@pytest.fixture
def coco(tmp_path):
    return CocoSet(tmp_path)


def test_panoptic_sample(coco):
    sample = coco.read_panoptic()
    assert (sample.key, sample.image_id, sample.source) == ("a", 40, "images/a.jpg")
    assert sample.image == coco.files["a.jpg"]
    sky, cat = sample.annotation.segments
    assert (sky.id, sky.category_id, sky.is_thing, sky.is_crowd, sky.source_id) == (1, 90, False, False, 5)
    assert (cat.id, cat.category_id, cat.is_thing, cat.is_crowd, cat.source_id) == (2, 3, True, True, 70_000)
    assert (cat.area, cat.bbox, cat.map) == (50.0, (5.0, 4.0, 10.0, 5.0), "seg")
    assert np.array_equal(sample.annotation.seg == 2, coco.ids == IDS[1])
    assert np.array_equal(sample.annotation.seg == 0, coco.ids == 0)
    assert sample.annotation.inst is None


def test_area_and_box_come_from_the_pixels_where_the_file_has_none(coco):
    del coco.panoptic[0]["segments_info"][1]["area"]
    coco.panoptic[0]["segments_info"][1]["bbox"] = []
    cat = coco.read_panoptic().annotation.segments[1]
    assert (cat.area, cat.bbox) == (50.0, (5, 4, 10, 5))


def test_instances_sample(coco):
    sample = coco.read_instances()
    annotation = sample.annotation
    assert annotation.seg is None
    assert annotation.inst.shape == (2, H, W)  # the first two overlap, the crowd fits beside the first
    assert [(s.id, s.layer, s.is_crowd, s.source_id) for s in annotation.segments] == [
        (1, 0, False, 1),
        (2, 1, False, 2),
        (3, 0, True, 3),
    ]
    assert annotation.segments[0].area == 70.5
    polygon = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([POLYGON], H, W)))
    assert [segment.polygons for segment in annotation.segments] == [(tuple(POLYGON),), None, None]
    for segment, mask in zip(annotation.segments, (polygon, _mask(5, 8, 15, 14), _mask(0, 20, 4, 30)), strict=True):
        assert np.array_equal(annotation.inst[segment.layer] == segment.id, mask.astype(bool))


def test_panoptic_with_instances(coco):
    coco.write()
    source = CocoPanopticSource(
        **{f: getattr(coco.panoptic_source, f) for f in ("images", "panoptic_json", "panoptic_masks")},
        instances_json=coco.instances_source.instances_json,
    )
    annotation = open_reader(source).read(0).annotation
    assert annotation.seg is not None
    assert annotation.inst.shape == (2, H, W)
    assert [s.map for s in annotation.segments] == ["seg"] * 2 + ["inst"] * 3
    coco.images[0]["id"] = coco.instances[0]["image_id"] = 41
    coco.instances = coco.instances[:1]
    (coco.root / "instances.json").write_text(
        json.dumps({"images": coco.images, "annotations": coco.instances, "categories": coco.categories})
    )
    with pytest.raises(DataError, match=r"instances.json lacks 1 images.*40"):
        open_reader(source)


def test_images_without_objects_are_kept(coco):
    coco.instances = []
    annotation = coco.read_instances().annotation
    assert annotation.segments == ()
    assert annotation.inst.shape == (1, H, W)
    assert not annotation.inst.any()


def test_more_than_254_instances_need_16_bits(coco):
    coco.instances = [
        coco.instances[1] | {"id": i, "segmentation": _rle(_mask(i // W, i % W, i // W + 1, i % W + 1))}
        for i in range(300)
    ]
    annotation = coco.read_instances().annotation
    assert annotation.inst.dtype == np.uint16
    assert annotation.inst.max() == 300


def test_a_mask_without_pixels_keeps_its_segment(coco):
    coco.instances = [coco.instances[1] | {"segmentation": _rle(_mask(0, 0, 0, 0)), "area": 0.3, "bbox": None}]
    annotation = coco.read_instances().annotation
    assert [(s.id, s.area, s.bbox) for s in annotation.segments] == [(1, 0.3, (0, 0, 0, 0))]
    assert not annotation.inst.any()


def test_layers_are_first_fit():
    masks = [_mask(0, 0, 5, 5), _mask(3, 3, 8, 8), _mask(7, 7, 9, 9), _mask(4, 4, 9, 9), _mask(0, 20, 2, 22)]
    layers, layer_of, measured = stack_layers(masks, len(masks), H, W)
    assert layer_of == [0, 1, 0, 2, 0]
    assert measured[1] == (25, (3, 3, 5, 5))
    for number, (mask, layer) in enumerate(zip(masks, layer_of, strict=True), start=1):
        assert np.array_equal(layers[layer] == number, mask.astype(bool))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_compressed_run_lengths_are_those_of_the_mask(seed, density):
    mask = (np.random.default_rng(seed).random((13, 300)) < density).astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    edges = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0))
    assert _decompress(rle["counts"].decode()).tolist() == np.diff([0, *edges.tolist(), mask.size]).tolist()


def test_readers_are_picklable_and_subsets_keep_their_samples(coco):
    coco.images.append({"id": 41, "file_name": "b.jpg", "height": H, "width": W})
    coco.files["b.jpg"] = coco.files["a.jpg"]
    coco.write()
    reader = open_reader(coco.instances_source)
    assert reader.keys == ("a", "b")
    part = pickle.loads(pickle.dumps(reader.subset([1])))
    assert part.keys == ("b",)
    assert part.read(0).image_id == 41
    assert part.source(0) == "images/b.jpg"
    assert part.size_hint(0) > len(coco.files["b.jpg"])


def test_names_become_safe_keys(coco):
    coco.images = [
        {"id": i, "file_name": name, "height": H, "width": W}
        for i, name in enumerate(
            ("img.v1.3.jpg", "img-v1-3.jpg", "train/x.jpg", "\u00e9t\u00e9.jpg", "l" * 150 + ".jpg")
        )
    ]
    coco.instances = []
    coco.write()
    keys = open_reader(coco.instances_source).keys
    assert keys[1] == "img-v1-3"
    assert len(set(keys)) == 5
    for key in keys:
        assert key.isascii()
        assert len(key) <= 80
        assert not set(key) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def test_the_fingerprint_follows_the_annotations_not_the_place(coco, tmp_path):
    coco.write()
    before = source_fingerprint(coco.instances_source)
    (tmp_path / "moved").mkdir()
    moved = CocoSet(tmp_path / "moved")
    moved.write()
    assert source_fingerprint(moved.instances_source) == before
    assert source_fingerprint(moved.panoptic_source) != before
    moved.instances[0]["category_id"] = 90
    moved.write()
    assert source_fingerprint(moved.instances_source) != before


# Faults that the annotation files show at once.


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
    return r"category ids that `categories` does not define: 17 \(1 times\)"


def _repeated_image_id(coco):
    coco.images.append(coco.images[0] | {"file_name": "b.jpg"})
    return r"image ids must be unique; these appear more than once: 40"


def _same_key(coco):
    coco.images.append({"id": 41, "file_name": "a.png", "height": H, "width": W})
    return r"a.jpg and a.png would have the same key 'a'"


def _stray_annotation(coco):
    coco.panoptic.append(coco.panoptic[0] | {"image_id": 99})
    coco.instances.append(coco.instances[0] | {"image_id": 99, "id": 9})
    return r"1 annotations belong to images that it does not list: 99"


def _missing_size(coco):
    del coco.images[0]["width"]
    return r"images\[0\] has no field 'width'"


def _senseless_size(coco):
    coco.images[0]["width"] = "wide"
    return r"images\[0\]: width is 'wide', not a whole number"


def _path_outside(coco):
    coco.images[0]["file_name"] = "../../secret.jpg"
    return r"file_name '../../secret.jpg' is not a relative path"


def _senseless_id(coco):
    coco.images[0]["id"] = 1.5
    return r"images\[0\]: id is 1.5, not a whole number"


def _senseless_color(coco):
    coco.categories[0]["color"] = [1, 2, "x"]
    return r"categories\[0\]: color is \[1, 2, 'x'\], not three whole numbers"


def _repeated_category(coco):
    coco.categories.append(coco.categories[0])
    return r"category ids must be unique.*\[3\]"


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
            _missing_size,
            _senseless_size,
            _path_outside,
            _repeated_category,
            _senseless_id,
            _senseless_color,
        )
    ],
)
def test_faults_of_the_annotation_files(coco, fault, kind):
    words = fault(coco)
    coco.write()
    with pytest.raises(DataError, match=words):
        open_reader(getattr(coco, f"{kind}_source"))


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
def test_files_that_are_no_annotations(coco, kind):
    source = getattr(coco, f"{kind}_source")
    with pytest.raises(DataError, match=r"images does not exist or is no folder; check the paths"):
        open_reader(source)
    coco.write()
    path = coco.root / f"{kind}.json"
    for content, words in (("{", "is not valid JSON"), ("[]", "has no list images, annotations, categories")):
        path.write_text(content)
        with pytest.raises(DataError, match=f"{kind}.json {words}"):
            open_reader(source)
    path.unlink()
    with pytest.raises(DataError, match=rf"{kind}.json does not exist or is no file"):
        open_reader(source)


def test_every_panoptic_image_needs_one_entry(coco):
    coco.images.append({"id": 41, "file_name": "b.jpg", "height": H, "width": W})
    coco.write()
    with pytest.raises(DataError, match=r"every image needs one entry.*none or several: 41"):
        open_reader(coco.panoptic_source)


def test_ids_may_be_names(coco):
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


def test_repeated_segment_and_annotation_ids(coco):
    coco.panoptic[0]["segments_info"][0]["id"] = IDS[1]
    coco.instances[0]["id"] = 2
    coco.write()
    with pytest.raises(DataError, match=r"image 40: segment ids must be unique.*70000"):
        open_reader(coco.panoptic_source)
    with pytest.raises(DataError, match=r"annotation ids must be unique.*2"):
        open_reader(coco.instances_source)


# Faults that only the images and masks show.


def _truncated_image(coco):
    coco.files["a.jpg"] = coco.files["a.jpg"][:-30]
    return r"images/a.jpg: the JPEG file is cut off"


def _image_of_another_size(coco):
    coco.files["a.jpg"] = cv2.imencode(".jpg", np.zeros((H, W + 1, 3), np.uint8))[1].tobytes()
    return r"images/a.jpg: the image is 31 x 20 pixels, its annotation 30 x 20"


def _deep_image(coco):
    coco.files["a.jpg"] = encode_png(np.zeros((H, W), np.uint16))
    return r"images/a.jpg: 16-bit images are not supported; convert it"


def _missing_image(coco):
    coco.files.clear()
    return r"images/a.jpg does not exist; the annotations refer to it"


def _no_image(coco):
    coco.files["a.jpg"] = b"<html>404</html>"
    return r"images/a.jpg: it is neither a JPEG nor a PNG"


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
@pytest.mark.parametrize(
    "fault",
    [_fault(f) for f in (_truncated_image, _image_of_another_size, _deep_image, _missing_image, _no_image)],
)
def test_faults_of_images(coco, fault, kind):
    words = fault(coco)
    with pytest.raises(DataError, match=words):
        getattr(coco, f"read_{kind}")()


def test_huge_images_are_refused_before_decoding(coco, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"a.jpg: 30 x 20 pixels are more than max_pixels \(599\)"):
        coco.read_instances(max_pixels=599)


def test_faults_of_panoptic_masks(coco):
    coco.ids[0, 0] = 12345
    with pytest.raises(DataError, match=r"masks/a.png: pixels have ids that its JSON entry does not list: 12345"):
        coco.read_panoptic()
    coco.ids[coco.ids != IDS[0]] = IDS[0]
    with pytest.raises(DataError, match=r"masks/a.png: its JSON entry lists segments without a pixel: 70000"):
        coco.read_panoptic()
    coco.ids = coco.ids[:, :-2]
    with pytest.raises(DataError, match=r"masks/a.png: the mask is 28 x 20 pixels, the image 30 x 20"):
        coco.read_panoptic()
    coco.ids = np.full((H, W), IDS[0], np.uint32)
    coco.panoptic[0]["segments_info"][1]["id"] = 1 << 24
    with pytest.raises(DataError, match="16777216"):
        coco.read_panoptic()
    (coco.root / "masks" / "a.png").write_bytes(coco.files["a.jpg"])
    with pytest.raises(DataError, match=r"masks/a.png: panoptic ids must be a PNG"):
        open_reader(coco.panoptic_source).read(0)


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([], "has no usable `segmentation`"),
        (None, "has no usable `segmentation`"),
        ([[1.0, 2.0, 3.0, 4.0]], "an even number of at least 6 coordinates"),
        ([POLYGON[:-1]], "an even number of at least 6 coordinates"),
        ({"size": [W, H], "counts": "abc"}, "its RLE is 20 x 30, the image 30 x 20"),
        ({"size": [H, W], "counts": [1, 2, 3]}, "do not add up to 30 x 20 pixels"),
        ({"size": [H, W], "counts": [-1, H * W + 1]}, "do not add up"),
        ({"size": [H, W], "counts": [1, "x"]}, "its RLE is damaged"),
        ({"size": [H, W], "counts": "zzzz"}, "its RLE is damaged"),
        ({"size": [H, W], "counts": ""}, "its RLE is damaged"),
        ({"size": [H, W], "counts": "\u00e9"}, "its RLE is damaged"),
        ({"size": [H, W], "counts": 5}, "its RLE is damaged"),
        ({"size": [H, W], "counts": _rle(_mask(5, 8, 15, 14))["counts"][:-2]}, "do not add up"),
        ({"size": [H, W], "counts": _rle(np.ones((H + 1, W), np.uint8))["counts"]}, "do not add up"),
    ],
)
def test_faults_of_segmentations(coco, segmentation, words):
    coco.instances[1]["segmentation"] = segmentation
    with pytest.raises(DataError, match=f"images/a.jpg: annotation 2.*{words}"):
        coco.read_instances()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"area": float("nan")}, "area is nan; it must be a finite number"),
        ({"area": -1}, "area is -1; it must be"),
        ({"area": "large"}, "area is large; it must be"),
        ({"bbox": [0, 0, float("inf"), 1]}, r"bbox is \[0, 0, inf, 1\], not four finite numbers"),
        ({"bbox": [0, 0, 1]}, r"bbox is \[0, 0, 1\], not four"),
        ({"segmentation": [[0.0, 0.0, 5.0, 0.0, 1e12, 5.0]]}, "coordinates far outside the 30 x 20 pixels"),
        ({"segmentation": [[0.0, 0.0, 5.0, 0.0, float("nan"), 5.0]]}, "coordinates far outside"),
        ({"segmentation": [[0.0, 0.0, 5.0, 0.0, "x", 5.0]]}, "coordinates far outside"),
    ],
)
def test_senseless_numbers(coco, change, words):
    coco.instances[1] |= change
    with pytest.raises(DataError, match=f"images/a.jpg: annotation 2.*{words}"):
        coco.read_instances()
    if "segmentation" not in change:
        coco.panoptic[0]["segments_info"][1] |= change
        with pytest.raises(DataError, match=f"masks/a.png: segment 70000.*{words}"):
            coco.read_panoptic()


def test_segments_and_flags_must_be_what_they_are_called(coco):
    coco.categories[0]["isthing"] = "0"
    with pytest.raises(DataError, match=r"panoptic.json: categories\[0\]: isthing is '0'; it must be 0 or 1"):
        coco.read_panoptic()
    coco.categories[0]["isthing"] = 1
    coco.panoptic[0]["segments_info"] = None
    with pytest.raises(DataError, match=r"annotation of image 40: segments_info is not a list"):
        coco.read_panoptic()
    coco.panoptic[0]["segments_info"] = []
    coco.write()
    (coco.root / "masks" / "a.png").write_bytes(encode_png(np.zeros((H, W), np.uint8)))
    with pytest.raises(DataError, match=r"a.png: this map holds its ids in three 8-bit channels"):
        open_reader(coco.panoptic_source).read(0)


def test_very_many_categories_are_checked_in_linear_time():
    table = [Category(i, str(i), True, (0, 0, 0)) for i in range(10**5)]
    with pytest.raises(DataError, match=r"category ids must be unique.*\[7\]"):
        CategoryTable((*table, table[7]))


def test_boxes_alone_are_refused(coco):
    del coco.instances[1]["segmentation"]
    coco.write()
    with pytest.raises(DataError, match="annotation 2 has no segmentation; boxes alone"):
        open_reader(coco.instances_source)
