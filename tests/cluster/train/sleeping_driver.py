"""A driver that works on until it is told to stop: `sleeping_driver.py RUNS handles|ignores`.

With `ignores` it has no handler of its own for SIGTERM. RUNS is a file that grows by one character a run.
"""

import pathlib
import signal
import sys
import time

runs, signal_handling = sys.argv[1:]
if signal_handling == "handles":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with pathlib.Path(runs).open("a") as file:
    file.write("x")
time.sleep(600)
