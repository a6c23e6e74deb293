"""Predictions with a category table are matched with the truth by class name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from m2f.eval.errors import EvaluationError
from m2f.eval.score.files import ScoredCategory
from m2f.eval.score.instances import instance_scoring
from m2f.eval.score.options import ScoreOptions, chosen_labels
from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring
from tests.eval.score.test_scoring import CATEGORIES, run, write_ids

NEW_IDS = {3: 7, 7: 3, 200: 5, 5: 200, 9: 1}
RENUMBERED = [c | {"id": NEW_IDS[c["id"]]} for c in reversed(CATEGORIES)]
EXTRA = {"id": 77, "name": "boat", "isthing": 1}


def panoptic_files(folder, categories, ids, extra=False):
    """Write an image of two segments with a perfect prediction; `extra` adds a predicted segment on void."""
    id_map = np.zeros((20, 30), np.int64)
    id_map[:8], id_map[8:16] = 1, 2
    write_ids(folder / "truth/a.png", id_map)
    predicted = id_map.copy()
    predicted[16:] = 3 * extra
    write_ids(folder / "found/a.png", predicted)
    areas = [{"id": i, "area": int((id_map == i).sum()), "iscrowd": 0} for i in (1, 2)]
    truth = [s | {"category_id": c} for s, c in zip(areas, (3, 7), strict=True)]
    found = [{"id": i, "category_id": ids[c]} for i, c in ((1, 3), (2, 7))]
    found += [{"id": 3, "category_id": EXTRA["id"]}] * extra

    def annotation(segments):
        return [{"image_id": 1, "file_name": "a.png", "segments_info": segments}]

    (folder / "truth.json").write_text(json.dumps({"annotations": annotation(truth), "categories": CATEGORIES}))
    (folder / "found.json").write_text(json.dumps({"annotations": annotation(found), "categories": categories}))
    masks = {"truth_masks": folder / "truth", "prediction_masks": folder / "found"}
    return PanopticFiles(truth=folder / "truth.json", predictions=folder / "found.json", **masks)


def instance_files(folder, categories, ids):
    """Write two objects of two classes with perfect results, and the category table beside the results."""
    square = [[2, 2, 12, 2, 12, 12, 2, 12]]
    shared = {"image_id": 1, "iscrowd": 0, "area": 100}
    annotations = [shared | {"id": i, "category_id": c, "segmentation": square} for i, c in ((1, 3), (2, 200))]
    images = [{"id": 1, "height": 20, "width": 30}]
    listed = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES]  # as in COCO's instance files: no isthing
    truth = {"images": images, "annotations": annotations, "categories": listed}
    results = [{"image_id": 1, "category_id": ids[c], "segmentation": square, "score": 0.9} for c in (3, 200)]
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found").mkdir()
    (folder / "found/instances.json").write_text(json.dumps(results))
    (folder / "found/categories.json").write_text(json.dumps(categories))
    return folder / "truth.json", folder / "found/instances.json"


def test_panoptic_results_with_other_ids_are_matched_by_name(tmp_path):
    report = run(panoptic_scoring(panoptic_files(tmp_path, RENUMBERED, NEW_IDS), boundary=False))
    assert report.content["all"]["pq"] == 1.0
    assert report.content["per_class"]["3"]["tp"] == report.content["per_class"]["7"]["tp"] == 1


def test_detections_with_other_ids_are_matched_by_name(tmp_path):
    truth, found = instance_files(tmp_path, RENUMBERED, NEW_IDS)
    report = run(instance_scoring(truth, found, boundary=False, class_agnostic=False))
    assert report.content["AP"] == pytest.approx(1.0)


def test_classes_missing_in_the_truth_are_ignored_and_noted(tmp_path):
    same = {c["id"]: c["id"] for c in CATEGORIES}
    files = panoptic_files(tmp_path, [*CATEGORIES, EXTRA], same, extra=True)
    report = run(panoptic_scoring(files, boundary=False))
    assert report.content["all"]["pq"] == 1.0
    assert f"5 classes in both; {files.truth} lacks boat" in report.table


def test_an_invalid_category_id_is_refused_if_classes_are_missing_in_the_truth(tmp_path):
    same = {c["id"]: c["id"] for c in CATEGORIES}
    truth, found = instance_files(tmp_path, [*CATEGORIES, EXTRA], same)
    results = json.loads(found.read_text())
    results[1]["category_id"] = [5]
    found.write_text(json.dumps(results))
    with pytest.raises(EvaluationError, match=r"image 1: result 1 has category \[5\]"):
        run(instance_scoring(truth, found, boundary=False, class_agnostic=False))


@pytest.mark.parametrize(
    ("changed", "rows"),
    [
        ({"isthing": 0}, r"id 3 'car' \(stuff\); .*: id 3 'car' \(thing\)"),
        ({"name": "van"}, r"id 3 'van' \(thing\); .*: id 3 'car' \(thing\)"),
    ],
)
def test_contradicting_category_tables_are_refused(tmp_path, changed, rows):
    same = {c["id"]: c["id"] for c in CATEGORIES}
    categories = [CATEGORIES[0] | changed, *CATEGORIES[1:]]
    with pytest.raises(EvaluationError, match=rows):
        panoptic_scoring(panoptic_files(tmp_path, categories, same), boundary=False)


def test_a_name_selects_all_classes_that_have_it(tmp_path):
    same = {c["id"]: c["id"] for c in CATEGORIES}
    files = panoptic_files(tmp_path, CATEGORIES, same)
    document = json.loads(files.truth.read_text())
    document["categories"][1]["name"] = "car"
    files.truth.write_text(json.dumps(document))
    files.predictions.write_text(json.dumps({"annotations": json.loads(files.predictions.read_text())["annotations"]}))
    scoring = panoptic_scoring(files, boundary=False, options=ScoreOptions(classes=("car",)))
    assert run(scoring).content["all"]["n"] == 2


def test_a_word_that_is_the_name_of_one_class_and_the_id_of_another_is_refused():
    categories = [ScoredCategory(3, "7", True), ScoredCategory(7, "car", True), ScoredCategory(9, "9", True)]
    message = "--classes 7: in truth.json, this is the id of class 'car' and the name of the class with id 3; use the"
    with pytest.raises(EvaluationError, match=message):
        chosen_labels(categories, ScoreOptions(classes=("7",)), "truth.json")
    assert chosen_labels(categories, ScoreOptions(classes=("car", "9")), "truth.json") == {1, 2}
    assert chosen_labels(categories, ScoreOptions(classes=("3",)), "truth.json") == {0}


def test_kinds_are_not_compared_if_a_table_has_null_instead_of_a_kind(tmp_path):
    same = {c["id"]: c["id"] for c in CATEGORIES}
    categories = [CATEGORIES[0] | {"isthing": None}, *CATEGORIES[1:]]
    report = run(panoptic_scoring(panoptic_files(tmp_path, categories, same), boundary=False))
    assert report.content["all"]["pq"] == 1.0
