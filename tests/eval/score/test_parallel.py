"""Scoring in several processes."""

import os

import pytest

from m2f.eval.errors import EvaluationError
from m2f.eval.score import parallel
from m2f.eval.score.parallel import map_tasks


def squares_or_fail(jobs):
    return [square_or_fail(job) for job in jobs]


def square_or_fail(job):
    if job == 23:  # the first 16 jobs run in the main process
        raise EvaluationError("image 23 is damaged")
    return job * job


def test_worker_errors_propagate_and_results_keep_their_order(monkeypatch):
    monkeypatch.setattr(parallel, "START_SECONDS", 0.0)
    assert list(map_tasks(squares_or_fail, range(30, 90), workers=2)) == [n * n for n in range(30, 90)]
    with pytest.raises(EvaluationError, match="image 23 is damaged"):
        list(map_tasks(squares_or_fail, range(60), workers=2))


def process_ids(jobs):
    return [os.getpid()] * len(jobs)


def test_processes_start_only_if_they_save_time(monkeypatch):
    """300 fast images take less time than starting two processes."""
    assert set(map_tasks(process_ids, range(300), workers=2)) == {os.getpid()}
    monkeypatch.setattr(parallel, "START_SECONDS", 0.0)
    processes = list(map_tasks(process_ids, range(60), workers=2))
    assert set(processes[:16]) == {os.getpid()}
    assert os.getpid() not in processes[16:]
