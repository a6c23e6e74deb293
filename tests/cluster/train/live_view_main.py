"""Shows the live view in a terminal: `live_view_main.py VALUES STOP`; VALUES is JSON, STOP a file that ends it."""

import json
import sys
import time
from pathlib import Path

from m2f.cluster.terminal import say
from m2f.cluster.train.live_view import LiveView

values, stop = json.loads(sys.argv[1]), Path(sys.argv[2])
view = LiveView("in-a-terminal", 1000)
view.start()
view.begin_attempt(2)
for step in range(1, 31):
    view.metrics(step, values | {"loss/total": 60.0 - step})
view.event("skipped", 30, "the loss of img_7 is not finite")
while not stop.exists():
    time.sleep(0.05)
view.stop("finished")
say("after the panel")
time.sleep(600)  # the terminal goes with this process
