"""The evaluation page is complete, well-formed and self-contained; its charts show the right data."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.eval.metrics.average_precision import InstanceDetections, InstanceTruth
from m2f.eval.metrics.error_types import instance_errors, panoptic_errors
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticTruth, TruthSegment
from m2f.eval.metrics.rle import encode_masks
from m2f.eval.metrics.segment_errors import instance_candidates, panoptic_candidates
from m2f.eval.report.charts import (
    MAX_POINTS,
    Bar,
    Series,
    bar_chart,
    downsample,
    line_chart,
    matrix_chart,
    stack_charts,
    tick_label,
    ticks,
)
from m2f.eval.report.evaluation_page import details_json, evaluation_page, to_jpeg
from m2f.eval.report.page import Section, page, table
from m2f.eval.report.panels import encode_png
from m2f.eval.report.precision_recall import curves_by_class, curves_by_size, precision_recall
from m2f.eval.results.results import EvaluationSubject
from m2f.eval.results.states import EvaluationStates, image_qualities

TABLE = CategoryTable(
    (
        Category(1, "cat & <dog>", True, (255, 0, 0)),
        Category(2, "sky", False, (0, 0, 255)),
        Category(3, "bus", True, (0, 0, 0)),
    )
)
SUBJECT = EvaluationSubject(dataset="toy", fingerprint="0123456789abcdef", step=1200)
TASKS = ("panoptic", "instance", "semantic")


def evaluated(tasks, num_images=3):
    """Return states in which the cat of image n lacks n columns, and the cat of image 2 is predicted as a bus."""
    states = EvaluationStates.empty(TABLE, tasks)
    truth_map = np.repeat([[1, 1, 1, 1, 2, 2, 2, 2]], 8, axis=0)
    truth = PanopticTruth(truth_map, {1: TruthSegment(0, 32, False), 2: TruthSegment(1, 32, False)})
    for image_id in range(num_images):
        predicted = np.where(np.arange(8) < image_id, 0, truth_map)
        prediction = PanopticPrediction(predicted, {1: 2 if image_id == 2 else 0, 2: 1})
        if states.panoptic is not None:
            states.panoptic.update(image_id, truth, prediction)
            states.segments.update(image_id, panoptic_candidates(truth, prediction))
            states.errors.add(image_id, panoptic_errors(panoptic_candidates(truth, prediction)))
        if states.instance is not None:
            boxes = InstanceTruth(
                encode_masks(truth_map[None] == 1), np.array([0]), np.array([32.0]), np.array([False])
            )
            found = InstanceDetections(
                encode_masks(predicted[None] == 1), np.array([0]), np.array([int(image_id == 2)]), np.array([0.9])
            )
            states.instance.update(image_id, boxes, found)
            if states.panoptic is None:
                states.segments.update(image_id, instance_candidates(boxes, found))
                states.errors.add(image_id, instance_errors(boxes, found))
        if states.semantic is not None:
            states.semantic.update(
                image_id, (truth_map - 1).astype(np.uint8), np.where(predicted > 0, predicted - 1, 2)
            )
    return states


def panel(value, width=60):
    return encode_png(np.full((20, width, 3), value, np.uint8))


class PageReader(HTMLParser):
    """Parser that fails on tags that are not closed in order, and collects text, links and tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("tasks", [TASKS, ("panoptic",), ("instance",), ("semantic",)], ids="+".join)
def test_pages_of_every_task_are_self_contained(tasks):
    results = evaluated(tasks).compute(TABLE, SUBJECT)
    html = evaluation_page(results, {5: panel(80)}, {7: panel(90), 3: panel(100)})
    read = PageReader(html)
    assert "toy at step 1,200" in read.text
    assert "cat & <dog>" in read.text
    assert read.tags.count("img") == 3
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in read.links)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert ("missed" in read.text) == (tasks != ("semantic",))
    assert ("gain in PQ by type of error" in read.text) == ("panoptic" in tasks)
    assert ("gain in AP50 by type of error" in read.text) == (tasks == ("instance",))
    assert ("precision at recall, mean over classes" in read.text) == ("instance" in tasks)
    json.loads(details_json(results))


def test_details_json_contains_the_data_of_the_page():
    content = json.loads(details_json(evaluated(TASKS).compute(TABLE, SUBJECT)))
    assert content["segments"]["outcomes"] == {
        "found": 5,
        "bad outline": 0,
        "wrong class": 0,
        "missed": 1,
        "duplicate": 0,
        "invented": 1,
    }
    assert ["sky", "sky", 3] in content["segments"]["confusion"]
    assert ["cat & <dog>", "(none)", 1] in content["segments"]["confusion"]
    assert ["cat & <dog>", "bus", 8 + 16] in content["pixels"]["confusion"]


def test_details_of_classes_with_one_name_are_kept_apart():
    named = CategoryTable(tuple(replace(category, name="fish") for category in TABLE.categories))
    states = evaluated(TASKS)
    content, same = (json.loads(details_json(states.compute(table, SUBJECT))) for table in (TABLE, named))
    for key in ("by_class", "confusion"):
        assert len(same["segments"][key]) == len(content["segments"][key])
    assert list(same["segments"]["by_class"]) == ["fish", "fish (2)", "fish (3)"]
    assert list(same["precision_recall_by_class"]) == ["fish"]
    assert same["precision_recall_by_class"]["fish"] == content["precision_recall_by_class"]["cat & <dog>"]


