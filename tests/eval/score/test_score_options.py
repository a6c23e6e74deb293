"""Options of `m2f score panoptic` and `instances`: boxes, sizes, subsets, unknown categories, report and the like."""

import contextlib
import io
import json
import re

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m2f.cluster.cli import main
from m2f.eval.errors import EvaluationError
from m2f.eval.functions import (
    Instances,
    PanopticImage,
    evaluate_instances,
    evaluate_panoptic,
    evaluate_semantic,
)
from m2f.eval.results.images import read_image_records
from m2f.eval.score.instances import instance_scoring
from m2f.eval.score.options import ScoreOptions

SIDE = 120
NAMES = ("cat", "dog", "bus")
IDS = (5, 1, 9)


def rle(mask):
    found = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def random_masks(random, count):
    masks = np.zeros((count, SIDE, SIDE), dtype=bool)
    for mask in masks:
        y, x, h, w = random.integers(0, SIDE - 6), random.integers(0, SIDE - 6), *random.integers(3, SIDE, 2)
        mask[y : y + h, x : x + w] = True
    return masks


@pytest.fixture
def coco(tmp_path):
    """Return (folder, truth, results, arrays) of instances with inexact boxes, crowds and tied scores."""
    random = np.random.default_rng(0)
    annotations, results, arrays = [], [], []
    for image_id in range(1, 13):
        masks = random_masks(random, random.integers(0, 6))
        labels = random.integers(0, 3, len(masks))
        crowd = random.random(len(masks)) < 0.15
        for mask, label, is_crowd in zip(masks, labels, crowd, strict=True):
            box = (coco_masks.toBbox(rle(mask)) + random.normal(0, 0.4, 4)).tolist()
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": IDS[label]})
            annotations[-1] |= {
                "area": float(mask.sum()),
                "iscrowd": int(is_crowd),
                "bbox": box,
                "segmentation": rle(mask),
            }
        shifted = [np.roll(m, random.integers(-6, 7, 2), axis=(0, 1)) for m in masks for _ in range(2)]
        found = np.concatenate([np.array(shifted).reshape(-1, SIDE, SIDE), random_masks(random, 3)]).astype(bool)
        predicted_labels = np.concatenate([np.repeat(labels, 2), random.integers(0, 3, 3)])
        scores = np.round(random.random(len(found)), 1)
        for mask, label, score in zip(found, predicted_labels, scores, strict=True):
            results.append({"image_id": image_id, "category_id": IDS[label], "segmentation": rle(mask)})
            results[-1] |= {"score": float(score)}
        arrays.append((Instances(masks, labels, is_crowd=crowd), Instances(found, predicted_labels, scores)))
    truth = {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, 13)],
        "categories": [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)],
        "annotations": annotations,
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path, truth, results, arrays


def with_boxes(results):
    return [result | {"bbox": coco_masks.toBbox(result["segmentation"]).tolist()} for result in results]


def oracle(truth, results, kind, **params):
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = json.loads(json.dumps(truth))
        api.createIndex()
        run = COCOeval(api, api.loadRes(json.loads(json.dumps(results))), kind)
        for name, value in params.items():
            setattr(run.params, name, value)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def scored(folder, *options, kind="instances"):
    words = [kind, "--truth", str(folder / "truth.json"), "--predictions", str(folder / "results.json")]
    assert main(["score", *words, "--output", str(folder / "out.json"), "--workers", "1", *options]) == 0
    return json.loads((folder / "out.json").read_text())


STATS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


@pytest.mark.parametrize("stated", [False, True], ids=["of masks", "stated"])
def test_box_and_mask_ap_equal_pycocotools(coco, stated):
    folder, truth, results, _ = coco
    if stated:
        results = with_boxes(results)
        (folder / "results.json").write_text(json.dumps(results))
    found = scored(folder, "--boxes")
    boxes, masks = oracle(truth, results, "bbox"), oracle(truth, results, "segm")
    assert [found["box"][name] for name in STATS] == boxes.stats.tolist()
    if not stated:
        assert [found[name] for name in STATS] == masks.stats.tolist()
    for category in IDS:
        class_stats = oracle(truth, results, "bbox", catIds=[category]).stats.tolist()
        assert list(found["box"]["per_class_stats"][str(category)].values()) == class_stats


