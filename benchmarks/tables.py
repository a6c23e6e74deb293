"""Results as a Markdown table and as JSON lines, under a head that names machine, software and date."""

from __future__ import annotations

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

from benchmarks.measure import Row

_HEAD = "| case | shape | ours ms | peer | peer ms | ratio | ours GB | peer GB | share | floor | waits | rel. error |"
_RULE = "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and with what a measurement was made."""

    day: str
    hardware: str
    threads: int
    load: float
    """Processes that wanted to run, over the last minute before."""
    torch: str
    commit: str
    """Of this repository; with a + where files differ from it."""
    tf32: bool
    """Whether matrix products of fp32 may round to TF32."""
    ceilings: str
    """What the device can do at best."""

    @classmethod
    def now(cls, device: torch.device, ceilings: str) -> Self:
        """On this machine."""
        return cls(
            day=date.today().isoformat(),
            hardware=_hardware(device),
            threads=torch.get_num_threads(),
            load=round(os.getloadavg()[0], 1),
            torch=torch.__version__,
            commit=_commit(),
            tf32=torch.backends.cuda.matmul.allow_tf32,
            ceilings=ceilings,
        )

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"{self.day}, {self.hardware}, {threads}, load {self.load}, torch {self.torch}, commit {self.commit}, "
            f"TF32 {'on' if self.tf32 else 'off'}\n{self.ceilings}"
        )

    @property
    def file_name(self) -> str:
        """Day and hardware, fit for a file."""
        return f"{self.day}_{re.sub('[^a-z0-9]+', '_', self.hardware.lower()).strip('_')}"


def markdown(rows: Sequence[Row], setting: Setting) -> str:
    """The table under its setting."""
    return "\n".join([str(setting), "", _HEAD, _RULE, *map(_line, rows)])


def json_lines(rows: Sequence[Row], setting: Setting) -> str:
    """The setting, then one object per row."""
    found = (asdict(row) | {"ratio": row.ratio, "floor_share": row.floor_share} for row in rows)
    plain = ({**row, "ours": row["ours"]._asdict(), "theirs": row["theirs"]._asdict()} for row in found)
    return "\n".join(json.dumps(content) for content in (asdict(setting), *plain))


def save(rows: Sequence[Row], setting: Setting, folder: Path) -> Path:
    """Write both forms to files that are named after day and hardware; returns the path of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{setting.file_name}.md"
    path.write_text(markdown(rows, setting) + "\n")
    path.with_suffix(".jsonl").write_text(json_lines(rows, setting) + "\n")
    return path


def _line(row: Row) -> str:
    memory = ["", "", ""]
    if row.ours_gb is not None and row.peer_gb is not None:
        memory = [f"{row.ours_gb:.2f}", f"{row.peer_gb:.2f}", f"{row.ours_gb / row.peer_gb:.2f}"]
    floor = "" if row.floor_share is None else f"{row.floor_share:.0%}"
    waits = "" if row.ours_waits is None else f"{row.ours_waits} / {row.peer_waits}"
    times = [f"{row.ours.median:.1f}", row.peer, f"{row.theirs.median:.1f}", f"{row.ratio:.2f}"]
    return f"| {' | '.join([row.case, row.shape, *times, *memory, floor, waits, f'{row.error:.0e}'])} |"


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
