"""Quality comparisons: which runs are trained, and the tables and verdicts from their run folders."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quality import make_tables, point_costs, run_arms
from benchmarks.quality.arms import (
    ALL_ARMS,
    ARMS,
    COMPARISONS,
    IMAGE_SETS,
    METRICS,
    PILOT_ARMS,
    Comparison,
    Run,
    list_runs,
)
from benchmarks.quality.bars import BARS, PARTS, Bar, judge, judge_costs, missing_runs
from benchmarks.quality.differences import cpu_ratio, paired_difference, read_results
from benchmarks.quality.finished_runs import CpuSeconds, read_cpu, read_run
from benchmarks.quality.make_tables import difference_table, spread_table
from benchmarks.quality.run_arms import Pool, parse
from benchmarks.quality.train_one import find_run

SHAPES, SMALL_SHAPES = IMAGE_SETS[:2]
BASE, BOXES, UNIFORM = ARMS[0], ARMS[2], ARMS[3]
COSTS = point_costs.Costs("1 x 64 x 64", {arm.name: 10.0 for arm in ARMS if arm.trainer == "m2f"})


def write_run(folder: Path, run: Run, *, step: int, seconds: float = 100.0, **metrics: float | None) -> None:
    place = folder / "runs" / run.name / "evaluations" / f"step_{step:08d}" / "val"
    place.mkdir(parents=True)
    content = {
        "step": step,
        "fingerprint": "f",
        "subset": None,
        "num_images": 512,
        "metrics": metrics,
        "per_class": [],
    }
    (place / "results.json").write_text(json.dumps(content))
    (folder / "cpu").mkdir(exist_ok=True)
    lines = [{"event": "start"}, {"event": "end", "training_s": seconds, "evaluation_s": 7.0}]
    (folder / "cpu" / f"{run.name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three finished seeds of two arms, and an unfinished fourth seed of the second arm."""
    for seed, (base, boxes) in enumerate([(50.0, 53.0), (54.0, 56.0), (52.0, 56.0)]):
        write_run(tmp_path, Run(SHAPES, BASE, seed), step=900, PQ=base, APs=10.0 + seed, APl=None)
        write_run(tmp_path, Run(SHAPES, BOXES, seed), step=900, seconds=130.0, PQ=boxes, APs=10.0 + seed, APl=None)
    write_run(tmp_path, Run(SHAPES, BOXES, 3), step=600, PQ=1.0)
    return tmp_path


def test_every_arm_has_a_valid_recipe(tmp_path):
    configs = [run.config(tmp_path) for run in list_runs(IMAGE_SETS, ARMS, [0, 7])]
    assert len({config.name for config in configs}) == len(configs) == 2 * len(IMAGE_SETS) * len(ARMS)
    assert {config.seed for config in configs} == {0, 7}
    shapes = configs[: 2 * 2 * len(ARMS)]
    assert {config.datasets["val"].source.num_images for config in shapes} == {512}
    assert len({config.datasets["val"].shards for config in configs}) == len(IMAGE_SETS)
    for config in configs:
        # The last step has a checkpoint, so it is evaluated.
        assert config.training.max_steps % config.training.checkpoint.every_steps == 0
        assert config.cluster.num_workers == 1
        assert config.output == str(tmp_path / "runs")
        assert config.training.micro_batch == config.training.global_batch
    assert {name for c in COMPARISONS for name in (c.arm, c.reference)} == {arm.name for arm in ALL_ARMS}


def test_arms_differ_only_in_their_overrides(tmp_path):
    base, boxes, uniform = (Run(SHAPES, arm, 3).config(tmp_path) for arm in (BASE, BOXES, UNIFORM))
    assert base.model.loss.num_points == boxes.model.loss.num_points == 1024
    assert (boxes.model.loss.matching_box_share, boxes.model.loss.supervision_box_share) == (0.5, 0.5)
    assert uniform.model.loss.num_points == 8192
    assert base.datasets == boxes.datasets == uniform.datasets
    assert base.training == boxes.training == uniform.training


def test_all_arms_of_a_seed_run_before_the_next_seed():
    assert [(run.arm.name, run.seed) for run in list_runs([SHAPES], [BASE, BOXES], [0, 1])] == [
        ("base", 0),
        ("box_points", 0),
        ("base", 1),
        ("box_points", 1),
    ]
    assert find_run("shapes", "box_points", "4") == Run(SHAPES, BOXES, 4)


