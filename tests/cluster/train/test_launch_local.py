from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

from m2f.cluster.train.processes import _SPAWN_CONTEXT, RankProcesses, describe_exit
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture
def start():
    started = []

    def run(*arguments):
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("launch_targets.py"), *arguments],
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(process, status):
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, text
    return text


def test_every_rank_gets_launch_variables(start, tmp_path):
    finish(start("write_variables", "2", str(tmp_path)), 0)
    first, second = ((tmp_path / f"rank{r}").read_text().split() for r in (0, 1))
    assert first[:4] == ["0", "0", "2", "127.0.0.1"]
    assert second[:4] == ["1", "1", "2", "127.0.0.1"]
    assert first[4:] == second[4:]
    assert first[5] == "e"


def test_ranks_communicate_over_loopback(start, tmp_path):
    finish(start("sum_over_ranks", "2", str(tmp_path)), 0)
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["3.0", "3.0"]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("mistake", "ConfigError training.lr is -1"),
        ("error", "LaunchError rank 1: ZeroDivisionError: division by zero\n(exit codes: rank 0: 1, rank 1: 1)\nTrace"),
        ("unpicklable", "LaunchError rank 1: RuntimeError: Local: only here"),
        ("kill", "LaunchError rank 1: RankDiedError: rank 1 was killed by SIGKILL (often the kernel's out-of-memory"),
    ],
)
def test_root_cause_is_reported_instead_of_its_consequence_on_a_lower_rank(start, failure, expected):
    assert finish(start("fail", "2", failure), 3).startswith(expected)


def test_failed_rank_ends_the_other_ranks(start):
    process = start("fail_while_the_other_hangs", "2")
    assert "rank 1: RuntimeError: broken" in finish(process, 3)  # the other rank sleeps for 600 s


def test_signal_stops_every_rank(start, tmp_path):
    process = start("wait_for_stop", "2", str(tmp_path))
    wait_until(lambda: process.poll() is not None or all((tmp_path / f"ready{r}").exists() for r in (0, 1)))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "stopping after a final checkpoint" in finish(process, 0)
    assert all((tmp_path / f"stopped{r}").exists() for r in (0, 1))


def test_started_ranks_are_killed_if_a_later_one_cannot_start(monkeypatch):
    started = []

    def start(**options):
        if started:
            raise OSError("no more processes")
        started.append(_SPAWN_CONTEXT.Process(target=time.sleep, args=(600,)))
        return started[0]

    monkeypatch.setattr("m2f.cluster.train.processes._SPAWN_CONTEXT", SimpleNamespace(Process=start, Pipe=Pipe))
    with pytest.raises(OSError, match="no more processes"):
        RankProcesses(time.sleep, (600,), 2).__enter__()
    assert started[0].exitcode == -signal.SIGKILL


def test_describe_exit_names_statuses_and_signals():
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-15) == "was killed by SIGTERM"
    assert describe_exit(-40) == "was killed by signal 40"  # a real-time signal without a name
