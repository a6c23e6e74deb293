"""Format results as a Markdown table and as JSON lines, with a header of machine, software and date."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Self

import torch

from benchmarks.measure import Measurement

_HEAD = "| case | shape | ours ms | peer | peer ms | ratio | ours GB | peer GB | share | floor | waits | rel. error |"
_RULE = "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Date, machine and software of a measurement."""

    day: str
    hardware: str
    threads: int
    load: float
    """Load average over the minute before the call of `now`."""
    torch: str
    commit: str
    """Commit of this repository; ends with + if files differ from it."""
    tf32: bool
    """Whether fp32 matrix products may round to TF32."""
    tf32_convolutions: bool
    """Whether fp32 convolutions may round to TF32. Comparisons of results disable both."""
    ceilings: str
    """Peak rates of the device, as text."""

    @classmethod
    def now(cls, device: torch.device, ceilings: str) -> Self:
        """Return the setting of this machine at this moment."""
        return cls(
            day=date.today().isoformat(),
            hardware=_hardware(device),
            threads=torch.get_num_threads(),
            load=round(os.getloadavg()[0], 1),
            torch=torch.__version__,
            commit=_commit(),
            tf32=torch.backends.cuda.matmul.allow_tf32,
            tf32_convolutions=torch.backends.cudnn.allow_tf32,
            ceilings=ceilings,
        )

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"{self.day}, {self.hardware}, {threads}, load {self.load}, torch {self.torch}, commit {self.commit}, "
            f"TF32 {'on' if self.tf32 else 'off'} ({'on' if self.tf32_convolutions else 'off'} in convolutions)\n"
            f"{self.ceilings}"
        )

    @property
    def file_name(self) -> str:
        """File name without suffix, made of day and hardware."""
        return f"{self.day}_{re.sub('[^a-z0-9]+', '_', self.hardware.lower()).strip('_')}"


def markdown(results: Sequence[Measurement], setting: Setting) -> str:
    """Return the Markdown table, preceded by the setting."""
    return "\n".join([str(setting), "", _HEAD, _RULE, *map(_line, results)])


def json_lines(results: Sequence[Measurement], setting: Setting) -> str:
    """Return JSON lines: the setting, then one object per measurement."""
    found = (asdict(result) | {"ratio": result.ratio, "floor_share": result.floor_share} for result in results)
    plain = ({**result, "ours": result["ours"]._asdict(), "theirs": result["theirs"]._asdict()} for result in found)
    return "\n".join(json.dumps(content) for content in (asdict(setting), *plain))


def save(results: Sequence[Measurement], setting: Setting, folder: Path) -> Path:
    """Write both formats to new files in a folder; return the path of the Markdown table.

    Files are named by `file_name`. If earlier results have this name, a number follows it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{setting.file_name}.md"
    numbers = itertools.count(2)
    while path.exists():
        path = folder / f"{setting.file_name}_{next(numbers)}.md"
    path.write_text(markdown(results, setting) + "\n")
    path.with_suffix(".jsonl").write_text(json_lines(results, setting) + "\n")
    return path


def _line(result: Measurement) -> str:
    memory = ["", "", ""]
    if result.ours_gb is not None and result.peer_gb is not None:
        memory = [f"{result.ours_gb:.2f}", f"{result.peer_gb:.2f}", f"{result.ours_gb / result.peer_gb:.2f}"]
    floor = "" if result.floor_share is None else f"{result.floor_share:.0%}"
    waits = "" if result.ours_waits is None else f"{result.ours_waits} / {result.peer_waits}"
    times = [f"{result.ours.median:.1f}", result.peer, f"{result.theirs.median:.1f}", f"{result.ratio:.2f}"]
    return f"| {' | '.join([result.case, result.shape, *times, *memory, floor, waits, f'{result.error:.0e}'])} |"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
