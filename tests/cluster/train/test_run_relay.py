import json
from pathlib import Path

import pytest

from m2f.cluster.demo import demo_config, table
from m2f.cluster.evaluation.lines import describe, headline
from m2f.cluster.evaluation.queue import Entry
from m2f.cluster.tracking.reporter import TrackingReporter, recover_metrics
from m2f.cluster.train.mailbox import CheckpointReport, EventReport, MetricsReport, RunBoard, Word
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import METRICS, Manifest, checkpoint_url, file_entry
from m2f.trainer.reporting import CommittedCheckpoint


class Recorder:
    def __init__(self):
        self.heard = []

    def metrics(self, step, values):
        self.heard.append(("metrics", step, dict(values)))

    def checkpoint(self, checkpoint):
        self.heard.append(("checkpoint", checkpoint.step))

    def event(self, kind, step, message):
        self.heard.append((kind, step, message))


def test_the_board_gives_every_report_once_and_in_order():
    board, recorder = RunBoard(), Recorder()
    board.pin(MetricsReport(1, {"loss": 2.0}))
    board.pin(CheckpointReport(CommittedCheckpoint(1, "c/1")))
    board.pin(EventReport("finished", 1, "done"))
    delivery = board.take(None, Word())
    for report in delivery.reports:
        report.tell(recorder)
    assert recorder.heard == [("metrics", 1, {"loss": 2.0}), ("checkpoint", 1), ("finished", 1, "done")]
    assert board.take(delivery, Word()).reports == ()


def test_a_delivery_that_got_lost_is_given_again():
    board = RunBoard()
    board.pin(EventReport("skipped", 1, "a"))
    first = board.take(None, Word())
    board.pin(EventReport("skipped", 2, "b"))
    board.take(first, Word())  # the driver never hears this answer
    board.pin(EventReport("skipped", 3, "c"))
    assert [report.step for report in board.take(first, Word()).reports] == [2, 3]


def test_a_board_that_was_made_again_counts_anew():
    old, new = RunBoard(), RunBoard()
    for step in range(3):
        old.pin(EventReport("skipped", step, ""))
    new.pin(EventReport("skipped", 9, ""))
    assert [report.step for report in new.take(old.take(None, Word()), Word()).reports] == [9]


def test_reports_that_fell_off_are_not_waited_for(monkeypatch):
    monkeypatch.setattr("m2f.cluster.train.mailbox.MAX_REPORTS", 2)
    board = RunBoard()
    first = board.take(None, Word())
    for step in range(5):
        board.pin(EventReport("skipped", step, ""))
    assert [report.step for report in board.take(first, Word()).reports] == [3, 4]


def test_the_board_carries_the_word_of_the_driver():
    board = RunBoard()
    board.take(None, Word())
    assert not board.word().stop
    board.take(None, Word(stop=True))
    assert board.word().stop
    board.take(None, Word(metrics_step=8))  # the driver may take it back
    assert board.word() == Word(stop=False, metrics_step=8)


HEADLINES = {"val/PQ": 51.234, "val/AP": 30.0, "val/SQ": 80.0, "street/mIoU": 70.5}


def test_headline_shows_the_main_numbers_of_every_set():
    assert headline(HEADLINES) == "street mIoU 70.50; val PQ 51.23, AP 30.00"


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (Entry(20, "c", 0, "failed", "batch 7 failed"), "step 20: evaluation failed: batch 7 failed"),
        (Entry(20, "c", 0, "published", metrics={"val/PQ": 1.0}), "step 20: evaluated: val PQ 1.00"),
    ],
)
def test_one_line_per_settled_evaluation(entry, line):
    assert describe(entry) == line


def test_the_demo_lists_every_checkpoint():
    entries = [Entry(10, "c", 0, "published", metrics=HEADLINES), Entry(20, "c", 0, "failed", "no")]
    assert table(entries).splitlines() == [
        "    step      PQ      AP    mIoU",
        "      10    51.2    30.0       -",
        "      20  failed",
    ]


def test_the_demo_writes_only_under_its_output(tmp_path):
    config = demo_config(str(tmp_path), ["training.max_steps=7"])
    assert config.training.max_steps == 7
    assert config.run_folder == f"{tmp_path}/demo"
    assert all(d.shards.startswith(f"{tmp_path}/demo/shards/") for d in config.datasets.values())


def test_steps_that_a_restart_does_again_are_tracked_once():
    logged = []

    class Recorder:
        def log_metrics(self, step, values):
            logged.append((step, dict(values)))

    reporter = TrackingReporter(Recorder())
    for step in (4, 7, 5, 5, 6, 7):  # 5 and 6 come late
        reporter.metrics(step, {"loss": float(step)})
    assert logged == [(step, {"train/loss": float(step)}) for step in (4, 7, 5, 6)]


def make_checkpoint(run_folder, step, metrics):
    url = Path(checkpoint_url(str(run_folder), step))
    url.mkdir(parents=True)
    (url / METRICS).write_text(json.dumps(metrics))
    manifest = Manifest(step, 1, 1, {METRICS: file_entry(url / METRICS)} if metrics else {})
    (url / "manifest.json").write_bytes(manifest.to_json())
    return url


def test_metrics_that_only_a_checkpoint_holds_are_tracked(tmp_path, caplog):
    logged = []

    class Recorder:
        def log_metrics(self, step, values):
            logged.append((step, dict(values)))

    reporter = TrackingReporter(Recorder())
    recover_metrics(reporter, Storage(), str(tmp_path))
    make_checkpoint(tmp_path, 5, {4: {"loss": 4.0}})
    newest = make_checkpoint(tmp_path, 10, {9: {"loss": 0.1 + 0.2}, 10: {"system/cpu_percent": 1.0}})
    reporter.metrics(9, {"loss": 0.1 + 0.2})
    reporter.metrics(11, {"loss": 11.0})
    for _ in range(2):
        recover_metrics(reporter, Storage(), str(tmp_path))
    assert [step for step, _ in logged] == [9, 11, 10]
    assert logged[2] == (10, {"system/cpu_percent": 1.0})
    (newest / METRICS).write_bytes((newest / METRICS).read_bytes().replace(b"10", b"12"))
    recover_metrics(reporter, Storage(), str(tmp_path))
    assert "a few points may be missing" in caplog.text
    make_checkpoint(tmp_path, 15, {})
    recover_metrics(reporter, Storage(), str(tmp_path))
    assert len(logged) == 3


def test_use_of_machines_is_tracked_where_mlflow_shows_it():
    logged = {}

    class Recorder:
        def log_metrics(self, step, values):
            logged.update(values)

    TrackingReporter(Recorder()).metrics(1, {"loss/total": 2.0, "system/cpu_percent": 50.0})
    assert logged == {"train/loss/total": 2.0, "system/cpu_percent": 50.0}
