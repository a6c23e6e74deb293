"""How much memory a piece of work adds at its peak."""

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
    """GiB that `run` needs at its peak beyond what is there before it; None where the system cannot tell."""
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
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator holds would hide what comes next
    _RESET.write_text("5")  # the peak starts again from here (proc(5))
    before = _kibibytes("VmRSS")
    run()
    return (_kibibytes("VmHWM") - before) / 2**20


def _kibibytes(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
