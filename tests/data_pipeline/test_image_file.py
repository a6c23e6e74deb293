from __future__ import annotations

import io
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f.data_pipeline.image_file import (
    BrokenImageError,
    check_pixels,
    decode_id_png,
    decode_index_png,
    decode_rgb,
    encode_png,
    frame_orientation,
    read_header,
)

RANDOM = np.random.default_rng(0)
PIXELS = cv2.resize(RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8), (48, 32))


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = _saved(Image.fromarray(PIXELS), "JPEG", quality=90)
PNG = _saved(Image.fromarray(PIXELS), "PNG")


def _with_orientation(orientation: int, order: str = "<") -> bytes:
    byte_order = b"II" if order == "<" else b"MM"
    directory = struct.pack(order + "HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + byte_order + struct.pack(order + "HI", 42, 8) + directory
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + JPEG[2:]


def test_headers_of_all_formats_are_read():
    cases = [
        (JPEG, "jpg", "rgb"),
        (_saved(Image.fromarray(PIXELS).convert("L"), "JPEG"), "jpg", "gray"),
        (_saved(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), "jpg", "cmyk"),
        (_saved(Image.fromarray(PIXELS), "JPEG", progressive=True), "jpg", "rgb"),
        (PNG, "png", "rgb"),
        (_saved(Image.fromarray(PIXELS).convert("RGBA"), "PNG"), "png", "rgba"),
        (_saved(Image.fromarray(PIXELS).convert("L"), "PNG"), "png", "gray"),
        (_saved(Image.fromarray(PIXELS).convert("LA"), "PNG"), "png", "gray_alpha"),
        (_saved(Image.fromarray(PIXELS).convert("P"), "PNG"), "png", "palette"),
    ]
    for data, ext, mode in cases:
        header = read_header(data)
        assert (header.ext, header.mode) == (ext, mode)
        assert (header.height, header.width, header.bit_depth, header.orientation) == (32, 48, 8, 1)
        assert decode_rgb(data).shape == (32, 48, 3)


def test_grey_and_cmyk_become_rgb():
    for mode in ("L", "CMYK"):
        data = _saved(Image.fromarray(PIXELS).convert(mode), "JPEG", quality=95)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(decode_rgb(data).astype(int) - expected).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientations_match_opencv(orientation, order):
    data = _with_orientation(orientation, order)
    assert read_header(data).orientation == orientation
    turned = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)  # OpenCV applies EXIF by default
    assert np.array_equal(decode_rgb(data, orientation), turned)
    assert np.array_equal(decode_rgb(data), decode_rgb(JPEG))


def test_invalid_exif_is_ignored():
    assert read_header(_with_orientation(99)).orientation == 1
    broken = bytearray(_with_orientation(6))
    broken[12:14] = b"XX"
    assert read_header(bytes(broken)).orientation == 1


def test_size_of_the_annotation_decides_the_rotation():
    turned, mirrored = read_header(_with_orientation(6)), read_header(_with_orientation(3))
    assert frame_orientation(turned, 48, 32) == 6
    assert frame_orientation(turned, 32, 48) == 1
    assert frame_orientation(mirrored, 32, 48) == 3
    with pytest.raises(BrokenImageError, match=r"the image is 48 x 32 pixels, but its annotation is 47 x 32"):
        frame_orientation(read_header(JPEG), 32, 47)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([JPEG, PNG]), st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(data, share):
    with pytest.raises(BrokenImageError):
        read_header(data[: int(len(data) * share)])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]))
def test_random_bytes_raise_broken_image_error_only(garbage, start):
    for call in (read_header, decode_rgb):
        with pytest.raises(BrokenImageError):
            call(start + garbage)


def test_a_flipped_bit_in_a_png_is_found():
    damaged = bytearray(PNG)
    damaged[len(PNG) // 2] ^= 1
    with pytest.raises(BrokenImageError, match="damaged"):
        read_header(bytes(damaged))


def _fails(decode, data: bytes) -> bool:
    try:
        decode(data)
    except BrokenImageError:
        return True
    return False


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_check_pixels_refuses_the_same_files_as_decoding(options, mode):
    intact = _saved(Image.fromarray(PIXELS[:31, :45]).convert(mode), "JPEG", **options)
    random, num_refused = np.random.default_rng(5), 0
    for _ in range(150):
        data, position = bytearray(intact), random.integers(2, len(intact) - 2)
        data[position] ^= 1 << random.integers(8)
        data[random.integers(position, len(data)) : -2] = b""
        try:
            header = read_header(bytes(data))
        except BrokenImageError:
            continue
        fails = _fails(decode_rgb, bytes(data))
        assert _fails(lambda data, header=header: check_pixels(data, header), bytes(data)) == fails
        num_refused += fails
    check_pixels(intact, read_header(intact))
    assert num_refused


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_pngs_are_decoded_to_indices(bits):
    values = RANDOM.integers(0, 2**bits, (7, 11), dtype=np.uint8)
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette(RANDOM.integers(0, 256, 768, dtype=np.uint8).tolist())
    assert np.array_equal(decode_index_png(_saved(image, "PNG", bits=bits)), values)


def test_label_maps_of_1_and_16_bits_are_decoded():
    values = RANDOM.integers(0, 2, (5, 9), dtype=np.uint8)
    assert np.array_equal(decode_index_png(_saved(Image.fromarray(values.astype(bool)), "PNG")), values)
    values_16 = RANDOM.integers(0, 1 << 16, (5, 9), dtype=np.uint16)
    assert np.array_equal(decode_index_png(encode_png(values_16)), values_16)
    assert decode_index_png(encode_png(values_16)).dtype == np.uint16
    for data in (PNG, JPEG):
        with pytest.raises(BrokenImageError, match="grey or palette PNG"):
            decode_index_png(data)


def test_panoptic_ids_use_all_three_channels():
    ids = np.array([[0, 1, 255, 256], [65536, 0xFFFFFF, 258, 3937500]], np.uint32)
    png = encode_png(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8))
    assert np.array_equal(decode_id_png(png), ids)
    with pytest.raises(BrokenImageError, match="must be stored as PNG"):
        decode_id_png(JPEG)
    wide = cv2.imencode(".png", np.ones((2, 4, 3), np.uint16))[1].tobytes()
    with pytest.raises(BrokenImageError, match="must have 8 bits per channel, but the PNG has 16"):
        decode_id_png(wide)


def test_encoded_pngs_are_deterministic():
    values = RANDOM.integers(0, 40, (30, 50), dtype=np.uint8)
    assert encode_png(values) == encode_png(values.copy(order="F"))