def test_precision_curves_average_over_annotated_classes():
    results = evaluated(("instance",)).compute(TABLE, SUBJECT)
    curves = precision_recall(results)
    assert len(curves["recall"]) == 101
    assert np.mean(curves["IoU 0.50"]) == pytest.approx(results.instance.stats["AP50"])
    assert np.mean(curves["mean of IoU 0.50 to 0.95"]) == pytest.approx(results.instance.stats["AP"])


def test_mean_of_a_precision_curve_equals_its_ap():
    result = evaluated(("instance",)).compute(TABLE, SUBJECT).instance
    cat, bus = curves_by_class(result)
    assert bus is None  # no bus is annotated
    assert np.mean(cat["mean of IoU 0.50 to 0.95"]) == pytest.approx(result.per_class[0])
    by_size = curves_by_size(result)
    assert np.mean(by_size["small"]) == pytest.approx(result.stats["APs"])
    assert by_size["medium"] is by_size["large"] is None


def test_small_charts_of_many_classes_are_folded():
    table = CategoryTable(tuple(Category(i, f"class {i}", True, (0, 0, 0)) for i in range(30)))
    states = EvaluationStates.empty(table, ("instance",))
    masks = encode_masks(np.ones((1, 8, 8), bool))
    for i in range(30):
        truth = InstanceTruth(masks, np.array([i]), np.array([64.0]), np.array([False]))
        states.instance.update(i, truth, InstanceDetections(masks, np.array([0]), np.array([i]), np.array([0.5])))
        nothing = InstanceDetections((), *np.zeros((3, 0), int))
        states.segments.update(i, instance_candidates(truth, nothing))
        states.errors.add(i, instance_errors(truth, nothing))
    html = evaluation_page(states.compute(table, SUBJECT), {}, {})
    assert html.count("AP 100.0") == 30
    assert "all 30 classes" in html
    PageReader(html)


def test_page_has_the_notes_on_images_classes_and_files_and_supports_an_empty_evaluation():
    subject = EvaluationSubject(dataset="toy", fingerprint="ff", subset="first 3 of 9", classes="only bus, sky")
    results = replace(evaluated(TASKS).compute(TABLE, subject), notes=["1 of 3 images have no result"])
    text = PageReader(evaluation_page(results, {}, {})).text
    shown = ["Subset: first 3 of 9. Not comparable with results of the whole set.", "Some classes: only bus, sky."]
    assert [line for line in text if line in (*shown, *results.notes)] == [*shown, *results.notes]
    PageReader(evaluation_page(EvaluationStates.empty(TABLE, TASKS).compute(TABLE, SUBJECT), {}, {}))


@pytest.mark.parametrize("tasks", [TASKS, ("instance",), ("semantic",)], ids="+".join)
def test_image_quality_is_lowest_for_the_worst_image(tasks):
    qualities = image_qualities(evaluated(tasks))
    assert min(qualities, key=lambda image_id: qualities[image_id]) == 2
    assert qualities[0] == pytest.approx(1.0)


def test_to_jpeg_shrinks_pictures():
    wide = np.random.default_rng(0).integers(0, 255, (40, 3000, 3)).astype(np.uint8)
    assert len(to_jpeg(encode_png(wide))) < len(encode_png(wide)) / 4


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 100.0, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]),
        (41.2, 50.3, [40.0, 42.0, 44.0, 46.0, 48.0, 50.0, 52.0]),
        (3.0, 3.0, [2.5, 2.7, 2.9, 3.1, 3.3, 3.5]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_numbers_that_enclose_the_range(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    if low != high:
        assert found == pytest.approx(expected)
    assert len({tick_label(tick, found) for tick in found}) == len(found)


def test_curves_keep_colours_skip_gaps_and_are_thinned():
    series = [Series("a", []), Series("b", [(0.0, 1.0), (1.0, float("nan")), (2.0, 2.0), (3.0, 3.0)])]
    svg = line_chart("t & u", series, "steps")
    assert svg.count("<polyline") == 2
    assert "#d55e00" in svg
    assert "#0072b2" not in svg
    assert "t &amp; u" in svg
    assert "no values" in line_chart("t", [Series("a", [(0.0, float("inf"))])], "steps")
    long = [(float(i), 2.0 * i) for i in range(10_000)]
    kept = downsample(long)
    assert len(kept) <= MAX_POINTS
    assert all(y == pytest.approx(2 * x) for x, y in kept)


def test_bars_extend_from_zero_in_both_directions():
    svg = bar_chart("t", [Bar("up", 2.0, "+2"), Bar("down", -1.0, "-1")])
    (left_up, width_up), (left_down, width_down) = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', svg)
    assert float(width_up) == pytest.approx(2 * float(width_down), abs=0.2)
    assert float(left_down) + float(width_down) == pytest.approx(float(left_up), abs=0.2)
    assert bar_chart("nothing", [Bar("a", 0.0, "0")])


def test_matrix_draws_only_nonzero_cells():
    svg = matrix_chart("m", ["a", "b"], [[0.75, 0.25], [0.0, 1.0]], [["x", "y"], ["", "z"]])
    assert svg.count("<title>") == 3
    assert ">75<" in svg


def test_charts_are_stacked_in_one_svg():
    charts = [bar_chart("one", [Bar("a", 1.0, "1")]), line_chart("two", [Series("s", [(0.0, 1.0), (1.0, 2.0)])], "x")]
    picture = stack_charts(charts)
    assert picture.count("<svg ") == 3
    tops = [float(y) for y in re.findall(r'<svg x="10" y="(\d+)"', picture)]
    assert tops == sorted(tops)


def test_page_and_table_escape_html():
    html = page("<t>", "", [Section("A & B", table(["<h>"], [["<c>"]]))])
    PageReader(html)
    assert "<c>" not in html
    assert 'href="#a---b"' in html
