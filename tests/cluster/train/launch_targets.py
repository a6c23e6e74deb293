"""Launch ranks that run a function of this module: `launch_targets.py TARGET RANKS ARGUMENT...`.

The main process imports this module under its own name, too, so that spawned ranks can unpickle the function.
"""

import os
import signal
import sys
import time
from pathlib import Path

import m2f.cluster.train.processes
from m2f.cluster.train.launch import LaunchError, launch
from m2f.cluster.train.local_rank import stopped_by_signals
from m2f.model.errors import ConfigError
from tests.waiting import PATIENCE_S


def rank():
    return int(os.environ["RANK"])


def write_variables(folder):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "EXTRA")
    Path(folder, f"rank{rank()}").write_text(" ".join(os.environ[n] for n in names))


def fail(failure):
    if rank() == 0:
        raise RuntimeError("[gloo] Connection reset by peer")
    if failure == "mistake":
        raise ConfigError("training.lr is -1; it must be positive")
    if failure == "error":
        raise ZeroDivisionError("division by zero")
    if failure == "unpicklable":

        class Local(RuntimeError):
            pass

        raise Local("only here")
    if failure == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def fail_while_the_other_hangs():
    if rank() == 1:
        raise RuntimeError("broken")
    time.sleep(600)


def sum_over_ranks(folder):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([rank() + 1.0])
    dist.all_reduce(total)
    Path(folder, f"rank{rank()}").write_text(str(total.item()))
    dist.destroy_process_group()


def wait_for_stop(folder):
    with stopped_by_signals() as control:
        Path(folder, f"ready{rank()}").touch()
        while not control.stop_requested():
            time.sleep(0.02)
        Path(folder, f"stopped{rank()}").touch()


if __name__ == "__main__":
    import launch_targets

    target, ranks, *arguments = sys.argv[1:]
    m2f.cluster.train.processes.GRACE_S = 0.5 if target == "fail_while_the_other_hangs" else PATIENCE_S
    try:
        launch(getattr(launch_targets, target), tuple(arguments), int(ranks), {"EXTRA": "e"})
    except (ConfigError, LaunchError) as error:
        sys.stdout.write(f"{type(error).__name__} {error}\n")
        sys.exit(3)
