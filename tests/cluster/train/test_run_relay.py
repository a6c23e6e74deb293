import pytest

from m2f.cluster.demo import demo_config, metrics_table
from m2f.cluster.evaluation.lines import describe, headline
from m2f.cluster.evaluation.queue import Entry
from m2f.cluster.tracking.reporter import TrackingReporter
from m2f.cluster.train.mailbox import Mailbox
from m2f.trainer.reporting import CommitReport, CommittedCheckpoint, Notice, StepReport
from tests.trainer.step_metrics import METRICS


def test_mailbox_returns_every_event_once_and_in_order():
    mailbox = Mailbox()
    events = StepReport(1, METRICS), CommitReport(CommittedCheckpoint(1, "c/1")), Notice("finished", 1, "done")
    for event in events:
        mailbox.post(event)
    assert mailbox.poll(stop=False) == events
    assert mailbox.poll(stop=False) == ()


def test_full_mailbox_drops_the_oldest_events(monkeypatch):
    monkeypatch.setattr("m2f.cluster.train.mailbox.MAX_EVENTS", 2)
    mailbox = Mailbox()
    for step in range(5):
        mailbox.post(Notice("skipped", step, ""))
    assert [event.step for event in mailbox.poll(stop=False)] == [3, 4]


def test_mailbox_returns_the_last_stop_request():
    mailbox = Mailbox()
    for stop in (False, True, False):  # the driver may withdraw its request
        mailbox.poll(stop)
        assert mailbox.stop_requested() == stop


HEADLINES = {"val/PQ": 51.234, "val/AP": 30.0, "val/SQ": 80.0, "street/mIoU": 70.5}


def test_headline_shows_the_headline_metrics_of_every_set():
    assert headline(HEADLINES) == "street mIoU 70.50; val PQ 51.23, AP 30.00"


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (Entry(20, "c", 0, "failed", "batch 7 failed"), "step 20: evaluation failed: batch 7 failed"),
        (Entry(20, "c", 0, "published", metrics={"val/PQ": 1.0}), "step 20: evaluated: val PQ 1.00"),
    ],
)
def test_settled_evaluation_is_described_in_one_line(entry, line):
    assert describe(entry) == line


def test_demo_table_lists_every_checkpoint():
    entries = [Entry(10, "c", 0, "published", metrics=HEADLINES), Entry(20, "c", 0, "failed", "no")]
    assert metrics_table(entries).splitlines() == [
        "step  evaluation     PQ     AP  mIoU",
        "----  ----------  -----  -----  ----",
        "  10  published   51.23  30.00     -",
        "  20  failed          -      -     -",
    ]


def test_demo_writes_only_to_its_output_folder(tmp_path):
    config = demo_config(str(tmp_path), ["training.max_steps=7"])
    assert config.training.max_steps == 7
    assert config.run_folder == f"{tmp_path}/demo"
    assert all(d.shards.startswith(f"{tmp_path}/demo/shards/") for d in config.datasets.values())


class Recorder:
    """Stub of Tracking that records points and tags."""

    def __init__(self):
        self.points, self.tags = [], {}

    def log_metrics(self, step, values):
        self.points.append((step, dict(values)))
        return True

    def set_tag(self, name, value):
        self.tags[name] = value


def test_steps_repeated_after_a_restart_are_tracked_once():
    recorder = Recorder()
    reporter = TrackingReporter(recorder)
    for step in (4, 7, 5, 5, 6, 7):  # 5 and 6 come late
        reporter.track(step, {"loss": float(step)})
    assert recorder.points == [(step, {"train/loss": float(step)}) for step in (4, 7, 5, 6)]


def test_events_are_logged_as_metrics_and_tags():
    recorder = Recorder()
    reporter = TrackingReporter(recorder)
    reporter.report(StepReport(1, METRICS))
    reporter.report(CommitReport(CommittedCheckpoint(1, "c/1")))
    reporter.report(Notice("skipped", 2, "not finite"))
    ((step, values),) = recorder.points
    assert step == 1
    assert values["train/loss/total"] == METRICS.loss.total
    assert values["system/cpu_percent"] == METRICS.system.cpu_percent  # MLflow's name for system metrics
    assert recorder.tags == {"checkpoint.step": "1", "checkpoint.url": "c/1", "event.skipped": "step 2: not finite"}
