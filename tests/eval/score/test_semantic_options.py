"""Options of `m2f score semantic`: names, void, subsets, report and per-image file; and its check of binary truth."""

import json
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from m2f.cluster.cli import main
from m2f.eval.errors import EvaluationError
from m2f.eval.functions import evaluate_semantic
from m2f.eval.results.images import read_image_records
from m2f.eval.score.options import ScoreOptions, read_names
from m2f.eval.score.semantic import semantic_scoring

NAMES = ("cat", "dog", "bus")


def test_semantic_scoring_supports_names_subsets_reports_and_arrays(tmp_path, capsys):
    random = np.random.default_rng(2)
    maps = []
    for name in ("a", "b/c"):
        truth = random.integers(0, 3, (20, 30)).astype(np.uint8)
        predicted = np.where(random.random(truth.shape) < 0.6, truth, random.integers(0, 3, truth.shape)).astype(
            np.uint8
        )
        truth[0, :5] = 255
        for side, labels in (("truth", truth), ("found", predicted)):
            path = tmp_path / side / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), labels)
        maps.append((truth, predicted))
    (tmp_path / "names.txt").write_text("cat\ndog\nbus\n")
    words = ["--truth", str(tmp_path / "truth"), "--predictions", str(tmp_path / "found"), "--num-classes", "3"]
    words += ["--class-names", str(tmp_path / "names.txt"), "--workers", "1", "--output", str(tmp_path / "out.json")]
    assert main(["score", "semantic", *words, "--report", str(tmp_path / "page.html")]) == 0
    assert "dog" in capsys.readouterr().out
    assert "pixels" in (tmp_path / "page.html").read_text()
    whole = json.loads((tmp_path / "out.json").read_text())
    array_results = evaluate_semantic(*zip(*maps, strict=True), class_names=NAMES)
    file_results = evaluate_semantic(tmp_path / "truth", tmp_path / "found", class_names=NAMES)
    assert array_results.semantic == file_results.semantic
    assert array_results.semantic.miou == whole["mIoU"]

    (tmp_path / "some.txt").write_text("b/c\n")
    assert main(["score", "semantic", *words, "--classes", "dog", "2", "--images", str(tmp_path / "some.txt")]) == 0
    part = json.loads((tmp_path / "out.json").read_text())
    alone = evaluate_semantic([maps[1][0]], [maps[1][1]], class_names=NAMES).semantic
    assert part["mIoU"] == pytest.approx(np.mean(alone.per_class[1:]))
    truth, predicted = maps[1]
    chosen = (truth == 1) | (truth == 2)
    assert part["pACC"] == pytest.approx((truth == predicted)[chosen].mean())

    files = ["--report", str(tmp_path / "page.html"), "--per-image", str(tmp_path / "images.parquet")]
    assert main(["score", "semantic", *words, "--classes", "dog", "2", *files]) == 0
    assert "Confusion" not in (tmp_path / "page.html").read_text()
    records = read_image_records((tmp_path / "images.parquet").read_bytes())
    assert records.per_image_values()["mIoU"][1] == pytest.approx(100 * part["mIoU"])
    both = json.loads((tmp_path / "out.json").read_text())
    assert records.resampled(np.ones((2, 1), np.int32))["mIoU"] == pytest.approx([100 * both["mIoU"]])


