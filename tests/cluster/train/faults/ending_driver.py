"""Fake driver whose n-th run ends in the way that the n-th END states: `ending_driver.py RUNS END...`.

END is an exit status, a negative signal number, or `ray`. With `ray`, the driver exits with status 1 as Ray ends it,
without a notice to its parent. Each run appends one character to the file RUNS.
"""

import os
import pathlib
import sys

runs = pathlib.Path(sys.argv[1])
number = len(runs.read_text()) if runs.exists() else 0
runs.write_text("x" * (number + 1))
end = sys.argv[2 + number]
if end == "ray":
    os._exit(1)
if end.startswith("-"):
    os.kill(os.getpid(), -int(end))
os.write(int(os.environ["M2F_END_PIPE"]), b".")
os._exit(int(end))
