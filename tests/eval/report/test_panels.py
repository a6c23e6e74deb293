"""Panels: shapes, determinism, colours, and overlays of every task."""

import numpy as np
import pytest

from m2f.data_pipeline.categories import Category
from m2f.eval.metrics.average_precision import InstanceDetections, InstanceTruth
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticTruth, TruthSegment
from m2f.eval.metrics.rle import encode_masks
from m2f.eval.report.overlays import instance_overlays, panoptic_overlays, semantic_overlays
from m2f.eval.report.panels import (
    COLUMN_PIXELS,
    Overlay,
    OverlaySegment,
    contact_sheet,
    decode_picture,
    encode_png,
    render_panel,
    segment_color,
)

CLASSES = (Category(1, "cat", True, (220, 20, 60)), Category(2, "sky", False, (0, 0, 0)))


def overlay(size):
    id_map = np.zeros(size, np.int32)
    id_map[: size[0] // 2] = 4
    return Overlay("truth", id_map, {4: OverlaySegment(0, 0.75)})


@pytest.mark.parametrize(("size", "longer"), [((24, 32), COLUMN_PIXELS[0]), ((600, 640), 640), ((1500, 3000), 960)])
def test_columns_are_scaled_to_a_readable_size(size, longer):
    image = np.full((*size, 3), 90, np.uint8)
    picture = decode_picture(render_panel(image, "image 1", [overlay(size), overlay(size)], CLASSES))
    assert picture.shape[1] == 3 * longer + 2 * 8
    assert picture.shape[0] == round(longer * size[0] / size[1]) + 30 or size == (600, 640)


def test_panels_are_deterministic_and_segments_are_tinted():
    image = np.full((60, 60, 3), 128, np.uint8)
    panel = render_panel(image, "a", [overlay((60, 60))], CLASSES)
    assert panel == render_panel(image, "a", [overlay((60, 60))], CLASSES)
    tinted = decode_picture(panel)[60, -40].astype(int)
    assert tinted[0] > tinted[1] + 40


def test_names_that_are_not_ascii_are_drawn_without_missing_letters():
    image = np.full((60, 60, 3), 128, np.uint8)
    panels = [
        render_panel(image, title, [overlay((60, 60))], (Category(1, name, True, (220, 20, 60)),))
        for title, name in (("bild ü", "Käfer"), ("bild u", "1: Kafer"))
    ]
    assert panels[0] == panels[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_tiny_images_and_empty_overlays_are_drawn(size):
    empty = Overlay("prediction", np.zeros(size, np.int32), {})
    assert decode_picture(render_panel(np.zeros((*size, 3), np.uint8), "x", [overlay(size), empty], CLASSES)).size


def test_colours_are_stable_per_class_and_vary_per_instance():
    assert segment_color(CLASSES[0], 0, 0) == (220, 20, 60)
    assert len({segment_color(CLASSES[0], 0, i) for i in range(20)}) == 20
    assert segment_color(CLASSES[1], 1, 0) != segment_color(CLASSES[1], 2, 0)


def test_contact_sheet_contains_all_panels():
    pictures = [np.full((40, w, 3), v, np.uint8) for w, v in ((2000, 10), (1000, 100), (1200, 200))]
    sheet = decode_picture(contact_sheet([encode_png(p) for p in pictures], columns=2))
    assert sheet.shape == (40 + 8 + 33, 2008, 3)
    assert abs(sheet[0, 0].astype(int) - 10).max() <= 3  # JPEG is lossy
    assert abs(sheet[0, 1010].astype(int) - 100).max() <= 3
    assert abs(sheet[50, 0].astype(int) - 200).max() <= 3


@pytest.mark.parametrize("other", [(20, 5000), (480, 640)])
def test_sheet_with_a_very_tall_image_stays_readable(other):
    panels = [
        render_panel(np.full((*size, 3), 90, np.uint8), "x", [overlay(size), overlay(size)], CLASSES)
        for size in (other, (5000, 1))
    ]
    wide, tall = (decode_picture(panel).shape for panel in panels)
    sheet = decode_picture(contact_sheet(panels))
    assert tall[:2] == (990, 3 + 2 * 8)
    assert sheet.shape[:2] == (round(wide[0] * 960 / wide[1]) + 8 + tall[0], 960)
    assert abs(sheet[-5, 19:].astype(int) - (24, 26, 30)).max() <= 20  # padded with the background


def test_sheet_of_many_panels_stays_within_the_jpeg_size_limit():
    panel = encode_png(np.full((700, 40, 3), 90, np.uint8))
    assert decode_picture(contact_sheet([panel] * 100)).shape[0] <= 65_500


def test_sheet_is_far_smaller_than_its_panels_as_png():
    noise = np.random.default_rng(0).normal(120, 12, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    assert len(contact_sheet([encode_png(noise)])) < len(encode_png(noise)) / 3


def test_panoptic_overlays_have_scores_only_for_predictions():
    truth = PanopticTruth(np.array([[1, 0]]), {1: TruthSegment(0, 1, True)})
    left, right = panoptic_overlays(truth, PanopticPrediction(np.array([[3, 3]]), {3: 1}), {3: 0.9}, 0.4567)
    assert left.segments == {1: OverlaySegment(0)}
    assert right.title == "prediction, PQ 45.7"
    assert right.segments == {3: OverlaySegment(1, 0.9)}


def test_instance_overlays_draw_small_truth_and_high_scores_on_top():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2], masks[1, 0, 0] = True, True
    rles = encode_masks(masks)
    truth = InstanceTruth(rles[::-1], np.array([1, 0]), np.array([1.0, 8.0]), np.zeros(2, bool))
    found = InstanceDetections(rles, np.array([0, 1, 1]), np.array([0, 1, 0]), np.array([0.9, 0.6, 0.1]))
    left, right = instance_overlays(truth, found, (4, 4))
    assert left.segments[left.id_map[0, 0]] == OverlaySegment(1)
    assert left.segments[left.id_map[1, 1]] == OverlaySegment(0)
    assert right.segments[right.id_map[0, 0]] == OverlaySegment(0, 0.9)
    assert len(right.segments) == 2


def test_semantic_overlays_do_not_draw_void():
    left, right = semantic_overlays(np.array([[0, 255]], np.uint8), np.array([[1, 0]]), 2)
    assert left.id_map.tolist() == [[1, 0]]
    assert right.id_map.tolist() == [[2, 1]]