def test_command_line_selects_sets_arms_and_seeds():
    given = parse(["here", "--arms", "base", "--seeds", "3", "4", "--overrides", "training.max_steps=9"])
    assert (given.folder, given.sets, given.arms, given.seeds) == (Path("here"), ["shapes"], ["base"], [3, 4])
    assert given.overrides == ["training.max_steps=9"]


def test_finished_runs_are_not_trained_again(folder, capsys):
    pool = Pool(folder, ["training.max_steps=900"], processes=1)
    assert pool.train(list_runs([SHAPES], [BASE, BOXES], [0, 1, 2]), seconds=60) == 0
    assert capsys.readouterr().out == "0 of 6 runs to train\nall runs are finished\n"


def test_running_processes_are_stopped_if_shards_cannot_be_written(tmp_path, monkeypatch):
    def fail(config):
        raise OSError("no space left")

    monkeypatch.setattr(run_arms, "make_shards", fail)
    pool = Pool(tmp_path, [], processes=2)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as running:
        pool._running[Run(SHAPES, BASE, 0)] = running
        with pytest.raises(OSError, match="no space left"):
            pool.train([Run(SHAPES, BASE, 1)], seconds=60)
        assert running.wait(60) == -signal.SIGTERM


def test_tables_include_only_runs_that_reached_the_last_step(folder):
    results = read_results([folder], SHAPES)
    assert set(results) == {(arm, seed) for arm in ("base", "box_points") for seed in range(3)}
    lines = spread_table(results).splitlines()
    assert lines[0] == "900 steps, 512 validation images"
    assert lines[2].startswith("| arm | seeds | PQ | APs | training")
    assert lines[4].startswith("| base | 3 | 52.00 (2.00) | 11.00 (1.00) |")
    assert lines[4].endswith("| 100 (0) | 7 (0) |")
    assert len(lines) == 6


def test_difference_pairs_runs_of_the_same_seed(folder):
    found = paired_difference(Comparison("box_points", "base"), "PQ", read_results([folder], SHAPES))
    assert found.seeds == 3
    assert found.interval.value == pytest.approx(3)
    assert found.interval.low == pytest.approx(3 - 4.3027 / 3**0.5, abs=1e-3)
    assert found.relative == pytest.approx(3 / 52)
    assert found.verdict(1.0) == "gain"
    assert paired_difference(Comparison("box_points", "base"), "APl", read_results([folder], SHAPES)) is None
    assert paired_difference(Comparison("box_points", "uniform_8192"), "PQ", read_results([folder], SHAPES)) is None


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ((1.0, 1.2, 1.1), 1.0, "gain"),
        ((-0.1, 0.1, 0.0), 1.0, "no loss"),
        ((-0.5, -0.4, -0.6), 1.0, "no loss"),
        ((-4.0, 3.0, 1.0), 1.0, "not decided"),
        ((-2.0, -2.1, -1.9), 1.0, "loss"),
        ((-1.0, -1.1, -1.0), 1.5, "no loss"),
    ],
)
def test_verdicts_follow_the_interval(tmp_path, differences, margin, verdict):
    for seed, difference in enumerate(differences):
        write_run(tmp_path, Run(SHAPES, BASE, seed), step=9, PQ=50.0 + 3 * seed)
        write_run(tmp_path, Run(SHAPES, BOXES, seed), step=9, PQ=50.0 + 3 * seed + difference)
    found = paired_difference(Comparison("box_points", "base"), "PQ", read_results([tmp_path], SHAPES))
    assert found.verdict(margin) == verdict


def test_difference_table_contains_ratio_and_margin(folder):
    results = read_results([folder], SHAPES)
    assert cpu_ratio(Comparison("box_points", "base"), results) == pytest.approx(1.3)
    assert cpu_ratio(Comparison("box_points", "uniform_8192"), results) is None
    (row,) = [line for line in difference_table(results).splitlines() if line.startswith("| box_points - base | PQ |")]
    assert row == "| box_points - base | PQ | 3 | +3.00 | +5.8 % | +0.52 to +5.48 | too few seeds | 1 | 1.30 |"
    assert set(METRICS) > {"PQ", "PQ_small", "APs"}


def test_cpu_seconds_of_a_killed_process_are_unknown(folder):
    run = Run(SHAPES, BASE, 0)
    record = folder / "cpu" / f"{run.name}.jsonl"
    assert read_run([folder], run).cpu == CpuSeconds(100.0, 7.0)
    whole = record.read_text()
    record.write_text(whole + whole)
    assert read_cpu(record) == CpuSeconds(200.0, 14.0)
    record.write_text('{"event": "start"}\n' + whole)
    assert read_cpu(record) is None
    assert read_cpu(folder / "none.jsonl") is None


