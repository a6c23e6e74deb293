"""Copies of results to the host, with a simulated GPU that notes its operations in order."""

from contextlib import contextmanager

import pytest
import torch

from m2f.model.inference import result_copies
from m2f.model.inference.result_copies import ResultCopy


class Result:
    """Fake of a tensor on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, operations):
        self.operations = operations

    def to(self, device, non_blocking):
        assert (device, non_blocking) == ("cpu", True)
        self.operations.append("copy on " + self.operations.streams[-1])
        return torch.ones(2)

    def record_stream(self, stream):
        self.operations.append(f"kept for {stream.name}")


class Operations(list):
    """Operations in order, and the names of the current streams, innermost last."""

    def __init__(self):
        super().__init__()
        self.streams = ["work"]


class Stream:
    def __init__(self, operations, name):
        self.operations, self.name = operations, name

    def wait_stream(self, other):
        self.operations.append(f"{self.name} waits for {other}")

    def record_event(self):
        self.operations.append(f"event on {self.name}")
        return self

    def synchronize(self):
        self.operations.append("host waits")


@pytest.fixture
def operations(monkeypatch):
    operations = Operations()

    @contextmanager
    def current(stream):
        operations.streams.append(stream.name)
        yield
        operations.streams.pop()

    result_copies._copy_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(operations, "copies"))
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: operations.streams[-1])
    yield operations
    result_copies._copy_stream.cache_clear()


def test_result_is_copied_on_a_stream_of_its_own_and_the_host_waits_only_when_it_needs_it(operations):
    copy = ResultCopy(Result(operations))
    started = ["copies waits for work", "copy on copies", "kept for copies", "event on copies"]
    assert operations == started
    assert copy.was_needed
    assert copy.wait().tolist() == [1, 1]
    assert operations == [*started, "host waits"]


def test_result_on_a_cpu_is_not_copied():
    result = torch.zeros(2)
    copy = ResultCopy(result)
    assert copy.wait() is result
    assert not copy.was_needed
