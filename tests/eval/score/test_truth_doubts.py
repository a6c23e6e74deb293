"""Truth whose areas, ids and maps contradict each other: a note, or an error if no number can be right."""

import json

import numpy as np
import pytest

from m2f.data_pipeline.image_file import encode_png
from m2f.eval.errors import EvaluationError
from m2f.eval.functions import evaluate_panoptic
from m2f.eval.score.options import ScoreOptions
from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring

MAP = np.zeros((20, 60), np.uint8)
MAP[:10], MAP[10:, :30] = 1, 2


@pytest.fixture
def score(tmp_path):
    """Return a function that scores 40 perfect panoptic images; the segments of each are the arguments."""
    (tmp_path / "x.png").write_bytes(encode_png(np.stack([MAP, MAP * 0, MAP * 0], axis=-1)))
    files = PanopticFiles(
        truth=tmp_path / "truth.json",
        truth_masks=tmp_path,
        predictions=tmp_path / "found.json",
        prediction_masks=tmp_path,
    )

    def write(path, *segments):
        listed = [{"id": i, "category_id": i % 2, "area": area, "iscrowd": 0} for i, area in segments]
        categories = [{"id": 0, "name": "sky", "isthing": 0}, {"id": 1, "name": "cat", "isthing": 1}]
        images = [{"image_id": n, "file_name": "x.png", "segments_info": listed} for n in range(40)]
        path.write_text(json.dumps({"annotations": images, "categories": categories}))

    def run(*segments, by_size=False):
        write(files.truth, *segments)
        write(files.predictions, (1, 600), (2, 300))
        scoring = panoptic_scoring(files, boundary=False, options=ScoreOptions(by_size=by_size))
        report = scoring.run(1, lambda count: None)
        return report.content["all"]["pq"], report.table.split("\n\n")[0].partition("\n")[2]

    run.files = files
    return run


@pytest.mark.parametrize("by_size", [False, True], ids=["engine", "own matching"])
def test_areas_as_shares_and_ids_of_another_version_are_refused(score, by_size):
    with pytest.raises(
        EvaluationError, match=r"image 0 .*truth.json and .*x.png\): segment 1 of the truth has 600 pixels"
    ):
        score((1, 0.5), (2, 0.25), by_size=by_size)
    with pytest.raises(
        EvaluationError, match=r"image 0 .*truth.json and .*\[1, 2\], but its list of segments has \[3, 4\]"
    ):
        score((3, 600), (4, 300), by_size=by_size)


def test_a_wrong_area_among_many_matches_is_refused_only_by_our_own_matching(tmp_path):
    """The engine returns the mean IoU of a class, here 0.73: of 2.1 and eleven times 0.6."""
    id_map, found = np.zeros((20, 240), np.uint8), np.zeros((20, 240), np.uint8)
    truth, predictions = [], []
    for i in range(1, 13):
        columns = slice(20 * i - 20, 20 * i)
        id_map[:, columns], found[: 20 if i == 1 else 12, columns] = i, i
        truth.append({"id": i, "category_id": 1, "area": 190 if i == 1 else 400, "iscrowd": 0})
        predictions.append({"id": i, "category_id": 1})
    masks = {"truth_masks": tmp_path / "truth", "prediction_masks": tmp_path / "found"}
    files = PanopticFiles(truth=tmp_path / "truth.json", predictions=tmp_path / "found.json", **masks)

    def score(by_size):
        for path, folder, values, segments in (
            (files.truth, files.truth_masks, id_map, truth),
            (files.predictions, files.prediction_masks, found, predictions),
        ):
            folder.mkdir(exist_ok=True)
            (folder / "x.png").write_bytes(encode_png(np.stack([values, values * 0, values * 0], axis=-1)))
            annotation = {"image_id": 0, "file_name": "x.png", "segments_info": segments}
            categories = [{"id": 1, "name": "cat", "isthing": 1}]
            path.write_text(json.dumps({"annotations": [annotation], "categories": categories}))
        scoring = panoptic_scoring(files, boundary=False, options=ScoreOptions(by_size=by_size))
        return scoring.run(1, lambda count: None).content["all"]["pq"]

    with pytest.raises(EvaluationError, match=r"segment 1 of the truth has 400 pixels, but states an area of 190"):
        score(by_size=True)
    assert score(by_size=False) == pytest.approx((400 / 190 + 11 * 0.6) / 12, abs=1e-12)


def test_areas_of_larger_images_and_unlisted_ids_are_noted(score):
    assert score((1, 600), (2, 300)) == (1, "")
    quality, note = score((1, 2400), (2, 1200))
    assert quality == 0
    assert note.startswith("DOUBTFUL TRUTH (8 images checked): 16 of 16 annotated segments have less than half")
    quality, note = score((1, 600))
    assert quality == 0.5
    assert note.startswith("DOUBTFUL TRUTH (8 images checked): no annotated segment has 8 ids of the truth's maps")
    _, note = score((1, 600), (2, 300), (9, 5))
    assert note.startswith("DOUBTFUL TRUTH (8 images checked): 8 of 24 annotated segments have no pixel")


def test_rounded_areas_keep_their_iou_and_are_noted_if_it_is_above_1(score):
    quality, note = score((1, 599), (2, 300))
    assert quality == pytest.approx((600 / 599 + 1) / 2, abs=1e-12)
    assert note.startswith("DOUBTFUL TRUTH: SQ is above 100 % (cat); stated areas are smaller")


def test_doubts_about_files_are_warnings_in_python(score):
    score((1, 2400), (2, 1200))
    files = score.files
    with pytest.warns(UserWarning, match="16 of 16 annotated segments"):
        evaluate_panoptic(
            files.truth, files.predictions, truth_masks=files.truth_masks, prediction_masks=files.truth_masks
        )
