"""Copies between host and device that do not make the host wait for previously queued work."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """Asynchronous copy of a tensor to the host. The device continues with work queued after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # in pinned memory
        self._done = None
        if tensor.device.type != "cpu":
            self._done = torch.Event(tensor.device)
            self._done.record()

    def wait(self) -> np.ndarray:
        """Wait until the copy is complete and return its values."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy.numpy()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on `device`, copied through pinned memory unless the device is the CPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
