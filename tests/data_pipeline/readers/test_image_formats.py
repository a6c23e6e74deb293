"""TIFF, BMP, WebP and 16-bit images in shards and predictions, and hidden copies made by tools."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from m2f.cluster.predict.inputs import ImageInput, find_images, match_image_list, read_image, read_image_list
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import BrokenImageError, decode_rgb, read_header
from m2f.data_pipeline.readers.files import DARK_IMAGE, check_image
from m2f.data_pipeline.readers.map_reader import pair_files
from m2f.data_pipeline.storage.storage import Storage

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def _saved(kind, pixels=PIXELS, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_other_formats_become_png_without_loss(tmp_path, kind, options):
    data = _saved(kind, **options)
    loaded = check_image(data, 20, 30, 10**6, "x")
    assert loaded.ext == "png"
    np.testing.assert_array_equal(decode_rgb(loaded.data), PIXELS)
    path = tmp_path / "x.image"
    path.write_bytes(data)
    np.testing.assert_array_equal(read_image(ImageInput(str(path), "x", 1), Storage(), 10**6), PIXELS)
    with pytest.raises(DataError, match=r"x: 30 x 20 pixels exceed max_pixels"):
        check_image(data, 20, 30, 599, "x")
    with pytest.raises(DataError, match="x: "):
        check_image(data[: len(data) // 2], 20, 30, 10**6, "x")


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_16_bit_images_keep_their_upper_8_bits(ending):
    grey = np.random.default_rng(1).integers(0, 65536, (20, 30), dtype=np.uint16)
    data = cv2.imencode(ending, grey)[1].tobytes()
    assert read_header(data).bit_depth == 16
    loaded = check_image(data, 20, 30, 10**6, "x")
    np.testing.assert_array_equal(decode_rgb(loaded.data), np.stack([grey // 256] * 3, axis=-1))


@pytest.mark.parametrize(("shape", "ending"), [((20, 30), ".png"), ((20, 30), ".tif"), ((20, 30, 3), ".tif")])
def test_16_bit_images_of_cameras_with_12_bits_are_reported_as_dark(shape, ending):
    values = np.random.default_rng(1).integers(0, 4096, shape, dtype=np.uint16)
    for factor, repairs in ((1, (DARK_IMAGE,)), (16, ())):
        data = cv2.imencode(ending, values * factor)[1].tobytes()
        assert read_header(data).bit_depth == 16
        assert check_image(data, 20, 30, 10**6, "x").repairs == repairs
    data = cv2.imencode(ending, np.zeros(shape, np.uint8))[1].tobytes()
    assert check_image(data, 20, 30, 10**6, "x").repairs == ()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., 0], PIXELS[..., 0].astype(np.uint16) << 8])
def test_tiff_files_are_turned_once(tmp_path, pixels, compression, orientation):
    data = _saved("TIFF", pixels, compression=compression, tiffinfo={274: orientation})
    header = read_header(data)
    assert (header.height, header.width, header.orientation) == (20, 30, orientation)
    stored = PIXELS if pixels.ndim == 3 else np.stack([PIXELS[..., 0]] * 3, axis=-1)
    exif = Image.Exif()
    exif[274] = orientation
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(_saved("PNG", stored, exif=exif)))))
    np.testing.assert_array_equal(decode_rgb(data), stored)
    loaded = check_image(data, *shown.shape[:2], 10**6, "x")  # the annotation was drawn on the turned image
    np.testing.assert_array_equal(decode_rgb(loaded.data), shown)
    path = tmp_path / "x.tif"
    path.write_bytes(data)
    np.testing.assert_array_equal(read_image(ImageInput(str(path), "x", 1), Storage(), 10**6), shown)
    if orientation >= 5:
        loaded = check_image(data, 20, 30, 10**6, "x")  # the annotation was drawn on the stored image
        np.testing.assert_array_equal(decode_rgb(loaded.data), stored)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colours_are_not_multiplied_by_alpha(kind, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    image.putalpha(Image.fromarray(PIXELS[..., 0]))
    data = _saved(kind, np.asarray(image), **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    loaded = check_image(data, 20, 30, 10**6, "x")
    np.testing.assert_array_equal(decode_rgb(loaded.data), np.asarray(image.convert("RGB")))


def test_jpeg_and_8_bit_png_files_are_unchanged():
    for kind, ext in (("JPEG", "jpg"), ("PNG", "png")):
        data = _saved(kind)
        assert check_image(data, 20, 30, 10**6, "x") == type(check_image(data, 20, 30, 10**6, "x"))(data, ext)


def test_float_pixels_and_multi_page_files_are_refused():
    with pytest.raises(BrokenImageError, match="'F' has no defined value range"):
        read_header(_saved("TIFF", np.zeros((2, 3), np.float32)))
    pages = {"save_all": True, "append_images": [Image.fromarray(PIXELS)]}
    with pytest.raises(BrokenImageError, match="it contains 2 images"):
        read_header(_saved("TIFF", **pages))


def test_hidden_copies_of_tools_are_ignored(tmp_path):
    for folder, ending in (("images", ".webp"), ("labels", ".png")):
        for name in ("a/x", "a/._x", "a/.ipynb_checkpoints/x-checkpoint"):
            path = tmp_path / folder / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    assert [r.image for r in pair_files(tmp_path / "images", tmp_path / "labels").records] == ["a/x.webp"]
    assert find_images([str(tmp_path / "images")], Storage()) == (str(tmp_path / "images/a/x.webp"),)
    assert find_images([f"{tmp_path}/images/a/*"], Storage()) == (str(tmp_path / "images/a/x.webp"),)


def _list(tmp_path, *names):
    entries = [f'{{"id": {i}, "file_name": "{name}", "height": 2, "width": 3}}' for i, name in enumerate(names, 1)]
    (tmp_path / "list.json").write_text(f'{{"images": [{", ".join(entries)}]}}')
    return read_image_list(tmp_path / "list.json")


def test_equal_base_names_in_two_folders_get_different_names(tmp_path):
    listed = _list(tmp_path, "b/img.jpg", "a/img.jpg", "other.jpg")
    images = match_image_list(["/x/a/img.jpg", "/x/b/img.jpg", "/x/c/other.jpg"], listed)
    assert [(i.id, i.url, i.name) for i in images] == [
        (1, "/x/b/img.jpg", "img"),
        (2, "/x/a/img.jpg", "img-2"),
        (3, "/x/c/other.jpg", "other"),
    ]


def test_missing_or_ambiguous_listed_images_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"1 of 2 images .* such as b/img.jpg"):
        match_image_list(["/x/a/img.jpg"], _list(tmp_path, "a/img.jpg", "b/img.jpg"))
    with pytest.raises(DataError, match=r"img.jpg, which matches /x/a/img.jpg and /x/b/img.jpg"):
        match_image_list(["/x/a/img.jpg", "/x/b/img.jpg"], _list(tmp_path, "img.jpg"))
