"""Label maps in other formats than PNG: lossless ones are read exactly, others are refused."""

import io
import json
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import BrokenImageError, decode_id_map, decode_index_map, encode_png
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.sources import HuggingFaceSource, LabelMapSource
from tests.data_pipeline.coco_set import IDS, CocoSet

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (7, 9), dtype=np.uint8)
GREY_16 = RANDOM.integers(0, 65536, (7, 9), dtype=np.uint16)
COLORS = RANDOM.integers(0, 256, (7, 9, 3), dtype=np.uint8)


def encode(values, kind, palette=None, **options):
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values, bits, photometric=1):
    """Return a grey-level TIFF with `bits` bits per pixel. Rows are padded to whole bytes."""
    rows = np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(len(values), -1)
    data = np.packbits(rows, axis=1).tobytes()
    height, width = values.shape
    fields = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    fields += [(278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(fields)) + entries + b"\0" * 4


def bmp(values, palette):
    """Return an 8-bit BMP whose palette contains these grey levels."""
    data = b"".join(row.tobytes() + b"\0" * (-len(row) % 4) for row in values[::-1])
    colors = b"".join(bytes((grey, grey, grey, 0)) for grey in palette)
    header = struct.pack("<IiiHHIIiiII", 40, values.shape[1], len(values), 1, 8, 0, 0, 0, 0, len(palette), 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(colors) + len(data), 0, 0, 54 + len(colors)) + header + colors + data


SHUFFLED_PALETTE = RANDOM.permutation(768).astype(np.uint8).tobytes()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd"])
@pytest.mark.parametrize("values", [GREY, GREY_16], ids=["8 bits", "16 bits"])
def test_tiff_without_loss_is_read_exactly(values, compression):
    decoded = decode_index_map(encode(values, "TIFF", compression=compression))
    assert decoded.dtype == values.dtype
    np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (encode(GREY, "TIFF", SHUFFLED_PALETTE), GREY),
        (encode(GREY, "BMP", SHUFFLED_PALETTE), GREY),
        (encode(GREY, "BMP"), GREY),
        (encode(GREY > 127, "BMP"), GREY > 127),
        (bmp(GREY % 3, [0, 1, 2]), GREY % 3),
        (bmp(GREY, range(255, -1, -1)), GREY),
        *((tiff(GREY & 2**bits - 1, bits), GREY & 2**bits - 1) for bits in (1, 2, 4, 8)),
        (cv2.imencode(".tif", GREY_16)[1].tobytes(), GREY_16),
        (encode_png(GREY_16), GREY_16),
    ],
)
def test_palette_maps_are_read_as_indices(data, values):
    np.testing.assert_array_equal(decode_index_map(data), values)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PNG"])
def test_colours_are_read_as_ids(kind):
    red, green, blue = np.moveaxis(COLORS.astype(np.uint32), -1, 0)
    np.testing.assert_array_equal(decode_id_map(encode(COLORS, kind)), red + 256 * green + 65536 * blue)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(GREY, "JPEG"), "must be PNG, TIFF or BMP; JPEG and WebP change values"),
        (encode(COLORS, "WEBP", lossless=True), "must be PNG, TIFF or BMP"),
        (encode(GREY, "TIFF", compression="jpeg"), "jpeg compression may change the values"),
        (tiff(GREY, 8, photometric=0), "in which white is 0"),
        (bmp(GREY % 2, [0, 255]), "two greys in its palette"),
        (encode(COLORS, "TIFF"), "must be grey or have a palette"),
        (encode(np.dstack([COLORS, GREY]), "TIFF"), "this is RGBA"),
        (cv2.imencode(".tif", np.dstack([GREY_16] * 3))[1].tobytes(), "a map must be 8-bit or 16-bit grey"),
        (encode(GREY.astype(np.int32), "TIFF"), "no defined value range"),
        (encode(GREY, "TIFF", tiffinfo={274: 6}), "EXIF orientation 6"),
        (encode(GREY, "TIFF")[:-20], "cannot be"),
        (encode(GREY, "BMP")[:-20], "cannot be decoded"),
    ],
)
def test_inexact_label_maps_are_refused(data, message):
    with pytest.raises(BrokenImageError, match=message):
        decode_index_map(data)


