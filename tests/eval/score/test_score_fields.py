"""Fields of score files: flags, areas and ids are right or one message that names file, entry and value."""

import json

import numpy as np
import pytest

from m2f.data_pipeline.image_file import encode_png
from m2f.eval.errors import EvaluationError
from m2f.eval.score.instances import instance_scoring
from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring
from m2f.model.errors import UserError


def _run(scoring):
    return scoring.run(1, lambda count: None).content


def _panoptic(folder, segment=(), category=(), predicted=()):
    base = {"id": 1, "category_id": 3, "area": 6, "iscrowd": 0}
    (folder / "x.png").write_bytes(encode_png(np.full((2, 3, 3), (1, 0, 0), np.uint8)))
    categories = [{"id": 3, "name": "car", "isthing": 1} | dict(category)]
    if dict(category).get("isthing", 0) is None:
        del categories[0]["isthing"]
    for name, changes in (("truth", segment), ("pred", predicted)):
        entry = {"image_id": 7, "file_name": "x.png", "segments_info": [base | dict(changes)]}
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
        )
    )


def test_plain_files_score(tmp_path):
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
        ({"category": {"isthing": "0"}}, "truth.json: category 3: isthing is '0'"),
        ({"category": {"isthing": None}}, "1 categories have no `isthing`"),
        ({"category": {"id": float("inf")}}, "a category has no whole number"),
    ],
)
def test_panoptic_faults_are_one_message(tmp_path, changes, message):
    with pytest.raises(EvaluationError, match=message):
        _panoptic(tmp_path, **changes)


def _instances(folder, annotation=(), image=()):
    square = {"segmentation": [[2, 2, 40, 2, 40, 40, 2, 40]], "category_id": 5, "image_id": 1}
    truth = {
        "images": [{"id": 1, "height": 60, "width": 60} | dict(image)],
        "categories": [{"id": 5, "name": "box"}],
        "annotations": [square | {"id": 1, "area": 1444, "iscrowd": 0} | dict(annotation)],
    }
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps([square | {"score": 0.5}]))
    scoring = instance_scoring(folder / "gt.json", folder / "found.json", boundary=False, class_agnostic=False)
    return _run(scoring)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotation": {"iscrowd": "1"}}, "gt.json: image 1: annotation 1: iscrowd is '1'"),
        ({"annotation": {"area": float("nan")}}, "gt.json: image 1: annotation 1: area is nan"),
        ({"annotation": {"area": "12"}}, "gt.json: image 1: annotation 1: area is 12"),
        ({"image": {"height": float("inf")}}, "gt.json: image 1: height is inf"),
        (
            {
                "image": {"height": 200_000, "width": 200_000},
                "annotation": {"segmentation": {"size": [200_000, 200_000], "counts": [40_000_000_000]}},
            },
            "too large; run lengths have 32 bits",
        ),
    ],
)
def test_instance_faults_are_one_message(tmp_path, changes, message):
    assert _instances(tmp_path)["AP"] == pytest.approx(1)
    with pytest.raises(UserError, match=message):
        _instances(tmp_path, **changes)
