import errno
import io
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from m2f.cluster.evaluation.manager import EvaluationProgress
from m2f.cluster.evaluation.queue import Entry
from m2f.cluster.train.live_view import LiveView, sparkline
from m2f.trainer.reporting import CommitReport, CommittedCheckpoint, StepReport
from tests.trainer.step_metrics import METRICS
from tests.waiting import wait_until

METRICS = replace(
    METRICS,
    throughput=replace(METRICS.throughput, eta_s=7833.0),
    grad_norm=12.3,
    mfu=0.382,
)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def render(view, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(view)
    lines = console.file.getvalue().splitlines()
    assert {len(line) for line in lines} == {min(width, 100)}
    return "\n".join(lines)


def test_panel_shows_progress_metrics_and_silence():
    clock = Clock()
    view = LiveView("ade20k", 160_000, clock=clock)
    assert "0 / 160,000" in render(view)
    view.begin_attempt(8)
    assert "starting 8 workers" in render(view)
    view.add_evaluation(Entry(5000, "c", 0, "published", metrics={"val/PQ": 35.2}))
    view.add_evaluation(Entry(10000, "c", 0, "published", metrics={"val/PQ": 34.2}))
    for loss in (60.0, 40.0, 31.25):
        view.report(StepReport(12020, replace(METRICS, loss=replace(METRICS.loss, total=loss))))
    view.report(CommitReport(CommittedCheckpoint(12000, "c")))
    view.show_evaluation(EvaluationProgress(12000, "12000", "val", 3, 63))
    clock.now += 8
    panel = render(view)
    for text in (
        "12,020 / 160,000",
        "7.5 %   2:10:33 left",
        "31.25  \u2588\u2583\u2581  class 11   mask 10.25   dice 10",
        "12.3 images/s \u00b7 0.81 s/step \u00b7 data wait 3 % \u00b7 MFU 38 %",
        "lr 0.0001 \u00b7 gradient 12.3 \u00b7 1 skipped",
        "CPU 55 % \u00b7 memory 31 % \u00b7 812 GB of disk free",
        "rank 3 takes 1.7 times as long",
        "step 12,000, 0:08 ago",
        "step 10,000: val PQ 34.20   (best PQ 35.20 at 5,000)",
        "evaluating step 12,000 on val, 3 of 63 batches",
        "training \u00b7 8 workers \u00b7 Ctrl-C stops after a checkpoint",
    ):
        assert text in panel, panel
    render(view, 60)
    clock.now += 100
    assert "no report for 1:48" in render(view)
    view.begin_attempt(7)
    assert "starting 7 workers \u00b7 1 restart" in render(view)
    view.show_interrupted()
    assert "1 restart \u00b7 stopping after a checkpoint, Ctrl-C again stops now" in render(view)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([2.0], 8, "\u2581"),
        ([1.0, 2.0, 3.0], 8, "\u2581\u2585\u2588"),
        ([float(n) for n in range(800)], 4, "\u2581\u2583\u2586\u2588"),
        ([1.0, float("nan"), float("inf"), 2.0], 8, "\u2581\u2588"),
    ],
)
def test_sparkline_fits_its_width(values, width, line):
    assert sparkline(values, width) == line


class Terminal(io.StringIO):
    gone = False

    def flush(self):
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")


def test_view_stops_although_the_terminal_is_gone():
    terminal, stdout = Terminal(), sys.stdout
    view = LiveView("ade20k", 10, Console(file=terminal, force_terminal=True))
    view._live.auto_refresh = False
    view.start()
    assert sys.stdout is not stdout
    terminal.gone = True
    view.stop("finished")
    assert sys.stdout is stdout


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux, which provides a terminal, is not installed")
def test_terminal_shows_one_panel_below_the_log(tmp_path):
    stop, refreshes = tmp_path / "stop", tmp_path / "refreshes"
    tmux = ["tmux", "-L", f"m2f-test-{os.getpid()}", "-f", "/dev/null"]
    words = [sys.executable, str(Path(__file__).with_name("live_view_main.py")), str(stop), str(refreshes)]
    command = f"cd {Path.cwd()} && PYTHONPATH=. TERM=xterm-256color {shlex.join(words)}"
    subprocess.run([*tmux, "new-session", "-d", "-x", "90", "-y", "24", command], check=True)

    def screen():
        return subprocess.run([*tmux, "capture-pane", "-p"], check=True, capture_output=True, text=True).stdout

    def wait_for(text):
        wait_until(lambda: text in screen(), what=lambda: f"{text!r} in {screen()}", pause_s=0.1)
        return screen()

    try:
        output = wait_for("30 / 1,000")
        wait_for("skipped: the loss of img_7 is not finite")
        shown = refreshes.stat().st_size
        wait_until(lambda: refreshes.stat().st_size >= shown + 3)  # each must redraw the panel in place
        output = screen()
        assert output.count("in-a-terminal") == output.count("images/s") == 1, output
        assert output.index("img_7") < output.index("in-a-terminal")
        stop.touch()
        output = wait_for("after the panel")
        assert output.count("in-a-terminal") == 1, output
        assert output.index("finished \u00b7 2 workers") < output.index("after the panel")
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
