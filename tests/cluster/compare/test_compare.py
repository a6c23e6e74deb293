"""Tests of `m2f compare`: deltas, missing values, changed settings, reports, and the reading of runs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from m2f.cluster.cli import main
from m2f.cluster.compare.compare import compare_runs
from m2f.cluster.compare.errors import CompareError
from m2f.cluster.compare.page import as_page
from m2f.cluster.compare.records import RunRecord, read_runs
from m2f.cluster.compare.report import as_json, as_markdown, as_text
from m2f.cluster.compare.set_result import SetResult
from m2f.cluster.evaluation.queue import Entry
from m2f.data_pipeline.storage.storage import Storage


def per_class(**classes):
    return [{"id": i, "name": name, "PQ": value} for i, (name, value) in enumerate(classes.items())]


def set_result(step, metrics, classes=None, *, fingerprint="f" * 64, subset=None, num_images=10):
    return SetResult(
        step=step,
        fingerprint=fingerprint,
        subset=subset,
        num_images=num_images,
        metrics=metrics,
        per_class=per_class(**(classes or {})),
    )


def record(name, curves, results=None, **recipe):
    settings = {"name": name} | {key.replace("__", "."): value for key, value in recipe.items()}
    return RunRecord(name=name, source=f"runs/{name}", recipe=settings, curves=curves, results=results or {})


@pytest.fixture
def pair():
    base = record(
        "base",
        {"val/PQ": ((10, 40.0), (20, 50.0)), "val/mIoU": ((20, 60.0),), "train/loss/total": ((1, 3.0), (20, 1.0))},
        {"val": set_result(20, {"PQ": 50.0}, {"cat": 30.0, "sky": 70.0, "dog": None})},
        training__optimizer__lr="0.001",
        model__gone="x",
        training__global_batch="4",
    )
    other = record(
        "other",
        {"val/PQ": ((10, 42.5),), "train/loss/total": ((1, 2.5), (10, 0.5)), "train/images_per_s": ((10, 7.0),)},
        {"val": set_result(10, {"PQ": 42.5}, {"cat": 33.0, "sky": 69.0, "dog": 5.0})},
        training__optimizer__lr="0.0005",
        training__global_batch="8",
    )
    return [base, other]


def values(rows, name):
    row = next(row for row in rows if row.name == name)
    return [(v.value, v.delta, v.best) for v in row.values]


def test_deltas_are_relative_to_the_first_run_and_missing_values_stay_missing(pair):
    comparison = compare_runs(pair)
    assert [row.name for row in comparison.metrics] == ["val/PQ", "val/mIoU"]
    assert values(comparison.metrics, "val/PQ") == [(50.0, None, True), (42.5, -7.5, False)]
    assert values(comparison.metrics, "val/mIoU") == [(60.0, None, False), (None, None, False)]
    assert comparison.steps == {"val": (20, 10)}
    assert any("different steps" in note for note in comparison.notes)


def test_a_step_selects_the_evaluations_of_that_step(pair):
    comparison = compare_runs(pair, step=10)
    assert values(comparison.metrics, "val/PQ") == [(40.0, None, False), (42.5, 2.5, True)]
    assert not any("different steps" in note for note in comparison.notes)
    assert "val: not evaluated at step 20: other" in compare_runs(pair, ["train/loss/total", "PQ"], step=20).notes


def test_lower_loss_is_better_and_ties_are_not_marked(pair):
    comparison = compare_runs(pair, ["train/loss/total"])
    assert values(comparison.metrics, "train/loss/total") == [(1.0, None, False), (0.5, -0.5, True)]
    twice = compare_runs([pair[0], pair[0]])
    assert not any(value.best for row in twice.metrics for value in row.values)
    assert not twice.differences


def test_differences_are_the_settings_that_differ(pair):
    found = {d.setting: d.values for d in compare_runs(pair).differences}
    assert found == {
        "training.optimizer.lr": ("0.001", "0.0005"),
        "model.gone": ("x", None),
        "training.global_batch": ("4", "8"),
    }


def test_classes_speed_and_curves_have_the_values_of_every_run(pair):
    comparison = compare_runs(pair)
    (table,) = comparison.classes
    assert values(table.rows, "cat") == [(30.0, None, False), (33.0, 3.0, True)]
    assert values(table.rows, "dog") == [(None, None, False), (5.0, None, False)]
    assert values(comparison.speed, "images/s (median)") == [(None, None, False), (7.0, None, False)]
    pq = comparison.plots[0]
    assert (pq.metric, pq.x_label) == ("val/PQ", "images")
    assert pq.curves == (((40.0, 40.0), (80.0, 50.0)), ((80.0, 42.5),))


def test_training_time_counts_every_step():
    times = {"val/PQ": ((10, 1.0),), "train/step_time_s": ((50, 1.0), (100, 3.0))}
    (hours,) = [row for row in compare_runs([record("a", times)]).speed if row.name == "training time, h"]
    assert hours.values[0].value == pytest.approx(200 / 3600)


def test_runs_without_a_common_metric_are_rejected_with_their_metrics(pair):
    other = record("unrelated", {"test/PQ": ((5, 1.0),)})
    with pytest.raises(CompareError, match=r"base: val/PQ, val/mIoU; unrelated: test/PQ"):
        compare_runs([pair[0], other])
    with pytest.raises(CompareError, match="no run has the metric 'AP'"):
        compare_runs(pair, ["AP"])


def test_a_run_without_results_does_not_prevent_the_comparison_of_the_others(pair):
    new = record("new", {"train/loss/total": ((1, 4.0),)})
    comparison = compare_runs([*pair, new])
    assert values(comparison.metrics, "val/PQ") == [(50.0, None, True), (42.5, -7.5, False), (None, None, False)]
    assert "val: not evaluated: new" in comparison.notes
    with pytest.raises(CompareError, match="no metric in common"):
        compare_runs([pair[0], new])


def test_selected_runs_without_the_compared_metrics_are_left_out_with_a_note(pair):
    new, parent = record("new", {"train/loss/total": ((1, 4.0),)}), record("sweep", {})
    selected = [replace(run, is_selected=True) for run in (new, parent, *pair)]
    comparison = compare_runs(selected)
    assert [run.name for run in comparison.runs] == ["base", "other"]
    assert values(comparison.metrics, "val/PQ")[1] == (42.5, -7.5, False)
    assert comparison.notes[:2] == tuple(
        f"{name} is left out, because it has none of the compared metrics" for name in ("new", "sweep")
    )
    assert [run.name for run in compare_runs(selected, ["train/loss/total"]).runs] == ["new", "base", "other"]
    assert [run.name for run in compare_runs(selected[1:2]).runs] == ["sweep"]


def test_an_evaluated_set_may_be_called_train(pair):
    """Training metrics have the same prefix `train/`, and end at a later step."""
    runs = [
        replace(run, curves=run.curves | {"train/AP": ((10, ap),), "train/lr": ((10, 0.1), (30, 0.0))}, results={})
        for run, ap in zip(pair, (40.0, 42.0), strict=True)
    ]
    comparison = compare_runs(runs)
    assert values(comparison.metrics, "train/AP") == [(40.0, None, False), (42.0, 2.0, True)]
    assert comparison.steps["train"] == (10, 10)
    assert not {"train/lr", "train/loss/total"} & {row.name for row in comparison.metrics}


def test_different_data_and_subsets_are_noted(pair):
    other = record(
        "other", pair[1].curves, {"val": set_result(10, {"PQ": 42.5}, fingerprint="0" * 64, subset="first 5 of 10")}
    )
    notes = " ".join(compare_runs([pair[0], other]).notes)
    assert "different data (base ffffffffffff, other 000000000000)" in notes
    assert "other first 5 of 10" in notes


def classes(*rows):
    return [{"id": i, "name": name, "is_thing": thing, "PQ": 50.0} for i, name, thing in rows]


def with_classes(record, rows):
    (name, result), *_ = record.results.items()
    return replace(record, results={name: replace(result, per_class=classes(*rows))})


TABLE = ((1, "cat", True), (2, "sky", False))


def test_runs_with_the_same_classes_in_another_order_are_compared_by_name(pair):
    comparison = compare_runs(
        [with_classes(pair[0], TABLE), with_classes(pair[1], ((1, "sky", False), (5, "cat", True)))]
    )
    assert not [note for note in comparison.notes if "classes" in note]
    assert [row.name for row in comparison.classes[0].rows] == ["cat", "sky"]


def test_classes_with_one_name_keep_their_values(pair):
    rows = [{"id": i, "name": "fish", "is_thing": True, "PQ": 10.0 * i} for i in (3, 5)]
    runs = [replace(run, results={"val": replace(run.results["val"], per_class=rows)}) for run in pair]
    found = [(row.name, row.values[0].value) for row in compare_runs(runs).classes[0].rows]
    assert found == [("fish", 30.0), ("fish (2)", 50.0)]


def test_classes_that_only_one_run_has_are_noted(pair):
    notes = compare_runs([with_classes(pair[0], TABLE), with_classes(pair[1], TABLE[:1])]).notes
    assert "val: 1 class in both; other lacks sky; their averages are over different classes" in notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((2, "sky", True), r"base: id 2 'sky' \(stuff\); other: id 2 'sky' \(thing\)"),
        ((2, "cloud", False), r"base: id 2 'sky' \(stuff\); other: id 2 'cloud' \(stuff\)"),
    ],
)
def test_runs_whose_classes_contradict_each_other_are_refused(pair, row, message):
    with pytest.raises(CompareError, match=message):
        compare_runs([with_classes(pair[0], TABLE), with_classes(pair[1], (TABLE[0], row))])


def test_published_results_are_shown_for_the_first_set():
    curves = {"val/PQ": ((10, 50.0),), "val/SQ": ((10, 80.0),), "small/PQ": ((10, 9.0),)}
    run = record("coco_panoptic_r50_official", curves, evaluation__sets__0__dataset="val")
    comparison = compare_runs([run])
    assert {row.name: row.paper for row in comparison.metrics} == {"small/PQ": None, "val/PQ": 51.9, "val/SQ": None}
    assert "Table I, COCO" in as_text(comparison)
    assert re.search(r"val/PQ +50\.00 +51\.90", as_text(comparison))
    assert compare_runs([record("mine", curves)]).paper is None


class StrictParser(HTMLParser):
    """HTML parser that collects text and links, and fails if tags are not closed in order."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_formats_agree_and_are_self_contained(pair):
    pair[1] = record("<b>other</b>|", pair[1].curves, pair[1].results, note="a|b")
    comparison = compare_runs(pair)
    text, markdown, html = as_text(comparison), as_markdown(comparison, "c.svg"), as_page(comparison)
    content = json.loads(as_json(comparison))
    assert content["metrics"][0]["values"][1] == {"value": 42.5, "delta": -7.5, "best": False}
    assert content["metrics"][1]["values"][1]["value"] is None
    for report in (text, markdown, html):
        assert "42.50" in report
        assert "-7.50" in report
    assert "| val/PQ | 50.00* | 42.50 -7.50 |" in markdown
    assert "<b>other" not in html
    parsed = StrictParser(html)
    assert "(absent)" in parsed.text
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)


