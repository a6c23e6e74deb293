"""Starts the ranks of a test as processes."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import m2f
from m2f.data_pipeline.config import DatasetConfig, SyntheticSource
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage

REPOSITORY = Path(m2f.__file__).parents[1]


@dataclass(frozen=True)
class Launcher:
    """Runs scenarios of `rank_main.py` with some ranks and reads what they saw."""

    folder: Path

    def run(self, scenarios, ranks=2, timeout_s=280):
        """Exit codes and outputs of the ranks."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(Path(__file__).with_name("rank_main.py")), scenarios, str(self.folder)]
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
        }
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in map(str, range(ranks))
        ]
        try:
            outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [process.returncode for process in processes], outputs

    def run_well(self, scenarios, ranks=2, timeout_s=280):
        """No rank may end with an error."""
        codes, outputs = self.run(scenarios, ranks, timeout_s)
        assert not any(codes), "\n".join(outputs)

    def seen(self, scenario, rank=0):
        return json.loads((self.folder / f"{scenario}.rank_{rank}.json").read_text())


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def training_shards(launcher):
    """Twelve images in `shards` of the launcher's folder."""
    url = str(launcher.folder / "shards")
    source = SyntheticSource(num_images=12, seed=1)
    write_dataset(open_reader(source), DatasetConfig(shards=url, source=source), Storage())
    return launcher.folder / "shards"
