"""Run `m2f train --launcher local` with a lease that expires after EXPIRY seconds, and with ranks that wait at a gate.

Usage: `leased_driver.py START_METHOD EXPIRY GATE STEP RECIPE [section.key=value ...]`. From STEP on, the ranks wait
until the file GATE exists. START_METHOD is `spawn`, as for users, or `fork`, which imports torch and DeepSpeed once for
both ranks. Forked ranks do not notice that the driver was killed.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from m2f.cluster.cli import main
from m2f.cluster.train import local, processes
from m2f.cluster.train.local_rank import train_rank
from m2f.trainer.checkpoint import lease
from m2f.trainer.checkpoint.lease import Timing
from tests.cluster.tiny_run import changed_losses
from tests.forks import FORK_CONTEXT

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
    start_method, expiry_s, gate, step, *words = sys.argv[1:]
    if start_method == "fork":
        processes._SPAWN_CONTEXT = FORK_CONTEXT
    lease.Timing = lambda: Timing(renew_s=0.2, poll_s=0.1, unchanged_s=float(expiry_s))
    local.train_rank = partial(gated_rank, gate, int(step))
    sys.exit(main(["train", *words, "--launcher", "local", "--plain"]))