def test_many_runs_are_shown_in_blocks_that_repeat_the_baseline(pair):
    runs = [pair[0], *(record(f"run_number_{i}", pair[1].curves) for i in range(12))]
    lines = as_text(compare_runs(runs)).splitlines()
    heads = [line for line in lines if line.startswith("metric")]
    assert len(heads) > 1
    assert all("base" in head for head in heads)
    assert max(len(line) for line in lines[14 : lines.index(heads[-1])] if not line.startswith("!")) <= 122


def test_the_width_of_a_block_includes_the_column_of_the_paper(pair):
    runs = [record("coco_panoptic_r50_official", pair[0].curves, evaluation__sets__0__dataset="val")]
    runs += [record(f"run_number_{i:08}", pair[1].curves) for i in range(12)]
    lines = as_text(compare_runs(runs)).splitlines()
    heads = [line for line in lines if line.startswith("metric")]
    assert all(head.endswith("paper") and len(head) <= 122 for head in heads)


def test_a_diverged_run_is_compared(pair):
    other = replace(pair[1], curves={**pair[1].curves, "train/loss/total": ((1, 2.5), (5, math.inf), (10, math.nan))})
    comparison = compare_runs([pair[0], other])
    assert "42.50" in as_text(comparison)
    assert "42.50" in as_page(comparison)
    (curves,) = [p["curves"] for p in json.loads(as_json(comparison))["plots"] if p["metric"] == "train/loss/total"]
    assert [value for _, value in curves[1]] == [2.5, None, None]


