"""Tests of the JSON files, tables and errors of `m2f score`."""

import contextlib
import json
import os

import cv2
import numpy as np
import pytest

from m2f.cluster.cli import main
from m2f.cluster.verbs import score


@pytest.fixture
def label_folders(tmp_path):
    for name, values in (("truth", [[0, 0, 1, 255]]), ("found", [[0, 2, 1, 0]])):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "x.png"), np.array(values, np.uint8))
    return ["--truth", str(tmp_path / "truth"), "--predictions", str(tmp_path / "found")]


def test_semantic_scores_are_printed_and_written(label_folders, tmp_path, capsys):
    output = tmp_path / "results.json"
    command = ["score", "semantic", *label_folders, "--num-classes", "4", "--ignore", "255", "--output", str(output)]
    assert main(command) == 0
    assert json.loads(output.read_text()) == {
        "mIoU": 0.75,
        "mIoU_union": 0.5,
        "mIoU_all_classes": 0.375,
        "fwIoU": pytest.approx(2 / 3),
        "mACC": 0.75,
        "pACC": pytest.approx(2 / 3),
        "IoU": [0.5, 1.0, 0.0, None],
        "void_pixels": 0,
        "num_images": 1,
        "notes": [],
    }
    assert "75.00       50.00             37.50" in capsys.readouterr().out


def test_instance_scores_are_printed_and_written(tmp_path, capsys):
    square = {"segmentation": [[2, 2, 40, 2, 40, 40, 2, 40]], "category_id": 5, "image_id": 1}
    truth = {
        "images": [{"id": 1, "height": 60, "width": 60}],
        "categories": [{"id": 5, "name": "box"}],
        "annotations": [square | {"id": 1, "area": 1444, "iscrowd": 0, "bbox": [2, 2, 38, 38]}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps([square | {"score": 0.5}]))
    files = ["--truth", str(tmp_path / "gt.json"), "--predictions", str(tmp_path / "results.json")]
    for extra in ([], ["--boundary"], ["--class-agnostic"]):
        assert main(["score", "instances", *files, *extra, "--output", str(tmp_path / "out.json")]) == 0
        content = json.loads((tmp_path / "out.json").read_text())
        assert [content[name] for name in ("AP", "APs", "APm", "AR1")] == pytest.approx([1, -1, 1, 1])
        assert ("AR1000" in content) == (extra == ["--class-agnostic"])
    assert "Boundary mask AP, 1 images" in capsys.readouterr().out


def test_score_errors_print_one_message(label_folders, tmp_path, capsys):
    assert main(["score", "semantic", *label_folders, "--num-classes", "2"]) == 2
    assert "m2f score: x.png: the prediction has labels from 0 to 2" in capsys.readouterr().err
    missing_folder = str(tmp_path / "none" / "out.json")
    assert main(["score", "semantic", *label_folders, "--num-classes", "4", "--output", missing_folder]) == 2
    assert "the folder does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["score", "panoptic", "--truth", "x"])


@pytest.mark.parametrize("option", ["--output", "--report", "--per-image"])
def test_impossible_outputs_are_refused_before_scoring(label_folders, tmp_path, capsys, option):
    command = ["score", "semantic", *label_folders, "--num-classes", "4", option]
    file = tmp_path / "file"
    file.write_text("")
    for path, message in (
        (tmp_path, f"{option} {tmp_path}: this is a folder; name a file"),
        (file / "out", f"{option} {file / 'out'}: {file} is not a folder"),
    ):
        assert main([*command, str(path)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert "scoring" not in printed.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("option", ["--output", "--report", "--per-image"])
def test_a_full_disk_does_not_lose_the_table(label_folders, capsys, option):
    assert main(["score", "semantic", *label_folders, "--num-classes", "4", option, "/dev/full"]) == 2
    printed = capsys.readouterr()
    assert "75.00       50.00             37.50" in printed.out
    assert f"m2f score: {option}: /dev/full cannot be written: No space left on device" in printed.err


def test_files_are_written_even_if_the_reader_of_the_table_has_ended(label_folders, tmp_path, monkeypatch):
    def broken(text):
        raise BrokenPipeError

    monkeypatch.setattr(score, "print_out", broken)
    output = tmp_path / "out.json"
    with contextlib.suppress(BrokenPipeError):
        main(["score", "semantic", *label_folders, "--num-classes", "4", "--output", str(output)])
    assert json.loads(output.read_text())["mIoU"] == 0.75
