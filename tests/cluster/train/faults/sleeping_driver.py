"""Fake driver that sleeps until a signal ends it: `sleeping_driver.py RUNS handles|ignores`.

With `handles`, SIGTERM makes it exit with status 0; with `ignores`, it has no handler. Each run appends one character
to the file RUNS.
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
