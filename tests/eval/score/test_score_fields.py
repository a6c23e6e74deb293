"""Fields of score files: flags, areas and ids are valid, or an error names file, entry and value."""

import json
from pathlib import Path

import numpy as np
import pytest

from m2f.data_pipeline.image_file import encode_png
from m2f.eval.errors import EvaluationError
from m2f.eval.score.cityscapes import _parse
from m2f.eval.score.instances import instance_scoring
from m2f.eval.score.options import EVERYTHING, ScoreOptions
from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring
from m2f.model.errors import UserError


def _run(scoring):
    return scoring.run(1, lambda count: None).content


MISSING = object()
"""Value of a field to leave out."""


def _panoptic(folder, segment=(), category=(), predicted=(), annotation=(), found=(), options=EVERYTHING):
    base = {"id": 1, "category_id": 3, "area": 6, "iscrowd": 0}
    (folder / "x.png").write_bytes(encode_png(np.full((2, 3, 3), (1, 0, 0), np.uint8)))
    fields = {"id": 3, "name": "car", "isthing": 1} | dict(category)
    categories = [{name: value for name, value in fields.items() if value is not MISSING}]
    for name, changes in (("truth", segment), ("pred", predicted)):
        entry = {"image_id": 7, "file_name": "x.png", "segments_info": [base | dict(changes)]}
        entry |= dict(annotation if name == "truth" else found)
        document = {"annotations": [entry]} | ({"categories": categories} if name == "truth" else {})
        (folder / f"{name}.json").write_text(json.dumps(document))
    return _run(
        panoptic_scoring(
            PanopticFiles(
                truth=folder / "truth.json",
                truth_masks=folder,
                predictions=folder / "pred.json",
                prediction_masks=folder,
            ),
            boundary=False,
            options=options,
        )
    )


def test_valid_panoptic_files_are_scored(tmp_path):
    assert _panoptic(tmp_path)["all"]["pq"] == 1
    assert _panoptic(tmp_path, segment={"iscrowd": False}, category={"isthing": True})["things"]["pq"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment": {"iscrowd": "0"}}, "truth.json: image 7: segment 1: iscrowd is '0'"),
        ({"segment": {"area": 0}}, "truth.json: image 7: segment 1: area is 0"),
        ({"segment": {"area": float("inf")}}, "truth.json: image 7: segment 1: area is inf"),
        ({"segment": {"id": "five"}}, "truth.json: image 7: id is 'five'"),
        ({"predicted": {"id": float("inf")}}, "pred.json: image 7: id is inf"),
        ({"category": {"isthing": "0"}}, "^[^:]*truth.json: category 3: isthing is '0'"),
        ({"category": {"isthing": MISSING}}, "1 categories have no `isthing`.*: car"),
        ({"category": {"isthing": None}}, "1 categories have no `isthing`.*: car"),
        ({"category": {"id": float("inf")}}, r"truth.json: categories\[0\]: id is inf"),
        ({"category": {"id": 3.5}}, r"truth.json: categories\[0\]: id is 3.5, not a whole number"),
        ({"predicted": {"category_id": "3"}}, "pred.json: image 7: segment 1 has category '3', which"),
        ({"annotation": {"segments_info": {}}}, "truth.json: image 7: segments_info is {}; it must be a list"),
        ({"found": {"segments_info": {}}}, "pred.json: image 7: segments_info is {}; it must be a list"),
        ({"annotation": {"image_id": "\ud800"}}, r"has the id '\\ud800', which contains half of a surrogate pair"),
    ],
)
def test_errors_in_panoptic_files_name_the_entry(tmp_path, changes, message):
    with pytest.raises(EvaluationError, match=message):
        _panoptic(tmp_path, **changes)


SQUARE = [[2, 2, 40, 2, 40, 40, 2, 40]]


