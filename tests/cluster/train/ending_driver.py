"""A driver that ends as told: `ending_driver.py RUNS END...`; one END a run.

END is an exit status, a negative number for a signal to itself, or `ray` for the way in which Ray ends a driver.

RUNS is a file that grows by one character a run.
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