def test_lists_may_come_from_windows_but_class_names_have_no_gap(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffroad\r\nsky\r\n\r\n".encode())
    assert read_names(path) == read_names(path, by_label=True) == ("road", "sky")
    path.write_text("road\n\nsky\n")
    assert read_names(path) == ("road", "sky")
    with pytest.raises(EvaluationError, match="line 2 is empty"):
        read_names(path, by_label=True)


def test_masks_of_0_and_255_are_refused_as_truth(tmp_path):
    truth, found = [np.array([[0, 0]]), np.array([[0, 255]])], [np.array([[0, 0]])] * 2
    with pytest.raises(EvaluationError, match=r"only the values 0 and 255.*or set ignore=255"):
        evaluate_semantic(truth, found, class_names=["a", "b"])
    assert evaluate_semantic(truth, found, class_names=["a", "b"], ignore=255).metrics()["pACC"] == 100
    for side, maps in (("truth", truth), ("found", found)):
        (tmp_path / side).mkdir()
        for number, values in enumerate(maps):
            cv2.imwrite(str(tmp_path / side / f"{number}.png"), values.astype(np.uint8))
    folders = tmp_path / "truth", tmp_path / "found"
    with pytest.raises(EvaluationError, match=r"truth have only the values 0 and 255.*--ignore 255"):
        evaluate_semantic(*folders, class_names=["a", "b"])
    assert evaluate_semantic(*folders, class_names=["a", "b"], ignore=255).metrics()["pACC"] == 100
    cv2.imwrite(str(folders[0] / "1.png"), np.array([[0, 1]], np.uint8))
    assert evaluate_semantic(*folders, class_names=["a", "b"]).metrics()["pACC"] == 75
    with pytest.raises(EvaluationError, match="the class names are 'cell'"):
        evaluate_semantic(found, found, class_names="cell")


def test_class_255_is_scored_if_there_are_256_classes_or_more(tmp_path, capsys):
    truth = np.array([[0, 255, 255, 65535]], np.uint16)
    predicted = np.array([[0, 0, 0, 0]], np.uint16)
    for side, labels in (("truth", truth), ("found", predicted)):
        (tmp_path / side).mkdir()
        cv2.imwrite(str(tmp_path / side / "a.png"), labels)
    words = ["--truth", str(tmp_path / "truth"), "--predictions", str(tmp_path / "found"), "--num-classes", "256"]
    assert main(["score", "semantic", *words, "--workers", "1", "--output", str(tmp_path / "out.json")]) == 0
    capsys.readouterr()
    semantic = evaluate_semantic([truth], [predicted], class_names=[str(label) for label in range(256)]).semantic
    assert semantic.truth_pixels[255] == 2
    assert semantic.pacc == json.loads((tmp_path / "out.json").read_text())["pACC"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("void", [255, 9])
def test_void_in_label_maps_counts_as_missed_but_not_as_false_positive(tmp_path, capsys, void):
    """In files and arrays, a predicted void pixel is a false negative of the true class and no false positive."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (20, 30)).astype(np.uint8)
    truth[0] = 255
    predicted = np.where(rng.random(truth.shape) < 0.3, void, rng.integers(0, 3, truth.shape)).astype(np.uint8)
    for side, labels in (("truth", truth), ("found", predicted)):
        (tmp_path / side).mkdir()
        cv2.imwrite(str(tmp_path / side / "a.png"), labels)
    words = ["--truth", str(tmp_path / "truth"), "--predictions", str(tmp_path / "found"), "--num-classes", "3"]
    words += [] if void == 255 else ["--void", str(void)]
    files = ["--output", str(tmp_path / "out.json"), "--per-image", str(tmp_path / "images.parquet")]
    assert main(["score", "semantic", *words, *files, "--report", str(tmp_path / "page.html")]) == 0
    labelled = truth != 255
    missed = int((predicted == void)[labelled].sum())
    note = f"{missed:,} of {labelled.sum():,} labelled pixels are predicted as void ({void})"
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "page.html").read_text()
    ious = [
        (labelled & (truth == k) & (predicted == k)).sum() / (labelled & ((truth == k) | (predicted == k))).sum()
        for k in range(3)
    ]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["IoU"] == pytest.approx(ious, abs=1e-12)
    assert found["void_pixels"] == missed
    results = evaluate_semantic([truth], [predicted], class_names=NAMES, void=void)
    assert list(results.semantic.per_class) == found["IoU"]
    images = read_image_records((tmp_path / "images.parquet").read_bytes())
    assert images.per_image_values()["mIoU"] == pytest.approx([100 * np.mean(ious)])


def test_maps_of_every_lossless_format_are_scored_and_others_are_noted(tmp_path):
    truth, found = tmp_path / "truth", tmp_path / "found"
    labels = np.zeros((8, 8), np.uint8)
    labels[4:] = 1
    # Of these five maps, only the first is predicted correctly.
    for name, predicted in (
        ("a.png", "a.png"),
        ("b.PNG", "b.PNG"),
        ("c/c.tif", "c/c.tif"),
        ("d.TIFF", "d.png"),
        ("e.bmp", "e.png"),
    ):
        for path, values in ((truth / name, labels), (found / predicted, labels if name == "a.png" else 1 - labels)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    (truth / "a.tif").write_bytes(b"a photo beside its map")
    (truth / "f.jpg").write_bytes(b"a lossy map")
    (truth / "a.jpg").write_bytes(b"another photo")
    report = semantic_scoring(truth, found, num_classes=2).run(1, lambda count: None)
    assert (report.content["pACC"], report.content["num_images"]) == (0.2, 5)
    note = f"1 JPEG or WebP file in {truth} without a map of the same name: not scored, because these formats"
    assert [line.partition(" change")[0] for line in report.content["notes"]] == [note]
    assert note in report.table
    assert semantic_scoring(truth, found, num_classes=2).compute_results().notes == report.content["notes"]
    options = ScoreOptions(images=("c/c", "d.TIFF"))
    assert semantic_scoring(truth, found, num_classes=2, options=options).names == ["c/c.tif", "d.TIFF"]

    (truth / "b.png").write_bytes((truth / "b.PNG").read_bytes())
    with pytest.raises(EvaluationError, match=r"b.PNG and b.png have the same stem; keep one of them"):
        semantic_scoring(truth, found, num_classes=2)
    (truth / "b.png").unlink()
    (found / "d.png").unlink()
    with pytest.raises(EvaluationError, match=r"found does not contain 1 of 5 maps: d.TIFF"):
        semantic_scoring(truth, found, num_classes=2)


def test_maps_in_colour_or_with_an_undecodable_name_are_refused(tmp_path):
    for side in ("truth", "found"):
        (tmp_path / side).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / side / "a.tif")
    folders = tmp_path / "truth", tmp_path / "found"
    with pytest.raises(EvaluationError, match=r"truth/a.tif: it is a rgb tif, but a label map is a grey or palette"):
        semantic_scoring(*folders, num_classes=2)
    os.rename(folders[0] / "a.tif", os.fsencode(folders[0]) + b"/\xff.tif")
    with pytest.raises(EvaluationError, match=r"the file name '\\udcff.tif' is not valid UTF-8"):
        semantic_scoring(*folders, num_classes=2)