def _instances(folder, annotation=(), image=(), result=(), images=(), options=EVERYTHING):
    square = {"segmentation": SQUARE, "category_id": 5, "image_id": 1}
    truth = {
        "images": [{"id": 1, "height": 60, "width": 60} | dict(image), *images],
        "categories": [{"id": 5, "name": "box"}],
        "annotations": [square | {"id": 31, "area": 1444, "iscrowd": 0} | dict(annotation)],
    }
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps([square | {"score": 0.9}, square | {"score": 0.5} | dict(result)]))
    scoring = instance_scoring(
        folder / "gt.json", folder / "found.json", boundary=False, class_agnostic=False, options=options
    )
    return scoring.run(1, lambda count: None)


def rle(counts, size=(60, 60)):
    return {"segmentation": {"size": list(size), "counts": counts}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotation": {"iscrowd": "1"}}, "gt.json: image 1: annotation 31: iscrowd is '1'"),
        ({"annotation": {"iscrowd": 2}}, "gt.json: image 1: annotation 31: iscrowd is 2"),
        ({"annotation": {"area": float("nan")}}, "gt.json: image 1: annotation 31: area is nan"),
        ({"annotation": {"area": "12"}}, "gt.json: image 1: annotation 31: area is '12'"),
        ({"annotation": {"area": -1}}, "gt.json: image 1: annotation 31: area is -1"),
        ({"image": {"height": float("inf")}}, "gt.json: image 1: height is inf"),
        ({"image": {"height": -5}}, "gt.json: image 1 has 60 x -5 pixels; it must have from 1 to"),
        ({"image": {"height": 70_000, "width": 70_000}}, "gt.json: image 1 has 70000 x 70000 pixels"),
        ({"image": {"height": 10**400}}, "gt.json: image 1 has 60 x more than 1e12 pixels"),
        ({"annotation": {"image_id": [1]}}, r"gt.json: image_id of annotation number 0 is \[1\], not an id"),
        (
            {"annotation": {"image_id": "1"}},
            "gt.json: image_id of annotation number 0 is '1', but the ids of images are",
        ),
        ({"result": {"image_id": {}}}, "found.json: result 1 is for image {}, which .*gt.json does not list"),
        ({"images": [{"id": 1, "height": 6, "width": 6}]}, "gt.json: image 1 is listed twice"),
        (
            {"image": {"id": "cat\udcff"}},
            r"has the id 'cat\\udcff', which contains half of a surrogate pair; no file can store it",
        ),
        ({"images": [{"id": "a", "height": 6, "width": 6}]}, "gt.json: some image ids are integers and some are text"),
        ({"images": [{"id": None, "height": 6, "width": 6}]}, r"gt.json: images\[1\] has id None; ids are"),
        ({"result": {"score": "five"}}, "found.json: image 1: result 1 has score 'five', which is not a finite number"),
        ({"result": {"score": 10**400}}, "found.json: image 1: result 1 has score 10000"),
        ({"result": {"score": float("inf")}}, "found.json: image 1: result 1 has score inf"),
        ({"result": {"category_id": [5]}}, r"found.json: image 1: result 1 has category \[5\], which .*gt.json"),
        ({"annotation": {"category_id": None}}, "gt.json: image 1: annotation 31 has category None, which"),
        (
            {"annotation": {"segmentation": [[1, 2, 3, 4, 5]]}},
            "gt.json: image 1: annotation 31: a polygon needs an even",
        ),
        ({"result": {"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}}, "found.json: image 1: result 1: a polygon has"),
        ({"result": rle([3, 4])}, "found.json: image 1: result 1: the run lengths of its RLE do not add up to 60 x 60"),
        ({"annotation": rle([4_000, -400])}, "gt.json: image 1: annotation 31: the run lengths of its RLE do not add"),
        (
            {"result": rle([3599.5, 0.5])},
            "found.json: image 1: result 1: its RLE is damaged; runs must be whole numbers",
        ),
        ({"result": rle([40_000_000_000])}, "found.json: image 1: result 1: the run lengths of its RLE do not add up"),
        ({"result": rle("zzzz")}, "found.json: image 1: result 1: its RLE is damaged"),
        (
            {"result": rle([3600], (60, 61))},
            "found.json: image 1: result 1: its RLE is 61 x 60, but the image is 60 x 60",
        ),
        ({"result": rle([3600], ("60", 60))}, "found.json: image 1: result 1 has no usable `segmentation`"),
        ({"annotation": {"segmentation": None}}, "gt.json: image 1: annotation 31 has no usable `segmentation`"),
    ],
)
def test_errors_in_instance_files_name_the_entry(tmp_path, changes, message):
    assert _instances(tmp_path).content["AP"] == pytest.approx(1)
    with pytest.raises(UserError, match=message):
        _instances(tmp_path, **changes)


def test_annotation_of_area_0_counts_as_in_pycocotools(tmp_path):
    """The stated area makes it small, and it counts in the AP over all sizes."""
    content = _instances(tmp_path, annotation={"area": 0}).content
    assert (content["AP"], content["APs"], content["APm"]) == (pytest.approx(1), pytest.approx(1), -1)


def test_annotations_of_unlisted_images_are_counted(tmp_path):
    table = _instances(tmp_path, annotation={"image_id": 2}).table
    assert f"1 of 1 annotations are for images that {tmp_path / 'gt.json'} does not list" in table


@pytest.mark.parametrize(
    ("annotation", "note"),
    [
        ({"area": 0.4}, "1 of 1 annotated segments have less than half or more than twice the pixels of their"),
        (
            {"segmentation": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]},
            "1 of 1 annotated segments have no pixel; perhaps coordinates are normalised",
        ),
    ],
)
def test_wrong_areas_and_masks_without_pixels_are_noted(tmp_path, annotation, note):
    assert "DOUBTFUL" not in _instances(tmp_path).table
    assert f"DOUBTFUL TRUTH (1 image checked): {note}" in _instances(tmp_path, annotation=annotation).table


def test_images_without_a_result_are_counted_and_named(tmp_path):
    assert "no result" not in _instances(tmp_path).table
    more = [{"id": i, "height": 9, "width": 9} for i in (7, 8)]
    assert "2 of 3 images have no result in" in _instances(tmp_path, images=more).table
    assert "(no detections): 7, 8" in _instances(tmp_path, images=more).table


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "a\\..\\x.png", "", 5, "x.png\0", "./x.png"])
def test_maps_outside_their_folder_are_refused(tmp_path, name):
    files = PanopticFiles(
        truth=tmp_path / "truth.json",
        truth_masks=tmp_path,
        predictions=tmp_path / "pred.json",
        prediction_masks=tmp_path,
    )
    for side in (files.truth, files.predictions):
        _panoptic(tmp_path)
        document = json.loads(side.read_text())
        document["annotations"][0]["file_name"] = name
        side.write_text(json.dumps(document))
        with pytest.raises(EvaluationError, match=rf"{side.name}: image 7: file_name .* must name a file in"):
            _run(panoptic_scoring(files, boundary=False))


