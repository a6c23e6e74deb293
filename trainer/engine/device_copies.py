"""Copy micro-batches to the device, each during the computation of the previous one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from m2f.data_pipeline.transforms.collate import Batch


class DeviceCopies:
    """Copies on a separate CUDA stream, so that a copy does not wait for work that is already queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Return the micro-batches of a step on the device, ready for work on its current stream.

        The copy of the first one starts immediately. The copy of each further one starts before the previous one is
        yielded.
        """
        return self._copy_in_turn(batches, self._copy(batches[0]))

    def _copy_in_turn(self, batches: Sequence[Batch], pending: _Copy) -> Iterator[Batch]:
        for following in batches[1:]:
            current, pending = pending, self._copy(following)
            yield current.wait()
        yield pending.wait()

    def _copy(self, batch: Batch) -> _Copy:
        if self._stream is None:
            return _Copy(batch.to(self._device), None)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self._device, non_blocking=True)
        return _Copy(copied, self._stream.record_event())


class _Copy:
    """A batch that is complete on the device once `event` has occurred, or already if there is no event."""

    def __init__(self, batch: Batch, event: Any) -> None:
        self._batch, self._event = batch, event

    def wait(self) -> Batch:
        """Return the batch. The device's current stream waits for the copy; the host does not."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._batch.images.device)
            stream.wait_event(self._event)
            for tensor in _tensors(self._batch):
                tensor.record_stream(stream)  # the memory was allocated on the copy stream
        return self._batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield batch.images
    yield batch.sizes
    yield from (getattr(batch.targets, field.name) for field in fields(batch.targets))
