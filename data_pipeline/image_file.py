"""Image files (JPEG, PNG, TIFF, BMP, WebP): reading headers, checking completeness, and decoding pixels.

Headers are read without decoding, so that a huge or broken file costs almost nothing. OpenCV does not apply the EXIF
orientation here. Instead, `frame_orientation` compares sizes with the annotation and decides how to turn the image.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
"""File name endings of images; case is ignored."""
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*")
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_PHOTOMETRIC = 256, 257, 258, 262
"""Numbers of tags in the TIFF 6.0 specification."""
_TIFF_ORIENTATION, _TIFF_EXTRA_SAMPLES = 274, 338
"""Numbers of further tags in the same specification."""
_LOSSLESS_TIFF = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma", "zstd")
"""Lossless compressions of TIFF, by Pillow's names."""
_PNG_MODES = {0: "gray", 2: "rgb", 3: "palette", 4: "gray_alpha", 6: "rgba"}
_JPEG_MODES = {1: "gray", 3: "rgb", 4: "cmyk"}
"""Modes by the colour type of a PNG, and by the number of components of a JPEG."""
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers SOF0 to SOF15 (ITU T.81, table B.1), without DHT, JPG and DAC, which lie between them."""
_JPEG_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers TEM, RST0 to RST7 and SOI, which have no length field."""


class BrokenImageError(ValueError):
    """Raised if an image file cannot be used. The message gives the reason; callers add the file name."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Header of an image file, read without decoding the pixels."""

    ext: Literal["jpg", "png", "tif", "bmp", "webp"]
    height: int
    """Height in pixels as stored, before any EXIF rotation."""
    width: int
    """Width in pixels as stored, before any EXIF rotation."""
    mode: str
    """gray, rgb, cmyk, palette, gray_alpha, rgba or rgbx; another text for channel layouts without a name."""
    bit_depth: int
    """Bits per channel or palette index. TIFF, BMP and WebP files with fewer than 8 bits count as 8."""
    orientation: int
    """EXIF orientation from 1 to 8; 1 means that viewers show the image as stored."""


