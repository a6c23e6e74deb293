"""Tests of confidence intervals of differences between runs, over images and over seeds, and of their reports."""

from __future__ import annotations

import json

import numpy as np
import pytest

from m2f.cluster.cli import main
from m2f.cluster.compare.compare import compare_runs
from m2f.cluster.compare.intervals import seed_groups
from m2f.cluster.compare.page import as_page
from m2f.cluster.compare.records import RunRecord, SetResult, read_runs
from m2f.cluster.compare.report import as_json, as_markdown, as_text
from m2f.eval.metrics.mean_iou import ConfusionRecord, MeanIoUState
from m2f.eval.results.images import image_records, image_table, read_image_records

UNREFLECTED = "{}: intervals over images do not reflect the variation between training runs"


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
    assert any(note.startswith(UNREFLECTED.format("better")) for note in comparison.notes)
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
    assert not any("variation between training runs" in note for note in comparison.notes)


def test_runs_whose_group_has_no_interval_over_seeds_are_named():
    runs = [
        make_run("a0", make_records(70)),
        make_run("a1", make_records(70, seed=1), seed="1", value=50.5),
        make_run("b0", make_records(70, seed=2), lr="2", value=52.0),
        make_run("b1", make_records(70, seed=3), lr="2", seed="1", value=53.0),
        make_run("b1_again", make_records(70, seed=3), lr="2", seed="1", value=53.0),
        make_run("lone", make_records(72, seed=4), lr="3", value=58.0),
    ]
    comparison = compare_runs(runs)
    assert [(one.run, one.kind) for one in comparison.intervals[-2:]] == [("lone", "images"), ("b0", "seeds")]
    (note,) = comparison.notes
    assert note.startswith(UNREFLECTED.format("lone"))
    (note,) = compare_runs([runs[0], *runs[2:]]).notes  # the baseline has one seed
    assert note.startswith(UNREFLECTED.format("b0, b1, b1_again, lone"))
    assert compare_runs(runs[:2]).notes == ()


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
    assert main(["compare", *folders, "--draws", "-1"]) == 2
