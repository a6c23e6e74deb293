"""Tests of confidence intervals of differences between runs, over images and over seeds, and of their reports."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from m2f.cluster.cli import main
from m2f.cluster.compare.compare import compare_runs
from m2f.cluster.compare.intervals import MIN_DRAWS, seed_groups
from m2f.cluster.compare.page import as_page
from m2f.cluster.compare.records import RunRecord, read_runs
from m2f.cluster.compare.report import as_json, as_markdown, as_text
from m2f.cluster.compare.set_result import SetResult
from m2f.eval.metrics.average_precision import NUM_AREAS, AveragePrecisionState, DetectionRecord
from m2f.eval.metrics.mean_iou import ConfusionRecord, MeanIoUState
from m2f.eval.results.images import image_records, image_table, read_image_records

TRAINED_ONCE = "{}: trained only once, so differences may be due to the variation between training runs"


def make_records(correct, num_images=400, first_id=0, seed=0):
    """Return records of two classes. In each image, each class has 100 pixels, of which about `correct` are correct."""
    random = np.random.default_rng(seed)
    state = MeanIoUState(2)
    for image_id in range(first_id, first_id + num_images):
        hits = random.binomial(100, correct / 100, size=2)
        cells = [hits[0], 100 - hits[0], 100 - hits[1], hits[1]]
        state.add(image_id, ConfusionRecord(np.flatnonzero(cells), [n for n in cells if n]))
    return image_records(None, None, state)


def result(**settings):
    return SetResult(
        step=5, fingerprint="f" * 64, subset=None, num_images=400, metrics={}, per_class=[], settings=settings or None
    )


def make_run(name, images=None, value=50.0, results=None, **recipe):
    return RunRecord(
        name=name,
        source=f"runs/{name}",
        recipe={"name": name, "seed": "0"} | {key.replace("__", "."): text for key, text in recipe.items()},
        curves={"val/mIoU": ((5, value),)},
        results={"val": results or result()},
        images={} if images is None else {"val": images},
    )


def test_image_interval_contains_the_difference_and_notes_its_limits():
    base, better = make_records(70), make_records(75, seed=1)
    comparison = compare_runs([make_run("base", base), make_run("better", better, lr="2")])
    (interval,) = comparison.intervals
    original = np.ones((400, 1), dtype=np.int32)
    value = better.resampled(original)["mIoU"][0] - base.resampled(original)["mIoU"][0]
    assert (interval.kind, interval.metric, interval.images) == ("images", "val/mIoU", 400)
    assert interval.value == pytest.approx(value)
    assert 0 < interval.low < value < interval.high < 2 * value
    assert any(note.startswith(TRAINED_ONCE.format("base, better")) for note in comparison.notes)
    line = f"{value:+.2f}"
    for text in (as_text(comparison), as_markdown(comparison), as_page(comparison)):
        assert line in text
        assert f"{interval.low:.2f} to {interval.high:.2f}" in text
        assert "400 images" in text
    assert json.loads(as_json(comparison))["intervals"][0]["low"] == interval.low
    assert compare_runs(comparison.runs).intervals == comparison.intervals  # the draws are deterministic
    assert compare_runs(comparison.runs, draws=0).intervals == ()


def test_paired_interval_of_equal_records_is_zero():
    base = make_records(70)
    same = compare_runs([make_run("base", base), make_run("twin", base, lr="2")]).intervals[0]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_runs_without_comparable_image_records_are_noted():
    base = make_run("base", make_records(70))
    notes = " ".join(
        compare_runs([base, make_run("old", lr="2"), make_run("moved", make_records(70, first_id=9), lr="3")]).notes
    )
    assert "no intervals over images for old, whose results have no images.parquet" in notes
    assert "no intervals over images for moved: evaluated on different images" in notes


def test_runs_that_differ_only_in_seed_are_grouped():
    runs = [
        make_run("a0"),
        make_run("b0", lr="2", value=52.0, training__micro_batch="2"),
        make_run("a1", seed="1", value=50.5),
        make_run("b1", lr="2", seed="1", value=53.0, training__micro_batch="1"),
        make_run("a1_again", seed="1"),
        make_run("lone", lr="3"),
    ]
    assert seed_groups(runs) == [[0, 2], [1, 3], [5]]
    assert seed_groups([RunRecord(name=n, source=n) for n in "xy"]) == [[0], [1]]
    comparison = compare_runs(runs)
    (interval,) = comparison.intervals
    assert (interval.kind, interval.run, interval.baseline, interval.runs) == ("seeds", "b0", "a0", (2, 2))
    assert interval.value == pytest.approx(2.25)
    assert interval.low < 2.25 < interval.high
    assert "2 and 2 seeds" in as_text(comparison)
    assert comparison.notes[-1].startswith(TRAINED_ONCE.format("lone"))


def test_sides_with_one_run_are_named():
    runs = [
        make_run("a0", make_records(70)),
        make_run("a1", make_records(70, seed=1), seed="1", value=50.5),
        make_run("b0", make_records(70, seed=2), lr="2", value=52.0),
        make_run("b1", make_records(70, seed=3), lr="2", seed="1", value=53.0),
        make_run("b1_again", make_records(70, seed=3), lr="2", seed="1", value=53.0),
        make_run("lone", make_records(72, seed=4), lr="3", value=58.0),
    ]
    comparison = compare_runs(runs)
    assert [(interval.run, interval.kind) for interval in comparison.intervals[-2:]] == [
        ("lone", "images"),
        ("b0", "seeds"),
    ]
    (note,) = comparison.notes
    assert note.startswith(TRAINED_ONCE.format("lone"))
    (note,) = compare_runs([runs[0], *runs[2:]]).notes  # the baseline has one seed
    assert note.startswith(TRAINED_ONCE.format("a0, lone"))
    assert compare_runs(runs[:2]).notes == compare_runs(runs[:1]).notes == ()


def test_sides_with_one_run_are_named_without_intervals_over_images():
    pair = [make_run("a"), make_run("b", lr="2")]
    for comparison in (
        compare_runs(pair),  # no image records
        compare_runs([replace(run, images={"val": make_records(70)}) for run in pair], draws=0),
        compare_runs([replace(run, curves={"train/loss/total": ((5, 1.0),)}) for run in pair], ["train/loss/total"]),
        compare_runs([replace(run, curves={"val/pACC": ((5, 1.0),)}) for run in pair], ["pACC"]),
    ):
        assert comparison.intervals == ()
        assert comparison.notes[-1].startswith(TRAINED_ONCE.format("a, b"))


def test_metrics_of_detections_have_intervals_over_images_and_other_metrics_are_named():
    random = np.random.default_rng(0)
    runs = []
    for name in ("base", "better"):
        state = AveragePrecisionState(2)
        for image_id in range(30):
            scores = np.sort(random.random((2, 2)))[:, ::-1].ravel()
            matched = np.repeat((1 << random.integers(0, 11, size=(4, 1))) - 1, NUM_AREAS, axis=1)
            counts = np.full((2, NUM_AREAS), 3)
            labels = np.array([0, 0, 1, 1])
            record = DetectionRecord(labels, scores, matched, np.zeros_like(matched), np.array([0, 1]), counts)
            state.add(image_id, record)
        stats = state.compute().stats
        values = {"AP": 100 * stats["AP"], "AP50": 100 * stats["AP50"], "AP75": 100 * stats["AP75"], "APs": 1.0}
        run = make_run(name, image_records(None, state, None), lr=name)
        runs.append(replace(run, curves={f"val/{metric}": ((5, value),) for metric, value in values.items()}))
    comparison = compare_runs(runs, ["AP75", "AP50", "APs"])
    assert [interval.metric for interval in comparison.intervals] == ["val/AP50", "val/AP75"]
    differences = {row.name: row.values[1].delta for row in comparison.metrics}
    for interval in comparison.intervals:
        assert interval.value == pytest.approx(differences[interval.metric])
        assert interval.low < interval.value < interval.high
    assert comparison.notes[0] == ("no intervals over images for val/APs; they exist only for PQ, AP, AP50, AP75, mIoU")
    assert [interval.metric for interval in compare_runs(runs).intervals] == ["val/AP"]


def test_single_group_of_seeds_gets_an_interval_of_its_mean():
    seeds = [make_run("a0"), make_run("a1", seed="1", value=51.0), make_run("a2", seed="2", value=52.0)]
    comparison = compare_runs(seeds)
    (interval,) = comparison.intervals
    assert (interval.value, interval.baseline, interval.runs) == (51.0, None, (3,))
    assert "3 seeds" in as_text(comparison)


def test_different_evaluation_settings_are_noted():
    first = make_run("first", results=result(shrink="area", batch_size=1, weights="1"))
    second = make_run("second", results=result(shrink="bilinear", batch_size=1, weights="2"))
    notes = compare_runs([first, second]).notes
    assert 'val: evaluated with different `shrink` (first "area", second "bilinear"); this alone' in " ".join(notes)
    assert not any("batch_size" in note or "weights" in note for note in notes)


def test_results_without_settings_beside_results_with_settings_are_noted():
    stated, old = make_run("stated", results=result(shrink="area")), make_run("old", lr="2")
    note = "val: the results of old do not state the settings of the evaluation, which may differ"
    assert any(line.startswith(note) for line in compare_runs([stated, old]).notes)
    assert not any("settings" in line for line in compare_runs([old, replace(old, name="older")]).notes)


def test_settings_are_those_of_the_compared_checkpoint(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"name: {name}\nlr: 0.001\n")
    for step, lr in ((100, "0.001"), (200, "0.01")):
        checkpoint = tmp_path / f"b/checkpoints/step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()
        (checkpoint / "recipe.yaml").write_text(f"name: b\nlr: {lr}\n")
    folders = [str(tmp_path / name) for name in "ab"]
    for step, lr, num_groups in ((None, "0.01", 2), (100, "0.001", 1)):
        runs = read_runs(folders, tracking=None, experiment=None, query=None, step=step)
        assert ([run.recipe["lr"] for run in runs], len(seed_groups(runs))) == (["0.001", lr], num_groups)


def test_image_records_are_read_from_run_folders(tmp_path, capsys):
    for name, correct in (("base", 70), ("better", 75)):
        folder = tmp_path / name / "evaluations/step_00000005/val"
        folder.mkdir(parents=True)
        records = make_records(correct)
        (tmp_path / name / "recipe.yaml").write_text(f"name: {name}\nseed: 0\nlr: {correct}\n")
        content = {"step": 5, "fingerprint": "f" * 64, "subset": None, "num_images": 400, "per_class": []}
        metrics = {"mIoU": float(records.resampled(np.ones((400, 1)))["mIoU"][0])}
        (folder / "results.json").write_text(json.dumps(content | {"metrics": metrics}))
        (folder / "images.parquet").write_bytes(image_table(records))
    folders = [str(tmp_path / name) for name in ("base", "better")]
    (base, _) = read_runs(folders, tracking=None, experiment=None, query=None, step=None)
    assert image_table(base.images["val"]) == image_table(read_image_records(image_table(make_records(70))))
    assert main(["compare", *folders, "--draws", "50"]) == 0
    assert "400 images" in capsys.readouterr().out
    (tmp_path / "better/evaluations/step_00000005/val/images.parquet").write_bytes(b"broken")
    assert main(["compare", *folders]) == 0
    assert "images.parquet cannot be read" in capsys.readouterr().out
    for draws in (-1, 1, MIN_DRAWS - 1):
        assert main(["compare", *folders, "--draws", str(draws)]) == 2
        assert f"--draws is {draws}; it must be at least 40, or 0 for no intervals" in capsys.readouterr().err
