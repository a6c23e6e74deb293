from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.sample import Annotation, Sample, Segment, id_dtype
from m2f.data_pipeline.shards import codec

RANDOM = np.random.default_rng(1)


def _segment(local_id, kind, layer=0):
    return Segment(
        id=local_id,
        category_id=90 + local_id,
        is_thing=True,
        is_crowd=local_id == 2,
        area=12.25,
        bbox=(1.5, 2.0, 3.0, 4.125),
        source_id=10_000_000_000 + local_id,
        map=kind,
        layer=layer,
        polygons=((0.5, 1.0, 4.0, 1.25, 2.0, 5.0),) if kind == "inst" else None,
    )


def _sample(seg, inst, segments=(), height=6, width=9, ext=".png"):
    image = cv2.imencode(ext, RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))[1].tobytes()
    annotation = Annotation(seg=seg, inst=inst, segments=tuple(segments))
    return Sample(
        key="a_key-1",
        image_id=7,
        source="folder/a.key 1.png",
        image=image,
        image_ext="jpg" if ext == ".jpg" else "png",
        height=height,
        width=width,
        annotation=annotation,
    )


def _members(sample):
    return {name.removeprefix("a_key-1."): data for name, data in codec.encode(sample)}


def _assert_equal(decoded, sample):
    assert (decoded.key, decoded.image_id, decoded.source) == (sample.key, sample.image_id, sample.source)
    assert decoded.size == (sample.height, sample.width)
    assert decoded.annotation.segments == sample.annotation.segments
    for ours, theirs in (
        (decoded.annotation.seg, sample.annotation.seg),
        (decoded.annotation.inst, sample.annotation.inst),
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert np.array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from([np.uint8, np.uint16]),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([".jpg", ".png"]),
    st.integers(0, 2**32),
)
def test_samples_survive_encoding_and_decoding(seg_dtype, inst_dtype, layers, with_seg, ext, seed):
    random = np.random.default_rng(seed)
    seg = random.integers(0, np.iinfo(seg_dtype).max, (6, 9), dtype=seg_dtype) if with_seg or not layers else None
    inst = random.integers(0, np.iinfo(inst_dtype).max, (layers, 6, 9), dtype=inst_dtype) if layers else None
    sample = _sample(seg, inst, [_segment(1, "seg"), _segment(2, "inst", 1)], ext=ext)
    _assert_equal(codec.decode(_members(sample)), sample)


def test_members_have_a_fixed_order_and_the_image_is_unchanged():
    sample = _sample(np.ones((6, 9), np.uint8), np.ones((2, 6, 9), np.uint8))
    names = [name for name, _ in codec.encode(sample)]
    assert names == ["a_key-1.img.png", "a_key-1.inst.png", "a_key-1.json", "a_key-1.seg.png"]
    assert names == sorted(names)
    assert codec.encode(sample)[0][1] == sample.image
    assert codec.encode(sample) == codec.encode(sample)


def test_empty_instance_layer_is_not_stored_but_restored():
    sample = _sample(None, np.zeros((1, 6, 9), np.uint8))
    assert sorted(_members(sample)) == ["img.png", "json"]
    _assert_equal(codec.decode(_members(sample)), sample)


def test_maps_have_16_bits_above_254_ids():
    assert id_dtype(254) is np.uint8
    assert id_dtype(255) is np.uint16
    assert id_dtype(65535) is np.uint16
    with pytest.raises(DataError, match="65536 segments; the limit is 65535"):
        id_dtype(65536)


def test_the_exif_decision_is_stored_and_applied():
    plain = _sample(None, np.zeros((1, 6, 9), np.uint8), ext=".jpg")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    image = plain.image[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain.image[2:]
    as_stored = replace(plain, image=image)
    turned = replace(
        plain, image=image, height=9, width=6, annotation=_sample(np.ones((9, 6), np.uint8), None).annotation
    )
    for sample, applied in ((as_stored, 1), (turned, 6)):
        members = _members(sample)
        assert json.loads(members["json"])["exif"] == {"orientation": 6, "applied": applied}
        assert codec.decode(members).size == (sample.height, sample.width)
    expected = np.rot90(codec.decode(_members(as_stored)).image, k=-1)  # EXIF 6: rotate clockwise to display
    assert np.array_equal(codec.decode(_members(turned)).image, expected)


def test_decoding_errors_name_the_sample():
    members = _members(_sample(np.ones((6, 9), np.uint8), None))
    other = _members(_sample(np.ones((5, 9), np.uint8), None, height=5))
    cases = [
        ({k: v for k, v in members.items() if k != "json"}, r"has no json member"),
        ({**members, "json": b"{"}, "cannot be read"),
        ({**members, "json": b"[]"}, "cannot be read"),
        ({**members, "json": b"{}"}, "cannot be read.*key"),
        ({**members, "json": json.dumps(json.loads(members["json"]) | {"exif": {}}).encode()}, "KeyError.*applied"),
        ({k: v for k, v in members.items() if k != "img.png"}, r"'a_key-1' \(folder/a.key 1.png\) has no image"),
        ({**members, "img.png": members["img.png"][:-20]}, "a_key-1.*truncated|a_key-1.*decoded"),
        (
            {**members, "img.png": other["img.png"]},
            r"a_key-1.*the image is \(5, 9\), but its description says \(6, 9\)",
        ),
        ({**members, "seg.png": other["seg.png"]}, r"a_key-1.*seg.png is \(5, 9\)"),
        ({**members, "seg.png": members["img.png"]}, "a_key-1.*seg.png: a label map must be"),
    ]
    for value in ("x", [1], 1.5, True, None, 1 << 70):
        changed = json.dumps(json.loads(members["json"]) | {"image_id": value}).encode()
        cases.append(({**members, "json": changed}, r"cannot be read.*image_id is .* not a 64-bit integer"))
    for invalid, message in cases:
        with pytest.raises(DataError, match=message):
            codec.decode(invalid)
