"""Fixtures that start the ranks of a test as processes."""

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from tests.forks import FORK_CONTEXT
from tests.trainer.rank_process import run_rank
from tests.waiting import PATIENCE_S


@dataclass(frozen=True)
class Launcher:
    """Runs scenarios of `rank_main.py` on a number of ranks and reads their results."""

    folder: Path

    def run(self, scenarios, ranks=2, timeout_s=PATIENCE_S):
        """Return exit codes and outputs of the ranks. A rank that exceeds `timeout_s` is killed: its code is -9."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
        }
        logs = [self.folder / f"rank_{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(FORK_CONTEXT.Process(run_rank, (variables, scenarios, self.folder, log)))
            processes[-1].start()
        deadline = time.monotonic() + timeout_s
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [process.exitcode for process in processes], [log.read_text() for log in logs]

    def run_successfully(self, scenarios, ranks=2, timeout_s=PATIENCE_S):
        """Run the scenarios and assert that no rank fails."""
        codes, outputs = self.run(scenarios, ranks, timeout_s)
        assert not any(codes), "\n".join(outputs)

    def run_each(self, scenarios, ranks=2):
        """Run the scenarios in one process group, which imports once; after a failure, run the rest in a new group.

        `result` of a failed scenario raises AssertionError with the output of its ranks.
        """
        remaining = list(scenarios)
        while remaining:
            codes, outputs = self.run(",".join(remaining), ranks, timeout_s=4 * PATIENCE_S)
            if not any(codes):
                return
            done = [all(self._record(name, rank).exists() for rank in range(ranks)) for name in remaining]
            failed = done.index(False) if False in done else len(remaining) - 1
            self._failure(remaining[failed]).write_text(f"exit codes {codes}\n" + "\n".join(outputs))
            remaining = remaining[failed + 1 :]

    def result(self, scenario, rank=0):
        failure = self._failure(scenario)
        assert not failure.exists(), f"{scenario} failed: {failure.read_text()}"
        return json.loads(self._record(scenario, rank).read_text())

    def _record(self, scenario, rank):
        return self.folder / f"{scenario}.rank_{rank}.json"

    def _failure(self, scenario):
        return self.folder / f"{scenario}.failed"


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def training_shards(launcher):
    """Write twelve images to `shards` in the launcher's folder and return its path."""
    url = str(launcher.folder / "shards")
    source = SyntheticSource(num_images=12, seed=1)
    write_dataset(open_reader(source), DatasetConfig(shards=url, source=source), Storage())
    return launcher.folder / "shards"