def test_costs_of_points_are_listed_by_arm(tmp_path):
    costs = point_costs.measure_all([point_costs.Sizes(1, 64, 3, 2, 5, 8)], repeats=1)
    assert list(costs[0].milliseconds) == [arm.name for arm in ARMS if arm.trainer == "m2f"]
    lines = point_costs.costs_table(costs).splitlines()
    assert lines[0].count("ms (ratio)") == len(ARMS) - 1
    assert lines[2].startswith("| 1 x 64 x 64, 3 masks, 2 predictions of 5 queries, 8 channels |")
    assert lines[2].endswith("(1.00) |")
    assert point_costs.read_costs([tmp_path]) == []


def test_costs_of_points_are_saved_to_a_new_folder_which_exists_before_the_measurement(tmp_path, monkeypatch, capsys):
    place = tmp_path / "new" / "folder"

    def measure_all(*given):
        assert place.is_dir()
        return [COSTS]

    monkeypatch.setattr(point_costs, "measure_all", measure_all)
    assert point_costs.main(["--save", str(place)]) == 0
    assert point_costs.read_costs([place, place]) == [COSTS]
    assert COSTS.sizes in capsys.readouterr().out


def write_pairs(folder, base, boxes, metric="APs"):
    """Write runs of base and box points on small shapes, one seed per pair of values."""
    for seed, (one, other) in enumerate(zip(base, boxes, strict=True)):
        write_run(folder, Run(SMALL_SHAPES, BASE, seed), step=9, **{metric: one})
        write_run(folder, Run(SMALL_SHAPES, BOXES, seed), step=9, **{metric: other})


SMALL_OBJECTS = Bar("small_shapes", Comparison("box_points", "base"), "APs", min_gain=0.2)
MEDIUM_OBJECTS = Bar("small_shapes", Comparison("box_points", "base"), "APm")


@pytest.mark.parametrize(
    ("boxes", "judged"),
    [
        ((12.5, 12.0, 12.5, 13.0, 12.5), "holds"),
        ((11.0, 11.0, 11.5, 11.0, 11.0), "FAILS"),  # a gain of less than a fifth
        ((20.0, 9.0, 16.0, 8.0, 14.0), "not decided"),
        ((9.0, 9.5, 9.0, 9.0, 9.0), "FAILS"),
    ],
)
def test_small_objects_bar_requires_a_gain_of_a_fifth(tmp_path, boxes, judged):
    write_pairs(tmp_path, [10.0] * 5, boxes)
    line = judge(SMALL_OBJECTS, read_results([tmp_path], SMALL_SHAPES))
    assert line.startswith(f"{judged}: box_points against base on small_shapes: a gain of at least 20 % in APs: ")
    assert line.endswith("%")


@pytest.mark.parametrize(
    ("boxes", "judged"),
    [
        ((30.0, 30.5, 30.0, 30.0, 29.5), "holds"),
        ((33.0, 27.0, 32.0, 28.0, 30.0), "not decided"),
        ((28.0, 28.0, 28.5, 28.0, 28.0), "FAILS"),
    ],
)
def test_other_objects_bar_requires_no_loss(tmp_path, boxes, judged):
    write_pairs(tmp_path, [30.0] * 5, boxes, "APm")
    line = judge(MEDIUM_OBJECTS, read_results([tmp_path], SMALL_SHAPES))
    assert line.startswith(f"{judged}: box_points against base on small_shapes: no loss in APm (margin 1): ")


def test_verdict_lists_missing_runs(tmp_path):
    write_pairs(tmp_path, [10.0] * 2, [12.0] * 2)
    results = read_results([tmp_path], SMALL_SHAPES)
    assert judge(SMALL_OBJECTS, results).endswith("not run: box_points 2-4, base 2-4")
    part = next(part for part in PARTS if part.image_set == "small_shapes")
    assert missing_runs(part, results) == (
        "FAILS: box points on small_shapes: 4 of 20 runs are finished; missing: base 2-4, box_matching 0-4, "
        "box_points 2-4, uniform_8192 0-4"
    )


def test_five_seeds_get_a_verdict(tmp_path):
    write_pairs(tmp_path, [10.0] * 5, [12.5, 12.0, 12.5, 13.0, 12.5])
    row = difference_table(read_results([tmp_path], SMALL_SHAPES)).splitlines()[2]
    assert row.startswith("| box_points - base | APs | 5 | +2.50 | +25.0 % |")
    assert row.endswith("| gain | 1 | 1.00 |")


