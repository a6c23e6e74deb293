"""Runs `m2f verify FOLDER` and prints its status and output, and the megabytes that it took, as JSON."""

import contextlib
import io
import json
import sys
from pathlib import Path

from m2f.cluster.cli import main
from m2f.data_pipeline.shards import verify


def peak_mb() -> float:
    """The most memory that this process has had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


if __name__ == "__main__":
    assert verify  # imported before the measurement
    before, output = peak_mb(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(["verify", sys.argv[1]])
    sys.stdout.write(json.dumps({"status": status, "output": output.getvalue(), "mb": peak_mb() - before}))
