from contextlib import contextmanager

import pytest
import torch

from m2f.data_pipeline.transforms.collate import Batch
from m2f.trainer.engine.device_copies import DeviceCopies
from tests.trainer.engine_ranks import make_images
from tests.trainer.tiny_job import MODEL


@pytest.fixture
def batches():
    return [make_images(MODEL, [position]) for position in range(3)]


@pytest.fixture
def operations(monkeypatch):
    """Return the list to which a simulated GPU appends its operations in order."""
    operations = []

    class Stream:
        def __init__(self, device=None):
            self.name = "copies" if device is not None else "work"

        def record_event(self):
            operations.append(f"event {len(copied)} on {self.name}")
            return len(copied)

        def wait_event(self, event):
            operations.append(f"{self.name} waits for event {event}")

    copied, streams = [], [Stream()]

    @contextmanager
    def current(stream):
        streams.append(stream)
        yield
        streams.pop()

    def copy(batch, device, non_blocking=False):
        copied.append(batch)
        assert (device, non_blocking) == (torch.device("cuda"), True)
        operations.append(f"copy {len(copied)} on {streams[-1].name}")
        return batch

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(Batch, "to", copy)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: operations.append(f"kept for {stream.name}")
    )
    return operations


def test_micro_batch_is_copied_while_the_previous_one_is_computed(batches, operations):
    arriving = DeviceCopies(torch.device("cuda")).start(batches)
    assert operations == ["copy 1 on copies", "event 1 on copies"]
    kept = ["kept for work"] * 10  # one per tensor of a batch
    for number in (1, 2, 3):
        operations.clear()
        assert next(arriving) is batches[number - 1]
        ahead = [] if number == 3 else [f"copy {number + 1} on copies", f"event {number + 1} on copies"]
        assert operations == [*ahead, f"work waits for event {number}", *kept]
    assert next(arriving, None) is None


def test_on_a_cpu_nothing_is_copied(batches):
    copies = list(DeviceCopies(torch.device("cpu")).start(batches))
    assert [batch.images.data_ptr() for batch in copies] == [batch.images.data_ptr() for batch in batches]
