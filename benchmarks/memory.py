"""Peak memory of a function call."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_growth(run: Callable[[], object], device: torch.device) -> float | None:
    """Return the GiB that `run` adds at its peak to the memory in use; None if the system does not report it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    if not _RESET.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory that the allocator still holds would hide new allocations
    _RESET.write_text("5")  # resets the peak, see proc(5)
    before = _kibibytes("VmRSS")
    run()
    return (_kibibytes("VmHWM") - before) / 2**20


def _kibibytes(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])