# Reading of runs


def write_run(folder, name, pq, *, lr="0.001", step=100):
    results = folder / "evaluations" / f"step_{step:08d}" / "val"
    results.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(f"name: {name}\ntraining:\n  optimizer: {{lr: {lr}}}\n")
    content = {
        "step": step,
        "fingerprint": "ab" * 32,
        "subset": None,
        "num_images": 3,
        "metrics": {"PQ": pq, "APl": None},
        "per_class": per_class(cat=pq),
    }
    (results / "results.json").write_text(json.dumps(content))
    return str(folder)


def read(*runs, **options):
    return read_runs(runs, **({"tracking": None, "experiment": None, "query": None, "step": None} | options))


@pytest.fixture(scope="module")
def store(tmp_path_factory, migrated_database):
    """Return the URI of a database and the ids of its three runs. Two runs share a name, and one has artifacts."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "mlflow.db").write_bytes(migrated_database)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("m2f", artifact_location=(folder / "artifacts").as_uri())
    ids = {}
    for key, name, pq in (("a", "alpha", 50.0), ("b", "beta", 52.0), ("c", "beta", 53.0)):
        run_id = client.create_run(experiment, run_name=name, tags={"m2f.version": "0.1.0"}).info.run_id
        points = [Metric("val/PQ", pq - 5, 1, 50), Metric("val/PQ", pq, 2, 100), Metric("train/eta_s", 9.0, 1, 5)]
        client.log_batch(run_id, points)
        client.set_terminated(run_id)
        ids[key] = run_id
    written = write_run(folder / "alpha", "alpha", 50.0)
    client.log_artifact(ids["a"], f"{written}/recipe.yaml")
    client.log_artifacts(ids["a"], f"{written}/evaluations", "evaluations")
    client.log_param(ids["b"], "training.optimizer.lr", "0.5")
    return uri, ids


def test_folders_are_read_without_mlflow(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = write_run(tmp_path / "a", "a", 50.0)
    write_run(tmp_path / "a", "a", 55.0, step=200)
    second = write_run(tmp_path / "b", "b", 57.0, lr="0.01", step=200)
    comparison = compare_runs(read(first, second))
    assert values(comparison.metrics, "val/PQ") == [(55.0, None, False), (57.0, 2.0, True)]
    assert [d.setting for d in comparison.differences] == ["training.optimizer.lr"]
    assert comparison.runs[0].curves["val/PQ"] == ((100, 50.0), (200, 55.0))
    assert "val/APl" not in comparison.runs[0].curves
    assert read(first, step=100)[0].results["val"].metrics["PQ"] == 50.0


def test_results_of_other_weights_are_left_out_with_a_note(tmp_path):
    folder = write_run(tmp_path / "a", "a", 50.0)
    (tmp_path / "a/evaluations/step_00000100").rename(tmp_path / "a/evaluations/model_final")
    results = tmp_path / "a/evaluations/model_final/val/results.json"
    results.write_text(results.read_text().replace('"step": 100', '"step": null'))
    note = "not compared, because the weights are not a checkpoint of the run: " + str(results.parents[1])
    (run,) = read(folder)
    assert (run.results, run.curves, run.notes[1:]) == ({}, {}, (note,))
    write_run(tmp_path / "a", "a", 55.0, step=200)
    (run,) = read(folder)
    assert (run.results["val"].step, run.curves["val/PQ"]) == (200, ((200, 55.0),))


def test_results_of_a_withdrawn_step_are_left_out_until_it_is_published_again(tmp_path):
    for step in (200, 250, 300):
        folder = write_run(tmp_path / "a", "a", step / 10, step=step)
    queue, entries = tmp_path / "a/evaluations/queue.json", []
    for step, status in ((200, "published"), (250, "withdrawn"), (250, "published"), (300, "withdrawn")):
        entries.append(asdict(Entry(step, "", 0, status, commit=f"{step}-{status}")))
    queue.write_text(json.dumps(entries))
    (run,) = read(folder)
    assert (run.results["val"].step, run.curves["val/PQ"]) == (250, ((200, 20.0), (250, 25.0)))
    assert run.notes[1:] == ("not compared, because the run restarted from an earlier checkpoint: results of step 300",)
    entries.append(entries[-1] | {"status": "published", "commit": "again"})
    queue.write_text(json.dumps(entries))
    assert read(folder)[0].results["val"].step == 300
    queue.write_text("{")
    (run,) = read(folder)
    assert (run.results["val"].step, "is not a valid evaluation queue" in run.notes[1]) == (300, True)


@pytest.mark.parametrize("content", ["{}", '{"uri": "file:x"}', '{"uri": null, "run_id": "a"}', "[]"])
def test_an_incomplete_tracking_record_is_noted(content, tmp_path):
    folder = write_run(tmp_path / "a", "a", 50.0)
    (tmp_path / "a/tracking.json").write_text(content)
    (run,) = read(folder)
    assert run.notes == ("tracking.json lacks `uri` or `run_id`, so its MLflow run is unknown",)
    assert run.curves["val/PQ"] == ((100, 50.0),)


def test_runs_of_one_recipe_are_named_after_their_folders(tmp_path):
    folders = [write_run(tmp_path / name, "same", 50.0) for name in ("first", "second", "deep/first")]
    assert [run.name for run in read(*folders[:2])] == ["first", "second"]
    assert [run.name for run in read(folders[0], folders[2])] == ["same (1)", "same (2)"]


def test_a_run_of_mlflow_keeps_its_name_beside_a_folder_of_that_name(store, tmp_path):
    uri, _ = store
    folder = write_run(tmp_path / "first", "alpha", 50.0)
    assert [run.name for run in read(folder, "alpha", tracking=uri)] == ["alpha (1)", "alpha (2)"]


def test_folders_in_a_bucket_are_read_like_local_ones(tmp_path, bucket, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    local = write_run(tmp_path / "a", "a", 50.0)
    storage = Storage()
    write_run(tmp_path / "b", "b", 51.5, lr="0.01")
    for path in (tmp_path / "b").rglob("*.*"):
        if path.is_file():
            storage.put(f"{bucket}/runs/b/{path.relative_to(tmp_path / 'b')}", path.read_bytes())
    comparison = compare_runs(read(local, f"{bucket}/runs/b/"))
    with pytest.raises(CompareError, match=f"{bucket}/runs/c cannot be read as a run folder"):
        read(f"{bucket}/runs/c")
    assert values(comparison.metrics, "val/PQ") == [(50.0, None, False), (51.5, 1.5, True)]
    assert [d.setting for d in comparison.differences] == ["training.optimizer.lr"]
    assert values(comparison.classes[0].rows, "cat") == [(50.0, None, False), (51.5, 1.5, True)]


def test_runs_are_found_by_id_name_and_filter(store):
    uri, ids = store
    alpha, beta = read("alpha", ids["b"], tracking=uri)
    assert (alpha.name, alpha.status, alpha.version) == ("alpha", "FINISHED", "0.1.0")
    assert alpha.curves == {"val/PQ": ((50, 45.0), (100, 50.0))}
    assert alpha.results["val"].per_class[0]["PQ"] == 50.0
    assert alpha.recipe["training.optimizer.lr"] == "0.001"
    assert alpha.notes == ()
    assert beta.recipe == {"training.optimizer.lr": "0.5"}  # from the parameters of the MLflow run
    assert [note.split(" ")[0] for note in beta.notes] == ["recipe.yaml", "evaluations/step_00000100/val/results.json"]
    found = read(tracking=uri, experiment="m2f", query='metrics."val/PQ" > 51')
    assert [run.name for run in found] == ["beta (1)", "beta (2)"]
    assert len(read(tracking=uri, experiment="m2f")) == 3


def test_runs_that_cannot_be_found_are_refused(store, tmp_path, monkeypatch):
    uri, _ = store
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for options, names, message in (
        ({"tracking": uri}, ["alpa"], "did you mean 'alpha'"),
        ({"tracking": uri}, ["what's a run with 32 characters?"], "no run folder, run id or run name"),
        ({"tracking": uri}, ["0" * 32], "no run folder, run id or run name"),
        ({"tracking": uri}, ["beta"], "2 runs .* give an id"),
        ({"tracking": uri, "experiment": "m3f"}, [], "did you mean 'm2f'"),
        ({"tracking": uri, "query": "nonsense ==="}, [], "--filter is 'nonsense ==='"),
        ({"tracking": uri, "query": "metrics.x > 1"}, [], "matches the filter"),
        ({"tracking": f"sqlite:///{tmp_path}/none.db"}, ["alpha"], "the MLflow database .* does not exist"),
        ({}, ["runs/none"], "not a run folder .* MLFLOW_TRACKING_URI"),
        ({}, [], "no run to compare"),
    ):
        with pytest.raises(CompareError, match=message):
            read(*names, **options)
    assert not list(tmp_path.iterdir())


def test_names_with_quotes_are_found_and_the_largest_float_is_read_as_infinity(store):
    uri, _ = store
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("quoted")
    run_id = client.create_run(experiment, run_name="bob's run").info.run_id
    for step, value in enumerate((math.inf, -math.inf, 2.0)):
        client.log_metric(run_id, "train/loss/total", value, step=step)
    (run,) = read("bob's run", tracking=uri, experiment="quoted")
    assert run.curves["train/loss/total"] == ((0, math.inf), (1, -math.inf), (2, 2.0))
    assert read(tracking=uri, experiment="quoted")[0].is_selected


def test_a_failure_of_the_database_is_one_message(store, monkeypatch):
    def fail(*_, **__):
        raise MlflowException("(psycopg2.InterfaceError) connection already closed", error_code=BAD_REQUEST)

    monkeypatch.setattr(MlflowClient, "search_runs", fail)
    for names, options in ((["alpha"], {}), ([], {"query": "metrics.x > 1"})):
        with pytest.raises(CompareError, match=r"does not answer \(.*already closed"):
            read(*names, tracking=store[0], **options)


def test_unreachable_server_is_named_in_the_message(tmp_path):
    with pytest.raises(CompareError, match=r"does not answer .* start the server"):
        read("alpha", tracking="http://127.0.0.1:9")
    folder = write_run(tmp_path / "a", "a", 50.0)
    record = json.dumps({"uri": "http://127.0.0.1:9", "run_id": "0" * 32})
    (tmp_path / "a" / "tracking.json").write_text(record)
    (run,) = read(folder)
    assert run.curves == {"val/PQ": ((100, 50.0),)}
    assert "no training curves: http://127.0.0.1:9 does not answer" in run.notes[0]


def test_the_verb_writes_every_format(tmp_path, capsys):
    folders = [write_run(tmp_path / name, name, pq) for name, pq in (("a", 50.0), ("b", 51.0))]
    assert main(["compare", *folders]) == 0
    assert "51.00 +1.00*" in capsys.readouterr().out
    for name in ("r.md", "r.html", "r.json"):
        assert main(["compare", *folders, "--output", str(tmp_path / "out" / name)]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"r.md", "r_curves.svg", "r.html", "r.json"}
    assert "![Training curves](r_curves.svg)" in (tmp_path / "out" / "r.md").read_text()
    assert main(["compare", *folders, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 3)[-1])["metrics"][0]["name"] == "val/PQ"
    assert main(["compare", str(tmp_path / "none")]) == 2