CASES = Path(__file__).resolve().parents[4] / "shared" / "cases" / "score"


@pytest.mark.skipif(not CASES.is_dir(), reason="no shared/cases/score")
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("pq_area_zero", "image 1: segment 5: area is 0"),
        ("pq_word_id", "image 1: id is 'five', not a whole number"),
        ("pq_no_isthing", "2 categories have no `isthing`"),
        ("ap_rle_over_32_bit", "image 1 has 200000 x 200000 pixels"),
        ("ap_duplicate_annotation_id", None),
    ],
)
def test_cases_of_public_bug_reports_are_scored_or_refused(case, message):
    folder = CASES / case
    truth, predictions = folder / "truth.json", folder / "pred.json"

    def score():
        if case.startswith("ap"):
            return _run(instance_scoring(truth, predictions, boundary=False, class_agnostic=False))["AP"]
        files = PanopticFiles(truth=truth, truth_masks=folder, predictions=predictions, prediction_masks=folder)
        return _run(panoptic_scoring(files, boundary=False))

    if message is None:
        assert score() == 1
        return
    with pytest.raises(UserError, match=message):
        score()


@pytest.mark.parametrize("category", [[5], {}, None, "5"])
def test_invalid_category_ids_are_refused_even_with_ignore_unknown(tmp_path, category):
    options = ScoreOptions(ignore_unknown=True)
    with pytest.raises(EvaluationError, match="image 7: segment 1 has category"):
        _panoptic(tmp_path, predicted={"category_id": category}, options=options)
    with pytest.raises(EvaluationError, match="image 1: result 1 has category"):
        _instances(tmp_path, result={"category_id": category}, options=options)