def test_grey_file_is_refused_as_a_colour_map():
    with pytest.raises(BrokenImageError, match="three 8-bit channels"):
        decode_id_map(encode(GREY, "TIFF"))


def _make_source(root, kind, labels):
    for name in ("images", "labels"):
        (root / name).mkdir()
    for stem in ("a", "b"):
        (root / "images" / f"{stem}.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((7, 9, 3), np.uint8))[1].tobytes())
    (root / "classes.json").write_text(json.dumps([{"label": i, "name": f"c{i}", "isthing": 1} for i in (1, 2)]))
    for name, data in labels.items():
        (root / "labels" / name).write_bytes(data)
    if kind == "labels":
        return LabelMapSource(images=f"{root}/images", labels=f"{root}/labels", categories=f"{root}/classes.json")
    return HuggingFaceSource(images=f"{root}/images", annotations=f"{root}/labels", categories=f"{root}/classes.json")


def _map(kind, value):
    values = np.full((7, 9), value, np.uint8)
    return values if kind == "labels" else np.dstack([values, np.ones_like(values), np.zeros_like(values)])


@pytest.mark.parametrize("kind", ["labels", "huggingface"])
@pytest.mark.parametrize(("ending", "image_format"), [("tif", "TIFF"), ("TIFF", "TIFF"), ("bmp", "BMP")])
def test_readers_accept_tiff_and_bmp_maps(tmp_path, kind, ending, image_format):
    labels = {f"a.{ending}": encode(_map(kind, 1), image_format), f"b.{ending}": encode(_map(kind, 2), image_format)}
    reader = open_reader(_make_source(tmp_path, kind, labels))
    assert [[s.category_id for s in reader.read(i).annotation.segments] for i in (0, 1)] == [[1], [2]]


@pytest.mark.parametrize("kind", ["labels", "huggingface"])
def test_png_maps_take_precedence_over_other_formats(tmp_path, kind):
    labels = {f"{stem}.png": encode_png(_map(kind, 1)) for stem in "ab"}
    labels |= {"a.tif": b"a preview", "a.bmp": b"another one", "a.jpg": b"and a third"}
    assert len(open_reader(_make_source(tmp_path, kind, labels)).read(0).annotation.segments) == 1


@pytest.mark.parametrize("kind", ["labels", "huggingface"])
@pytest.mark.parametrize(("ending", "image_format"), [("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP")])
def test_jpeg_and_webp_maps_are_refused(tmp_path, kind, ending, image_format):
    labels = {f"{stem}.{ending}": encode(_map(kind, 1), image_format) for stem in "ab"}
    with pytest.raises(DataError, match=rf"labels: 2 maps are JPEG or WebP files.*a.{ending}, b.{ending}; export"):
        open_reader(_make_source(tmp_path, kind, labels))


@pytest.mark.parametrize(("image_format", "is_exact"), [("TIFF", True), ("BMP", True), ("JPEG", False)])
def test_panoptic_masks_are_read_in_lossless_formats_only(tmp_path, image_format, is_exact):
    coco = CocoSet(tmp_path)
    coco.write()
    colors = np.dstack([coco.ids & 255, coco.ids >> 8 & 255, coco.ids >> 16]).astype(np.uint8)
    (tmp_path / "masks" / "a.png").write_bytes(encode(colors, image_format))
    reader = open_reader(coco.panoptic_source)
    if not is_exact:
        with pytest.raises(DataError, match=r"masks/a.png: label maps must be PNG, TIFF or BMP"):
            reader.read(0)
        return
    assert [s.source_id for s in reader.read(0).annotation.segments] == list(IDS)


@pytest.mark.parametrize(
    ("mode", "kind"), [("LA", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("RGB", "TIFF"), ("RGB", "BMP")]
)
def test_maps_with_equal_channels_are_grey(mode, kind):
    image = Image.fromarray(GREY).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    assert np.array_equal(decode_index_map(buffer.getvalue()), GREY)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_label_maps_are_refused(mode):
    image = Image.fromarray(GREY).convert(mode)
    image.putpixel((0, 0), (7, 254) if mode == "LA" else (7, 7, 7, 254))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    with pytest.raises(BrokenImageError, match="a label map must not be transparent"):
        decode_index_map(buffer.getvalue())
