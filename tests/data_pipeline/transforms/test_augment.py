import dataclasses

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f.data_pipeline.config import LargeScaleJitter, ScaleJitter, ShortestEdgeCrop
from m2f.data_pipeline.randomness import Stream, sample_rng
from m2f.data_pipeline.transforms.augment import (
    AugmentParams,
    ColorJitter,
    augment,
    draw_params,
    jitter_color,
    large_scale_jitter,
    resize_image,
    shortest_edge_size,
)

IGNORE = 255


def smooth_image(height, width):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + k) * np.cos(y / 7 - k) for k in range(3)]
    return np.round(127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def blocks(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return (1 + (y // 8) * 7 % 5 + 6 * ((x // 8) % 6)).astype(np.uint8)[None]


def augment_officially(image, ids, params):
    """Reference as in the official code: flip, resize the whole image with Pillow, crop, pad."""
    (height, width), (y, x), (rows, columns) = params.scaled, params.offset, params.canvas
    pixels, labels = image, ids[0]
    if params.flip:
        pixels, labels, x = pixels[:, ::-1], labels[:, ::-1], max(width - columns, 0) - x
    pixels = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BILINEAR)
    labels = Image.fromarray(np.ascontiguousarray(labels)).resize((width, height), Image.Resampling.NEAREST)
    crop = np.asarray(pixels)[y : y + rows, x : x + columns]
    crop_labels = np.asarray(labels)[y : y + rows, x : x + columns]
    padding = (0, rows - crop.shape[0]), (0, columns - crop.shape[1])
    return np.pad(crop, (*padding, (0, 0)), constant_values=128), np.pad(crop_labels, padding, constant_values=IGNORE)


def resize_then_crop(image, ids, params):
    """Slow reference: resize the whole image, crop, flip, pad. The official code flips first."""
    height, width = params.scaled
    if params.shrink == "bilinear":
        return augment_officially(image, ids, params)
    area = height < image.shape[0] and width < image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR)
    rows = ((np.arange(height) + 0.5) * image.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * image.shape[1] / width).astype(int)
    labels = ids[0][rows][:, columns]
    y, x = params.offset
    crop = resized[y : y + params.canvas[0], x : x + params.canvas[1]]
    labels = labels[y : y + params.canvas[0], x : x + params.canvas[1]]
    if params.flip:
        crop, labels = crop[:, ::-1], labels[:, ::-1]
    out = np.full((*params.canvas, 3), 128, np.uint8)
    out_labels = np.full(params.canvas, IGNORE, np.uint8)
    out[: crop.shape[0], : crop.shape[1]] = crop
    out_labels[: crop.shape[0], : crop.shape[1]] = labels
    return out, out_labels


@pytest.mark.parametrize("name", ["down", "up_flip", "mid", "tiny"])
def test_large_scale_jitter_gives_the_official_label_maps(goldens, name):
    golden = np.load(goldens / "h_augment.npz")
    flip, scale, crop_position = (float(v) for v in golden[f"lsj_{name}_params"])
    params = large_scale_jitter(
        (45, 61), LargeScaleJitter(size=64), flip=bool(flip), scale=scale, crop_position=crop_position
    )
    result = augment(golden["image"], golden["seg"][None], params, IGNORE)
    np.testing.assert_array_equal(result.id_maps[0], golden[f"lsj_{name}_seg"])
    difference = np.abs(result.image.astype(int) - golden[f"lsj_{name}_image"])
    if params.scaled[0] > 45:  # enlarging is the same interpolation; shrinking uses INTER_AREA, not Pillow's filter
        assert difference.max() <= 1
    h, w = result.size
    assert difference[:h, :w].mean() < 8
    assert difference[h:].max(initial=0) == 0
    assert difference[:, w:].max(initial=0) == 0


@pytest.mark.parametrize("name", ["down", "up_flip", "mid", "tiny"])
def test_bilinear_shrinking_gives_the_official_pixels(goldens, name):
    golden = np.load(goldens / "h_augment.npz")
    flip, scale, crop_position = (float(v) for v in golden[f"lsj_{name}_params"])
    config = LargeScaleJitter(size=64, shrink="bilinear")
    params = large_scale_jitter((45, 61), config, flip=bool(flip), scale=scale, crop_position=crop_position)
    result = augment(golden["image"], golden["seg"][None], params, IGNORE)
    np.testing.assert_array_equal(result.image, golden[f"lsj_{name}_image"])
    np.testing.assert_array_equal(result.id_maps[0], golden[f"lsj_{name}_seg"])


@pytest.mark.parametrize("case", [0, 1])
def test_color_jitter_equals_the_official_code(goldens, case):
    golden = np.load(goldens / "h_augment.npz")
    order, brightness, contrast, saturation, hue = (
        float(v) for v in golden[f"color_{case}_params_order_beta_contrast_saturation_hue"]
    )
    jitter = ColorJitter(
        contrast_first=order == 1, brightness=brightness, contrast=contrast, saturation=saturation, hue=int(hue)
    )
    difference = jitter_color(golden["image"], jitter).astype(int) - golden[f"color_{case}_image"]
    assert np.abs(difference).max() <= 1


def test_large_scale_jitter_changes_colours_only_on_request():
    plain, colored = LargeScaleJitter(size=64), LargeScaleJitter(size=64, color=True)
    for seed in range(20):
        without, with_color = (draw_params(np.random.default_rng(seed), (45, 61), one) for one in (plain, colored))
        assert without.color is None
        assert with_color.color is not None
        assert dataclasses.replace(with_color, color=None) == without  # the geometry stays the same


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(3, 120), st.integers(3, 120)),
    flip=st.booleans(),
    scale=st.floats(0.1, 2.0),
    crop_position=st.floats(0, 1),
)
def test_bilinear_shrinking_equals_a_resize_before_the_crop(size, flip, scale, crop_position):
    """Covers round scales, at which two source pixels are equally near."""
    image, ids = smooth_image(*size), np.arange(size[0] * size[1], dtype=np.uint8).reshape(1, *size) % 250
    config = LargeScaleJitter(size=64, shrink="bilinear")
    params = large_scale_jitter(size, config, flip=flip, scale=scale, crop_position=crop_position)
    result = augment(image, ids, params, IGNORE)
    expected, labels = augment_officially(image, ids, params)
    np.testing.assert_array_equal(result.image, expected)
    np.testing.assert_array_equal(result.id_maps[0], labels)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    position=st.integers(0, 2**40),
    canvas=st.sampled_from([32, 64]),
    jitter=st.booleans(),
)
def test_cropping_before_resizing_moves_content_by_less_than_a_pixel(size, position, canvas, jitter):
    image, ids = smooth_image(*size), blocks(*size)
    config = (
        LargeScaleJitter(size=canvas)
        if jitter
        else ShortestEdgeCrop(shortest_edges=(24, 48, 96), max_size=200, crop=(canvas, canvas + 8), color=False)
    )
    params = draw_params(sample_rng(1, position, Stream.AUGMENT), size, config)
    result = augment(image, ids, params, IGNORE)
    _, labels = resize_then_crop(image, ids, params)
    assert result.image.shape == (*params.canvas, 3)
    # Every label is within one pixel in the reference. The border is excluded: some neighbours are outside the crop.
    around = np.pad(labels, 1, mode="edge")
    h, w = params.canvas
    near = np.zeros_like(labels, dtype=bool)
    for dy in range(3):
        for dx in range(3):
            near |= result.id_maps[0] == around[dy : dy + h, dx : dx + w]
    assert near[1:-1, 1:-1].all()
    np.testing.assert_array_equal(result.id_maps[0] == IGNORE, labels == IGNORE)


