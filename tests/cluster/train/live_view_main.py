"""Show the live view in a terminal until the file STOP exists: `live_view_main.py STOP REFRESHES`.

The panel's automatic refreshes are counted in the file REFRESHES, which gets one byte each.
"""

import sys
import time
from pathlib import Path

from m2f.cluster.terminal import print_out
from m2f.cluster.train.live_view import LiveView
from m2f.trainer.reporting import Notice, StepReport
from tests.trainer.step_metrics import with_loss

stop, refreshes = Path(sys.argv[1]), Path(sys.argv[2])
refreshes.touch()
view = LiveView("in-a-terminal", 1000)
refresh = view._live.refresh


def counted_refresh() -> None:
    refresh()
    with refreshes.open("ab") as file:
        file.write(b".")


view._live.refresh = counted_refresh
view.start()
view.begin_attempt(2)
for step in range(1, 31):
    view.report(StepReport(step, with_loss(60.0 - step)))
view.report(Notice("skipped", 30, "the loss of img_7 is not finite"))
while not stop.exists():
    time.sleep(0.05)
view.stop("finished")
print_out("after the panel")
time.sleep(600)  # the terminal closes when this process ends