@pytest.mark.parametrize("label", ["inf", "1e400", "car"])
def test_a_label_of_cityscapes_results_must_be_a_finite_number(label):
    with pytest.raises(EvaluationError, match=f"^a.txt, line 1: 'mask.png {label} 0.5' is not `MASK LABEL_ID SCORE`$"):
        _parse(f"mask.png {label} 0.5", "a.txt, line 1")


@pytest.mark.parametrize("ignore_unknown", [False, True])
def test_null_instead_of_segments_is_refused(tmp_path, ignore_unknown):
    with pytest.raises(EvaluationError, match=r"pred.json: image 7: segments_info is None; it must be a list"):
        _panoptic(tmp_path, found={"segments_info": None}, options=ScoreOptions(ignore_unknown=ignore_unknown))


def test_ids_of_segments_that_are_not_scored_are_checked_too(tmp_path):
    unknown = {"category_id": 77, "id": [5]}
    with pytest.raises(EvaluationError, match=r"pred.json: image 7: id is \[5\]"):
        _panoptic(tmp_path, predicted=unknown, options=ScoreOptions(ignore_unknown=True))


@pytest.fixture
def edit_panoptic(tmp_path):
    """Return a function that applies a change to both documents of a perfect image, and scores them."""

    def score(change):
        _panoptic(tmp_path)
        truth, predictions = tmp_path / "truth.json", tmp_path / "pred.json"
        documents = [json.loads(path.read_text()) for path in (truth, predictions)]
        change(*documents)
        for path, document in zip((truth, predictions), documents, strict=True):
            path.write_text(json.dumps(document))
        masks = {"truth_masks": tmp_path, "prediction_masks": tmp_path}
        return _run(panoptic_scoring(PanopticFiles(truth=truth, predictions=predictions, **masks), boundary=False))

    return score


@pytest.mark.parametrize("side", ["truth", "pred"])
def test_an_image_that_is_listed_twice_is_refused(edit_panoptic, side):
    def repeat(*documents):
        annotations = documents[side == "pred"]["annotations"]
        annotations.append(annotations[0] | {"segments_info": []})

    with pytest.raises(EvaluationError, match=f"{side}.json: image 7 is listed twice; image ids must be unique"):
        edit_panoptic(repeat)


def test_images_without_annotation_and_predictions_without_truth_are_noted(edit_panoptic, tmp_path):
    def add(truth, predictions):
        truth["images"] = [{"id": 7}, {"id": 8}, {"id": 9}]
        predictions["annotations"] += [{"image_id": i, "file_name": "x.png", "segments_info": []} for i in (8, 99)]

    content = edit_panoptic(add)
    truth = tmp_path / "truth.json"
    assert (content["all"]["pq"], content["num_images"]) == (1, 1)
    assert content["notes"] == [
        f"2 of 3 predictions are for images without an annotation in {truth}; they are not scored: 8, 99",
        f"2 of 3 images in {truth} have no annotation; they are not scored: 8, 9",
    ]
    assert edit_panoptic(lambda *documents: None)["notes"] == []


def test_the_last_entry_of_a_repeated_segment_counts_even_if_another_is_unknown(edit_panoptic, tmp_path):
    unknown, known = {"id": 1, "category_id": 77}, {"id": 1, "category_id": 3}
    for entries, pq in (([unknown, known], 1), ([known, unknown], 0)):

        def repeat(truth, predictions, entries=entries):
            predictions["annotations"][0]["segments_info"] = entries

        with pytest.raises(EvaluationError, match="image 7: segment 1 has category 77"):
            edit_panoptic(repeat)
        masks = {"truth_masks": tmp_path, "prediction_masks": tmp_path}
        files = PanopticFiles(truth=tmp_path / "truth.json", predictions=tmp_path / "pred.json", **masks)
        for by_size in (False, True):
            options = ScoreOptions(ignore_unknown=True, by_size=by_size)
            assert _run(panoptic_scoring(files, boundary=False, options=options))["all"]["pq"] == pq