@pytest.mark.parametrize("shrink", ["area", "bilinear"])
@pytest.mark.parametrize("scaled", [(60, 80), (24, 32), (90, 120)])
def test_augmentation_without_a_crop_equals_a_plain_resize(shrink, scaled):
    image, ids = smooth_image(48, 64), blocks(48, 64)
    params = AugmentParams(scaled=scaled, offset=(0, 0), canvas=(128, 128), flip=True, shrink=shrink)
    result = augment(image, ids, params, IGNORE)
    expected, labels = resize_then_crop(image, ids, params)
    np.testing.assert_array_equal(result.image, expected)
    np.testing.assert_array_equal(result.id_maps[0], labels)


def test_image_and_ids_stay_aligned_when_cropped():
    # The image shows its own ids, so image and ids must agree away from segment borders.
    ids = blocks(70, 90)
    image = np.repeat(ids[0][..., None] * 5, 3, axis=-1)
    config = LargeScaleJitter(size=64, min_scale=1.2)
    for position in range(40):
        params = draw_params(sample_rng(3, position, Stream.AUGMENT), (70, 90), config)
        result = augment(image, ids, params, IGNORE)
        matches = result.image[..., 0] == result.id_maps[0] * 5
        flat = cv2.erode(result.image[..., 0], np.ones((5, 5))) == cv2.dilate(result.image[..., 0], np.ones((5, 5)))
        h, w = result.size
        assert matches[:h, :w][flat[:h, :w]].all()


def test_draws_depend_only_on_seed_and_position():
    config = ShortestEdgeCrop(shortest_edges=(32, 48, 64), max_size=128, crop=(32, 48))
    first = [draw_params(sample_rng(5, p, Stream.AUGMENT), (40, 50), config) for p in range(20)]
    again = [draw_params(sample_rng(5, p, Stream.AUGMENT), (40, 50), config) for p in reversed(range(20))]
    assert first == again[::-1]
    assert len({dataclasses.astuple(p) for p in first}) == 20
    assert first != [draw_params(sample_rng(6, p, Stream.AUGMENT), (40, 50), config) for p in range(20)]