def read_header(data: bytes) -> ImageHeader:
    """Return the header of an image file.

    Raises:
        BrokenImageError: the format is not supported, the header is damaged, the file holds several images, or a JPEG
            or PNG file is truncated.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg_header(data)
    if data.startswith(_PNG_SIGNATURE):
        return _read_png_header(data)
    if data[:4] in _TIFF_SIGNATURES or data.startswith(b"BM") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return _read_other_header(data)
    raise BrokenImageError("it is not a JPEG, PNG, TIFF, BMP or WebP file; convert it")


def is_hidden_copy(name: str) -> bool:
    """Return whether a path is a hidden copy made by notebooks (`.ipynb_checkpoints`) or macOS (`._name`)."""
    parts = name.split("/")
    return ".ipynb_checkpoints" in parts or parts[-1].startswith("._")


def is_image_name(name: str) -> bool:
    """Return whether a path or URL has the ending of an image and is not a hidden copy."""
    return name.lower().endswith(IMAGE_ENDINGS) and not is_hidden_copy(name)


def frame_orientation(header: ImageHeader, height: int, width: int) -> int:
    """Return the EXIF orientation that turns the stored image into the frame of an annotation.

    The result is the orientation in the header if the image turned by it has the size of the annotation. Otherwise, it
    is 1, if the stored image has that size. If both fit (mirrored, upside-down or square images), the header decides,
    as in image viewers.

    Raises:
        BrokenImageError: neither the stored nor the turned image has the size of the annotation.
    """
    stored, annotated = (header.height, header.width), (height, width)
    shown = stored if header.orientation < 5 else stored[::-1]
    if shown == annotated:
        return header.orientation
    if stored == annotated:
        return 1
    raise BrokenImageError(
        f"the image is {shown[1]} x {shown[0]} pixels, but its annotation is {width} x {height}; check that they match"
    )


def decode_rgb(data: bytes, orientation: int = 1) -> np.ndarray:
    """Return the pixels [H, W, 3] uint8 RGB of an image file, turned by an EXIF orientation.

    16-bit channels are reduced to their upper 8 bits (value // 256), whatever range the image uses.

    Raises:
        BrokenImageError: the pixels cannot be decoded.
    """
    image = _decode(data, cv2.IMREAD_COLOR_RGB)
    match orientation:
        case 2:
            image = image[:, ::-1]
        case 3:
            image = image[::-1, ::-1]
        case 4:
            image = image[::-1]
        case 5:
            image = image.transpose(1, 0, 2)
        case 6:
            image = image.transpose(1, 0, 2)[:, ::-1]
        case 7:
            image = image.transpose(1, 0, 2)[::-1, ::-1]
        case 8:
            image = image.transpose(1, 0, 2)[::-1]
    return np.ascontiguousarray(image)


def check_pixels(data: bytes, header: ImageHeader) -> None:
    """Check that all pixels of an image file can be decoded.

    A JPEG is decoded at 1/8 of its size. This reads every coefficient, so the same files fail as at full size, in half
    the time.

    Raises:
        BrokenImageError: the pixels cannot be decoded.
    """
    _decode(data, cv2.IMREAD_REDUCED_COLOR_8 if header.ext == "jpg" else cv2.IMREAD_COLOR_RGB)


def decode_index_png(data: bytes) -> np.ndarray:
    """Return the values [H, W] uint8 or uint16 of a grey PNG, or the indices of a palette PNG.

    Raises:
        BrokenImageError: the file is not a grey or palette PNG, or cannot be decoded.
    """
    header = read_header(data)
    if header.ext != "png" or header.mode not in ("gray", "palette"):
        raise BrokenImageError(f"a label map must be a grey or palette PNG, but this is {header.mode} {header.ext}")
    if header.mode == "palette":
        data = _without_palette(data)
    values = _decode(data, cv2.IMREAD_UNCHANGED)
    if header.bit_depth < 8:  # decoders stretch small depths over 0..255
        values //= 255 // (2**header.bit_depth - 1)
    return values


def decode_id_png(data: bytes) -> np.ndarray:
    """Return the segment ids [H, W] uint32 of a COCO panoptic PNG: R + 256 G + 65536 B.

    Raises:
        BrokenImageError: the file is not a PNG, has 16 bits per channel, or cannot be decoded.
    """
    header = read_header(data)
    if header.ext != "png":
        raise BrokenImageError("panoptic ids must be stored as PNG; JPEG and WebP change colours")
    if header.bit_depth > 8:
        raise BrokenImageError("this map must have 8 bits per channel, but the PNG has 16; save it with 8 bits")
    padded = cv2.cvtColor(_decode(data, cv2.IMREAD_COLOR_RGB), cv2.COLOR_RGB2RGBA)  # four bytes are read as one uint32
    return padded.view("<u4")[..., 0] & np.uint32(0xFFFFFF)


def decode_index_map(data: bytes) -> np.ndarray:
    """Return the values [H, W] uint8 or uint16 of a grey or palette map in a lossless format: PNG, TIFF or BMP.

    A map of 8 bits with three equal channels and no transparency is grey.

    Raises:
        BrokenImageError: the file has another format, colours or transparency, or cannot be decoded exactly.
    """
    header = read_header(data)
    if header.ext == "png" and (header.mode in ("gray", "palette") or header.bit_depth > 8):
        return decode_index_png(data)
    values = _decode(data, cv2.IMREAD_UNCHANGED) if header.ext == "png" else _lossless_pixels(data)
    if values.ndim == 2:
        return values
    if (values[..., :3] != values[..., :1]).any():
        raise BrokenImageError("a label map must be grey or have a palette, but this file is in colour")
    if values.shape[2] == 4 and (values[..., 3] != 255).any():
        raise BrokenImageError(
            "a label map must not be transparent; save it without an alpha channel, or, if that channel is the mask, "
            "save only that channel as a grey image"
        )
    return np.ascontiguousarray(values[..., 0])


def decode_id_map(data: bytes) -> np.ndarray:
    """Return the segment ids [H, W] uint32, R + 256 G + 65536 B, of a map in a lossless format: PNG, TIFF or BMP.

    Raises:
        BrokenImageError: the file has another format or a single channel, or cannot be decoded exactly.
    """
    if read_header(data).ext == "png":
        return decode_id_png(data)
    colors = _lossless_pixels(data)
    if colors.ndim != 3:
        raise BrokenImageError("this map must store ids in three 8-bit channels, but the file has one")
    red, green, blue = np.moveaxis(colors.astype(np.uint32), -1, 0)
    return red | green << 8 | blue << 16


def encode_png(values: np.ndarray) -> bytes:
    """Encode values [H, W] uint8 or uint16, or [H, W, 3] uint8 RGB, as PNG. Equal values give equal bytes."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 6]
    if values.ndim == 2:  # ids mostly equal those above them, so the filtered rows are runs of zeros
        options += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
        options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    bgr = values if values.ndim == 2 else values[..., ::-1]
    done, data = cv2.imencode(".png", np.ascontiguousarray(bgr), options)
    assert done, f"OpenCV cannot write a PNG of {values.shape} {values.dtype}"
    return data.tobytes()


def _decode(data: bytes, flags: int) -> np.ndarray:
    if data[:4] in _TIFF_SIGNATURES:
        data = _without_turn_and_alpha(data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise BrokenImageError(f"it cannot be decoded ({error.err})") from error
    if image is None:
        raise BrokenImageError("it cannot be decoded; its pixel data is damaged")
    return image


def _lossless_pixels(data: bytes) -> np.ndarray:
    """Return the stored pixels of a TIFF or BMP file.

    They are grey values or palette indices, [H, W] uint8 or uint16, or colours, [H, W, 3] uint8.

    Raises:
        BrokenImageError: the format may have changed the labelled values, is not supported, or cannot be decoded.
    """
    header = read_header(data)
    if header.ext not in ("tif", "bmp"):
        raise BrokenImageError(
            "label maps must be PNG, TIFF or BMP; JPEG and WebP change values, so export the map again as PNG"
        )
    if header.orientation != 1:
        raise BrokenImageError(f"the map has EXIF orientation {header.orientation}; save it upright")
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF", "BMP")) as image:
            tags = getattr(image, "tag_v2", {})
            compression, mode = image.info.get("compression"), image.mode
            bits = {*tags.get(_TIFF_BITS, (8,))}
            values = np.asarray(image)
    except Exception as error:  # as in `_read_other_header`
        raise BrokenImageError(f"it cannot be decoded ({error!r:.100})") from error
    if header.ext == "tif" and compression not in _LOSSLESS_TIFF:
        raise BrokenImageError(f"TIFF with {compression} compression may change the values of a map; save it with LZW")
    if mode in ("1", "L") and tags.get(_TIFF_PHOTOMETRIC) == 0:
        raise BrokenImageError("the map is a TIFF in which white is 0; save it with black as 0")
    if mode == "1" and header.ext == "bmp" and data[28:30] != b"\1\0":  # Pillow separates the two values by a threshold
        raise BrokenImageError("the map is a BMP with more than 1 bit and two greys in its palette; save it as PNG")
    if mode == "RGB" and bits == {8}:
        return values
    if mode == "L" and len(bits) == 1 and max(bits) <= 8:  # Pillow stretches small depths over 0..255
        return values // (255 // (2 ** max(bits) - 1))
    if mode in ("1", "P") or mode.startswith("I;16"):
        return values.astype(np.uint16 if mode.startswith("I") else np.uint8)
    raise BrokenImageError(f"a map must be 8-bit or 16-bit grey, palette or 8-bit RGB, but this is {mode}")


def _read_other_header(data: bytes) -> ImageHeader:
    """Return the header of a TIFF, BMP or WebP file, read by Pillow.

    Raises:
        BrokenImageError: the header is damaged, the file holds several images, or its pixel format is not supported.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF", "BMP", "WEBP")) as image:
            frames, orientation = getattr(image, "n_frames", 1), int(image.getexif().get(_TIFF_ORIENTATION, 1))
            kind, mode, tags = image.format, image.mode, getattr(image, "tag_v2", {})
            # The tags hold the stored size. Recent versions of Pillow return the size of the turned image for TIFF.
            bits = 16 if max(tags.get(_TIFF_BITS, (8,))) > 8 else 8
            width, height = tags.get(_TIFF_WIDTH, image.width), tags.get(_TIFF_HEIGHT, image.height)
    except Exception as error:  # Pillow's plugins raise any exception for damaged bytes
        raise BrokenImageError(f"its header cannot be read ({error!r:.100})") from error
    if frames != 1:
        raise BrokenImageError(f"it contains {frames} images; save the one to use as a separate file")
    if mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "I;16", "I;16B", "I;16L"):
        name = {"L": "gray", "1": "gray", "I": "gray", "P": "palette", "C": "cmyk"}.get(mode[0], mode.lower())
        ext: Literal["tif", "bmp", "webp"] = "tif" if kind == "TIFF" else "bmp" if kind == "BMP" else "webp"
        return ImageHeader(ext, height, width, name, bits, orientation if 1 <= orientation <= 8 else 1)
    raise BrokenImageError(f"its pixel format {mode!r} has no defined value range; convert it to 8 bits")


def _read_jpeg_header(data: bytes) -> ImageHeader:
    frame, orientation = None, 1
    for marker, start, end in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            frame = struct.unpack_from(">BHHB", data, start)
        elif marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            orientation = _exif_orientation(data[start + 6 : end])
        elif marker == 0xDA and data.rfind(b"\xff\xd9", end) < 0:
            raise BrokenImageError("the JPEG file is truncated (no end marker); copy it again")
    if frame is None:
        raise BrokenImageError("the JPEG file contains no image")
    bit_depth, height, width, channels = frame
    return ImageHeader("jpg", height, width, _JPEG_MODES.get(channels, f"{channels} channels"), bit_depth, orientation)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of every segment up to and including the header of the first scan."""
    position, marker = 2, 0
    while marker != 0xDA:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 4 > len(data) or data[position] != 0xFF:
            raise BrokenImageError("the JPEG file is truncated or has a damaged header; copy it again")
        marker = data[position + 1]
        position += 2
        if marker in _JPEG_WITHOUT_LENGTH:
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        if end > len(data) or end < position + 2:
            raise BrokenImageError("the JPEG file is truncated or has a damaged header; copy it again")
        yield marker, position + 2, end
        position = end


def _read_png_header(data: bytes) -> ImageHeader:
    orientation, fields = 1, None
    for kind, payload in _png_chunks(data):
        if kind == b"IHDR" and len(payload) == 13:
            fields = struct.unpack(">IIBBBBB", payload)
        elif kind == b"eXIf":
            orientation = _exif_orientation(payload)
    if fields is None:
        raise BrokenImageError("the PNG file has no image header")
    width, height, bit_depth, color = fields[:4]
    return ImageHeader("png", height, width, _PNG_MODES.get(color, f"colour type {color}"), bit_depth, orientation)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and payload of every chunk. Raises BrokenImageError for truncated files and wrong checksums."""
    position, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            raise BrokenImageError("the PNG file is truncated; copy it again")
        kind, payload = data[position + 4 : position + 8], data[position + 8 : end - 4]
        if zlib.crc32(payload, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
            raise BrokenImageError(f"the PNG file is damaged (checksum of chunk {kind!r}); copy it again")
        yield kind, payload
        position = end


def _without_palette(data: bytes) -> bytes:
    """Return a palette PNG declared as grey, so that decoders return its indices instead of its colours."""
    chunks = [_PNG_SIGNATURE]
    for kind, payload in _png_chunks(data):
        if kind in (b"PLTE", b"tRNS", b"bKGD", b"hIST"):
            continue
        if kind == b"IHDR":
            payload = payload[:9] + b"\0" + payload[10:]
        chunks += [len(payload).to_bytes(4, "big"), kind, payload]
        chunks.append(zlib.crc32(payload, zlib.crc32(kind)).to_bytes(4, "big"))
    return b"".join(chunks)


def _without_turn_and_alpha(tiff: bytes) -> bytes:
    """Return a TIFF file with orientation 1, whose extra channel is not declared as alpha. Its pixels are unchanged.

    Otherwise, OpenCV would turn the pixels, even if told not to, and multiply the colours by alpha.
    """
    edited, order = bytearray(tiff), "<" if tiff.startswith(b"II") else ">"
    neutral = {_TIFF_ORIENTATION: 1, _TIFF_EXTRA_SAMPLES: 0}  # 0: the meaning of the extra channel is not specified
    for tag, position in _tiff_entries(tiff):
        if tag in neutral:  # its type becomes SHORT (3), its count 1
            edited[position + 2 : position + 12] = struct.pack(f"{order}HIHH", 3, 1, neutral[tag], 0)
    return bytes(edited)


def _exif_orientation(tiff: bytes) -> int:
    """Return the orientation in the first directory; 1 if it is missing or invalid."""
    for tag, position in _tiff_entries(tiff):
        if tag == _TIFF_ORIENTATION:
            value = _tiff_number(tiff, position + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _tiff_entries(tiff: bytes) -> Iterator[tuple[int, int]]:
    """Yield tag and position of every entry of the first directory; nothing if the byte order is invalid."""
    if tiff[:2] in (b"II", b"MM"):
        directory = _tiff_number(tiff, 4, 4)
        for position in range(directory + 2, directory + 2 + 12 * _tiff_number(tiff, directory, 2), 12):
            yield _tiff_number(tiff, position, 2), position


def _tiff_number(tiff: bytes, position: int, size: int) -> int:
    return int.from_bytes(tiff[position : position + size], "little" if tiff.startswith(b"II") else "big")
