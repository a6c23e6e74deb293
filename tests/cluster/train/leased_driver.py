"""Run `m2f train --launcher local` with a lease that expires after 2 s, and with ranks that wait at a gate.

Usage: `leased_driver.py GATE STEP RECIPE [section.key=value ...]`. From STEP on, the ranks wait until the file GATE
exists.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from m2f.cluster.cli import main
from m2f.cluster.train import local
from m2f.cluster.train.local_rank import train_rank
from m2f.trainer.checkpoint import lease
from m2f.trainer.checkpoint.lease import Timing
from tests.cluster.tiny_run import changed_losses

GLOBAL_BATCH = 4


def gated_rank(gate: str, step: int, *arguments: object) -> None:
    """Run `train_rank`, and wait from `step` on until the file `gate` exists."""

    def wait(losses, targets):
        while (targets.position >= GLOBAL_BATCH * (step - 1)).any() and not Path(gate).exists():
            time.sleep(0.05)
        return losses

    with changed_losses(wait):
        train_rank(*arguments)


if __name__ == "__main__":
    lease.Timing = lambda: Timing(renew_s=0.2, poll_s=0.1, unchanged_s=2.0)
    local.train_rank = partial(gated_rank, sys.argv[1], int(sys.argv[2]))
    sys.exit(main(["train", *sys.argv[3:], "--launcher", "local", "--plain"]))
