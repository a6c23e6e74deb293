"""Steps of the first minutes on a GPU: all can be imported, and the fast ones run on a CPU."""

import importlib
import inspect
import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import first_gpu_minutes
from benchmarks.first_gpu_minutes import CALLS, STEPS, Call, Step, main, run_call
from benchmarks.gpu.stage import Stage, distance, milliseconds
from tests.waiting import PATIENCE_S

FAST_STEPS = ("determinism", "graphs", "parity", "probe", "sanitizer", "sdpa", "train")


@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.name)
def test_every_step_can_be_imported(step):
    function = getattr(importlib.import_module(f"benchmarks.gpu.{step.module}"), step.name)
    assert list(inspect.signature(function).parameters) == ["stage"]


def test_calls_are_shorter_than_ten_minutes():
    assert sum(len(call.steps) for call in CALLS.values()) == len(STEPS)
    assert all(call.seconds < 600 for call in CALLS.values())
    assert all(step.seconds <= call.seconds for call in CALLS.values() for step in call.steps)


@pytest.fixture(autouse=True)
def restore_environment(monkeypatch, tmp_path):
    """Restore what the steps set, because they are written for separate processes."""
    for name in ("TRITON_INTERPRET", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)


@pytest.mark.parametrize("name", FAST_STEPS)
def test_cheap_steps_work_in_a_dry_run(name, tmp_path):
    assert main(["step", name, "--dry-run", "--out", str(tmp_path)]) == 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == name
    assert json.loads(line)["state"] in ("ok", "skipped")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of inputs of a compiled region
@pytest.mark.parametrize(
    ("name", "measured"),
    [("first_step", ["cold s", "warm s"]), ("step_b2", ["2 images", "2 images, compiled"])],
)
def test_steps_measure_the_compiled_model(name, measured, tmp_path):
    assert main(["step", name, "--dry-run", "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "results.jsonl").read_text())["found"]) == measured


@pytest.mark.slow
def test_call_runs_steps_as_processes_and_ends_with_a_table(tmp_path, monkeypatch, capsys):
    # The time limits are for a GPU. On a busy CPU, the start of a process alone may take minutes.
    steps = tuple(replace(STEPS[name], seconds=PATIENCE_S) for name in ("sdpa", "graphs"))
    monkeypatch.setitem(CALLS, "1", Call(PATIENCE_S, steps))
    assert main(["call", "1", "--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line] == 2 * [["sdpa", "skipped"], ["graphs", "skipped"]]
    assert "==== graphs" in (tmp_path / "log_1.txt").read_text()


def test_step_that_hangs_or_dies_does_not_stop_the_call(tmp_path, monkeypatch, capsys):
    """The steps are replaced by a program that sleeps and one that exits without a result."""
    for name, text in (("hangs", "import time; time.sleep(600)"), ("dies", "raise SystemExit(7)")):
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(CALLS, "1", Call(300, (Step("hangs", "none", 0.5), Step("dies", "none", 100))))
    monkeypatch.setattr(first_gpu_minutes, "step_command", lambda step, _: [sys.executable, str(tmp_path / step.name)])
    hung, died = run_call("1", [], tmp_path)
    assert (hung.state, died.state) == ("timeout", "failed")
    assert "exit status 7" in str(died.found)
    assert [json.loads(line)["step"] for line in (tmp_path / "results.jsonl").open()] == ["hangs", "dies"]


def test_a_step_does_not_start_without_time_left(tmp_path, monkeypatch):
    monkeypatch.setitem(CALLS, "1", Call(1, (STEPS["msda"],)))
    assert [result.state for result in run_call("1", [], tmp_path)] == ["no time"]


def test_failed_step_is_recorded_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setitem(STEPS, "probe", Step("probe", "no_such_module", 1))
    assert main(["step", "probe", "--dry-run", "--out", str(tmp_path)]) == 1
    assert "no_such_module" in json.loads((tmp_path / "results.jsonl").read_text())["found"]


@pytest.mark.parametrize("words", [("call", "msda"), ("step", "1")])
def test_step_and_call_names_are_not_interchangeable(words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--dry-run"])
    assert " is not a " in capsys.readouterr().err


def test_milliseconds_warms_up_and_distance_is_relative(tmp_path):
    calls = []
    assert milliseconds(lambda: calls.append(0), Stage(torch.device("cpu"), tmp_path).device) < 100
    assert len(calls) == 4
    assert distance(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)
