"""Start method for the ranks of tests: forks of a server that has already imported torch, DeepSpeed and m2f.

These imports take each spawned rank about ten seconds of CPU time. Users' ranks are spawned. Most tests with a driver
in a separate process, and tests on Ray, cover that.
"""

import multiprocessing
import os
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path

from m2f.cluster.train import processes

REPOSITORY = Path(__file__).resolve().parents[1]
PRELOADED_MODULES = [
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports Inductor; DeepSpeed imports it if ZeRO is on
    "m2f.cluster.train.local_rank",
    "tests.trainer.rank_main",
]


class ForkContext:
    """The part of a `multiprocessing` context that starts ranks: `Pipe` and `Process`."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED_MODULES)
        self.Pipe = self._context.Pipe

    def Process(self, target, args, name=None):
        with chdir(REPOSITORY):  # the server finds `tests` in its working directory
            forkserver.ensure_running()
        return self._context.Process(target=_in_environment, args=(dict(os.environ), target, args), name=name)


def _in_environment(environment, target, arguments):
    """Run the target in the environment of the caller, because the server has that of the first test."""
    os.environ.clear()
    os.environ.update(environment)
    if target is processes._worker:  # its last argument is the process id of its parent, which is the server here
        arguments = (*arguments[:-1], os.getppid())
    target(*arguments)


FORK_CONTEXT = ForkContext()
