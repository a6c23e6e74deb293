"""Copy results to the host while the device computes the next ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class ResultCopy:
    """Copy of a result to pinned host memory, on a CUDA stream of its own.

    The copy starts when the result is complete, and does not wait for work that is queued later. On a CPU nothing is
    copied.
    """

    def __init__(self, result: Tensor) -> None:
        self._copy, self._event = result, None
        if result.device.type == "cuda":
            self._event = self._start(result)

    def _start(self, result: Tensor) -> Any:
        """Queue the copy and return the event after it."""
        stream = _copy_stream(result.device)
        stream.wait_stream(torch.cuda.current_stream(result.device))
        with torch.cuda.stream(stream):
            self._copy = result.to("cpu", non_blocking=True)  # in pinned memory
        result.record_stream(stream)  # its memory must not be reused before the copy ends
        return stream.record_event()

    @property
    def was_needed(self) -> bool:
        """Whether the result was on a device, so that it had to be copied."""
        return self._event is not None

    def wait(self) -> Tensor:
        """Wait until the copy is complete and return it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
