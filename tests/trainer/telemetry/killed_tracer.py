"""Writes a trace, then kills itself with SIGKILL: `killed_tracer.py RUN_FOLDER LINES`."""

import os
import signal
import sys

from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.telemetry.trace import Trace

trace = Trace(Storage(), sys.argv[1], "now", 3)
for step in range(int(sys.argv[2])):
    trace.write({"step": step})
os.kill(os.getpid(), signal.SIGKILL)