def test_zero_boxes_are_replaced_by_mask_boxes_and_invalid_boxes_are_refused(coco, capsys):
    folder, _, results, _ = coco
    before = scored(folder, "--boxes")
    (folder / "results.json").write_text(json.dumps([result | {"bbox": [0, 0, 0, 0]} for result in results]))
    assert scored(folder, "--boxes") == before
    words = ["--truth", str(folder / "truth.json"), "--predictions", str(folder / "results.json"), "--boxes"]
    for box in ([0, 0, -1, 2], [1, 2, 3], ["a", 0, 0, 0], [float("nan"), 1, 1, 1], 7):
        (folder / "results.json").write_text(json.dumps([results[0] | {"bbox": box}]))
        assert main(["score", "instances", *words]) == 2
        assert "result 0 has bbox" in capsys.readouterr().err


def test_class_metrics_with_other_limits_and_sizes_equal_pycocotools(coco, capsys):
    folder, truth, results, _ = coco
    found = scored(folder, "--max-dets", "3", "1", "2", "--area-bounds", "500", "4000")
    assert re.search(r"class +AP +AP50 +AP75 +APs +APm +APl +AR1 +AR2 +AR3", capsys.readouterr().out)
    ranges = [[0, 1e10], [0, 500], [500, 4000], [4000, 1e10]]
    run = oracle(truth, results, "segm", maxDets=[1, 2, 3], areaRng=ranges)
    precision, recall = run.eval["precision"], run.eval["recall"]  # [T, R, K, A, M], classes by ascending id
    for k, category in enumerate(sorted(IDS)):
        expected = {"AP": precision[:, :, k, 0, 2], "AP50": precision[0, :, k, 0, 2], "APl": precision[:, :, k, 3, 2]}
        expected |= {"AR1": recall[:, k, 0, 0], "AR3": recall[:, k, 0, 2], "ARs": recall[:, k, 1, 2]}
        row = found["per_class_stats"][str(category)]
        for name, values in expected.items():
            assert row[name] == (values.mean() if (values > -1).all() else -1), (category, name)


def test_subset_of_images_and_classes_equals_pycocotools(coco, capsys):
    folder, truth, results, _ = coco
    (folder / "chosen.txt").write_text("3\n4\n7\n\n8\n")
    found = scored(folder, "--images", str(folder / "chosen.txt"), "--classes", "dog", "9", "--boxes")
    assert "SOME CLASSES: dog, 9" in capsys.readouterr().out
    assert (found["num_images"], found["notes"][:2]) == (4, ["SUBSET: 4 selected images", "SOME CLASSES: dog, 9"])
    for kind, numbers in (("segm", found), ("bbox", found["box"])):
        run = oracle(truth, results, kind, imgIds=[3, 4, 7, 8], catIds=[1, 9])
        assert [numbers[name] for name in STATS] == run.stats.tolist()
    words = ["--truth", str(folder / "truth.json"), "--predictions", str(folder / "results.json")]
    assert main(["score", "instances", *words, "--classes", "cow"]) == 2
    assert "does not list 1 of the classes to score: cow; listed: dog, cat, bus" in capsys.readouterr().err
    (folder / "chosen.txt").write_text("99\n")
    assert main(["score", "instances", *words, "--images", str(folder / "chosen.txt")]) == 2
    assert main(["score", "instances", *words, "--area-bounds", "9", "3"]) == 2


def test_unknown_categories_are_refused_or_ignored(coco, capsys):
    folder, _, results, _ = coco
    before = scored(folder)
    other = [{**results[0], "category_id": 77, "score": 1.0}]
    (folder / "results.json").write_text(json.dumps(other + results))
    words = ["--truth", str(folder / "truth.json"), "--predictions", str(folder / "results.json")]
    assert main(["score", "instances", *words]) == 2
    note = "ignored: predictions of categories that the truth does not list (77)"
    notes = {"notes": [*before["notes"], note]}
    assert scored(folder, "--ignore-unknown", "--report", str(folder / "page.html")) == before | notes
    assert note in capsys.readouterr().out
    assert note in (folder / "page.html").read_text()