def test_draws_cover_the_official_ranges():
    config = ShortestEdgeCrop(shortest_edges=(32, 64), max_size=256, crop=(32, 32))
    drawn = [draw_params(sample_rng(0, p, Stream.AUGMENT), (40, 50), config) for p in range(3000)]
    jitters = [p.color for p in drawn if p.color]
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-18, 18)}
    for name, (low, high) in ranges.items():
        values = [getattr(j, name) for j in jitters]
        used = [v for v in values if v is not None]
        assert 0.45 < len(used) / len(values) < 0.55
        assert low <= min(used) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(used) <= high
    assert {p.scaled for p in drawn} == {(32, 40), (64, 80)}
    assert {p.offset[1] for p in drawn if p.scaled == (32, 40)} == set(range(9))
    assert 0.45 < np.mean([p.flip for p in drawn]) < 0.55


@pytest.mark.parametrize("size", [(480, 640), (612, 387), (100, 900)])
def test_scale_jitter_shows_the_whole_image_at_an_official_size(size):
    config = ScaleJitter()
    drawn = [draw_params(sample_rng(0, p, Stream.AUGMENT), size, config) for p in range(300)]
    assert {p.scaled for p in drawn} == {shortest_edge_size(size, e, 1333) for e in range(640, 801, 32)}
    assert all(p.canvas == p.scaled and p.offset == (0, 0) and p.color is None for p in drawn)
    assert 0.4 < np.mean([p.flip for p in drawn]) < 0.6


def test_scale_jitter_crops_half_of_the_images():
    config = ScaleJitter(shortest_edges=tuple(range(480, 801, 32)), crop_first=(384, 600))
    drawn = [draw_params(sample_rng(0, p, Stream.AUGMENT), (480, 640), config) for p in range(4000)]
    parts = [p for p in drawn if p.scaled != p.canvas]
    assert 0.45 < len(parts) / len(drawn) < 0.53  # a crop of the whole image is not counted
    for p in drawn:
        assert min(p.canvas) in config.shortest_edges or max(p.canvas) == 1333
        assert all(0 <= o <= s - c for o, s, c in zip(p.offset, p.scaled, p.canvas, strict=True))
    # Before the final resize, 384 to 600 rows are cropped from an image of 400, 500 or 600 rows.
    shares = np.array([p.canvas[0] / p.scaled[0] for p in parts])
    assert 384 / 600 - 0.01 < shares.min() < 384 / 600 + 0.03
    assert shares.max() <= 1
    positions = np.array([p.offset[1] / (p.scaled[1] - p.canvas[1]) for p in parts if p.scaled[1] - p.canvas[1] > 99])
    assert 0.45 < positions.mean() < 0.55
    assert positions.min() < 0.02
    assert positions.max() > 0.98


def test_crop_before_resizing_equals_the_enlarged_crop():
    image, ids = smooth_image(48, 64), blocks(48, 64)
    config = ScaleJitter(shortest_edges=(32,), max_size=100, crop_first=(20, 40))
    for position in range(20):
        params = draw_params(sample_rng(2, position, Stream.AUGMENT), (48, 64), config)
        result = augment(image, ids, dataclasses.replace(params, shrink="bilinear"), IGNORE)
        expected, labels = resize_then_crop(image, ids, dataclasses.replace(params, shrink="bilinear"))
        np.testing.assert_array_equal(result.image, expected)
        np.testing.assert_array_equal(result.id_maps[0], labels)
        assert result.size == params.canvas


def test_augmentation_does_not_modify_its_inputs():
    image, ids = smooth_image(40, 50), blocks(40, 50)
    image.flags.writeable = ids.flags.writeable = False
    params = AugmentParams(
        scaled=(40, 50), offset=(0, 0), canvas=(40, 50), color=ColorJitter(brightness=9.0, saturation=1.2, hue=4)
    )
    before = image.copy()
    result = augment(image, ids, params, IGNORE)  # would raise if it wrote to its inputs
    assert np.array_equal(image, before)
    assert not np.array_equal(result.image, image)


def test_wide_id_maps_keep_their_type():
    ids = np.arange(40 * 50, dtype=np.int16).reshape(1, 40, 50)
    params = AugmentParams(scaled=(40, 50), offset=(3, 4), canvas=(20, 20))
    result = augment(smooth_image(40, 50), ids, params, 32767)
    np.testing.assert_array_equal(result.id_maps, ids[:, 3:23, 4:24])


@pytest.mark.parametrize(
    ("size", "edge", "limit", "expected"),
    [((480, 640), 800, 1333, (800, 1067)), ((640, 480), 800, 1333, (1067, 800)), ((100, 900), 800, 1333, (148, 1333))],
)
def test_shortest_edge_size_respects_the_limit(size, edge, limit, expected):
    assert shortest_edge_size(size, edge, limit) == expected
    assert resize_image(smooth_image(*size), expected).shape == (*expected, 3)
