"""Starts ranks as forks of a process that has imported what they need, which takes each of them ten seconds of a core.

Ranks of users are spawned; tests whose driver is a process of its own, and those of Ray, see that.
"""

import multiprocessing
import os
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORTED = [
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports Inductor; DeepSpeed asks for it wherever ZeRO is on
    "m2f.cluster.train.local_rank",
    "tests.trainer.rank_main",
]


class Forks:
    """As much of a context of `multiprocessing` as those who start ranks use."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)
        self.Pipe = self._context.Pipe

    def Process(self, target, args, name=None):
        with chdir(REPOSITORY):  # what is imported is looked for from here
            forkserver.ensure_running()
        return self._context.Process(target=_in_environment, args=(dict(os.environ), target, args), name=name)


def _in_environment(environment, target, arguments):
    """The server's environment is that of the first test."""
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


FORKS = Forks()