def test_report_and_per_image_file_are_written(coco):
    folder, *_ = coco
    found = scored(
        folder, "--report", str(folder / "page.html"), "--per-image", str(folder / "images.parquet"), "--boxes"
    )
    page = (folder / "page.html").read_text()
    for text in ("gain in AP50 by type of error", "Confusion", "Precision and recall", "results.json", "AP75"):
        assert text in page
    records = read_image_records((folder / "images.parquet").read_bytes())
    assert records.resampled(np.ones((12, 1), np.int32))["AP"][0] == pytest.approx(100 * found["AP"])


def test_per_image_values_count_as_many_detections_as_the_table(tmp_path):
    mask = np.zeros((1, SIDE, SIDE), bool)
    mask[:, :9, :9] = True
    wrong = np.roll(mask[0], 50, axis=1)
    results = [{"image_id": 1, "category_id": 1, "segmentation": rle(m)} for m in [mask[0], *[wrong] * 100, mask[0]]]
    results = [result | {"score": 1 - i / 200} for i, result in enumerate(results)]
    annotation = {"image_id": 1, "category_id": 1, "area": 81, "iscrowd": 0}
    masks = (mask[0], np.roll(mask[0], 1, axis=0))
    truth = {
        "images": [{"id": 1, "height": SIDE, "width": SIDE}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [annotation | {"id": i, "segmentation": rle(m)} for i, m in enumerate(masks)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = scored(tmp_path, "--class-agnostic", "--per-image", str(tmp_path / "images.parquet"))
    records = read_image_records((tmp_path / "images.parquet").read_bytes())
    assert records.per_image_values()["AP"] == pytest.approx([100 * found["AP"]])


def test_class_tables_have_the_limits_of_detections_that_were_scored(coco):
    folder, *_ = coco
    scored(folder, "--max-dets", "1", "5", "--report", str(folder / "page.html"))
    shown = re.findall(r"<th[^>]*>(AR\d+)</th>", (folder / "page.html").read_text())
    assert shown == ["AR1", "AR5", "AR1", "AR5"]  # of the set, and by class
    files, options = (folder / "truth.json", folder / "results.json"), ScoreOptions(max_dets=(1, 5))
    results = instance_scoring(*files, boundary=False, class_agnostic=False, options=options).compute_results()
    assert "\nclass  kind      AP\n" in results.table()


def test_python_functions_give_the_results_of_m2f_score(coco):
    folder, _, _, arrays = coco
    found = scored(folder, "--boxes")
    file_results = evaluate_instances(folder / "truth.json", str(folder / "results.json"), boxes=True)
    assert file_results.metrics()["AP"] == 100 * found["AP"]
    truth, predictions = zip(*arrays, strict=True)
    array_results = evaluate_instances(truth, predictions, class_names=NAMES)
    assert array_results.metrics()["AP"] == pytest.approx(100 * found["AP"], abs=1e-10)
    assert array_results.per_class()[0]["name"] == "cat"
    assert array_results.errors.counts == file_results.errors.counts
    masks = random_masks(np.random.default_rng(0), 2)
    with pytest.raises(EvaluationError, match="image 0: the prediction: scores has 1 entries for 2 masks"):
        evaluate_instances([Instances(masks, [0, 0])], [Instances(masks, [0, 0], [0.5])], class_names=["a"])
    with pytest.raises(EvaluationError, match="predictions has 0 images"):
        evaluate_instances([Instances(masks, [0, 0])], [], class_names=["a"])
    with pytest.raises(EvaluationError, match="truth is list, but the other one is a path"):
        evaluate_instances([], "results.json")


@pytest.fixture
def panoptic(tmp_path):
    """Return (folder, arrays): truth and predictions of four images, as COCO files and as arrays."""
    random = np.random.default_rng(1)
    categories = [{"id": i, "name": n, "isthing": int(n != "bus")} for i, n in zip(IDS, NAMES, strict=True)]
    documents = {"truth": [], "results": []}
    arrays = []
    for image_id in range(4):
        base = 1 + (np.arange(SIDE) // 17)[None, :] + 8 * (np.arange(SIDE) // 50)[:, None]
        truth_labels = {i: int(random.integers(0, 3)) for i in np.unique(base).tolist()}
        predicted = np.roll(base, random.integers(0, 7), axis=1)
        labels = {i: k if random.random() < 0.7 else int(random.integers(0, 3)) for i, k in truth_labels.items()}
        for side, id_map, side_labels in (("truth", base, truth_labels), ("results", predicted, labels)):
            folder = tmp_path / f"{side}_masks"
            folder.mkdir(exist_ok=True)
            bgr = np.stack([id_map * 0, id_map // 256, id_map % 256], axis=-1).astype(np.uint8)
            cv2.imwrite(str(folder / f"{image_id}.png"), bgr)
            segments = [
                {"id": i, "category_id": IDS[k], "area": int((id_map == i).sum()), "iscrowd": 0}
                for i, k in side_labels.items()
            ]
            documents[side].append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
        arrays.append((PanopticImage(base, truth_labels), PanopticImage(predicted, labels)))
    for side, annotations in documents.items():
        content = {"annotations": annotations} | ({"categories": categories} if side == "truth" else {})
        (tmp_path / f"{side}.json").write_text(json.dumps(content))
    return tmp_path, arrays


def panoptic_words(folder):
    return ["--truth-masks", str(folder / "truth_masks"), "--prediction-masks", str(folder / "results_masks")]


def test_panoptic_scoring_supports_sizes_reports_subsets_and_arrays(panoptic, capsys):
    folder, arrays = panoptic
    words = panoptic_words(folder)
    found = scored(folder, *words, "--report", str(folder / "page.html"), kind="panoptic")
    page = (folder / "page.html").read_text()
    assert "gain in PQ by type of error" in page
    assert "Confusion" in page
    truth, predictions = zip(*arrays, strict=True)
    array_results = evaluate_panoptic(truth, predictions, class_names=NAMES, is_thing=[True, True, False])
    assert array_results.panoptic.all.pq == pytest.approx(found["all"]["pq"], abs=1e-12)
    assert array_results.panoptic.by_size["small"].pq == pytest.approx(found["by_size"]["small"]["pq"], abs=1e-12)
    file_results = evaluate_panoptic(
        folder / "truth.json",
        folder / "results.json",
        truth_masks=folder / "truth_masks",
        prediction_masks=folder / "results_masks",
    )
    assert file_results.errors.gains == pytest.approx(array_results.errors.gains)
    assert file_results.table().startswith("results.json: 4 images\n")

    assert scored(folder, *words, "--by-size", kind="panoptic") == found
    bounds = scored(folder, *words, "--area-bounds", "10", "900", kind="panoptic")["by_size"]
    assert bounds["small"] is None
    assert bounds["large"] is None
    assert bounds["medium"]["n"] == 3

    dog_only = scored(folder, *words, "--classes", "dog", kind="panoptic")
    assert dog_only["all"]["pq"] == found["per_class"]["1"]["pq"]
    assert dog_only["all"]["n"] == 1
    (folder / "one.txt").write_text("2\n")
    one = scored(folder, *words, "--images", str(folder / "one.txt"), kind="panoptic")
    alone = evaluate_panoptic(truth[2:3], predictions[2:3], class_names=NAMES, is_thing=[True, True, False])
    assert one["all"]["pq"] == pytest.approx(alone.panoptic.all.pq, abs=1e-12)
    with pytest.raises(EvaluationError, match="image 0: a segment has class 3"):
        evaluate_panoptic(
            [PanopticImage(truth[0].id_map, {1: 3})], predictions[:1], class_names=NAMES, is_thing=[True] * 3
        )
    with pytest.raises(EvaluationError, match="class_names and is_thing"):
        evaluate_panoptic(truth, predictions)


def test_a_label_for_void_is_ignored_on_both_sides():
    id_map = np.array([[0, 0, 1, 1]])
    for labels in ({1: 0}, {0: 0, 1: 0}, {0: -1, 1: 0}):
        images = [PanopticImage(id_map, labels)]
        for truth, found in ((images, [PanopticImage(id_map, {1: 0})]), ([PanopticImage(id_map, {1: 0})], images)):
            quality = evaluate_panoptic(truth, found, class_names=["a"], is_thing=[True]).panoptic.per_class[0]
            assert (quality.true_positives, quality.false_positives, quality.false_negatives) == (1, 0, 0)


def test_stated_areas_of_segments_must_be_above_0_unless_they_are_crowds():
    id_map = np.array([[1, 1, 2, 2]])
    found = [PanopticImage(id_map, {1: 0, 2: 0})]
    for area in (0, -3, float("nan")):
        truth = [PanopticImage(id_map, {1: 0, 2: 0}, areas={2: area})]
        with pytest.raises(EvaluationError, match=f"image 0: the truth: areas states {area} for segment 2"):
            evaluate_panoptic(truth, found, class_names=["a"], is_thing=[True])
    truth = [PanopticImage(id_map, {1: 0, 2: 0}, crowds=[2], areas={2: 0})]
    assert evaluate_panoptic(truth, found, class_names=["a"], is_thing=[True]).metrics()["PQ"] == 100


def test_an_annotated_segment_without_pixels_is_missed_by_a_prediction_in_void():
    truth = [PanopticImage(np.array([[1, 1, 0, 0]]), {1: 0, 2: 1})]
    found = [PanopticImage(np.array([[1, 1, 3, 3]]), {1: 0, 3: 1})]
    with pytest.warns(UserWarning, match="1 of 2 annotated segments have no pixel"):
        results = evaluate_panoptic(truth, found, class_names=["a", "b"], is_thing=[True] * 2)
    quality = results.panoptic.per_class[1]
    assert (quality.true_positives, quality.false_positives, quality.false_negatives) == (0, 0, 1)


def test_maps_without_integers_are_refused():
    whole, real = np.array([[0, 1]]), np.array([[0.0, 0.9]])
    for truth, found, side in ((whole, real, "prediction"), (real, whole, "truth")):
        message = f"image 0: the {side} is a float64 map.*; it must be integers"
        with pytest.raises(EvaluationError, match=message):
            evaluate_semantic([truth], [found], class_names=["a", "b"])
        images = [PanopticImage(truth, {1: 0})], [PanopticImage(found, {1: 0})]
        with pytest.raises(EvaluationError, match=message):
            evaluate_panoptic(*images, class_names=["a"], is_thing=[True])


def test_masks_may_be_a_list_of_arrays_or_of_uncompressed_run_lengths():
    mask = np.zeros((4, 6), dtype=bool)
    mask[:, 1:3] = True
    runs = {"size": [4, 6], "counts": [4, 8, 12]}
    for masks in (mask[None], [mask], [rle(mask)], [runs]):
        results = evaluate_instances([Instances(masks, [0])], [Instances([mask], [0], [0.9])], class_names=["a"])
        assert results.metrics()["AP"] == pytest.approx(100)
    for masks, message in (
        (mask, r"the truth: masks is bool of shape \[4, 6\]; it must be \[N, H, W\]"),
        ([mask.astype(int)], "mask 0 is int64 with shape"),
        ([runs | {"counts": [4, 9, 12]}], "mask 0: the run lengths of its RLE do not add up to 6 x 4 pixels"),
        ([rle(mask) | {"size": [400, 6]}], "mask 0: the run lengths of its RLE do not add up to 6 x 400 pixels"),
        ([rle(mask) | {"counts": b"\xff"}], "mask 0: its RLE is damaged"),
    ):
        with pytest.raises(EvaluationError, match=f"image 0: {message}"):
            evaluate_instances([Instances(masks, [0])], [Instances([mask], [0], [0.9])], class_names=["a"])


def test_stated_areas_of_instances_must_be_numbers_of_at_least_0():
    mask = np.ones((4, 6), dtype=bool)
    for area in (float("nan"), float("inf"), -1):
        truth, found = Instances([mask] * 2, [0, 0], areas=[0, area]), Instances([mask], [0], [0.9])
        with pytest.raises(EvaluationError, match=f"image 0: the truth: areas has {area} for mask 1"):
            evaluate_instances([truth], [found], class_names=["a"])


def test_unknown_categories_of_segments_are_refused_or_ignored(panoptic, capsys):
    folder, _ = panoptic
    document = json.loads((folder / "results.json").read_text())
    document["annotations"][1]["segments_info"][0]["category_id"] = 77
    (folder / "results.json").write_text(json.dumps(document))
    words = ["--truth", str(folder / "truth.json"), "--predictions", str(folder / "results.json")]
    assert main(["score", "panoptic", *words, *panoptic_words(folder)]) == 2
    report = "--ignore-unknown", "--report", str(folder / "page.html")
    assert "(77)" in scored(folder, *panoptic_words(folder), *report, kind="panoptic")["notes"][0]
    assert "(77)" in capsys.readouterr().out
    assert "the truth does not list (77)" in (folder / "page.html").read_text()
