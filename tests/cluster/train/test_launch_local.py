from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from m2f.cluster.train.processes import describe_exit

# Targets live in a module of their own, as the spawned workers import them by name.
TARGETS = """
import os, signal, sys, time
from pathlib import Path
from m2f.cluster.launch_local import LaunchError, launch
from m2f.model.errors import ConfigError

def rank():
    return int(os.environ["RANK"])

def write_variables(folder):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "EXTRA")
    Path(folder, f"rank{rank()}").write_text(" ".join(os.environ[n] for n in names))

def fail(how):
    if rank() == 0:
        time.sleep(0.3)
        raise RuntimeError("[gloo] Connection reset by peer")
    if how == "mistake":
        raise ConfigError("training.lr is -1; it must be positive")
    if how == "error":
        raise ZeroDivisionError("division by zero")
    if how == "unpicklable":
        class Local(RuntimeError): pass
        raise Local("only here")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)

def fail_while_the_other_hangs():
    if rank() == 1:
        raise RuntimeError("broken")
    time.sleep(600)

def sum_over_ranks(folder):
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([rank() + 1.0])
    dist.all_reduce(total)
    Path(folder, f"rank{rank()}").write_text(str(total.item()))
    dist.destroy_process_group()

def wait_for_stop(folder):
    from m2f.cluster.train_local import SignalControl
    control = SignalControl()
    Path(folder, f"ready{rank()}").touch()
    while not control.stop_requested():
        time.sleep(0.02)
    Path(folder, f"stopped{rank()}").touch()

if __name__ == "__main__":
    import m2f.cluster.launch_local
    import launch_targets
    m2f.cluster.train.processes.ECHO_S = 0.5
    try:
        launch(getattr(launch_targets, sys.argv[1]), tuple(sys.argv[3:]), int(sys.argv[2]), {"EXTRA": "e"})
    except (ConfigError, LaunchError) as error:
        print(type(error).__name__, error)
        sys.exit(3)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "launch_targets.py").write_text(textwrap.dedent(TARGETS))
    started = []

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "launch_targets.py"), *arguments],
            env=environment,
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
    text, _ = process.communicate(timeout=60)
    assert process.returncode == status, text
    return text


def test_every_rank_has_the_launch_variables(start, tmp_path):
    finish(start("write_variables", "2", str(tmp_path)), 0)
    first, second = ((tmp_path / f"rank{r}").read_text().split() for r in (0, 1))
    assert first[:4] == ["0", "0", "2", "127.0.0.1"]
    assert second[:4] == ["1", "1", "2", "127.0.0.1"]
    assert first[4:] == second[4:]
    assert first[5] == "e"


def test_ranks_meet_over_loopback(start, tmp_path):
    finish(start("sum_over_ranks", "2", str(tmp_path)), 0)
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["3.0", "3.0"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mistake", "ConfigError training.lr is -1"),
        ("error", "LaunchError rank 1: ZeroDivisionError: division by zero\n(exit codes: rank 0: 1, rank 1: 1)\nTrace"),
        ("unpicklable", "LaunchError rank 1: RuntimeError: Local: only here"),
        ("kill", "LaunchError rank 1: RuntimeError: rank 1 was ended by SIGKILL (often the kernel's out-of-memory"),
    ],
)
def test_the_root_cause_is_shown_and_not_its_echo_on_a_lower_rank(start, how, expected):
    assert finish(start("fail", "2", how), 3).startswith(expected)


def test_a_dead_rank_ends_the_others(start):
    process = start("fail_while_the_other_hangs", "2")
    started = time.monotonic()
    assert "rank 1: RuntimeError: broken" in finish(process, 3)
    assert time.monotonic() - started < 30


def test_a_signal_asks_every_rank_to_stop(start, tmp_path):
    process = start("wait_for_stop", "2", str(tmp_path))
    while not all((tmp_path / f"ready{r}").exists() for r in (0, 1)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "stopping after a last checkpoint" in finish(process, 0)
    assert all((tmp_path / f"stopped{r}").exists() for r in (0, 1))


def test_exits_are_described():
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-15) == "was ended by SIGTERM"
