"""Micro-batches on their way to the device, each copied while the one before it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from m2f.data_pipeline.transforms.collate import Batch


class DeviceCopies:
    """Copies on a stream of their own, so that no copy waits for the work that was queued before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The micro-batches of a step on the device, for work on its current stream.

        The first one's copy begins at once, that of each further one before the one before it is handed out.
        """
        return self._in_turn(batches, self._copy(batches[0]))

    def _in_turn(self, batches: Sequence[Batch], coming: _Copy) -> Iterator[Batch]:
        for following in batches[1:]:
            current, coming = coming, self._copy(following)
            yield current.arrived()
        yield coming.arrived()

    def _copy(self, batch: Batch) -> _Copy:
        if self._stream is None:
            return _Copy(batch.to(self._device), None)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self._device, non_blocking=True)
        return _Copy(copied, self._stream.record_event())


class _Copy:
    """A batch that is whole on the device when its event has come; without an event, now."""

    def __init__(self, batch: Batch, event: Any) -> None:
        self._batch, self._event = batch, event

    def arrived(self) -> Batch:
        """The batch; the device's current stream waits for it, the host does not."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._batch.images.device)
            stream.wait_event(self._event)
            for tensor in _tensors(self._batch):
                tensor.record_stream(stream)  # its memory belongs to the stream of the copies
        return self._batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield batch.images
    yield batch.sizes
    yield from (getattr(batch.targets, field.name) for field in fields(batch.targets))
