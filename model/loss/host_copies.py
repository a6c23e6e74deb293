"""Copies between host and device that do not make the host wait for the work queued before them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host; the device goes on with what is queued after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # in pinned memory
        self._done = None
        if tensor.device.type != "cpu":
            self._done = torch.Event(tensor.device)
            self._done.record()

    def wait(self) -> np.ndarray:
        """The values, once the device has got that far."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy.numpy()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor, through pinned memory if the device is not the CPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