def test_consecutive_seeds_are_listed_as_a_range(tmp_path):
    write_pairs(tmp_path, [10.0] * 3, [12.0] * 3)
    (tmp_path / "runs" / "small_shapes-base-1" / "evaluations").rename(tmp_path / "elsewhere")
    assert judge(SMALL_OBJECTS, read_results([tmp_path], SMALL_SHAPES)).endswith("box_points 3-4, base 1 3-4")


def test_costs_are_judged_by_their_bar():
    milliseconds = {"base": 30.0, "box_matching": 30.0, "box_points": 40.0, "uniform_8192": 100.0}
    lines = judge_costs([point_costs.Costs("sizes", milliseconds)])
    assert [line.split(":")[0] for line in lines] == ["holds", "FAILS"]
    assert lines[1].endswith("(sizes): 0.40")


def test_bars_and_parts_use_known_arms_and_metrics():
    names = {arm.name for arm in ALL_ARMS}
    assert all({bar.comparison.arm, bar.comparison.reference} <= names and bar.metric in METRICS for bar in BARS)
    assert all(set(part.arms) <= names for part in PARTS)


def test_pilots_are_compared_with_longer_and_shorter_runs(tmp_path):
    long, half, pilots = (Run(SHAPES, arm, 2).config(tmp_path) for arm in PILOT_ARMS)
    assert (long.training.max_steps, half.training.max_steps, pilots.training.max_steps) == (2500, 1250, 1500)
    for config in (long, half, pilots):
        assert config.training.max_steps % config.training.checkpoint.every_steps == 0
        assert config.datasets == Run(SHAPES, BASE, 2).config(tmp_path).datasets
    assert (long.model.pilots.max_targets, pilots.model.pilots.max_targets) == (0, 100)
    assert find_run("shapes", "pilots_1500", "4").arm == PILOT_ARMS[2]


@pytest.mark.parametrize(("seconds", "verdict"), [(69.0, "holds"), (71.0, "FAILS")])
def test_pilots_must_cost_less(tmp_path, seconds, verdict):
    for seed in range(5):
        write_run(tmp_path, Run(SHAPES, PILOT_ARMS[0], seed), step=2500, PQ=60.0 + seed)
        write_run(tmp_path, Run(SHAPES, PILOT_ARMS[2], seed), step=1500, seconds=seconds, PQ=60.5 + seed)
    results = read_results([tmp_path], SHAPES)
    assert len(results) == 10
    assert judge(BARS[-1], results) == (
        f"{verdict}: pilots_1500 against base_2500 on shapes: no loss in PQ (margin 1), in at most 0.7 of the CPU "
        f"seconds: +0.50 (+0.50 to +0.50), +0.8 %, {seconds / 100:.2f} of the CPU seconds"
    )


def test_kept_results_replace_their_run_folders(folder, tmp_path, capsys):
    """The kept results give the same tables as the run folders, so large run folders can be deleted."""
    kept, later, steps = tmp_path / "kept", tmp_path / "later", ["--overrides", "training.max_steps=900"]
    point_costs.write_costs([COSTS], folder)
    assert make_tables.main([str(folder), "--keep", str(kept), *steps]) == 0
    before = capsys.readouterr().out
    assert COSTS.sizes in before
    assert len(list(kept.rglob("results.json"))) == len(list(kept.rglob("*.jsonl"))) == 6
    assert make_tables.main([str(kept), *steps]) == 0
    assert capsys.readouterr().out == before
    write_run(later, Run(SHAPES, BOXES, 3), step=900, PQ=57.0)
    assert len(read_results([kept, later], SHAPES)) == 7
    pool = Pool(later, ["training.max_steps=900"], processes=1, kept=[kept])
    assert pool.train(list_runs([SHAPES], [BASE, BOXES], [0, 1, 2]), seconds=60) == 0


def test_make_tables_prints_all_tables_and_bars(folder, capsys):
    assert make_tables.main([str(folder), "--overrides", "training.max_steps=900"]) == 0
    out = capsys.readouterr().out
    assert "## shapes\n\n900 steps, 512 validation images" in out
    assert "FAILS: beside transformers on shapes: 2 of 4 runs are finished; missing: transformers 0-1" in out
    assert "FAILS: box points on nuclei: 0 of 8 runs are finished" in out
    assert make_tables.main([str(folder)]) == 0
    assert "FAILS: beside transformers on shapes: 0 of 4 runs are finished" in capsys.readouterr().out
