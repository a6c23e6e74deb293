"""Log points to an MLflow run, then kill this process: `killed_writer.py URI RUN_ID SPOOL STEPS`."""

import os
import signal
import sys

from m2f.cluster.tracking.tracking import TrackedRun, Tracking

uri, run_id, spool, steps = sys.argv[1:]
tracking = Tracking(TrackedRun(uri=uri, run_id=run_id, spool=spool), "rank0", interval_s=0.05)
for step in range(int(steps)):
    tracking.log_metrics(step, {"loss": step})
os.kill(os.getpid(), signal.SIGKILL)
