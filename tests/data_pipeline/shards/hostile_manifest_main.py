"""Runs `m2f verify FOLDER`. Prints its exit status, its output and the growth of peak memory in MB, as JSON."""

import contextlib
import io
import json
import sys
from pathlib import Path

from m2f.cluster.cli import main
from m2f.data_pipeline.shards import verify


def peak_mb() -> float:
    """Return the peak resident memory of this process in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


if __name__ == "__main__":
    assert verify  # imported early, so that the import is not measured
    before, output = peak_mb(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(["verify", sys.argv[1]])
    sys.stdout.write(json.dumps({"status": status, "output": output.getvalue(), "mb": peak_mb() - before}))
